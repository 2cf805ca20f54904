"""A recorded flow is found by its id and becomes the question that policy was asked."""

from __future__ import annotations

from typing import Any

import pytest

from sectool.errors import UsageError
from sectool.events import Action, DropReason
from sectool.flowids import new_event_id
from store.recorded import decided_by_policy, find_flow, request_of


def test_found_by_id_and_asked_again(lab: Any) -> None:
    web, db = lab.labels("app=web,empty="), lab.labels("app=db")
    rule = lab.rule("allow app=web to call fqdn:*.example.com on tcp/443")
    lab.start()
    for flow in range(3):
        lab.ring().put(
            lab.record(
                flow=flow, start=lab.T0 + flow, source_labels=web, source_identity=1,
                destination_labels=db if flow == 1 else 0, destination_identity=2 if flow == 1 else 0,
                rule=rule if flow == 2 else 0,
            )
        )  # fmt: skip
    lab.ring().put(
        lab.record(flow=3, start=lab.T0 + 3, transport=1, source_port=8, destination_port=0, action=Action.DENY,
                   drop_reason=DropReason.DEFAULT_DENY)
    )  # fmt: skip
    lab.ring().put_blob({"type": "dict.identity", "ts": lab.T0, "id": 1, "spiffe_id": "spiffe://x/web"})
    lab.ring().put_blob({"type": "dict.identity", "ts": lab.T0, "id": 2, "spiffe_id": "spiffe://x/db"})
    lab.stored(4)
    reader = lab.live()
    rows = sorted(reader.flows(last=10).table.to_pylist(), key=lambda r: r["event_start"])
    found = [find_flow(reader, str(row["event_id"])) for row in rows]
    assert [row["event_id"] for row in found] == [row["event_id"] for row in rows]
    assert [row["start_us"] for row in found] == [lab.T0 + n for n in range(4)]
    asked = [request_of(row) for row in found]
    assert dict(asked[0].source.labels or {}) == {"app": "web", "empty": ""}
    assert asked[0].destination.labels is None
    assert (asked[0].protocol, asked[0].port, asked[0].can_encrypt) == (6, 443, False)
    assert asked[1].can_encrypt
    assert asked[2].destination.names == {"host.example.com"}  # the deciding rule tells the name
    assert (asked[3].protocol, asked[3].port, asked[3].icmp_code) == (1, 8, 0)
    assert [decided_by_policy(row) for row in found] == [True] * 4


@pytest.mark.parametrize("wrong", ["x", "' OR 1=1 --"])
def test_what_is_no_id_asks_nothing(lab: Any, wrong: str) -> None:
    with pytest.raises(UsageError, match="is not the id"):
        find_flow(lab, wrong)


def test_an_unknown_id(lab: Any) -> None:
    import uuid

    lab.start()
    with pytest.raises(UsageError, match="is on record"):
        find_flow(lab.live(), str(uuid.UUID(bytes=new_event_id(lab.T0))))


@pytest.mark.parametrize(
    ("row", "ours"),
    [
        ({"action": "allow", "drop_reason": None, "decider": None, "adopted": False}, True),
        ({"action": "allow", "drop_reason": None, "decider": None, "adopted": True}, False),
        ({"action": "deny", "drop_reason": "peer_denied", "decider": "peer", "adopted": False}, False),
        ({"action": "deny", "drop_reason": "rate_limited", "decider": "local", "adopted": False}, False),
    ],
)
def test_whose_verdict_it_was(row: dict[str, Any], ours: bool) -> None:
    assert decided_by_policy(row) is ours
