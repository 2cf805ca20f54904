"""What staged documents would have decided otherwise: flows whose pending verdict differs from the enforced one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from store.reader import Reader

_WHERE = (
    "event_start >= make_timestamp({since}) AND event_start < make_timestamp({until}) "
    "AND pending_action IS NOT NULL"
)
_PARTY = "coalesce({end}_labels, {end}_ip)"
# An error is no verdict of policy, and a flow that another enforcer refused was not refused by ours.
_JUDGED = (
    "action IN ('allow', 'audit', 'deny') AND (action <> 'deny' OR drop_reason IN "
    "('default_deny', 'intent_deny', 'guardrail_deny', 'encryption_unavailable'))"
)


@dataclass(frozen=True, slots=True)
class StagedReport:
    """`judged` flows had a pending verdict, `changed` of them another one; `groups` of those, most flows first.

    A group has enforced, pending, source, destination, service, pending_rule, rule, flows, first, last, example.
    """

    judged: int
    changed: int
    groups: list[dict[str, Any]]
    truncated: bool


def staged_changes(reader: Reader, since_us: int, until_us: int | None, *, limit: int) -> StagedReport:
    """Compare both verdicts of the flows begun in a stretch of time (UTC microseconds)."""
    where = _WHERE.format(since=int(since_us), until=int(until_us) if until_us is not None else (1 << 61))
    differs = "pending_action <> action"
    totals = reader.query(
        f"SELECT coalesce(sum(flow_count), 0)::BIGINT AS judged, "  # noqa: S608 -- numbers only
        f"coalesce(sum(flow_count) FILTER (WHERE {differs}), 0)::BIGINT AS changed "
        f"FROM flows WHERE {where} AND {_JUDGED}"
    ).table.to_pylist()[0]
    found = reader.query(
        f"SELECT action AS enforced, pending_action AS pending, {_PARTY.format(end='source')} AS source, "  # noqa: S608
        f"{_PARTY.format(end='destination')} AS destination, "
        "CASE WHEN transport IN ('tcp', 'udp') THEN transport || '/' || destination_port "
        "WHEN transport IN ('icmp', 'icmpv6') THEN transport || '/' || source_port ELSE transport END AS service, "
        "rule, pending_rule, sum(flow_count)::BIGINT AS flows, min(event_start) AS first, "
        "max(event_start) AS last, any_value(event_id)::VARCHAR AS example "
        f"FROM flows WHERE {where} AND {_JUDGED} AND {differs} GROUP BY ALL "
        "ORDER BY flows DESC, enforced, source, destination, service",
        limit=limit,
    )
    return StagedReport(totals["judged"], totals["changed"], found.table.to_pylist(), found.truncated)
