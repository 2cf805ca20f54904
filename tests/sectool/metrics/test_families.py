"""Numbers of a host: as status and stats say them, and with labels that nobody can multiply."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from sectool.metrics.exposition import text
from sectool.metrics.families import MAX_PARTS, families
from tests.sectool.metrics.test_exposition import read

STATUS: dict[str, Any] = {
    "version": "0.1.0",
    "state": "degraded",
    "problems": [{"what": "disk", "why": "full"}],
    "enforcing": True,
    "observing": False,
    "mode": "enforce",
    "break_glass": {"left_s": 60, "by": "alice", "reason": "fire"},
    "rules_installed": True,
    "started": 1_772_330_584_500_000,
    "host_ca_expires": 1_800_000_000_000_000,
    "policy": {"revision": 7, "applied": 1_772_330_584_000_000, "author": "alice"},
    "workers": [
        {
            "number": 0,
            "restarts": 2,
            "enforcing": True,
            "stats": {
                "packets": 100,
                "bulk": {"packets": 5, "waiting": 1, "dropped": 0, "user_dropped": 0},
                "queue": {"waiting": 3, "dropped": 4, "user_dropped": 5, "seen": 9},
                "verdicts": {"allow": 10, "deny": 2},
                "reasons": {"default_deny": 2, "made\nup": 1, "another": 2},
                "sessions": {"held": 1, "issued": 2},
                "live": 8,
                "encrypted": 3,
                "half_open": 1,
                "lost": 6,
                "cpu_us": 1_500_000,
            },
        }
    ],
    "store": {"pid": 7, "restarts": 1},
    "events_lost_by_agent": 1,
    "workloads": 4,
}
STATS: dict[str, Any] = {
    "flow_records": 12,
    "lost": 7,
    "insert_p50_ms": 2.5,
    "insert_p99_ms": None,
    "rings": {"worker-0": {"pending": 1, "capacity": 16, "lost": 6}},
    "segments": 3,
    "unopened_segments": ["x"],
    "bytes": 4096,
    "degraded": "full",
}
IDENTITIES = {
    "items": [{"not_after": 2_000_000, "refused": None}, {"not_after": 1_000_000, "refused": "yes"}]
}


def test_all_of_it_is_told() -> None:
    found = read(text(families(STATUS, STATS, IDENTITIES)))
    worker = ("worker", "0")
    expected: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {
        ("sectool_up", ()): 1,
        ("sectool_build_info", (("version", "0.1.0"),)): 1,
        ("sectool_start_time_seconds", ()): 1_772_330_584.5,
        ("sectool_enforcing", ()): 1,
        ("sectool_degraded", ()): 1,
        ("sectool_problems", ()): 1,
        ("sectool_observing", ()): 0,
        ("sectool_break_glass_remaining_seconds", ()): 60,
        ("sectool_policy_revision", ()): 7,
        ("sectool_certificate_expiry_time_seconds", (("certificate", "host_ca"),)): 1_800_000_000,
        ("sectool_certificate_expiry_time_seconds", (("certificate", "first_identity"),)): 1,
        ("sectool_identities", ()): 2,
        ("sectool_identities_refused", ()): 1,
        ("sectool_worker_restarts_total", (worker,)): 2,
        ("sectool_flows_total", (("verdict", "allow"), worker)): 10,
        ("sectool_denials_total", (("reason", "default_deny"), worker)): 2,
        ("sectool_denials_total", (("reason", "other"), worker)): 3,
        ("sectool_flows_live", (worker,)): 8,
        ("sectool_handshakes_open", (worker,)): 1,
        ("sectool_sessions", (("kind", "issued"), worker)): 2,
        ("sectool_packets_total", (("queue", "normal"), worker)): 100,
        ("sectool_packets_total", (("queue", "bulk"), worker)): 5,
        ("sectool_queue_packets", (("queue", "normal"), worker)): 3,
        ("sectool_queue_full_total", (("queue", "normal"), worker)): 4,
        ("sectool_worker_cpu_seconds_total", (worker,)): 1.5,
        ("sectool_events_lost_total", (("where", "worker-0"),)): 6,
        ("sectool_events_lost_total", (("where", "agent"),)): 1,
        ("sectool_store_up", ()): 1,
        ("sectool_store_restarts_total", ()): 1,
        ("sectool_store_flow_records_total", ()): 12,
        ("sectool_store_insert_p50_seconds", ()): 0.0025,
        ("sectool_store_bytes", ()): 4096,
        ("sectool_store_segments", ()): 3,
        ("sectool_store_unopened_segments", ()): 1,
        ("sectool_store_degraded", ()): 1,
        ("sectool_ring_events", (("ring", "worker-0"),)): 1,
        ("sectool_ring_capacity", (("ring", "worker-0"),)): 16,
    }
    assert expected.items() <= found.items()
    assert not any(name == "sectool_store_insert_p99_seconds" for name, _ in found)
    assert "alice" not in text(families(STATUS, STATS, IDENTITIES))


def test_what_does_not_answer_is_told() -> None:
    assert read(text(families(None, None, None))) == {("sectool_up", ()): 0, ("sectool_store_up", ()): 0}
    assert read(text(families(STATUS, None, None)))["sectool_store_up", ()] == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60)
@given(data=st.data())
def test_answers_of_another_version_are_taken_as_far_as_they_go(data: st.DataObject) -> None:
    """Invariant: whatever a field holds, what comes out can be read."""
    status, stats = dict(STATUS), dict(STATS)
    for document in (status, stats):
        document[data.draw(st.sampled_from(sorted(document)))] = data.draw(JSON)
    status["workers"] = [
        {**STATUS["workers"][0], data.draw(st.sampled_from(["stats", "number"])): data.draw(JSON)}
    ]
    assert ("sectool_up", ()) in read(
        text(families(status, stats, data.draw(st.none() | st.just(IDENTITIES))))
    )


def test_there_are_never_many_series() -> None:
    """Invariant: names in verdicts, reasons and rings do not make more series than the product knows of."""
    flood = {f"reason-{n}": 1 for n in range(10_000)}
    worker = {**STATUS["workers"][0], "stats": {"verdicts": flood, "reasons": flood}}
    rings = {f"ring-{n}": {"pending": 1, "capacity": 1, "lost": 0} for n in range(10_000)}
    found = read(text(families({**STATUS, "workers": [worker]}, {**STATS, "rings": rings}, IDENTITIES)))
    assert len(found) < 3 * MAX_PARTS + 200
    assert found["sectool_denials_total", (("reason", "other"), ("worker", "0"))] == 10_000
