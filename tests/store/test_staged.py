"""The staged report counts exactly the flows whose two verdicts differ."""

from __future__ import annotations

from typing import Any

from sectool.events import Action, DropReason
from store.staged import staged_changes


def test_groups_and_totals(lab: Any) -> None:
    web, db = lab.labels("app=web"), lab.labels("app=db")
    rule = lab.rule("allow app=web to call app=db")
    lab.start()

    def put(flow: int, action: Action, pending: Action, reason: int = 0, **more: Any) -> None:
        lab.ring().put(
            lab.record(
                flow=flow, start=lab.T0 + flow * 1_000_000, action=action, pending_action=pending,
                drop_reason=reason, pending_rule=rule if pending is Action.ALLOW else 0,
                source_labels=web, destination_labels=db, **more,
            )
        )  # fmt: skip

    put(1, Action.DENY, Action.ALLOW, DropReason.DEFAULT_DENY)
    put(2, Action.DENY, Action.ALLOW, DropReason.DEFAULT_DENY, flow_count=5)
    put(3, Action.ALLOW, Action.DENY)
    put(4, Action.ALLOW, Action.ALLOW)
    put(5, Action.ALLOW, Action.NONE)  # nothing was staged then
    put(6, Action.DENY, Action.ALLOW, DropReason.PEER_DENIED)  # not ours to change
    put(7, Action.ERROR, Action.ALLOW, DropReason.PROOF_INVALID)
    put(900, Action.DENY, Action.ALLOW, DropReason.DEFAULT_DENY)  # too late
    lab.stored(8)
    report = staged_changes(lab.live(), lab.T0, lab.T0 + 800_000_000, limit=10)
    assert (report.judged, report.changed, report.truncated) == (8, 7, False)
    first, second = report.groups
    assert (first["enforced"], first["pending"], first["flows"]) == ("deny", "allow", 6)
    assert (first["source"], first["destination"], first["service"]) == ("app=web", "app=db", "tcp/443")
    assert first["pending_rule"] == "allow app=web to call app=db"
    assert (second["enforced"], second["pending"], second["flows"]) == ("allow", "deny", 1)
    assert staged_changes(lab.live(), lab.T0, None, limit=1).truncated
