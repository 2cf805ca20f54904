"""What `explain` shows: an inquiry, the recorded flow it is about, and whose the rules are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sectool.cli.moments import show_time
from sectool.policy.explanation import Explanation, NearMiss
from sectool.policy.inquiry import Inquiry, Origin, Widening, widening_lines
from sectool.policy.rules import Rule

SCHEMA = "sectool.explanation/1"


@dataclass(frozen=True, slots=True)
class Recorded:
    """A flow of the store, as a row of the event format, and what policy makes of it `now` (None: the same text)."""

    row: Mapping[str, Any]
    agrees: bool
    now: Inquiry | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """Everything to be shown."""

    flow: str
    inquiry: Inquiry
    origins: Mapping[int, Origin] = field(default_factory=dict)
    widening: Widening | None = None
    recorded: Recorded | None = None

    def lines(self) -> Iterator[str]:
        """For people."""
        main = self.inquiry.main
        if self.recorded:
            yield from _recorded(self.recorded)
        first, *rest = main.lines()
        yield first
        for side in self.inquiry.sides:
            yield side.line()
        told: set[int] = set()
        for line in rest:
            yield line
            for rule in self._named_in(main, line):
                if rule.id in self.origins and rule.id not in told:
                    told.add(rule.id)
                    yield f"  {_since(self.origins[rule.id])}"
        if self.widening is not None:
            yield from widening_lines(self.widening, main.sentence)
        if self.recorded and self.recorded.now:
            now = self.recorded.now.main
            by = f"by {now.decision.rule.title}" if now.decision.rule else "by default"
            verdict = "allowed" if self.recorded.now.allowed else "denied"
            yield f"by the policy in force now (revision {now.revision}) it would be {verdict} {by}"

    @staticmethod
    def _named_in(main: Explanation, line: str) -> list[Rule]:
        """The rules whose text a line of the explanation has just given."""
        near = main.nearest_allow
        rules = (main.decision.rule, main.decision.encrypt_rule, near.rule if near else None)
        return [rule for rule in rules if rule is not None and line == f"  {rule.text}"]

    def document(self) -> dict[str, Any]:
        """For programs."""
        main = self.inquiry.main
        decision = main.decision
        near = main.nearest_allow
        widening = self.widening
        return {
            "flow": self.flow,
            "verdict": decision.action.name.lower(),
            "reason": decision.reason.name.lower(),
            "revision": main.revision or None,
            "rule": self._rule(decision.rule),
            "encrypted": decision.encrypt,
            "encryption_rule": self._rule(decision.encrypt_rule),
            "pending_verdict": decision.pending_action.name.lower(),
            "pending_rule": self._rule(decision.pending_rule),
            "sides": [
                {
                    "point": side.point,
                    "judges": side.explanation is not None,
                    "verdict": side.explanation.decision.action.name.lower() if side.explanation else None,
                    "rule": self._rule(side.explanation.decision.rule) if side.explanation else None,
                }
                for side in self.inquiry.sides
            ],
            "applied": [self._rule(r) for r in main.applied],
            "staged": [self._rule(r) for r in main.staged],
            "near": [{"rule": self._rule(n.rule), "missing": _missing(n)} for n in main.near],
            "near_more": main.near_more,
            "nearest_allow": self._rule(near.rule) if near else None,
            "missing": _missing(near) if near else [],
            "remedy": str(main.remedy),
            "sentence": main.sentence,
            "lets_in": None
            if widening is None or not main.sentence
            else {
                "tried": widening.tried,
                "count": widening.count,
                "partial": widening.partial,
                "pairs": [{"source": _labels(s), "destination": _labels(d)} for s, d in widening.pairs],
            },
            "recorded": None
            if self.recorded is None
            else {
                "flow": dict(self.recorded.row),
                "agrees": self.recorded.agrees,
                "verdict_now": self.recorded.now.main.decision.action.name.lower()
                if self.recorded.now
                else None,
            },
        }

    def _rule(self, rule: Rule | None) -> dict[str, Any] | None:
        if rule is None:
            return None
        out: dict[str, Any] = rule.describe()
        begun = self.origins.get(rule.id)
        if begun is not None:
            out["since"] = {
                "revision": begun.revision,
                "applied": begun.applied_us,
                "author": begun.author,
                "roles": list(begun.roles),
                "reason": begun.reason,
                "exact": begun.exact,
            }
        return out


def _labels(labels: Mapping[str, str] | None) -> dict[str, str] | None:
    return None if labels is None else dict(labels)


def _missing(near: NearMiss) -> list[dict[str, str]]:
    return [{"part": m.part, "clause": m.clause, "found": m.found} for m in near.misses]


def _since(begun: Origin) -> str:
    least = "" if begun.exact else "at least "
    roles = f" as {', '.join(begun.roles)}" if begun.roles and begun.roles != ("root",) else ""
    why = f": {begun.reason}" if begun.reason else ""
    return (
        f"in force {least}since revision {begun.revision}, {show_time(begun.applied_us)}, "
        f"by {begun.author}{roles}{why}"
    )


def _recorded(found: Recorded) -> Iterator[str]:
    row = found.row
    state = "open still" if row["open"] else "ended" if row["event.end"] else "not let through"
    action = {"allow": "allowed", "deny": "denied", "audit": "let through for audit"}.get(
        row["event.action"], "failed"
    )
    if row["observed"]:
        action = "let through, but would have been denied had anything been enforced"
    by = f" by {row['rule.policy']}: {row['rule.text']}" if row["rule.text"] else ""
    reason = f" ({row['drop_reason']})" if row["drop_reason"] else ""
    yield f"flow {row['event.id']} of {row['event.start']}, {state}: {action}{reason}{by}"
    yield (
        f"  {row['source.ip']}:{row['source.port']} -> {row['destination.ip']}:{row['destination.port']} "
        f"{row['network.transport']}, seen by the {row['observation_point']}"
    )
    if row["decider"] == "peer":
        rule = f", rule: {row['peer_rule.text']}" if row["peer_rule.text"] else ""
        yield f"  the enforcer of the other end refused it: {row['peer_reason'] or 'no reason given'}{rule}"
    if not found.agrees:
        yield (
            "  policy alone would have decided otherwise: host names, encryption or revocation as they were then "
            "are not in it"
        )
    yield "what the policy of that time says:"
