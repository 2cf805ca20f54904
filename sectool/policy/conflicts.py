"""Rules that do not do what their owners think: what other rules make of them, each with an example flow.

    unreachable       no flow at all matches it: its clauses contradict each other, or its time is over
    void              an intent of which guardrails leave nothing
    partly void       an intent of which a guardrail takes something
    shadowed          an intent that never decides, because other intents deny (or, for audit, allow) all it speaks of
    partly shadowed   an allow or audit rule from which another owner's deny takes something
    redundant         a rule without which every flow gets the same verdict

Nothing is claimed that is not proven. Whether a rule is covered by others is found by examples: take a flow of the
rule, ask the engine which rules match it, cut those out of the rule's region (sectool.policy.algebra), and take the
next example from what is left. An example that nobody else matches ends it, which for most rules is the first; so
the work grows with the number of rules, not with its square. Rules with `where` comparisons that algebra leaves open
cut only rules with the same comparisons, and rules that end (`until`) only those that end no later.

All rules that are called redundant can be removed together: none is covered by another one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from sectool.policy.algebra import ADDRESSES, PROVEN, STRANGERS, Parties, Region, Regions, parties_of
from sectool.policy.collector import held
from sectool.policy.engine import Engine
from sectool.policy.model import Mode
from sectool.policy.network import IPAddress
from sectool.policy.overlap import Overlaps
from sectool.policy.podconflicts import rules_of, takings
from sectool.policy.rules import CompiledRule, Phase, Rule
from sectool.policy.selector import Cidr, NamedNet
from sectool.policy.valuesets import ranges, without
from sectool.policy.witness import Witness, address_in, witness

MAX_STEPS: Final = 400  # examples per question; beyond that the answer is left open
MAX_PAIRS: Final = 400_000  # pairs of rules compared for overlap
MAX_EACH: Final = 3  # overlaps told per rule and kind


class ConflictKind(StrEnum):
    """What is the matter with a rule, worst first."""

    UNREACHABLE = "unreachable"
    VOID = "void"
    SHADOWED = "shadowed"
    PARTLY_VOID = "partly void"
    PARTLY_SHADOWED = "partly shadowed"
    REDUNDANT = "redundant"


SAYS: Final = {
    ConflictKind.UNREACHABLE: "matches no flow",
    ConflictKind.VOID: "allows nothing: guardrails deny all of it",
    ConflictKind.SHADOWED: "never decides: other rules come first for all of it",
    ConflictKind.PARTLY_VOID: "a guardrail takes part of it",
    ConflictKind.PARTLY_SHADOWED: "another owner denies part of it",
    ConflictKind.REDUNDANT: "changes nothing: other rules say the same",
}


@dataclass(frozen=True, slots=True)
class Conflict:
    """`rule` is in conflict with `by` (empty for unreachable, of which `why` tells).

    `example` is a flow they all speak of, as the language writes flows. `pending`: only once staged documents are
    enforced.
    """

    kind: ConflictKind
    rule: Rule
    by: tuple[Rule, ...] = ()
    example: str = ""
    why: str = ""
    pending: bool = False

    @property
    def owners(self) -> tuple[str, ...]:
        """Everybody it is told to."""
        return tuple(dict.fromkeys((self.rule.owner, *(rule.owner for rule in self.by))))

    def describe(self) -> dict[str, object]:
        """For programs."""
        return {
            "kind": str(self.kind),
            "owners": list(self.owners),
            "pending": self.pending,
            "why": self.why or SAYS[self.kind],
            "example": self.example,
            "rule": self.rule.describe(),
            "by": [rule.describe() for rule in self.by],
        }

    def lines(self) -> list[str]:
        """For people."""
        staged = " once staged documents are enforced" if self.pending else ""
        out = [f"{self.kind}{staged}: {self.rule.title} at {self.rule.where}: {self.why or SAYS[self.kind]}"]
        out.append(f"  {self.rule.text}")
        for rule in self.by[:4]:
            out.append(f"  because of {rule.title} at {rule.where}:")
            out.append(f"    {rule.text}")
        if len(self.by) > 4:
            out.append(f"  and {len(self.by) - 4} more rules")
        if self.example:
            out.append(f"  e.g. {self.example}")
        return out


@dataclass(frozen=True, slots=True)
class Conflicts:
    """All that were found, in order of rules. `undecided` rules were too entangled to be told about in full."""

    found: tuple[Conflict, ...] = ()
    undecided: tuple[Rule, ...] = ()

    def of(self, *kinds: ConflictKind) -> list[Conflict]:
        """Those of some kinds."""
        return [conflict for conflict in self.found if conflict.kind in kinds]

    def lines(self, most: int = 20) -> list[str]:
        """For people: worst first, alike ones together, at most so many."""
        order = list(ConflictKind)
        groups: dict[tuple[object, ...], list[Conflict]] = {}
        for conflict in sorted(self.found, key=lambda c: order.index(c.kind)):
            alone = not conflict.by  # unreachable ones each have a reason of their own
            key = (
                conflict.kind,
                conflict.rule.owner,
                conflict.pending,
                conflict.rule.id if alone else conflict.by,
            )
            groups.setdefault(key, []).append(conflict)
        out: list[str] = []
        for group in list(groups.values())[:most]:
            out += group[0].lines()
            if len(group) > 1:
                rules = "rule" if len(group) == 2 else "rules"
                out.append(
                    f"  and {len(group) - 1} more {rules} of {group[0].rule.owner} for the same reason"
                )
        if len(groups) > most:
            out.append(f"and {len(groups) - most} more conflicts")
        if self.undecided:
            out.append(
                f"{len(self.undecided)} rules overlap with too many others to say more, "
                f"the first is {self.undecided[0].title}"
            )
        return out


@held()
def find_conflicts(engine: Engine, now_us: int) -> Conflicts:
    """Everything that is to be said of an engine's rules at a moment (UTC microseconds)."""
    return _Search(engine, now_us).run()


@dataclass(frozen=True, slots=True)
class _Cut:
    """A region that some rules take together."""

    region: Region
    rules: tuple[CompiledRule, ...]


_Example = tuple[Witness, Sequence[CompiledRule]]
_Pick = Callable[[CompiledRule, Sequence[CompiledRule], Witness], _Cut | None]


class _Search:
    def __init__(self, engine: Engine, now_us: int) -> None:
        self.engine = engine
        self.now = now_us
        self._regions = Regions({doc.name: doc.spec for doc in engine.documents.networks})
        self.region: list[Region | None] = [self._regions.of(rule.sentence) for rule in engine.compiled]
        self.elsewhere = _elsewhere(engine)
        self.flagged: set[int] = set()  # ranks of rules that do nothing
        self.found: dict[int, list[Conflict]] = {}
        self.undecided: dict[int, Rule] = {}
        self.pairs = 0
        self.pods: list[Conflict] = []  # of NetworkPolicies

    def run(self) -> Conflicts:
        for phase in Phase:
            for rule in reversed([r for r in self.engine.compiled if r.phase is phase]):
                self._alone(rule)
        self._overlaps()
        ordered = [conflict for rank in sorted(self.found) for conflict in self.found[rank]] + self.pods
        return Conflicts(tuple(ordered), tuple(self.undecided[rank] for rank in sorted(self.undecided)))

    def _say(self, rule: CompiledRule, conflict: Conflict) -> None:
        self.found.setdefault(rule.rank, []).append(conflict)

    def _alone(self, rule: CompiledRule) -> None:
        """Whether the rule does anything at all."""
        until, region = rule.sentence.until, self.region[rule.rank]
        why = ""
        if region is None:
            why = "matches no flow: its clauses contradict each other"
        elif until and until.us <= self.now:
            why = f"matches no flow any more: it ended ({until})"
        if why:
            self.flagged.add(rule.rank)
            self._say(rule, Conflict(ConflictKind.UNREACHABLE, rule.rule, why=why))
            return
        assert region is not None
        first = self._example(region)
        if first is not None and len(first[1]) <= 1 and _first_for(rule, first):
            return  # nobody else speaks of this flow
        for kind, start, pick in self._questions(rule, region):
            if start is not None and self._ask(rule, kind, start, pick, first, staged=rule.staged):
                return
        if self.engine.has_staged and not rule.staged:
            for kind, start, pick in self._questions(rule, region):
                if (
                    kind is not ConflictKind.REDUNDANT
                    and start is not None
                    and self._ask(rule, kind, start, pick, first, staged=True)
                ):
                    return

    def _questions(
        self, rule: CompiledRule, region: Region
    ) -> Iterator[tuple[ConflictKind, Region | None, _Pick]]:
        if rule.phase in (Phase.INTENT_ALLOW, Phase.INTENT_AUDIT):
            passing = _passing(rule, region)
            yield ConflictKind.VOID, passing, self._pick_guardrails
            yield ConflictKind.SHADOWED, passing, self._pick_before
        yield ConflictKind.REDUNDANT, region, self._pick_same

    def _ask(
        self,
        rule: CompiledRule,
        kind: ConflictKind,
        start: Region,
        pick: _Pick,
        first: _Example | None,
        *,
        staged: bool,
    ) -> bool:
        """Put one question; whether the rule is what `kind` says."""
        by: dict[int, CompiledRule] = {}
        example = ""
        waiting = [start]
        for _ in range(MAX_STEPS):
            if not waiting:
                pending = any(r.staged for r in by.values()) or rule.staged
                self._say(
                    rule,
                    Conflict(
                        kind, rule.rule, tuple(by[n].rule for n in sorted(by)), example, pending=pending
                    ),
                )
                if not pending or rule.staged:
                    self.flagged.add(rule.rank)
                return True
            piece = waiting.pop()
            found = first if piece is start and first and _first_for(rule, first) else self._example(piece)
            if found is None:
                return False
            point, everybody = found
            matching = [
                other
                for other in everybody
                if other is not rule
                and other.rank not in self.flagged
                and (staged or not other.staged)
                and _outlives(other, rule)
            ]
            cut = pick(rule, matching, point)
            if cut is None:
                return False
            example = example or point.text
            by.update((r.rank, r) for r in cut.rules)
            waiting.extend(piece.minus(cut.region))
        self.undecided[rule.rank] = rule.rule
        return False

    def _example(self, region: Region) -> _Example | None:
        """A flow of the region, and all rules that match it."""
        point = self._witness(region)
        return None if point is None else (point, self.engine.matching(point.request, self.now)[0])

    def _witness(self, region: Region) -> Witness | None:
        return witness(region, self.now, elsewhere=self.elsewhere)

    def _usable(self, rule: CompiledRule, other: CompiledRule) -> Region | None:
        """The region of another rule if it can be cut out exactly."""
        mine, theirs = self.region[rule.rank], self.region[other.rank]
        if mine is None or theirs is None or not mine.subtractable(theirs):
            return None
        return theirs

    def _pick_denying(
        self, rule: CompiledRule, matching: Sequence[CompiledRule], point: Witness, *phases: Phase
    ) -> _Cut | None:
        for other in matching:
            region = self._usable(rule, other)
            if region is None:
                continue
            if other.phase in phases:
                return _Cut(region, (other,))
            if other.phase is Phase.GUARDRAIL_ENCRYPTION and rule.phase >= Phase.INTENT_ALLOW:
                # Encryption is demanded where one end has no enforcer.
                for source, destination in ((STRANGERS, None), (None, STRANGERS)):
                    party = point.request.source if source else point.request.destination
                    narrowed = _narrow(region, source, destination)
                    if party.labels is None and narrowed is not None:
                        return _Cut(narrowed, (other,))
        return None

    def _pick_guardrails(
        self, rule: CompiledRule, matching: Sequence[CompiledRule], point: Witness
    ) -> _Cut | None:
        return self._pick_denying(rule, matching, point, Phase.GUARDRAIL_DENY)

    def _pick_before(
        self, rule: CompiledRule, matching: Sequence[CompiledRule], point: Witness
    ) -> _Cut | None:
        phases = [Phase.GUARDRAIL_DENY, Phase.INTENT_DENY]
        if rule.phase is Phase.INTENT_AUDIT:
            phases.append(Phase.INTENT_ALLOW)
        return self._pick_denying(rule, matching, point, *phases)

    def _pick_same(self, rule: CompiledRule, matching: Sequence[CompiledRule], point: Witness) -> _Cut | None:
        phase = rule.phase
        earlier = [p for p in (Phase.GUARDRAIL_DENY, Phase.INTENT_DENY) if p < phase]
        if phase is Phase.GUARDRAIL_ENCRYPTION:
            earlier = [Phase.GUARDRAIL_DENY]
        if phase is Phase.INTENT_AUDIT:
            earlier.append(Phase.INTENT_ALLOW)
        found = self._pick_denying(rule, matching, point, *earlier)
        if found is not None:
            return found
        demanding = [r for r in matching if r.phase is Phase.GUARDRAIL_ENCRYPTION]
        for other in matching:
            region = self._usable(rule, other)
            if other.phase is not phase or region is None:
                continue
            if other.sentence.encrypted or not rule.sentence.encrypted:
                return _Cut(region, (other,))
            for guardrail in demanding:  # together they say the same
                demanded = self._usable(rule, guardrail)
                common = region.meet(demanded) if demanded else None
                if common is not None:
                    return _Cut(common, (other, guardrail))
        return None

    # --- what only overlaps ---

    def _overlaps(self) -> None:
        for kind, phases in (
            (ConflictKind.PARTLY_VOID, (Phase.GUARDRAIL_DENY, Phase.GUARDRAIL_ENCRYPTION)),
            (ConflictKind.PARTLY_SHADOWED, (Phase.INTENT_DENY,)),
        ):
            takers = Overlaps(
                (rule, region)
                for rule in self.engine.compiled
                if rule.phase in phases and rule.rank not in self.flagged
                for region in self._takes(rule)
            )
            if not takers:
                continue
            for rule in self.engine.compiled:
                if rule.phase >= Phase.INTENT_ALLOW and rule.rank not in self.flagged:
                    self._overlap(rule, kind, takers)
            self._overlap_pods(kind, takers)

    def _overlap_pods(self, kind: ConflictKind, takers: Overlaps) -> None:
        for doc, rules in self.engine.network_policies.policies():
            for direction, number, net_rule in rules_of(doc):
                rule = rules[direction, number]
                for other, point in takings(doc, direction, net_rule, takers, self._witness):
                    if kind is ConflictKind.PARTLY_SHADOWED and other.rule.owner == rule.owner:
                        continue
                    if other in self.engine.matching(point.request, self.now)[0]:
                        pending = rule.mode is Mode.STAGE or other.staged
                        self.pods.append(Conflict(kind, rule, (other.rule,), point.text, pending=pending))

    def _takes(self, rule: CompiledRule) -> Iterable[Region]:
        region = self.region[rule.rank]
        if region is None:
            return ()
        if rule.phase is not Phase.GUARDRAIL_ENCRYPTION:
            return (region,)
        narrowed = (_narrow(region, STRANGERS, None), _narrow(region, None, STRANGERS))
        return [part for part in narrowed if part is not None]

    def _overlap(self, rule: CompiledRule, kind: ConflictKind, takers: Overlaps) -> None:
        region = self.region[rule.rank]
        mine = None if region is None else _passing(rule, region)
        if mine is None:
            return
        told: set[int] = set()
        known = {r.id for c in self.found.get(rule.rank, ()) for r in c.by}
        for other, taken in takers.near(mine):
            if other.rank in told or other.rule.id in known:
                continue
            if kind is ConflictKind.PARTLY_SHADOWED and other.rule.owner == rule.rule.owner:
                continue
            self.pairs += 1
            if self.pairs > MAX_PAIRS:
                self.undecided[rule.rank] = rule.rule
                return
            common = mine.meet(taken)
            point = None if common is None else self._witness(common)
            if point is None:
                continue
            matching = self.engine.matching(point.request, self.now)[0]
            if rule not in matching or other not in matching:
                continue
            told.add(other.rank)
            self._say(
                rule,
                Conflict(kind, rule.rule, (other.rule,), point.text, pending=rule.staged or other.staged),
            )
            if len(told) == MAX_EACH:
                return


def _first_for(rule: CompiledRule, example: _Example) -> bool:
    """Whether a flow of the rule is also one that it may let through (see `_passing`)."""
    request = example[0].request
    able = request.source.labels is not None and request.destination.labels is not None
    return able or not rule.sentence.encrypted


def _passing(rule: CompiledRule, region: Region) -> Region | None:
    """What a rule may let through: of one that says `encrypted`, only flows between two enforcers."""
    return _narrow(region, PROVEN, PROVEN) if rule.sentence.encrypted else region


def _narrow(region: Region, source: Parties | None, destination: Parties | None) -> Region | None:
    origin = region.source if source is None else region.source.meet(source)
    target = region.destination if destination is None else region.destination.meet(destination)
    if origin is None or target is None:
        return None
    return replace(region, source=origin, destination=target)


def _outlives(other: CompiledRule, rule: CompiledRule) -> bool:
    end, mine = other.sentence.until, rule.sentence.until
    return end is None or (mine is not None and mine.us <= end.us)


def _elsewhere(engine: Engine) -> IPAddress:
    """An address in none of the networks that rules speak of, if there is one."""
    specs = {doc.name: doc.spec for doc in engine.documents.networks}
    taken: list[tuple[int, int]] = []
    for side in {side for r in engine.compiled for side in (r.sentence.source, r.sentence.destination)}:
        if isinstance(side, (NamedNet, Cidr)):
            parties = parties_of(side, specs)
            taken.extend(parties.addresses if parties else ())
    return address_in(without(ADDRESSES, ranges(taken)) or ADDRESSES)
