"""A rule as the engine holds it: compiled for matching, and able to say why it does not match."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Final, NamedTuple

from sectool.labels import DOMAIN_LABEL, FEDERATED_LABEL, stable_id
from sectool.policy.model import DocumentSet, Mode, PolicyDoc, RuleDoc
from sectool.policy.network import IPAddress, NetworkSpec
from sectool.policy.request import Request
from sectool.policy.selector import Anyone, Cidr, Clause, Fqdn, Labels, NamedNet, Op, Selector
from sectool.policy.sentence import Sentence, Verb
from sectool.policy.service import describe


class Phase(IntEnum):
    """The place of a rule in the order of evaluation (see sectool.policy.engine)."""

    GUARDRAIL_DENY = 1
    GUARDRAIL_ENCRYPTION = 2
    INTENT_DENY = 3
    INTENT_ALLOW = 4
    INTENT_AUDIT = 5


_PHASES = {
    ("Guardrail", Verb.DENY): Phase.GUARDRAIL_DENY,
    ("Guardrail", Verb.REQUIRE): Phase.GUARDRAIL_ENCRYPTION,
    ("Policy", Verb.DENY): Phase.INTENT_DENY,
    ("Policy", Verb.ALLOW): Phase.INTENT_ALLOW,
    ("Policy", Verb.AUDIT): Phase.INTENT_AUDIT,
    ("NetworkPolicy", Verb.ALLOW): Phase.INTENT_ALLOW,
}


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule for people and records. `index` counts from 1 inside its document; `where` is file:line:column.

    `id` is the 63-bit content id of kind, policy name and canonical sentence: the same on every host and in
    every revision that holds this very rule.
    """

    id: int
    policy: str
    kind: str
    owner: str
    index: int
    text: str
    where: str
    mode: Mode

    @property
    def title(self) -> str:
        """`Policy shop, rule 2 (owner team-shop)`"""
        return f"{self.kind} {self.policy}, rule {self.index} (owner {self.owner})"

    def describe(self) -> dict[str, object]:
        """For programs."""
        return {
            "id": self.id,
            "kind": self.kind,
            "policy": self.policy,
            "owner": self.owner,
            "index": self.index,
            "text": self.text,
            "where": self.where,
            "mode": str(self.mode),
        }


_OURS: Final = Clause(FEDERATED_LABEL, Op.ABSENT)


def within_domain(selector: Selector) -> Selector:
    """What a label selector of a rule that lets something pass speaks of: workloads of our own trust domain.

    A federated peer is meant only where a clause says so, by `domain` or `federated`: neither `app=web` nor
    `!legacy` lets in somebody whose labels others vouch for. Selectors of rules that deny or demand encryption
    speak of everybody.
    """
    if not isinstance(selector, Labels):
        return selector
    if any(clause.key in (DOMAIN_LABEL, FEDERATED_LABEL) for clause in selector.clauses):
        return selector
    return Labels((*selector.clauses, _OURS))


class Facts(NamedTuple):
    """What rules see of a party: labels (None: no proven identity), networks of its address, host names."""

    labels: Mapping[str, str] | None
    networks: frozenset[int]
    names: frozenset[str]


class Miss(NamedTuple):
    """A part of a rule that does not hold. `part` is source, destination, service, where or until."""

    part: str
    clause: str  # as the sentence spells it
    found: str  # what is the case instead


class CompiledRule:
    """One rule, its networks resolved to numbers of the engine's network table."""

    __slots__ = (
        "destination_network",
        "phase",
        "rank",
        "rule",
        "sentence",
        "source_network",
        "staged",
        "timed",
    )

    def __init__(self, rule: Rule, sentence: Sentence, networks: Networks) -> None:
        self.rule = rule
        self.phase = _PHASES[rule.kind, sentence.verb]
        if self.phase in (Phase.INTENT_ALLOW, Phase.INTENT_AUDIT):
            sentence = replace(
                sentence,
                source=within_domain(sentence.source),
                destination=within_domain(sentence.destination),
            )
        self.sentence = sentence
        self.rank = 0  # its place among all rules, set by the engine
        self.staged = rule.mode is Mode.STAGE
        self.timed = bool(sentence.conditions or sentence.until)
        self.source_network = networks.number_of(sentence.source)
        self.destination_network = networks.number_of(sentence.destination)

    def matches_parties(self, source: Facts, destination: Facts) -> bool:
        """Whether both selectors hold."""
        return _holds(self.sentence.source, self.source_network, source) and _holds(
            self.sentence.destination, self.destination_network, destination
        )

    def matches_source(self, facts: Facts) -> bool:
        """Whether the selector of the calling side holds."""
        return _holds(self.sentence.source, self.source_network, facts)

    def matches_destination(self, facts: Facts) -> bool:
        """Whether the selector of the called side holds."""
        return _holds(self.sentence.destination, self.destination_network, facts)

    def matches_service(self, protocol: int, port: int, code: int) -> bool:
        services = self.sentence.services
        return not services or any(s.matches(protocol, port, code) for s in services)

    def in_force(self, source: Facts, destination: Facts, now_us: int) -> tuple[bool, int | None]:
        """Whether `until` and `where` hold now, and when after now that may change, if ever."""
        flips: list[int] = []
        holds = True
        until = self.sentence.until
        if until:
            if now_us < until.us:
                flips.append(until.us)
            else:
                return False, None
        for condition in self.sentence.conditions:
            ok, flip = condition.holds(source.labels, destination.labels, now_us)
            holds = holds and ok
            if flip is not None:
                flips.append(flip)
        return holds, min(flips) if flips else None

    def misses(self, request: Request, source: Facts, destination: Facts, now_us: int) -> list[Miss]:
        """All parts that do not hold; empty exactly when the rule matches."""
        sentence = self.sentence
        out = _selector_misses("source", sentence.source, self.source_network, source, request.source.address)
        out += _selector_misses(
            "destination",
            sentence.destination,
            self.destination_network,
            destination,
            request.destination.address,
        )
        if not self.matches_service(request.protocol, request.port, request.icmp_code):
            spelled = "on " + ",".join(map(str, sentence.services))
            out.append(
                Miss(
                    "service",
                    spelled,
                    f"the call is {describe(request.protocol, request.port, request.icmp_code)}",
                )
            )
        for condition in sentence.conditions:
            if not condition.holds(source.labels, destination.labels, now_us)[0]:
                out.append(
                    Miss("where", f"where {condition}", _compared(str(condition), source, destination))
                )
        if sentence.until and now_us >= sentence.until.us:
            out.append(Miss("until", f"until {sentence.until}", "that time is over"))
        return out


class Networks:
    """Numbers the networks that rules speak of, each once, in the order of first use."""

    def __init__(self, documents: DocumentSet) -> None:
        self._named = {doc.name: doc.spec for doc in documents.networks}
        self._numbers: dict[Selector, int] = {}
        self.specs: list[NetworkSpec] = []

    def number_of(self, selector: Selector) -> int:
        """The number of a network selector; -1 for every other selector."""
        if not isinstance(selector, (NamedNet, Cidr)):
            return -1
        if selector not in self._numbers:
            self._numbers[selector] = len(self.specs)
            self.specs.append(
                self._named[selector.name]
                if isinstance(selector, NamedNet)
                else NetworkSpec((selector.network,))
            )
        return self._numbers[selector]

    def add(self, spec: NetworkSpec) -> int:
        """The number of addresses that no selector names."""
        self.specs.append(spec)
        return len(self.specs) - 1


def compile_rules(documents: DocumentSet, networks: Networks) -> list[CompiledRule]:
    """All rules that are not off, in order of evaluation: by phase, document name, and place in it."""
    out = [
        compile_rule(doc, rule, index, networks)
        for doc in (*documents.guardrails, *documents.policies)
        if doc.mode is not Mode.OFF
        for index, rule in enumerate(doc.rules, 1)
    ]
    out.sort(key=lambda rule: rule.phase)
    for rank, rule in enumerate(out):
        rule.rank = rank
    return out


def compile_rule(doc: PolicyDoc, rule: RuleDoc, index: int, networks: Networks) -> CompiledRule:
    text = str(rule.sentence)
    number = stable_id(f"{doc.kind}/{doc.name}/{text}".encode())
    return CompiledRule(
        Rule(number, doc.name, doc.kind.value, doc.owner, index, text, rule.where, doc.mode),
        rule.sentence,
        networks,
    )


def _holds(selector: Selector, network: int, facts: Facts) -> bool:
    if isinstance(selector, Labels):
        labels = facts.labels
        if labels is None:
            return False
        return all(clause.holds(labels) for clause in selector.clauses)
    if network >= 0:
        return network in facts.networks
    if isinstance(selector, Fqdn):
        return selector.matches(facts.names)
    return True


def _selector_misses(
    part: str, selector: Selector, network: int, facts: Facts, address: IPAddress | None
) -> list[Miss]:
    if _holds(selector, network, facts):
        return []
    match selector:
        case Labels(clauses):
            labels = facts.labels
            if labels is None:
                return [Miss(part, str(selector), "no proven identity, so no labels")]
            return [
                Miss(part, _as_written(clauses), _foreign(labels))
                if c is _OURS
                else Miss(part, str(c), _label_found(labels, c.key, c.op))
                for c in clauses
                if not c.holds(labels)
            ]
        case Fqdn():
            names = ", ".join(sorted(facts.names))
            return [Miss(part, str(selector), f"known names: {names}" if names else "no host name is known")]
        case Anyone():
            return []
        case _:
            return [
                Miss(part, str(selector), "no address" if address is None else f"the address is {address}")
            ]


def _as_written(clauses: tuple[Clause, ...]) -> str:
    return str(Labels(tuple(clause for clause in clauses if clause is not _OURS)))


def _foreign(labels: Mapping[str, str]) -> str:
    domain = labels.get(DOMAIN_LABEL, "?")
    return f"it is of trust domain {domain}, and the rule does not say {DOMAIN_LABEL}={domain}"


def _label_found(labels: Mapping[str, str], key: str, op: Op) -> str:
    if key not in labels:
        return f"label {key} is absent"
    return f"label {key} is present" if op is Op.ABSENT else f"{key}={labels[key]}"


def _compared(condition: str, source: Facts, destination: Facts) -> str:
    found = []
    for word in condition.split(" "):
        side, dot, key = word.partition(".")
        if dot and side in ("source", "destination"):
            labels = source.labels if side == "source" else destination.labels
            if labels is None:
                found.append(f"the {side} has no proven identity")
            else:
                found.append(f"{word} is {labels[key] or 'empty'}" if key in labels else f"{word} is absent")
    return ", ".join(found)
