"""A small history for tests that ask about the past: two days of a shop, a policy change, a flood, a denial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sectool.events import Action, DropReason, Phase
from store.control import Actor, ControlHistory

HOUR = 3_600_000_000
ALICE = Actor(1000, "alice")
AGENT = Actor(0, "sectool agent")

POLICY_1 = """
kind: Policy
name: shop
owner: team-a
rules:
  - allow app=web to call app=db on tcp/5432
"""
POLICY_2 = """
kind: Policy
name: shop
owner: team-a
rules:
  - allow app=web to call app=cache on tcp/6379
  - allow app=cache to call app=db on tcp/5432
"""


def write_control(state: Path, t0: int) -> None:
    """Revision 1 from `t0`, revision 2 from t0 + 24 h; identities and a workload."""
    with ControlHistory(state / "control.sqlite") as history:
        for number, (text, moment) in enumerate(((POLICY_1, t0), (POLICY_2, t0 + 24 * HOUR)), 1):
            body = {
                "revision": number,
                "hash": f"{number:064x}",
                "text": text,
                "author": "alice",
                "reason": f"reason {number}",
                "roles": [],
            }
            history.append("policy", str(number), body, ALICE, f"reason {number}", moment)
            history.append("activation", "host1", {"revision": number}, AGENT, "switched", moment + 1000)
        for name, begin in (("web", t0), ("db", t0), ("cache", t0 + 20 * HOUR)):
            identity: dict[str, Any] = {
                "id": len(name),
                "spiffe_id": f"spiffe://lab/{name}",
                "labels": {"app": name},
                "serial": name,
                "not_before": begin,
                "not_after": begin + 100 * HOUR,
            }
            history.append(
                "identity", identity["spiffe_id"], identity, AGENT, "issued", begin + 2000, valid_from=begin
            )
        history.append(
            "workload", "7", {"name": "web", "user": "www"}, AGENT, "started", t0 + 30 * HOUR, valid_from=t0
        )
        history.close("workload", "7", AGENT, "ended", t0 + 31 * HOUR, valid_to=t0 + 30 * HOUR)


def fill(lab: Any) -> dict[str, Any]:
    """Events into the lab's rings, stored and let go of: the ids that tests need."""
    t0 = lab.T0
    labels = {name: lab.labels(f"app={name}") for name in ("web", "db", "cache")}
    ids = {name: lab.identity(f"spiffe://lab/{name}", labels[name]) for name in labels}
    work = lab.workload("web", labels["web"])
    rule = lab.rule("allow app=web to call app=db on tcp/5432")
    ring = lab.ring()
    parties = {
        "source_labels": labels["web"],
        "source_identity": ids["web"],
        "source_workload": work,
        "destination_labels": labels["db"],
        "destination_identity": ids["db"],
        "destination_port": 5432,
    }
    for flow in range(10):  # the first day: web reaches db, one each hour, each for a second
        start = t0 + flow * HOUR
        fields = {**parties, "flow": flow, "start": start, "rule": rule, "policy_revision": 1}
        ring.put(lab.record(**fields))
        ring.put(
            lab.record(
                **fields,
                phase=Phase.END,
                ts=start + 1_000_000,
                end=start + 1_000_000,
                source_bytes=100,
                conn_state=3,
            )
        )
    start = t0 + 25 * HOUR
    for flow in range(100, 400):  # the second day: a flood of denials within 30 s
        ring.put(
            lab.record(
                **parties,
                flow=flow,
                start=start + (flow - 100) * 100_000,
                action=Action.DENY,
                drop_reason=DropReason.DEFAULT_DENY,
                policy_revision=2,
                flags=1,
                conn_state=4,
            )
        )
    cache = {**parties, "destination_labels": labels["cache"], "destination_identity": ids["cache"]}
    cache["destination_port"] = 6379
    ring.put(lab.record(**cache, flow=500, start=start + HOUR, policy_revision=2, source_port=40_001))
    ring.put(
        lab.record(
            flow=501,
            start=start + 2 * HOUR,
            source_ip="203.0.113.9",
            action=Action.DENY,
            drop_reason=20,
            conn_state=4,
        )
    )
    agent = lab.ring("agent")
    blobs = [
        {"type": "enforcer.start", "ts": t0 - 1000, "host": "host1", "revision": 0},
        {
            "type": "policy.applied",
            "ts": t0,
            "revision": 1,
            "previous": 0,
            "author": "alice",
            "reason": "reason 1",
        },
        {
            "type": "identity.issued",
            "ts": t0 + 2000,
            "spiffe_id": "spiffe://lab/web",
            "serial": "1",
            "workload_id": work,
        },
        {
            "type": "workload.start",
            "ts": t0 + 3000,
            "workload": "web",
            "workload_id": work,
            "user": "www",
            "pid": 7,
        },
        {
            "type": "policy.applied",
            "ts": t0 + 24 * HOUR,
            "revision": 2,
            "previous": 1,
            "author": "alice",
            "reason": "reason 2",
        },
        {"type": "policy.activated", "ts": t0 + 24 * HOUR + 1000, "revision": 2, "cut": 1, "problems": []},
        {"type": "events.lost", "ts": t0 + 26 * HOUR, "where": "worker 0", "count": 5},
        {"type": "new.kind", "ts": t0 + 27 * HOUR, "what": "\x1b[31mred"},
    ]
    for blob in blobs:
        assert agent.put_blob(blob)
    write_control(lab.state, t0)
    return {"labels": labels, "ids": ids, "workload": work, "rule": rule, "flood": start}


def settle(lab: Any) -> None:
    """Drain the rings into segments with a store in this process, and close it."""
    store = lab.inside()
    while store.step():
        pass
    store.close()
