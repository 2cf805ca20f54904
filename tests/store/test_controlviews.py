"""Policies, identities, workloads and trust of any moment, in SQL."""

from __future__ import annotations

from typing import Any

import pytest

from sectool.errors import SectoolError
from store.control import Actor, ControlHistory

ALICE = Actor(1000, "alice")
MINUTE = 60_000_000


@pytest.fixture
def history(lab: Any) -> Any:
    """Two revisions a minute apart, the second rolled back; a workload that ended; an identity that expires."""
    start = lab.T0
    with ControlHistory(lab.state / "control.sqlite") as control:
        for number in (1, 2):
            body = {
                "hash": f"h{number}",
                "text": f"text {number}",
                "author": "alice",
                "reason": f"why {number}",
            }
            moment = start + (number - 1) * MINUTE
            control.append("policy", str(number), body, ALICE, f"why {number}", moment, moment)
            control.append(
                "activation", "web1", {"revision": number}, ALICE, "switched", moment + 1, moment + 1
            )
        late = start + 2 * MINUTE
        control.append("activation", "web1", {"revision": 1}, ALICE, "rolled back", late, late)
        labels = {"app": "web"}
        control.append("workload", "7", {"name": "nginx", "labels": labels}, ALICE, "began", start, start)
        control.close("workload", "7", ALICE, "ended", late, late)
        identity = {"labels": labels, "not_before": start, "not_after": start + MINUTE, "serial": "9"}
        control.append("identity", "spiffe://lab/web", identity, ALICE, "issued", start, start)
        control.append("trust", "lab", {"roots": ["ab"]}, ALICE, "trusted", start, start)
    lab.ring().put(lab.record())
    store = lab.inside()
    store.step()
    store.close()
    return lab.reader()


def ask(reader: Any, sql: str) -> list[dict[str, Any]]:
    return list(reader.query(sql).table.to_pylist())


def moment(lab: Any, seconds: int) -> str:
    return f"make_timestamp({lab.T0 + seconds * 1_000_000})"


def test_policies_at(history: Any, lab: Any) -> None:
    sql = "SELECT host, revision, hash, author, reason, text FROM policies_at({})"
    assert ask(history, sql.format(moment(lab, -1))) == []
    in_force = [ask(history, sql.format(moment(lab, s)))[0]["revision"] for s in (1, 61, 121)]
    assert in_force == [1, 2, 1]
    assert ask(history, sql.format(moment(lab, 61))) == [
        {"host": "web1", "revision": 2, "hash": "h2", "author": "alice", "reason": "why 2", "text": "text 2"}
    ]


def test_workloads_identities_and_trust(history: Any, lab: Any) -> None:
    names = [
        [row["name"] for row in ask(history, f"SELECT name FROM workloads_at({moment(lab, s)})")]
        for s in (1, 121)
    ]
    assert names == [["nginx"], []]
    valid = [len(ask(history, f"SELECT * FROM identities_at({moment(lab, s)})")) for s in (-1, 1, 61)]
    assert valid == [0, 1, 0]
    (identity,) = ask(history, f"SELECT labels->>'app' AS app, serial FROM identities_at({moment(lab, 1)})")
    assert identity == {"app": "web", "serial": "9"}
    assert ask(history, f"SELECT trust_domain FROM trust_at({moment(lab, 1)})") == [{"trust_domain": "lab"}]


def test_a_flow_beside_the_policy_in_force_when_it_began(history: Any, lab: Any) -> None:
    sql = (
        "SELECT f.destination_port, p.text FROM flows f ASOF JOIN"
        " (SELECT * FROM control_rows WHERE kind = 'policy') p0 ON f.event_start >= p0.valid_from,"
        f" policies_at({moment(lab, 1)}) p"
    )
    assert ask(history, sql) == [{"destination_port": 443, "text": "text 1"}]


def test_changes_follow_the_history(history: Any, lab: Any) -> None:
    count = "SELECT count(*) AS n, count(DISTINCT hash) AS d, max(actor) AS who FROM changes"
    assert ask(history, count) == [{"n": 9, "d": 9, "who": "alice"}]
    with ControlHistory(lab.state / "control.sqlite") as control:
        control.append("network", "office", {"net": "10.0.0.0/8"}, Actor(0, "root"), "new")
    assert ask(history, count)[0]["n"] == 10


def test_without_a_control_history_there_is_nothing(lab: Any) -> None:
    lab.ring().put(lab.record())
    store = lab.inside()
    store.step()
    store.close()
    assert ask(lab.reader(), "SELECT * FROM policies_at(now()::TIMESTAMP)") == []


def test_a_damaged_history_is_told(history: Any, lab: Any) -> None:
    (lab.state / "control.sqlite").write_bytes(b"nonsense" * 1000)
    with pytest.raises(SectoolError, match="damaged"):
        ask(history, "SELECT * FROM changes")
    assert ask(history, "SELECT count(*) AS n FROM flows") == [{"n": 1}]
