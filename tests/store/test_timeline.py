"""Timelines of a small history: merged in order, floods on one line, changes of policy in words."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sectool.errors import UsageError
from store.reader import Reader, open_reader
from tests.store.shop import HOUR, fill, settle


@pytest.fixture(scope="module")
def told(
    make_lab: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Reader]]:
    lab = make_lab(tmp_path_factory.mktemp("timeline"))
    fill(lab)
    settle(lab)
    reader = open_reader(lab.state, lab.run)
    yield lab, reader
    reader.close()


def _ask(told: tuple[Any, Reader], **fields: Any) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = told[1].ask("timeline", **fields)["entries"]
    return entries


def test_a_moment_shows_what_changed_just_before(told: tuple[Any, Reader]) -> None:
    lab = told[0]
    entries = _ask(told, at=lab.T0 + 25 * HOUR, around=90 * 60_000_000)
    assert [e["kind"] for e in entries] == ["policy", "policy", "flow", "flow", "loss"]
    assert [e["ts"] for e in entries] == sorted(e["ts"] for e in entries)
    applied, active, flood, reached, lost = entries
    assert applied["text"].startswith("alice applied policy revision 2: reason 2 (")
    assert "  - allow app=web to call app=db on tcp/5432" in applied["more"]
    assert "  + allow app=web to call app=cache on tcp/6379" in applied["more"]
    assert active["text"] == "policy revision 2 is in force; 1 live connections were cut"
    assert flood["count"] == 300
    assert flood["until"] - flood["ts"] == 299 * 100_000
    assert flood["text"] == "app=web was denied app=db tcp/5432: default_deny"
    assert reached["text"] == "app=web reached app=cache tcp/6379"
    assert lost["severity"] == "bad"


def test_hours_apart_are_no_flood(told: tuple[Any, Reader]) -> None:
    lab = told[0]
    entries = _ask(told, since=lab.T0, until=lab.T0 + 10 * HOUR, kinds=["flow"])
    assert [e["count"] for e in entries] == [1] * 10
    assert all("allow app=web to call app=db" in e["text"] for e in entries)


@pytest.mark.parametrize(
    ("about", "flows"),
    [
        ("app=cache", {"app=web reached app=cache tcp/6379"}),
        ("203.0.113.9", {"203.0.113.9 was denied 10.0.0.2 tcp/443: no_identity"}),
        ("203.0.113.0/24", {"203.0.113.9 was denied 10.0.0.2 tcp/443: no_identity"}),
        ("spiffe://lab/cache", {"app=web reached app=cache tcp/6379"}),
        ("policy:shop", None),
        ("workload:web", None),
    ],
)
def test_about_one_thing(told: tuple[Any, Reader], about: str, flows: set[str] | None) -> None:
    lab = told[0]
    entries = _ask(told, since=lab.T0, until=lab.T0 + 48 * HOUR, about=about)
    texts = {e["text"] for e in entries if e["kind"] == "flow"}
    assert texts == flows if flows else texts
    if about == "policy:shop":
        assert all(e["data"]["policy"] == "shop" for e in entries if e["kind"] == "flow")
    identities = [e for e in entries if e["kind"] == "identity"]
    assert bool(identities) == (about in ("app=cache", "workload:web"))  # web called cache


def test_one_flow_has_its_whole_life(told: tuple[Any, Reader]) -> None:
    reader = told[1]
    row = reader.flows(first=1).table.to_pylist()[0]
    entries = [e for e in _ask(told, about=row["event_id"]) if e["kind"] == "flow"]
    assert [e["type"] for e in entries][:2] == ["flow.allow", "flow.end"]
    assert entries[1]["text"] == "app=web -> app=db tcp/5432 ended, 100 bytes"


def test_few_lines_keep_what_is_rare(told: tuple[Any, Reader]) -> None:
    lab, reader = told
    document = reader.ask("timeline", since=lab.T0, until=lab.T0 + 48 * HOUR, limit=8)
    assert document["truncated"]
    assert len(document["entries"]) == 8
    assert {"policy", "loss"} <= {e["kind"] for e in document["entries"]}


@pytest.mark.parametrize(
    "fields",
    [
        {"kinds": ["nonsense"]},
        {"about": "no such thing"},
        {"about": "01900000-0000-7000-8000-000000000000"},
        {"about": "spiffe://"[:9] + '"'},
        {"about": "x" * 5000},
        {"at": 5, "since": 1},
        {"since": 10, "until": 5},
        {"since": -1},
        {"kinds": "flow"},
    ],
)
def test_what_cannot_be_answered_is_told(told: tuple[Any, Reader], fields: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        _ask(told, **fields)


def test_the_store_process_answers_alike(lab: Any) -> None:
    fill(lab)
    lab.start()
    lab.stored(322, 8)
    fields = {"since": lab.T0, "until": lab.T0 + 48 * HOUR}
    live = lab.live().ask("timeline", **fields)
    with pytest.raises(UsageError):
        lab.live().ask("nothing")
    lab.stop()
    assert lab.reader().ask("timeline", **fields) == live
