"""What changed between two moments of a small history, and that the answers of SQL are those of plain counting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sectool.errors import UsageError
from sectool.filters import parse_text
from store.reader import Reader, open_reader
from tests.store.shop import HOUR, fill, settle


@pytest.fixture(scope="module")
def past(
    make_lab: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, Reader]]:
    lab = make_lab(tmp_path_factory.mktemp("changes"))
    fill(lab)
    settle(lab)
    reader = open_reader(lab.state, lab.run)
    yield lab, reader
    reader.close()


def test_two_days(past: tuple[Any, Reader]) -> None:
    lab, reader = past
    document = reader.ask("changes", before=lab.T0 + 24 * HOUR, after=lab.T0 + 48 * HOUR)
    policy = document["policy"]
    assert (policy["from"], policy["to"]) == (1, 2)  # its activation came 1 ms after the moment
    assert "  + allow app=cache to call app=db on tcp/5432" in policy["changes"]
    assert [row["reason"] for row in policy["applied"]] == []  # applied at the very moment, not after it
    assert document["identity"] == {"new": [], "gone": [], "changed": []}
    assert [row["name"] for row in document["workload"]["gone"]] == ["web"]
    traffic = document["traffic"]
    assert traffic["before"] == {"pairs": 1, "allowed": 10, "denied": 0, "bytes": 1000}
    assert traffic["after"] == {"pairs": 3, "allowed": 1, "denied": 301, "bytes": 0}
    assert {(r["source"], r["destination"], r["service"]) for r in traffic["new"]["pairs"]} == {
        ("app=web", "app=cache", "tcp/6379"),
        ("203.0.113.9", "10.0.0.2", "tcp/443"),
    }
    assert traffic["vanished"] == {"count": 0, "pairs": []}
    (changed,) = traffic["changed"]["pairs"]
    assert (changed["allowed_before"], changed["denied_before"], changed["denied_after"]) == (10, 0, 300)


def test_backwards_in_traffic_and_forward_in_identity(past: tuple[Any, Reader]) -> None:
    lab, reader = past
    document = reader.ask("changes", before=lab.T0 + 10 * HOUR, after=lab.T0 + 22 * HOUR, window=10 * HOUR)
    assert [row["name"] for row in document["identity"]["new"]] == ["spiffe://lab/cache"]
    assert document["policy"]["from"] == document["policy"]["to"] == 1
    assert document["traffic"]["vanished"]["count"] == 1


def test_only_some_traffic(past: tuple[Any, Reader]) -> None:
    lab, reader = past
    chosen = parse_text("to-label=app=cache").to_json()
    document = reader.ask("changes", before=lab.T0 + 24 * HOUR, after=lab.T0 + 48 * HOUR, filter=chosen)
    assert document["traffic"]["after"]["pairs"] == document["traffic"]["new"]["count"] == 1


@pytest.mark.parametrize(
    "fields", [{"before": 9, "after": 9}, {"before": 10**9, "after": 10**10, "window": 5}]
)
def test_impossible_moments(past: tuple[Any, Reader], fields: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        past[1].ask("changes", **fields)


def test_the_map_counts_what_the_flows_say(past: tuple[Any, Reader]) -> None:
    lab, reader = past
    document = reader.ask("connectivity", since=lab.T0, until=lab.T0 + 48 * HOUR)
    edges = {(e["source"], e["destination"]): e for e in document["edges"]}
    assert edges["app=web", "app=db"]["allowed"] == 10
    assert edges["app=web", "app=db"]["denied"] == 300
    assert edges["app=web", "app=db"]["bytes"] == 1000
    assert {n["name"] for n in document["nodes"] if not n["identified"]} == {"203.0.113.9", "10.0.0.2"}
    then = reader.ask("connectivity", at=lab.T0 + 3 * HOUR + 500_000)
    assert [(e["source"], e["destination"], e["allowed"]) for e in then["edges"]] == [
        ("app=web", "app=db", 1)
    ]
    nothing = reader.ask("connectivity", at=lab.T0 + 3 * HOUR + 2_000_000)
    assert nothing["edges"] == []
    other = reader.ask("connectivity", since=lab.T0, until=lab.T0 + 48 * HOUR, by=["zone"])
    assert "no such label" in {n["name"] for n in other["nodes"]}
    with pytest.raises(UsageError):
        reader.ask("connectivity", by=["\x1b"])
