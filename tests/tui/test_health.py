"""Health in lines: what is bad has a sign and stands out, whatever else is shown."""

from __future__ import annotations

from typing import Any

from tui import health

NOW = 1_000_000_000_000_000
HOUR = 3_600_000_000
WORKER: dict[str, Any] = {
    "number": 0,
    "pid": 7,
    "restarts": 1,
    "enforcing": True,
    "revision": 3,
    "stats": {"packets": 12, "live": 1, "encrypted": 0, "held": 0, "queue": {"waiting": 0, "dropped": 0}},
}
STATUS: dict[str, Any] = {
    "state": "enforcing",
    "enforcing": True,
    "problems": [],
    "rules_installed": True,
    "host": "web-1",
    "trust_domain": "shop.example",
    "version": "1",
    "started": NOW - HOUR,
    "policy": {"revision": 3, "author": "root", "applied": NOW - HOUR},
    "enforced_networks": ["10.0.0.0/8"],
    "workers": [WORKER],
    "events_lost_by_agent": 0,
    "workloads": 4,
    "identities_refused": 0,
    "host_ca_expires": NOW + 100 * HOUR,
}


def marked(text: Any) -> list[str]:
    """Lines with the sign of something bad."""
    return [line for line in text.plain.split("\n") if line.startswith("✗")]


def test_a_host_that_does_well_has_nothing_bad() -> None:
    text = health.enforcement(STATUS, NOW, 100)
    assert not marked(text)
    assert "1 live flow," in text.plain
    assert "1 restart" in text.plain
    assert "1 restarts" not in text.plain


def test_what_is_wrong_is_told() -> None:
    stats = {
        **WORKER["stats"],
        "queue": {"waiting": 3, "dropped": 5, "user_dropped": 1},
        "lost": 2,
        "uncut": 1,
    }
    bad = {
        **STATUS,
        "enforcing": False,
        "rules_installed": False,
        "problems": [{"what": "rules", "why": "flushed\x1b[31m"}],
        "workers": [{**WORKER, "enforcing": False, "stats": stats}],
        "policy": None,
    }
    told = "\n".join(marked(health.enforcement(bad, NOW, 100)))
    for what in (
        "NOT INSTALLED",
        "flushed",
        "NOT ENFORCING",
        "6 packets dropped",
        "everything is denied",
        "not cut",
    ):
        assert what in told, what
    assert "\x1b" not in told


def test_the_store_and_its_rings() -> None:
    ring = {"pending": 90, "capacity": 100, "lost": 0}
    counters = {
        "bytes": 2048,
        "segments": 1,
        "rings": {"worker-0": ring},
        "insert_p50_ms": 1.0,
        "insert_p99_ms": 9.0,
    }
    text = health.store(counters, 100, live=True)
    assert "90% full" in text.plain
    assert "1 segment\n" in text.plain
    assert not marked(text)
    assert marked(health.store({**counters, "rings": {"worker-0": {**ring, "lost": 4}}}, 100, live=True))
    assert marked(health.store({"error": "gone"}, 100, live=True))


def test_certificates_and_lists() -> None:
    identity = {"spiffe_id": "spiffe://shop.example/web", "not_after": NOW + HOUR, "refused": ""}
    fresh = {
        "issuer_name": "web-1",
        "number": 2,
        "serials": ["1"],
        "workloads": {},
        "keys": [],
        "next_update": NOW + 1,
    }
    good = health.certificates(STATUS, [identity], [fresh], NOW, 100)
    assert not marked(good)
    assert "list 2, 1 revoked" in good.plain
    bad = health.certificates(
        {**STATUS, "host_ca_expires": NOW},
        [{**identity, "refused": "revoked"}],
        [{**fresh, "next_update": NOW}],
        NOW,
        100,
    )
    assert len(marked(bad)) == 4


def test_findings_come_the_worst_first() -> None:
    levels = ("good", "note", "warning", "bad")
    found = [
        {"area": "host", "check": level, "level": level, "message": f"{level} thing", "hint": "do this"}
        for level in levels
    ]
    lines = health.findings(found, 100).plain.split("\n")
    order = [
        next(i for i, line in enumerate(lines) if f"{level} thing" in line)
        for level in ("bad", "warning", "note")
    ]
    assert order == sorted(order)
    assert "good thing" not in "\n".join(lines)
    assert "1 of 4 checks" in "\n".join(lines)
    assert "examining" in health.findings(None, 100).plain
    assert "no root" in health.findings(None, 100, "no root").plain


def test_a_moment_of_the_past() -> None:
    document: dict[str, Any] = {
        "enforcer": {"state": "degraded", "since": NOW, "problems": {"rules": "flushed"}},
        "policy": [{"key": "2", "author": "eve"}],
        "activation": [{"key": "web-1", "revision": 2}],
        "flows_open": 12_345,
        "identity": [1],
        "workload": [],
        "trust": [],
        "warnings": [],
    }
    text = health.then(document, 100)
    assert len(marked(text)) == 2
    assert "revision 2 by eve on web-1" in text.plain
    assert "12.3k open" in text.plain


def test_long_lines_go_on_below_where_they_began() -> None:
    found = [
        {
            "area": "host",
            "check": "clock",
            "level": "bad",
            "message": "it is wrong " * 9,
            "hint": "set it " * 20,
        }
    ]
    lines = health.findings(found, 60).plain.split("\n")
    assert all(len(line) <= 60 for line in lines)
    inset = " " * (health.NAME + 3)
    assert sum(line.startswith(inset) for line in lines) >= 5
