"""A whole answer about one flow: the verdict of each side, who is behind the rules, and what a new rule would let in.

Both ends of a flow judge it, the initiator what leaves it (egress), the responder what reaches it (ingress); an end
without a proven identity has no enforcer and judges nothing. The two may know different things: host names are known
only where they were looked up, at the initiator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final

from sectool.events import Action
from sectool.labels import LabelSet
from sectool.policy.documents import parse
from sectool.policy.engine import Engine, judge
from sectool.policy.explanation import WORDS, Explanation, Remedy, explain
from sectool.policy.model import DocumentKind, PolicyDoc, RuleDoc
from sectool.policy.request import NO_NAMES, Party, Request
from sectool.policy.rules import Facts, Networks, Rule, compile_rule
from sectool.policy.sentence import parse_sentence
from sectool.policy.yamlpos import clean

MAX_PAIRS: Final = 20_000  # known pairs a proposed sentence is tried on
MAX_TOLD: Final = 10
MAX_REVISIONS: Final = 200  # looked back for the beginning of a rule


@dataclass(frozen=True, slots=True)
class Side:
    """What one end says. `explanation` is None when it has no enforcer."""

    point: str  # initiator or responder
    explanation: Explanation | None

    def line(self) -> str:
        """For people."""
        name = f"{self.point} ({'egress' if self.point == 'initiator' else 'ingress'})"
        if self.explanation is None:
            return f"{name}: has no proven identity, so no enforcer judges there"
        decision = self.explanation.decision
        by = f"by {decision.rule.title}" if decision.rule else "by default"
        crypto = ", encrypted" if decision.encrypt and decision.action is not Action.DENY else ""
        return f"{name}: {WORDS[decision.action]} {by}{crypto}"


@dataclass(frozen=True, slots=True)
class Origin:
    """The revision that brought a rule, without a gap until now. `exact`: it was not there before."""

    revision: int
    applied_us: int
    author: str
    roles: tuple[str, ...]
    reason: str
    exact: bool = True


@dataclass(frozen=True, slots=True)
class Widening:
    """What a sentence would let in beside the flow that was asked about, of what is known.

    `pairs` are at most 10 of `count` pairs of label sets; `partial`: so many were known that not all were tried.
    """

    pairs: tuple[tuple[LabelSet | None, LabelSet | None], ...] = ()
    count: int = 0
    tried: int = 0
    partial: bool = False


@dataclass(frozen=True, slots=True)
class Inquiry:
    """All of it. `main` is the explanation that decides: of the side that denies, else of the one that judges."""

    sides: tuple[Side, Side]
    main: Explanation

    @property
    def allowed(self) -> bool:
        """Whether both ends let it through (an end without an enforcer has no say)."""
        return self.main.decision.action in (Action.ALLOW, Action.AUDIT)


def inquire(engine: Engine, request: Request, now_us: int) -> Inquiry:
    """Ask each side that judges, at `now_us` (UTC microseconds)."""
    unnamed = replace(
        request,
        source=replace(request.source, names=NO_NAMES),
        destination=replace(request.destination, names=NO_NAMES),
    )
    initiator = explain(engine, request, now_us) if request.source.labels is not None else None
    responder = None
    if request.destination.labels is not None:
        responder = initiator if initiator and unnamed == request else explain(engine, unnamed, now_us)
    asked = [e for e in (initiator, responder) if e is not None]
    denying = [e for e in asked if e.decision.action not in (Action.ALLOW, Action.AUDIT)]
    main = next(iter((*denying, *asked)), None) or explain(engine, request, now_us)
    return Inquiry((Side("initiator", initiator), Side("responder", responder)), main)


def widening(engine: Engine, found: Explanation, known: Iterable[LabelSet], now_us: int) -> Widening:
    """Try the sentence of an explanation on all known pairs: which of those denied now would it let in?"""
    if found.remedy is not Remedy.SENTENCE:
        return Widening()
    sentence = parse_sentence(found.sentence)
    doc = PolicyDoc(DocumentKind.POLICY, "proposed", "you", (RuleDoc(sentence, ""),))
    rule = compile_rule(doc, doc.rules[0], 1, Networks(engine.documents))
    rule.rank = len(engine.compiled)
    asked = found.request
    parties = [Party(labels) for labels in dict.fromkeys(known)]
    sources = _fitting(engine, asked.source, parties, rule.matches_source)
    destinations = _fitting(engine, asked.destination, parties, rule.matches_destination)
    pairs: list[tuple[LabelSet | None, LabelSet | None]] = []
    count = tried = 0
    for source, destination in _pairs(sources, destinations):
        if (source.labels, destination.labels) == (asked.source.labels, asked.destination.labels):
            continue
        if tried == MAX_PAIRS:
            return Widening(tuple(pairs), count, tried, True)
        tried += 1
        both = source.labels is not None and destination.labels is not None
        request = Request(source, destination, asked.protocol, asked.port, asked.icmp_code, both)
        if engine.evaluate(request, now_us).action is not Action.DENY:
            continue
        matching, _ = engine.matching(request, now_us)
        after = judge(
            sorted((*(r for r in matching if not r.staged), rule), key=lambda r: (r.phase, r.rank)), both
        )
        if after.action is not Action.DENY:
            count += 1
            if len(pairs) < MAX_TOLD:
                pairs.append((source.labels, destination.labels))
    return Widening(tuple(pairs), count, tried)


def _fitting(
    engine: Engine, asked: Party, parties: Sequence[Party], matches: Callable[[Facts], bool]
) -> list[Party]:
    if asked.labels is None:  # named by its address or host name: nobody else
        return [asked]
    return [party for party in parties if matches(engine.facts(party))]


def _pairs(sources: Sequence[Party], destinations: Sequence[Party]) -> Iterator[tuple[Party, Party]]:
    for source in sources:
        for destination in destinations:
            yield source, destination


def origin(
    rule: int, revisions: Iterable[tuple[Origin, str]], *, still: Callable[[], bool] = lambda: True
) -> Origin | None:
    """Since when a rule (by id) has been there, going back through revisions (newest first, each with its text).

    The answer is not exact when the past was not looked at to the end: after 200 revisions, or when `still` says no.
    """
    found: Origin | None = None
    for number, (revision, text) in enumerate(revisions):
        if number == MAX_REVISIONS or not still():
            return replace(found, exact=False) if found else None
        if Engine(parse(text, f"revision {revision.revision}")).rule(rule) is None:
            break
        found = revision
    return found


def widening_lines(found: Widening, sentence: str) -> list[str]:
    """For people."""
    if not sentence:
        return []
    if not found.tried:
        return ["nobody else that is known here fits that rule"]
    most = "at least " if found.partial else ""
    if not found.count:
        return [f"of {most}{found.tried} other known pairs that fit it, none would be let in by it"]
    out = [f"it would also let in {most}{found.count} of {found.tried} other known pairs that fit it:"]
    out += [clean(f"  {source} -> {destination}") for source, destination in found.pairs]
    if found.count > len(found.pairs):
        out.append(f"  and {found.count - len(found.pairs)} more")
    return out


def rules_of_interest(inquiry: Inquiry) -> list[Rule]:
    """Rules whose beginning is worth telling: what decided, what demanded encryption, what is nearest."""
    decision = inquiry.main.decision
    near = inquiry.main.nearest_allow
    found = (decision.rule, decision.encrypt_rule, near.rule if near else None)
    return list(dict.fromkeys(rule for rule in found if rule is not None))
