"""Why a flow is decided as it is, and what would change that.

The verdict comes from `Engine.decide`, the rules that apply from the engine's own matching, and a proposed
sentence is put to the engine's `judge` before it is shown: nothing here decides by itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from sectool.events import Action, DropReason
from sectool.labels import DOMAIN_LABEL, FEDERATED_LABEL
from sectool.policy.engine import Decision, Engine, judge
from sectool.policy.model import DocumentKind, Mode, PolicyDoc, RuleDoc
from sectool.policy.network import IPAddress, parse_cidr
from sectool.policy.request import Party, Request
from sectool.policy.rules import CompiledRule, Miss, Networks, Phase, Rule, compile_rule
from sectool.policy.selector import Anyone, Cidr, Fqdn, Labels, Selector, equality, host_name
from sectool.policy.sentence import Sentence, Verb
from sectool.policy.service import PROTOCOL_NAMES, Service, describe
from sectool.policy.yamlpos import clean

MAX_NEAR: Final = 10


@dataclass(frozen=True, slots=True)
class NearMiss:
    """A rule and the parts of it that do not hold (none: it matches, but is staged or overruled)."""

    rule: Rule
    misses: tuple[Miss, ...]


class Remedy(StrEnum):
    """What would let the flow through."""

    NOTHING_NEEDED = "it is allowed already"
    SENTENCE = "a rule of your own"
    OWNER = "the owner of the rule that denies"
    ENFORCER = "an enforcer on both ends, or the owner of the rule that demands encryption"


@dataclass(frozen=True, slots=True)
class Explanation:
    """All there is to say about one verdict.

    `applied` are the enforced rules that match, in order of evaluation, `staged` the staged ones; `near` the
    rules one part away from matching (at most 10, `near_more` counts the rest); `nearest_allow` the allow
    rule that lacks least. `sentence` would allow the flow if put into a Policy; it is "" when none can.
    """

    request: Request
    decision: Decision
    revision: int
    applied: tuple[Rule, ...]
    staged: tuple[Rule, ...]
    near: tuple[NearMiss, ...]
    near_more: int
    nearest_allow: NearMiss | None
    remedy: Remedy
    sentence: str = ""
    isolated: tuple[tuple[str, tuple[str, ...]], ...] = ()  # direction, NetworkPolicies

    def lines(self) -> list[str]:
        """For people, plain text without terminal sequences."""
        return [clean(line) for line in (*self._verdict(), *self._rules(), *self._way_out())]

    def _verdict(self) -> Iterable[str]:
        decision, request = self.decision, self.request
        service = describe(request.protocol, request.port, request.icmp_code)
        yield f"{WORDS[decision.action]}: {request.source} -> {request.destination} {service}"
        if self.revision:
            yield f"policy revision {self.revision}"
        if decision.rule is None:
            yield "decided by default: no rule allows it"
            for direction, names in self.isolated:
                end = "calling" if direction == "egress" else "called"
                by = ", ".join(names)
                yield f"the {end} pod is isolated for {direction} by NetworkPolicy {by}, which does not let it pass"
        else:
            yield f"decided by {decision.rule.title} at {decision.rule.where}:"
            yield f"  {decision.rule.text}"
        if decision.reason is DropReason.ENCRYPTION_UNAVAILABLE:
            yield "that rule demands encryption, and one of the two ends has no enforcer to encrypt with"
        elif decision.encrypt_rule and decision.encrypt_rule != decision.rule:
            yield f"encrypted because of {decision.encrypt_rule.title}:"
            yield f"  {decision.encrypt_rule.text}"
        elif decision.encrypt:
            yield "encrypted because the same rule says so"
        if decision.pending_action is not Action.NONE:
            by = f"by {decision.pending_rule.title}" if decision.pending_rule else "by default"
            change = "also" if decision.pending_action is decision.action else "instead"
            yield f"with staged documents enforced: {change} {WORDS[decision.pending_action]} {by}"

    def _rules(self) -> Iterable[str]:
        for title, rules in (("rules that apply:", self.applied), ("staged rules that apply:", self.staged)):
            if rules:
                yield title
                for rule in rules:
                    yield f"  {rule.title}: {rule.text}"
        if self.near:
            yield "rules that nearly apply:"
            for near in self.near:
                yield f"  {near.rule.title}: {near.rule.text}"
                yield from (f"    but {_miss(miss)}" for miss in near.misses)
            if self.near_more:
                yield f"  and {self.near_more} more"

    def _way_out(self) -> Iterable[str]:
        near = self.nearest_allow
        if near and self.decision.action is not Action.ALLOW and near.misses:
            yield f"nearest rule that would allow it: {near.rule.title} at {near.rule.where}:"
            yield f"  {near.rule.text}"
            yield from (f"    but {_miss(miss)}" for miss in near.misses)
        elif near and self.decision.action is not Action.ALLOW:
            state = "it is only staged" if near.rule.mode is Mode.STAGE else "it is overruled"
            yield f"{near.rule.title} would allow it, but {state}"
        match self.remedy:
            case Remedy.SENTENCE:
                yield "this rule in a Policy would allow it:"
                yield f"  {self.sentence}"
            case Remedy.OWNER if self.decision.rule:
                owner = self.decision.rule.owner
                yield f"no rule of yours can allow it: talk to {owner}, who owns the rule that denies"
            case Remedy.ENFORCER if self.decision.rule:
                yield (
                    "it needs an enforcer on both ends, or "
                    f"{self.decision.rule.owner}, who owns the rule, must not demand encryption for it"
                )
            case _:
                return


WORDS: Final = {
    Action.ALLOW: "ALLOWED",
    Action.DENY: "DENIED",
    Action.AUDIT: "LET THROUGH FOR AUDIT",
    Action.NONE: "UNDECIDED",
    Action.ERROR: "FAILED",
}


def _miss(miss: Miss) -> str:
    return f"{miss.part + ' ' if miss.part in ('source', 'destination') else ''}{miss.clause}: {miss.found}"


def explain(engine: Engine, request: Request, now_us: int) -> Explanation:
    """Explain the verdict on `request` at `now_us` (UTC microseconds). Looks at every rule, so it is slow."""
    decision = engine.decide(request, now_us)
    matching, _ = engine.matching(request, now_us)
    source, destination = engine.facts(request.source), engine.facts(request.destination)
    near: list[NearMiss] = []
    more = 0
    nearest: tuple[tuple[int, bool, int], NearMiss] | None = None
    for rule in engine.compiled:
        misses = rule.misses(request, source, destination, now_us)
        if len(misses) == 1:
            if len(near) < MAX_NEAR:
                near.append(NearMiss(rule.rule, tuple(misses)))
            else:
                more += 1
        if rule.phase is Phase.INTENT_ALLOW:
            distance = (len(misses), rule.staged, rule.rank)
            if nearest is None or distance < nearest[0]:
                nearest = (distance, NearMiss(rule.rule, tuple(misses)))
    remedy, sentence = _remedy(engine, request, decision, [r for r in matching if not r.staged])
    return Explanation(
        request,
        decision,
        engine.revision,
        tuple(r.rule for r in matching if not r.staged),
        tuple(r.rule for r in matching if r.staged),
        tuple(near),
        more,
        nearest[1] if nearest else None,
        remedy,
        sentence,
        _isolated(engine, request) if decision.rule is None else (),
    )


def _isolated(engine: Engine, request: Request) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Why NetworkPolicies do not let it pass: the direction, and those that isolate the pod."""
    source, destination = engine.facts(request.source), engine.facts(request.destination)
    refusing = engine.network_policies.refusing(source, destination, request.protocol, request.port)
    return tuple((direction, tuple(doc.name for doc in docs)) for direction, docs in refusing)


def _remedy(
    engine: Engine, request: Request, decision: Decision, matching: list[CompiledRule]
) -> tuple[Remedy, str]:
    if decision.action is Action.ALLOW:
        return Remedy.NOTHING_NEEDED, ""
    sentence = allowing_sentence(engine, request)
    doc = PolicyDoc(DocumentKind.POLICY, "proposed", "you", (RuleDoc(sentence, ""),))
    candidate = compile_rule(doc, doc.rules[0], 1, Networks(engine.documents))
    candidate.rank = len(engine.compiled)
    tried = judge(sorted([*matching, candidate], key=lambda r: (r.phase, r.rank)), request.can_encrypt)
    if tried.action is Action.ALLOW:
        return Remedy.SENTENCE, str(sentence)
    if tried.reason is DropReason.ENCRYPTION_UNAVAILABLE:
        return Remedy.ENFORCER, ""
    return Remedy.OWNER, ""


def allowing_sentence(engine: Engine, request: Request) -> Sentence:
    """The narrowest natural sentence that allows this one service between parties like these two.

    Labels are asked for by the keys that intents of this engine use (all keys if they use none of them); a
    party without labels by its host name or, failing that, its address.
    """
    keys: Counter[str] = Counter()
    for rule in engine.compiled:
        if rule.rule.kind != DocumentKind.POLICY:
            continue
        for side in (rule.sentence.source, rule.sentence.destination):
            if isinstance(side, Labels):
                keys.update({clause.key for clause in side.clauses})
    services: tuple[Service, ...] = ()
    if request.protocol in PROTOCOL_NAMES:
        services = (Service(request.protocol, request.port, request.port),)
    return Sentence(Verb.ALLOW, _naming(request.source, keys), _naming(request.destination, keys), services)


def _naming(party: Party, keys: Counter[str]) -> Selector:
    if party.labels:
        used = sorted((key for key in party.labels if key in keys), key=lambda key: (-keys[key], key))
        if FEDERATED_LABEL in party.labels and DOMAIN_LABEL in party.labels:
            return equality(
                party.labels,
                [DOMAIN_LABEL, *(k for k in used if k not in (DOMAIN_LABEL, FEDERATED_LABEL))],
            )
        return equality(party.labels, used or list(party.labels))
    for name in sorted(party.names):
        with suppress(ValueError):  # names come from DNS; what is none cannot be put into a sentence
            return Fqdn(host_name(name))
    if party.address is not None:
        return Cidr(parse_cidr(_single(party.address)))
    return Anyone()


def _single(address: IPAddress) -> str:
    mapped = getattr(address, "ipv4_mapped", None)
    plain: IPAddress = mapped or address
    return f"{str(plain).partition('%')[0]}/{plain.max_prefixlen}"
