"""What another policy would have made of the recorded flows.

Each distinct situation (store.situations) is put once to the engine, as of the time of its flows. Only what policy
decided on this host is judged anew: who had no sound credential, or was refused by the other end, stays refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from sectool.errors import SectoolError
from sectool.events import FLAG_ADOPTED, FLAG_COALESCED, Action, DropReason, Point
from sectool.labels import DOMAIN_LABEL, FEDERATED_LABEL, LabelSet
from sectool.policy.condition import Condition, LabelRef, ordered, quantity
from sectool.policy.effective import keys_asked, pod_keys
from sectool.policy.engine import Decision, Engine
from sectool.policy.model import DocumentSet, WorkloadDoc
from sectool.policy.places import Places
from sectool.policy.request import Party, Request
from sectool.policy.selector import Fqdn
from sectool.policy.sentence import Sentence, parse_sentence
from sectool.policy.service import ICMP, ICMP6, describe
from store.relabel import Relabel
from store.situations import History, Progress, RuleEntry, Situation, Window, Words

POLICY_REASONS: Final = frozenset(
    {
        DropReason.DEFAULT_DENY,
        DropReason.INTENT_DENY,
        DropReason.GUARDRAIL_DENY,
        DropReason.ENCRYPTION_UNAVAILABLE,
    }
)
_PASSED: Final = frozenset({Action.ALLOW, Action.AUDIT})
_NAMES_TRIED: Final = 16


class Kind(StrEnum):
    """How a verdict differs from the recorded one. The first two are regressions."""

    NEWLY_DENIED = "newly denied"
    NO_LONGER_ENCRYPTED = "no longer encrypted"
    NEWLY_ALLOWED = "newly allowed"
    NEWLY_ENCRYPTED = "newly encrypted"
    NOW_AUDITED = "now audited"
    NO_LONGER_AUDITED = "no longer audited"


REGRESSIONS: Final = (Kind.NEWLY_DENIED, Kind.NO_LONGER_ENCRYPTED)


@dataclass(frozen=True, slots=True)
class Change:
    """Flows alike whose verdict would differ. Times are UTC microseconds of event_start.

    `source` and `destination` are those labels that the rules look at (and app and env, which people do), or an
    address of the first flow for a party without identity. `was` and `now` name the rule that decides, or what
    decides when it is none.
    """

    kind: Kind
    source: str
    destination: str
    service: str
    was: str
    now: str
    owner: str  # of the rule that decides now
    flows: int
    first: int
    last: int
    example: str  # event id


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a back-test says. Counts are of flows."""

    changes: tuple[Change, ...]
    flows: int
    judged: int
    situations: int
    unjudged: Mapping[str, int]  # why policy has no say, by the name of the reason
    first: int  # 0: there was nothing
    last: int
    lost: int  # events that never reached the store
    relabelled: int  # flows whose workload would bear other labels
    warnings: tuple[str, ...] = ()

    @property
    def regressions(self) -> bool:
        """Whether something that worked would not, or would lose its encryption."""
        return any(change.kind in REGRESSIONS for change in self.changes)

    def count(self, kind: Kind) -> int:
        """Flows of a kind of change."""
        return sum(change.flows for change in self.changes if change.kind is kind)


@dataclass(slots=True)
class _Group:
    flows: int = 0
    first: int = 0
    last: int = 0
    example: str = ""
    owner: str = ""

    def add(self, situation: Situation) -> None:
        if not self.flows or (situation.first, situation.example) < (self.first, self.example):
            self.first, self.example = situation.first, situation.example
        self.last = max(self.last, situation.last)
        self.flows += situation.flows


@dataclass(frozen=True, slots=True)
class _Key:
    """What changes of one group have in common. A party is its labels, or its place if it has none."""

    kind: Kind
    source: LabelSet | int
    destination: LabelSet | int
    service: str
    was: str
    now: str


@dataclass(slots=True)
class _Tally:
    groups: dict[_Key, _Group] = field(default_factory=dict)
    unjudged: Counter[str] = field(default_factory=Counter)
    flows: int = 0
    judged: int = 0
    relabelled: int = 0


def backtest(
    history: History,
    candidate: DocumentSet,
    window: Window = Window(),  # noqa: B008 -- frozen
    *,
    before: Sequence[WorkloadDoc] | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Judge the history by `candidate` (all of it: what it does not allow is denied).

    `before` are the Workload documents by which the recorded workloads got their labels; with them, workloads that
    `candidate` labels differently are judged by the labels they would have. None: labels stay as recorded.
    """
    engine = Engine(candidate)
    places = Places(engine.network_specs)
    words = history.words()
    span = history.span(window)
    relabel = Relabel(before, candidate.workloads, words) if before is not None else None
    if relabel is not None and not relabel.needed:
        relabel = None
    judge = Judge(engine, places, words, relabel)
    cuts = () if span is None else [c for c in flips(engine, judge.label_sets()) if span[0] < c <= span[1]]
    found = history.situations(window, places, cuts, by_workload=relabel is not None, progress=progress)
    tally = _Tally()
    # In order of time: the engine remembers what it decided, and a clock that goes back is not what it expects.
    for situation in sorted(found, key=lambda s: s.span):
        judge.take(situation, tally)
    return Outcome(
        tuple(_changes(tally, history)),
        tally.flows,
        tally.judged,
        len(found),
        dict(sorted(tally.unjudged.items())),
        *(span or (0, 0)),
        history.lost(window),
        tally.relabelled,
        tuple(history.warnings),
    )


class Judge:
    """Puts situations to an engine."""

    def __init__(self, engine: Engine, places: Places, words: Words, relabel: Relabel | None = None) -> None:
        self.engine = engine
        self.places = places
        self.words = words
        self.relabel = relabel
        self._known_names = {
            number: names for number, rule in words.rules.items() if (names := _names_of(rule)) is not None
        }
        self._asked = self._keys()
        self._shown: dict[LabelSet, LabelSet] = {}
        self._spoken = sorted(
            {
                (side.name, side.wildcard)
                for rule in engine.compiled
                for side in (rule.sentence.source, rule.sentence.destination)
                if isinstance(side, Fqdn)
            }
        )

    def _keys(self) -> frozenset[str]:
        """Labels by which changes are told apart: what the rules of then and now look at."""
        sentences = [rule.sentence for rule in self.engine.compiled]
        for entry in self.words.rules.values():
            with suppress(SectoolError):
                sentences.append(parse_sentence(entry.text))
        return keys_asked(sentences) | pod_keys(self.engine.documents.network_policies) | {"app", "env"}

    def _seen(self, labels: LabelSet) -> LabelSet:
        """The part of a party's labels by which changes are told apart; all if there is none."""
        shown = self._shown.get(labels)
        if shown is None:
            ours = {k: v for k, v in labels.items() if k in self._asked}
            if FEDERATED_LABEL not in ours:
                ours.pop(DOMAIN_LABEL, None)
            shown = self._shown[labels] = LabelSet(ours) if ours else labels
        return shown

    def label_sets(self) -> Iterable[LabelSet]:
        """All label sets that situations can have."""
        yield from self.words.labels.values()
        if self.relabel is not None:
            yield from self.relabel.made()

    def unjudged(self, situation: Situation) -> str:
        """Why policy has no say in a situation, in a word; "" when it has."""
        if situation.flags & FLAG_ADOPTED:
            return "adopted"
        reason = DropReason(situation.drop_reason) if _is_reason(situation.drop_reason) else None
        if situation.action not in _PASSED:
            if situation.action != Action.DENY or reason not in POLICY_REASONS:
                return reason.name.lower() if reason else f"reason_{situation.drop_reason}"
            if situation.flags & FLAG_COALESCED:
                return "coalesced"
        for number in (situation.source_labels, situation.destination_labels):
            if number and number not in self.words.labels:
                return "labels_unknown"
        return ""

    def labels(self, situation: Situation) -> tuple[LabelSet | None, LabelSet | None]:
        """Labels of source and destination, None without identity."""
        source = self.words.labels.get(situation.source_labels)
        destination = self.words.labels.get(situation.destination_labels)
        if self.relabel is not None:
            if source is not None:
                source = self.relabel.labels(situation.source_workload, source)
            if destination is not None:
                destination = self.relabel.labels(situation.destination_workload, destination)
        return source, destination

    def request(self, situation: Situation) -> Request:
        """The question that the flows of a situation ask."""
        source, destination = self.labels(situation)
        names = self._known_names.get(situation.rule)
        ends = (frozenset[str](), frozenset[str]()) if names is None else names
        can = (
            source is not None
            and destination is not None
            and situation.transport not in (ICMP, ICMP6)
            and situation.drop_reason != DropReason.ENCRYPTION_UNAVAILABLE
        )
        samples = self.places.samples
        return Request(
            Party(source, None, samples[situation.source_place], ends[0] if source is None else frozenset()),
            Party(
                destination,
                None,
                samples[situation.destination_place],
                ends[1] if destination is None else frozenset(),
            ),
            situation.transport,
            situation.port,
            situation.code,
            can,
        )

    def decide(self, situation: Situation) -> Decision | None:
        """The verdict as of the flows; None when it depends on host names that the history does not keep."""
        request = self.request(situation)
        decision = self.engine.decide(request, situation.first)
        if self._spoken and not self._certain(request, decision, situation):
            return None
        return decision

    def _certain(self, request: Request, decision: Decision, situation: Situation) -> bool:
        """Whether no other host names that the rules speak of would lead to another verdict."""
        strangers = [p for p in (request.source, request.destination) if p.labels is None]
        if not strangers:
            return True
        every = _named(request, frozenset(_example(name, wild) for name, wild in self._spoken))
        matching, _ = self.engine.matching(every, situation.first)
        tried = [
            side
            for rule in matching
            for side in (rule.sentence.source, rule.sentence.destination)
            if isinstance(side, Fqdn)
        ]
        if not tried:
            return True
        if len(tried) > _NAMES_TRIED:
            return False
        known = request.source.names | request.destination.names
        if all(side.matches(known) for side in tried):
            return True
        outcomes = [
            self.engine.evaluate(
                _named(request, known | {_example(side.name, side.wildcard)}), situation.first
            )
            for side in tried
        ]
        return all((d.action, d.encrypt) == (decision.action, decision.encrypt) for d in outcomes)

    def take(self, situation: Situation, tally: _Tally) -> None:
        """Add a situation to the tally."""
        tally.flows += situation.flows
        why = self.unjudged(situation)
        if why:
            tally.unjudged[why] += situation.flows
            return
        decision = self.decide(situation)
        if decision is None:
            tally.unjudged["host_names_unknown"] += situation.flows
            return
        tally.judged += situation.flows
        ends = self.labels(situation)
        recorded = (
            self.words.labels.get(situation.source_labels),
            self.words.labels.get(situation.destination_labels),
        )
        if ends != recorded:
            tally.relabelled += situation.flows
        kind = difference(situation, decision)
        if kind is None:
            return
        source, destination = ends
        key = _Key(
            kind,
            situation.source_place if source is None else self._seen(source),
            situation.destination_place if destination is None else self._seen(destination),
            describe(situation.transport, situation.port, situation.code),
            self._was(situation),
            _now(decision, kind),
        )
        group = tally.groups.setdefault(key, _Group())
        group.add(situation)
        deciding = decision.encrypt_rule if kind is Kind.NEWLY_ENCRYPTED else decision.rule
        group.owner = deciding.owner if deciding else ""

    def _was(self, situation: Situation) -> str:
        rule = self.words.rules.get(situation.rule)
        if rule is not None:
            return f"{rule.kind} {rule.policy}: {rule.text}"
        return "default" if situation.drop_reason == DropReason.DEFAULT_DENY else "a rule not recorded"


def difference(situation: Situation, decision: Decision) -> Kind | None:
    """How the verdict differs from the recorded one, if it does."""
    passes = decision.action in _PASSED
    if situation.action not in _PASSED:
        return Kind.NEWLY_ALLOWED if passes else None
    if not passes:
        return Kind.NEWLY_DENIED
    if situation.point != Point.LOCAL and situation.transport not in (
        ICMP,
        ICMP6,
    ):  # what never leaves is plain
        if situation.encrypted and not decision.encrypt:
            return Kind.NO_LONGER_ENCRYPTED
        if decision.encrypt and not situation.encrypted:
            return Kind.NEWLY_ENCRYPTED
    if decision.action == situation.action:
        return None
    return Kind.NOW_AUDITED if decision.action is Action.AUDIT else Kind.NO_LONGER_AUDITED


def flips(engine: Engine, label_sets: Iterable[LabelSet]) -> list[int]:
    """All moments (UTC microseconds, in order) at which an expiry or an age can change a verdict."""
    out: set[int] = set()
    conditions: set[Condition] = set()
    for rule in engine.compiled:
        if rule.sentence.until is not None:
            out.add(rule.sentence.until.us)
        conditions.update(c for c in rule.sentence.conditions if c.operator not in ("=", "!="))
    if not conditions:
        return sorted(out)
    values: dict[str, set[str]] = {}
    for labels in label_sets:
        for key, value in labels.items():
            values.setdefault(key, set()).add(value)
    for condition in conditions:
        right = condition.right
        others = values.get(right.key, set()) if isinstance(right, LabelRef) else {right}
        for value in values.get(condition.left.key, ()):
            for other in others:
                _, flip = ordered(quantity(value), condition.operator, quantity(other), 0)
                if flip is not None:
                    out.add(flip)
    return sorted(out)


def _is_reason(number: int) -> bool:
    return number in DropReason.__members__.values()


def _names_of(rule: RuleEntry) -> tuple[frozenset[str], frozenset[str]] | None:
    """Host names of source and destination that a recorded rule proves; None when it speaks of none."""
    if "fqdn:" not in rule.text:
        return None
    try:
        sentence: Sentence = parse_sentence(rule.text)
    except SectoolError:
        return None
    ends = [
        frozenset({_example(side.name, side.wildcard)}) if isinstance(side, Fqdn) else frozenset[str]()
        for side in (sentence.source, sentence.destination)
    ]
    return (ends[0], ends[1]) if any(ends) else None


def _example(name: str, wildcard: bool) -> str:
    return f"some.{name}" if wildcard else name


def _named(request: Request, names: frozenset[str]) -> Request:
    def party(one: Party) -> Party:
        return one if one.labels is not None else Party(None, None, one.address, names)

    return Request(
        party(request.source),
        party(request.destination),
        request.protocol,
        request.port,
        request.icmp_code,
        request.can_encrypt,
    )


def _now(decision: Decision, kind: Kind) -> str:
    rule = decision.encrypt_rule if kind is Kind.NEWLY_ENCRYPTED else decision.rule
    if rule is None:
        return "default"
    text = f"{rule.kind} {rule.policy}: {rule.text}"
    return (
        f"{text} (no encryption possible)" if decision.reason is DropReason.ENCRYPTION_UNAVAILABLE else text
    )


def _changes(tally: _Tally, history: History) -> list[Change]:
    strangers = [
        (group.first, group.example)
        for key, group in tally.groups.items()
        if isinstance(key.source, int) or isinstance(key.destination, int)
    ]
    addresses = history.examples(strangers)
    order = list(Kind)
    out = []
    for key, group in tally.groups.items():
        at, to = addresses.get(group.example, ("?", "?"))
        source = f"ip:{at}" if isinstance(key.source, int) else str(key.source) or "(no labels)"
        destination = (
            f"ip:{to}" if isinstance(key.destination, int) else str(key.destination) or "(no labels)"
        )
        out.append(
            Change(
                key.kind,
                source,
                destination,
                key.service,
                key.was,
                key.now,
                group.owner,
                group.flows,
                group.first,
                group.last,
                group.example,
            )
        )
    out.sort(key=lambda c: (order.index(c.kind), -c.flows, c.source, c.destination, c.service, c.was, c.now))
    return out
