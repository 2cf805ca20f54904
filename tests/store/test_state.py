"""State at a moment, and history played back on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sectool.errors import UsageError
from sectool.filters import parse_text
from store import replay as replaying
from store.reader import Reader, open_reader
from store.replay import LONGEST_WAIT, replay
from tests.store.shop import HOUR, fill, settle


@pytest.fixture(scope="module")
def past(
    make_lab: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Reader]]:
    lab = make_lab(tmp_path_factory.mktemp("state"))
    fill(lab)
    settle(lab)
    reader = open_reader(lab.state, lab.run)
    yield lab, reader
    reader.close()


class FakeClock:
    """Moves only when waited for."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.waited: list[float] = []

    def now(self) -> float:
        return self.time

    def wait(self, seconds: float) -> None:
        self.waited.append(seconds)
        self.time += seconds


def test_what_was_so(past: tuple[Any, Reader]) -> None:
    lab, reader = past
    then = reader.ask("state", at=lab.T0 + 3 * HOUR + 500_000)
    assert [r["revision"] for r in then["activation"]] == [1]
    assert [r["author"] for r in then["policy"]] == ["alice"]
    assert "text" not in then["policy"][0]
    assert {r["spiffe_id"] for r in then["identity"]} == {"spiffe://lab/web", "spiffe://lab/db"}
    assert [r["name"] for r in then["workload"]] == ["web"]
    assert (then["flows_open"], then["enforcer"]["state"]) == (1, "enforcing")
    later = reader.ask("state", at=lab.T0 + 31 * HOUR)
    assert [r["revision"] for r in later["activation"]] == [2]
    assert later["workload"] == []
    before = reader.ask("state", at=lab.T0 - HOUR)
    assert (before["activation"], before["enforcer"]["state"]) == ([], "unknown")


def test_played_back_in_order_and_in_time(past: tuple[Any, Reader]) -> None:
    lab, reader = past
    clock = FakeClock()
    flood = lab.T0 + 25 * HOUR
    steps = list(replay(reader, since=flood, until=flood + HOUR + 1, speed=10, clock=clock))
    assert [s.ts for s in steps] == sorted(s.ts for s in steps)
    assert sum(s.flow is not None for s in steps) == 301
    assert [s.event["type"] for s in steps if s.event] == ["events.lost"]
    assert sum(s.skipped > 0 for s in steps) == 1  # the quiet hour
    shown = clock.time - 1000
    assert shown == pytest.approx(29.9 / 10 + LONGEST_WAIT)


def test_pages_lose_and_double_nothing(past: tuple[Any, Reader], monkeypatch: pytest.MonkeyPatch) -> None:
    lab, reader = past
    monkeypatch.setattr(replaying, "PAGE", 7)
    window = {"since": lab.T0, "until": lab.T0 + 48 * HOUR, "speed": 0.0, "clock": FakeClock()}
    steps = list(replay(reader, parse_text("verdict=deny"), **window))
    ids = [s.flow["event_id"] for s in steps if s.flow]
    assert len(ids) == len(set(ids)) == 301
    assert sum(s.event is not None for s in steps) == 7
    with pytest.raises(UsageError):
        next(replay(reader, since=5, until=5))
