"""What differs in effect between two policy sets: who may call whom by what, not how it is written.

A verdict can only differ for flows of which a rule speaks that the two sets do not share. Each such rule is looked at
in two ways:

    known      for the workloads that there are, by the labels that rules look at: every pair, every service
               (NetworkPolicies that differ are looked at for all pairs, and only so)
    possible   for all flows that could be: the rule's set of flows (sectool.policy.algebra) is divided by all other
               rules that overlap it, so that no rule tells two flows of a part apart, and one of each part is asked

Both ask the engine. The second is exact but for `where` comparisons with an order or between two labels, of which it
looks for an example that holds and one that does not; and where a rule would fall into too many parts, it says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from sectool.events import Action
from sectool.labels import DOMAIN_LABEL, FEDERATED_LABEL, LabelSet
from sectool.policy.algebra import Region, Regions
from sectool.policy.condition import LabelRef
from sectool.policy.engine import Decision, Engine
from sectool.policy.model import NAMESPACE_LABEL, POD_LABEL, Mode, NetworkPolicyDoc, canonical_document
from sectool.policy.netpol import KIND, NAMESPACE_KEYS, PORT_LABEL, pod_of
from sectool.policy.places import Places
from sectool.policy.request import Party, Request
from sectool.policy.rules import CompiledRule, Networks, Rule
from sectool.policy.selector import Anyone, Cidr, Fqdn, Labels, NamedNet, Selector
from sectool.policy.sentence import Sentence, Verb, parse_sentence
from sectool.policy.service import ICMP, ICMP6, PROTOCOL_NAMES, Service
from sectool.policy.witness import witness

MAX_PARTS: Final = 400  # of one rule's flows
MAX_ASKED: Final = 400_000  # questions about known workloads
_OTHER_PROTOCOL: Final = 132  # stands for what no rule can name


class Effect(StrEnum):
    """What happens to flows."""

    ALLOWED = "newly allowed"
    DENIED = "newly denied"
    ENCRYPTED = "newly encrypted"
    PLAIN = "no longer encrypted"
    AUDITED = "now audited"
    UNAUDITED = "no longer audited"


@dataclass(frozen=True, slots=True)
class Difference:
    """Flows alike whose verdict differs. `pairs` is how many pairs of known label sets these are (0: a possible one).

    `before` and `after` name what decides. `rule` is one that only one of the sets has, and that speaks of them.
    """

    effect: Effect
    source: str
    destination: str
    services: str
    before: str
    after: str
    rule: str
    pairs: int


@dataclass(frozen=True, slots=True)
class Effective:
    """All differences. `notes` tell what was not looked at."""

    known: tuple[Difference, ...]
    possible: tuple[Difference, ...]
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.known or self.possible)


def effective(old: Engine, new: Engine, known: Iterable[LabelSet], now_us: int) -> Effective:
    """Compare two engines at a moment (UTC microseconds). `known` are the label sets of the workloads there are."""
    changed = _changed(old, new)
    notes: list[str] = []
    pods = _pods_changed(old, new)
    if pods is not None:
        notes.append("NetworkPolicies were compared for the workloads in the history only")
    comparison = _Comparison(old, new, now_us)
    asked = [*changed, (pods, new)] if pods is not None else changed
    pairs = _Known(comparison, list(known)).differences(asked, notes)
    possible = _possible(comparison, changed, notes)
    return Effective(tuple(pairs), tuple(possible), tuple(dict.fromkeys(notes)))


def _changed(old: Engine, new: Engine) -> list[tuple[CompiledRule, Engine]]:
    """Rules that only one of them has, with their engine. A rule whose network changed is another rule."""
    meanings = [{_meaning(rule, engine) for rule in engine.compiled} for engine in (old, new)]
    return [
        (rule, engine)
        for engine, others in ((old, meanings[1]), (new, meanings[0]))
        for rule in engine.compiled
        if _meaning(rule, engine) not in others
    ]


def _pods_changed(old: Engine, new: Engine) -> CompiledRule | None:
    """A rule that speaks of everything, standing for NetworkPolicies that differ; None when they do not."""
    docs = [e.documents.network_policies for e in (old, new)]
    if [canonical_document(d) for d in docs[0]] == [canonical_document(d) for d in docs[1]]:
        return None
    rule = Rule(0, "", KIND, "", 0, "NetworkPolicies that differ", "", Mode.ENFORCE)
    return CompiledRule(rule, Sentence(Verb.ALLOW, Anyone(), Anyone()), Networks(new.documents))


def _meaning(rule: CompiledRule, engine: Engine) -> tuple[object, ...]:
    sentence = rule.sentence
    plain = replace(sentence, because="")
    specs = tuple(
        engine.network_specs[number] if number >= 0 else None
        for number in (rule.source_network, rule.destination_network)
    )
    named = replace(
        plain,
        source=_unnamed(plain.source),
        destination=_unnamed(plain.destination),
    )
    return rule.phase, str(named), rule.staged, specs


def _unnamed(side: Selector) -> Selector:
    """Networks count by what they hold, not by their name."""
    return NamedNet("x") if isinstance(side, NamedNet | Cidr) else side


@dataclass(slots=True)
class _Comparison:
    old: Engine
    new: Engine
    now_us: int

    def verdicts(self, request: Request) -> tuple[Effect, Decision, Decision] | None:
        """How the verdicts on a request differ, if they do."""
        before = self.old.decide(request, self.now_us)
        after = self.new.decide(request, self.now_us)
        effect = _effect(before, after)
        return None if effect is None else (effect, before, after)


def _effect(before: Decision, after: Decision) -> Effect | None:
    was, now = (d.action in (Action.ALLOW, Action.AUDIT) for d in (before, after))
    if was != now:
        return Effect.ALLOWED if now else Effect.DENIED
    if not now:
        return None
    if before.encrypt != after.encrypt:
        return Effect.ENCRYPTED if after.encrypt else Effect.PLAIN
    if before.action is after.action:
        return None
    return Effect.AUDITED if after.action is Action.AUDIT else Effect.UNAUDITED


def _decider(decision: Decision) -> str:
    return (
        f"{decision.rule.kind} {decision.rule.policy}: {decision.rule.text}" if decision.rule else "default"
    )


# --- workloads there are ----------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Row:
    pairs: set[tuple[str, str]] = field(default_factory=set)
    services: set[Service] = field(default_factory=set)


class _Known:
    """Asks for all pairs of known workloads, those that no rule tells apart as one."""

    def __init__(self, comparison: _Comparison, known: Sequence[LabelSet]) -> None:
        self._comparison = comparison
        engines = (comparison.old, comparison.new)
        rules = [rule for engine in engines for rule in engine.compiled]
        policies = [doc for engine in engines for doc in engine.documents.network_policies]
        self._keys = keys_asked(rule.sentence for rule in rules) | pod_keys(policies)
        self._ports = bool(policies)
        counted: dict[LabelSet, int] = {}
        for labels in known:
            seen = LabelSet({k: v for k, v in labels.items() if k in self._keys or self._names_port(k)})
            counted[seen] = counted.get(seen, 0) + 1
        self._members = sorted(counted.items(), key=lambda entry: str(entry[0]))
        self._strangers = self._outside(rules)
        self._atoms = _atoms(rules, _pod_ports(policies, known))

    def _names_port(self, key: str) -> bool:
        return self._ports and key.startswith(PORT_LABEL)

    def _outside(self, rules: Sequence[CompiledRule]) -> list[Party]:
        """Parties without identity that rules tell apart: by network and by host name."""
        specs = [*self._comparison.old.network_specs, *self._comparison.new.network_specs]
        names = sorted(
            {
                f"some.{side.name}" if side.wildcard else side.name
                for rule in rules
                for side in (rule.sentence.source, rule.sentence.destination)
                if isinstance(side, Fqdn)
            }
        )
        places = Places(specs).samples
        return [
            *(Party(None, None, address) for address in places),
            *(Party(None, None, places[0], frozenset({name})) for name in names),
        ]

    def differences(
        self, changed: Sequence[tuple[CompiledRule, Engine]], notes: list[str]
    ) -> list[Difference]:
        """Differences between pairs of which at least one is a known workload."""
        rows: dict[tuple[Effect, str, str, str, str, str], _Row] = {}
        counts: dict[tuple[str, str], int] = {}
        asked = 0
        for rule, engine in changed:
            sources = list(self._speaks_of(rule, engine, True))
            destinations = list(self._speaks_of(rule, engine, False))
            atoms = [a for a in self._atoms if rule.matches_service(a.protocol, a.low, a.code or 0)]
            asked += len(sources) * len(destinations) * len(atoms)
            if asked > MAX_ASKED:
                notes.append(f"too many known pairs for {rule.rule.title}: these are left out")
                continue
            for source, source_count in sources:
                for destination, destination_count in destinations:
                    if source.labels is None and destination.labels is None:
                        continue
                    both = source.labels is not None and destination.labels is not None
                    ends = (_shown(source), _shown(destination))
                    counts[ends] = source_count * destination_count
                    for atom in atoms:
                        can = both and atom.protocol not in (ICMP, ICMP6)
                        request = Request(source, destination, atom.protocol, atom.low, atom.code or 0, can)
                        found = self._comparison.verdicts(request)
                        if found is not None:
                            effect, before, after = found
                            key = (effect, *ends, _decider(before), _decider(after), rule.rule.text)
                            row = rows.setdefault(key, _Row())
                            row.services.add(atom)
        seen: set[tuple[Effect, str, str, str]] = set()
        out = []
        for (effect, at, to, was, now, text), row in rows.items():
            services = spelled(row.services, self._atoms)
            if (effect, at, to, services) in seen:
                continue
            seen.add((effect, at, to, services))
            out.append(Difference(effect, at, to, services, was, now, text, counts[at, to]))
        return _sorted(out)

    def _speaks_of(self, rule: CompiledRule, engine: Engine, calling: bool) -> Iterator[tuple[Party, int]]:
        side = rule.sentence.source if calling else rule.sentence.destination
        for labels, count in self._members:
            party = Party(labels)
            if isinstance(side, Labels):
                if all(clause.holds(labels) for clause in side.clauses):
                    yield party, count
            elif not isinstance(side, NamedNet | Cidr | Fqdn):
                yield party, count
        if isinstance(side, Labels):
            return
        number = rule.source_network if calling else rule.destination_network
        for party in self._strangers:
            facts = engine.facts(party)
            if number >= 0 and number not in facts.networks:
                continue
            if isinstance(side, Fqdn) and not side.matches(party.names):
                continue
            yield party, 1


def keys_asked(sentences: Iterable[Sentence]) -> frozenset[str]:
    """The labels that sentences look at."""
    out = {DOMAIN_LABEL, FEDERATED_LABEL}
    for sentence in sentences:
        for side in (sentence.source, sentence.destination):
            if isinstance(side, Labels):
                out.update(clause.key for clause in side.clauses)
        for condition in sentence.conditions:
            out.add(condition.left.key)
            if isinstance(condition.right, LabelRef):
                out.add(condition.right.key)
    return frozenset(out)


def pod_keys(policies: Iterable[NetworkPolicyDoc]) -> frozenset[str]:
    """Labels of workloads that NetworkPolicies look at, ports aside."""
    pods: set[str] = set()
    spaces: set[str] = set()
    for doc in policies:
        pods.update(clause.key for clause in doc.selector)
        for rule in (*(doc.ingress or ()), *(doc.egress or ())):
            for peer in rule.peers:
                pods.update(clause.key for clause in peer.pods or ())
                spaces.update(clause.key for clause in peer.namespaces or ())
    out = {*NAMESPACE_KEYS, *pods, *(POD_LABEL + k for k in pods), *(NAMESPACE_LABEL + k for k in spaces)}
    return frozenset(out) if pods or spaces or policies else frozenset()


def _pod_ports(policies: Iterable[NetworkPolicyDoc], known: Iterable[LabelSet]) -> list[Service]:
    """Services that NetworkPolicies tell apart; names are those of the known workloads."""
    entries = [
        port
        for doc in policies
        for rule in (*(doc.ingress or ()), *(doc.egress or ()))
        for port in rule.ports
    ]
    out = [Service(port.protocol, port.low, port.high) for port in entries if not port.name]
    if any(port.name for port in entries):
        for labels in known:
            pod = pod_of(labels)
            names = {port.name for port in entries if port.name}
            found = [pod.port(name) for name in names] if pod is not None else []
            out += [Service(protocol, number, number) for protocol, number in filter(None, found)]
    return [service for service in out if service.protocol in PROTOCOL_NAMES]


def _atoms(rules: Iterable[CompiledRule], more: Iterable[Service] = ()) -> list[Service]:
    """Services that no rule divides, each protocol's together all there are."""
    edges: dict[int, set[int]] = {protocol: {0} for protocol in PROTOCOL_NAMES}
    codes: dict[tuple[int, int], set[int]] = {}
    for service in more:
        edges[service.protocol].update((service.low, service.high + 1))
    for rule in rules:
        for service in rule.sentence.services:
            edges[service.protocol].update((service.low, service.high + 1))
            if service.code is not None:
                codes.setdefault((service.protocol, service.low), set()).add(service.code)
    out = [Service(_OTHER_PROTOCOL)]
    for protocol, starts in sorted(edges.items()):
        end = 255 if protocol in (ICMP, ICMP6) else 65535
        inside = sorted(s for s in starts if s <= end)
        for low, after in zip(inside, [*inside[1:], end + 1], strict=True):
            out.append(Service(protocol, low, after - 1))
            out += [Service(protocol, low, low, code) for code in sorted(codes.get((protocol, low), ()))]
    return out


def spelled(services: Iterable[Service], atoms: Sequence[Service]) -> str:
    """Services as a sentence writes them, neighbours put together; `all` for all there are."""
    found = set(services)
    if found >= set(atoms):
        return "all"
    parts: list[str] = []
    for protocol in sorted({s.protocol for s in found}):
        plain = sorted((s.low, s.high) for s in found if s.protocol == protocol and s.code is None)
        whole = {s for s in atoms if s.protocol == protocol} <= found
        if protocol not in PROTOCOL_NAMES:
            parts.append("other protocols")
            continue
        if whole:
            parts.append(PROTOCOL_NAMES[protocol])
            continue
        joined: list[tuple[int, int]] = []
        for low, high in plain:
            if joined and low == joined[-1][1] + 1:
                joined[-1] = (joined[-1][0], high)
            else:
                joined.append((low, high))
        parts += [str(Service(protocol, low, high)) for low, high in joined]
        coded = [s for s in found if s.protocol == protocol and s.code is not None]
        parts += [str(s) for s in sorted(coded, key=lambda s: (s.low, s.code or 0))]
    return ",".join(parts)


def _shown(party: Party) -> str:
    if party.labels is not None:
        ours = {k: v for k, v in party.labels.items() if k != DOMAIN_LABEL}  # as a rule means it
        shown = party.labels if FEDERATED_LABEL in party.labels else LabelSet(ours)
        return str(shown) or "(none of the labels that rules look at)"
    return ",".join([f"fqdn:{name}" for name in sorted(party.names)] or [f"ip:{party.address}"])


_NO_LABEL: Final = "no-workload-has-this"


# --- all flows that could be ------------------------------------------------------------------------------------------


def _possible(
    comparison: _Comparison, changed: Sequence[tuple[CompiledRule, Engine]], notes: list[str]
) -> list[Difference]:
    regions: dict[int, tuple[Region, CompiledRule]] = {}
    for engine in (comparison.old, comparison.new):
        make = Regions({doc.name: doc.spec for doc in engine.documents.networks})
        for rule in engine.compiled:
            region = make.of(rule.sentence)
            if region is not None:
                regions[id(rule)] = (region, rule)
    # Whether both ends have an identity divides flows, too: only between such can there be encryption.
    both = Regions({}).of(parse_sentence(f"deny !{_NO_LABEL} to call !{_NO_LABEL}"))
    identified = [both] if both is not None else []
    out: dict[tuple[Effect, str], Difference] = {}  # the plainest example of each
    for rule, _ in changed:
        own = regions.get(id(rule))
        if own is None:
            continue
        others = [region for region, other in regions.values() if other is not rule]
        parts, whole = _parts(own[0], [*others, *identified])
        if not whole:
            notes.append(f"{rule.rule.title} overlaps too many rules: not all its flows were looked at")
        for part in parts:
            example = witness(part, comparison.now_us)
            found = comparison.verdicts(example.request) if example is not None else None
            if example is None or found is None:
                continue
            effect, before, after = found
            text = example.text
            at, _, rest = text.partition(" -> ")
            to, _, service = rest.rpartition(" ")
            one = Difference(effect, at, to, service, _decider(before), _decider(after), rule.rule.text, 0)
            known = out.get((effect, one.rule))
            if known is None or _plainness(one) < _plainness(known):
                out[effect, one.rule] = one
    return _sorted(out.values())


def _plainness(one: Difference) -> tuple[int, str]:
    text = f"{one.source} -> {one.destination} {one.services}"
    return len(text), text


def _parts(region: Region, others: Sequence[Region]) -> tuple[list[Region], bool]:
    """The region divided so that no other one cuts through a part, and whether that was done to the end."""
    parts = [region]
    if region.conditions:  # flows for which they do not hold are none of the rule's, but tell what it changes
        parts.append(Region(region.source, region.destination, region.services))
    for other in others:
        divided: list[Region] = []
        for part in parts:
            common = part.meet(other)
            if common is None:
                divided.append(part)
                continue
            divided.append(common)
            if not part.subtractable(other):  # the comparison may hold or not
                divided.append(Region(common.source, common.destination, common.services, part.conditions))
            divided += list(part.minus(other))
            if len(divided) > MAX_PARTS:
                return divided, False
        parts = divided
    return parts, True


def _sorted(differences: Iterable[Difference]) -> list[Difference]:
    order = list(Effect)
    return sorted(
        differences,
        key=lambda d: (order.index(d.effect), -d.pairs, d.source, d.destination, d.services, d.rule),
    )
