"""What a policy can be learned from: the recorded flows as parties and services, each combination once."""

# ruff: noqa: S608 -- SQL is put together from this module's own parts and from numbers

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from sectool.events import FLAG_ADOPTED, FLAG_COALESCED, Action, DropReason, Phase
from sectool.labels import LabelSet
from sectool.policy.network import IPAddress
from sectool.policy.places import address_of
from sectool.policy.selector import Labels
from sectool.policy.suggest import Observation
from store.situations import ICMPS, History, Window

_MOST: int = 1_000_000  # combinations of one answer


@dataclass(frozen=True, slots=True)
class Seen:
    """Flows to learn from, all label sets there are, and how many flows are none to learn from, by why."""

    flows: list[Observation]
    known: list[LabelSet]
    left_out: Mapping[str, int]


def observations(
    history: History, window: Window, *, selector: Labels | None = None, denied: bool = False
) -> Seen:
    """All that was let through (with `denied` also what no rule allowed), of who `selector` speaks of if given."""
    icmp = f"transport IN {ICMPS}"
    address = [
        f"CASE WHEN {side}_labels = 0 THEN {side}_ip_{half} ELSE 0 END AS {side}_{half}"
        for side in ("source", "destination")
        for half in ("hi", "lo")
    ]
    sql = (
        f"SELECT source_labels, destination_labels, {', '.join(address)}, transport,"
        f" CASE WHEN {icmp} THEN source_port ELSE destination_port END AS port, action, drop_reason,"
        f" flags & {FLAG_ADOPTED | FLAG_COALESCED} AS odd, encryption = 2 AS encrypted,"
        " sum(flow_count)::BIGINT, epoch_us(min(event_start)), epoch_us(max(event_start))"
        f" FROM flow_records WHERE phase = {Phase.VERDICT:d}{window.sql()} GROUP BY ALL"
    )
    words = history.words()
    merged: dict[tuple[LabelSet | IPAddress, LabelSet | IPAddress, int, int, bool], tuple[int, int, int]] = {}
    left: Counter[str] = Counter()
    for row in history.new_and_old(sql, _MOST):
        (
            source_id,
            destination_id,
            shi,
            slo,
            dhi,
            dlo,
            protocol,
            port,
            action,
            reason,
            odd,
            encrypted,
            *counts,
        ) = row
        flows, first, last = counts
        why = _why_not(action, reason, odd, denied)
        if why:
            left[why] += flows
            continue
        source = words.labels.get(source_id) if source_id else address_of(shi << 64 | slo)
        destination = words.labels.get(destination_id) if destination_id else address_of(dhi << 64 | dlo)
        if source is None or destination is None:
            left["labels unknown"] += flows
            continue
        if selector is not None and not (_meant(selector, source) or _meant(selector, destination)):
            left["not asked for"] += flows
            continue
        key = (source, destination, protocol, port, encrypted)
        before = merged.get(key)
        if before is not None:
            flows, first, last = flows + before[0], min(first, before[1]), max(last, before[2])
        merged[key] = flows, first, last
    found = [
        Observation(source, destination, protocol, port, *counted, encrypted)
        for (source, destination, protocol, port, encrypted), counted in merged.items()
    ]
    found.sort(key=lambda o: (o.protocol, o.port, str(o.source), str(o.destination), o.encrypted))
    return Seen(found, list(words.labels.values()), dict(sorted(left.items())))


def _why_not(action: int, reason: int, odd: int, denied: bool) -> str:
    if odd & FLAG_ADOPTED:
        return "connections from before the enforcer, which nobody judged"
    if odd & FLAG_COALESCED:
        return "floods, whose parties are not recorded"
    if action == Action.AUDIT and reason == DropReason.NO_IDENTITY:
        return "peers without an enforcer in an enforced network: no rule could let them in"
    if action == Action.AUDIT and reason not in (DropReason.NONE, DropReason.DEFAULT_DENY):
        return "let through while nothing was enforced, against a rule or without a proof"
    if action in (Action.ALLOW, Action.AUDIT):
        return ""
    if action == Action.DENY and reason == DropReason.DEFAULT_DENY:
        return "" if denied else "denied because no rule allowed them (--denied learns from them)"
    return "denied by a rule, or refused for other reasons"


def _meant(selector: Labels, party: LabelSet | IPAddress) -> bool:
    return isinstance(party, LabelSet) and all(clause.holds(party) for clause in selector.clauses)
