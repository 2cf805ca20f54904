"""A policy learned from flows: the few sentences that let through what was seen, and what they rest on.

Services first (a server that was called on many ports of a range gets the range), then the parties of each: labels by
sectool.policy.generalise, addresses of parties without identity by sectool.policy.prefixes. Sentences with equal
parties are put together, and so are those that differ in one label. Only flows that the policy in force does not allow
already are learned from, so what comes out is what to add. The same flows give the same text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from sectool.events import Action
from sectool.labels import LabelSet
from sectool.policy.engine import Engine
from sectool.policy.generalise import Clauses, Evidence, Found, Learner, Universe
from sectool.policy.model import DocumentSet, NetworkDoc, PolicyDoc
from sectool.policy.netnames import Listed, Names, worldwide
from sectool.policy.network import IPAddress, IPNetwork
from sectool.policy.portranges import by_service
from sectool.policy.prefixes import networks
from sectool.policy.request import Party, Request
from sectool.policy.selector import Anyone, Clause, Labels, Op, Selector
from sectool.policy.sentence import Sentence, Verb
from sectool.policy.service import ICMP, ICMP6, PROTOCOL_NAMES, Service

_MANY_VALUES: Final = 64  # of one label in a list
_LONG_LIST: Final = 1024  # characters of them


@dataclass(frozen=True, slots=True)
class Observation:
    """Flows alike. A party is its labels, or its address if it has no identity. Times are UTC microseconds."""

    source: LabelSet | IPAddress
    destination: LabelSet | IPAddress
    protocol: int
    port: int  # ICMP: the type
    flows: int
    first: int
    last: int
    encrypted: bool = False

    def request(self) -> Request:
        """The question these flows ask."""
        both = isinstance(self.source, LabelSet) and isinstance(self.destination, LabelSet)
        return Request(
            _party(self.source),
            _party(self.destination),
            self.protocol,
            self.port,
            can_encrypt=both and self.protocol not in (ICMP, ICMP6),
        )


@dataclass(frozen=True, slots=True)
class Suggested:
    """A sentence with its evidence. `pairs` of parties are seen; `covered` is how many it lets talk."""

    sentence: Sentence
    evidence: Evidence
    pairs: int
    covered: int
    examples: tuple[Observation, ...]
    wider: tuple[str, ...] = ()  # in which respects it is wider than what was seen


@dataclass(frozen=True, slots=True)
class Suggestion:
    """What was learned. `left_out` counts flows by why nothing was learned from them."""

    rules: tuple[Suggested, ...]
    networks: tuple[NetworkDoc, ...]
    flows: int  # learned from
    first: int
    last: int
    left_out: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Nets:
    """Parties without identity: the networks that their addresses were drawn from."""

    items: tuple[IPNetwork, ...]


@dataclass(slots=True)
class _Draft:
    """A sentence in the making."""

    source: Clauses | Nets
    destination: Clauses | Nets
    services: tuple[Service, ...]
    evidence: Evidence
    pairs: int
    covered: int
    examples: tuple[Observation, ...]
    wider: tuple[str, ...] = ()


def suggest(
    observations: Iterable[Observation],
    known: Iterable[LabelSet],
    base: DocumentSet,
    now_us: int,
    *,
    left_out: Mapping[str, int] | None = None,
) -> Suggestion:
    """Learn what to add to `base`. `known` are all label sets there are: they tell what a sentence lets in."""
    left = dict(left_out or {})
    engine = Engine(without_audit(base))
    wanted: list[Observation] = []
    for one in observations:
        verdict = engine.decide(one.request(), now_us)
        if verdict.action is Action.ALLOW:
            why = "allowed already"
        elif verdict.rule is not None:
            why = f"denied by {verdict.rule.kind} {verdict.rule.policy}"
        elif one.protocol not in PROTOCOL_NAMES:
            why = f"protocol {one.protocol}, which no sentence can name"
        elif not isinstance(one.source, LabelSet) and not isinstance(one.destination, LabelSet):
            why = "neither end has an identity"
        else:
            wanted.append(one)
            continue
        left[why] = left.get(why, 0) + one.flows
    members = {*known, *(p for o in wanted for p in (o.source, o.destination) if isinstance(p, LabelSet))}
    universe = Universe(members)
    drafts: list[_Draft] = []
    for service, group in by_service(wanted):
        drafts += _learn(universe, service, group)
    rules, made = _sentences(_merge_values(_merge_services(drafts)), base)
    return Suggestion(
        tuple(rules),
        tuple(made),
        sum(o.flows for o in wanted),
        min((o.first for o in wanted), default=0),
        max((o.last for o in wanted), default=0),
        dict(sorted(left.items())),
    )


def without_audit(base: DocumentSet) -> DocumentSet:
    """The same set without its audit rules: what they let through is what there is to learn."""

    def plain(doc: PolicyDoc) -> PolicyDoc:
        return replace(doc, rules=tuple(r for r in doc.rules if r.sentence.verb is not Verb.AUDIT))

    return replace(base, policies=tuple(map(plain, base.policies)))


def _party(one: LabelSet | IPAddress) -> Party:
    return Party(one) if isinstance(one, LabelSet) else Party(None, None, one)


# --- parties ----------------------------------------------------------------------------------------------------------


def _learn(universe: Universe, service: Service, group: Sequence[Observation]) -> list[_Draft]:
    """Sentences for one service."""
    inside: list[Observation] = []
    from_net: dict[IPNetwork, list[Observation]] = {}
    to_net: dict[IPNetwork, list[Observation]] = {}
    for side, found in (("source", from_net), ("destination", to_net)):
        other = "destination" if side == "source" else "source"
        roles: dict[str, list[Observation]] = {}
        for one in group:
            if not isinstance(getattr(one, side), LabelSet):
                roles.setdefault(_role(getattr(one, other)), []).append(one)
        for _, members in sorted(roles.items()):
            nets = networks(_address(getattr(one, side)) for one in members)
            for one in members:
                address = _address(getattr(one, side))
                net = next(n for n in nets if n.version == address.version and address in n)
                found.setdefault(net, []).append(one)
    inside = [o for o in group if isinstance(o.source, LabelSet) and isinstance(o.destination, LabelSet)]
    out: list[_Draft] = []
    wider = _ports_wider(service, group)
    pairs, examples = _pairs(universe, inside, both=True)
    for rule in Learner(universe, pairs).cover():
        assert rule.source is not None
        assert rule.destination is not None
        out.append(_draft(rule, rule.source, rule.destination, service, examples, wider))
    for found, outward in ((from_net, False), (to_net, True)):
        for net, members in sorted(found.items(), key=lambda entry: (entry[0].version, entry[0])):
            pairs, examples = _pairs(universe, members, both=False, outward=outward)
            learner = Learner(universe, pairs, learn_source=outward, learn_destination=not outward)
            for rule in learner.cover():
                said = rule.source if outward else rule.destination
                assert said is not None
                source, destination = (said, Nets((net,))) if outward else (Nets((net,)), said)
                draft = _draft(rule, source, destination, service, examples, wider)
                seen = {o.destination if outward else o.source for o in members}
                if net.num_addresses > len(seen):
                    draft.wider = (*draft.wider, f"{net}: {len(seen)} of its addresses were seen")
                out.append(draft)
    return out


def _address(one: LabelSet | IPAddress) -> IPAddress:
    assert not isinstance(one, LabelSet)
    return one


def _role(one: LabelSet | IPAddress) -> str:
    """What a workload is, whichever instance."""
    if not isinstance(one, LabelSet):
        return ""
    return str(one.get("app") or one.get("k8s.label.app") or one)


def _pairs(
    universe: Universe, group: Sequence[Observation], *, both: bool, outward: bool = False
) -> tuple[dict[tuple[int, int], Evidence], dict[tuple[int, int], Observation]]:
    pairs: dict[tuple[int, int], Evidence] = {}
    examples: dict[tuple[int, int], Observation] = {}
    for one in group:
        source = universe.number[one.source] if isinstance(one.source, LabelSet) and (both or outward) else 0
        destination = 0
        if isinstance(one.destination, LabelSet) and (both or not outward):
            destination = universe.number[one.destination]
        key = (source, destination)
        evidence = Evidence(one.flows, one.first, one.last, one.encrypted)
        pairs[key] = pairs[key] + evidence if key in pairs else evidence
        if key not in examples or (-one.flows, str(one)) < (-examples[key].flows, str(examples[key])):
            examples[key] = one
    return pairs, examples


def _draft(
    rule: Found,
    source: Clauses | Nets,
    destination: Clauses | Nets,
    service: Service,
    examples: Mapping[tuple[int, int], Observation],
    wider: tuple[str, ...],
) -> _Draft:
    return _Draft(
        source,
        destination,
        (service,),
        rule.evidence,
        rule.seen,
        rule.covered,
        (examples[rule.example],),
        wider,
    )


def _ports_wider(service: Service, group: Sequence[Observation]) -> tuple[str, ...]:
    if service.low == service.high:
        return ()
    seen = len({one.port for one in group})
    return (f"{service}: {seen} of {service.high - service.low + 1} ports were seen",)


# --- putting together -------------------------------------------------------------------------------------------------


def _merge_services(drafts: Sequence[_Draft]) -> list[_Draft]:
    """One sentence for the same parties, whatever the number of services; and one for all networks of one party."""
    by_parties: dict[tuple[object, ...], _Draft] = {}
    for draft in drafts:
        parties: tuple[object, ...] = (draft.source, draft.destination, draft.evidence.encrypted)
        known = by_parties.get(parties)
        by_parties[parties] = draft if known is None else _joined_draft(known, draft, services=True)
    by_network: dict[tuple[object, ...], _Draft] = {}
    for draft in by_parties.values():
        key: tuple[object, ...] = (
            None if isinstance(draft.source, Nets) else draft.source,
            None if isinstance(draft.destination, Nets) else draft.destination,
            tuple(map(str, draft.services)),
            draft.evidence.encrypted,
        )
        known = by_network.get(key)
        if known is None:
            by_network[key] = draft
            continue
        joined = _joined_draft(known, draft, services=False)
        joined.source = _nets(known.source, draft.source)
        joined.destination = _nets(known.destination, draft.destination)
        by_network[key] = joined
    return list(by_network.values())


def _nets(one: Clauses | Nets, other: Clauses | Nets) -> Clauses | Nets:
    if not isinstance(one, Nets) or not isinstance(other, Nets):
        return one
    found = {*one.items, *other.items}
    return Nets(tuple(sorted(found, key=lambda n: (n.version, int(n.network_address), n.prefixlen))))


def _joined_draft(one: _Draft, other: _Draft, *, services: bool) -> _Draft:
    return _Draft(
        one.source,
        one.destination,
        (*one.services, *other.services) if services else one.services,
        one.evidence + other.evidence,
        max(one.pairs, other.pairs) if services else one.pairs + other.pairs,
        max(one.covered, other.covered) if services else one.covered + other.covered,
        (*one.examples, *other.examples)[:8],
        tuple(dict.fromkeys((*one.wider, *other.wider))),
    )


@dataclass(frozen=True, slots=True)
class _Merged:
    """A draft whose clauses may have several values."""

    draft: _Draft
    source: Listed
    destination: Listed


def _merge_values(drafts: Sequence[_Draft]) -> list[_Merged]:
    """Sentences that differ in one label's values become one with `in`. What they cover stays the same."""
    merged = [
        _Merged(replace(d, source=source, destination=destination), _listed(source), _listed(destination))
        for d in drafts
        for source in _parted(d.source)
        for destination in _parted(d.destination)
    ]
    changed = True
    while changed:
        changed = False
        keys = sorted(
            {(side, key) for m in merged for side in (0, 1) for key, _ in (m.source, m.destination)[side]}
        )
        for side, key in keys:
            groups: dict[tuple[object, ...], list[_Merged]] = {}
            for one in merged:
                groups.setdefault(_shape(one, side, key), []).append(one)
            merged = []
            for shape, group in groups.items():
                if shape[0] != "without" or len(group) == 1 or _too_long(group, side, key):
                    merged += group
                    continue
                changed = True
                merged.append(_united(group, side, key))
    return merged


def _listed(party: Clauses | Nets) -> Listed:
    if isinstance(party, Nets):
        return ()
    return tuple((key, None if value is None else (value,)) for key, value in party)


def _shape(one: _Merged, side: int, key: str) -> tuple[object, ...]:
    """Equal for those that differ in the values of one key at most."""
    parts = (one.source, one.destination)
    rest = (
        tuple(map(str, one.draft.services)),
        one.draft.evidence.encrypted,
        one.draft.source if isinstance(one.draft.source, Nets) else None,
        one.draft.destination if isinstance(one.draft.destination, Nets) else None,
        parts[1 - side],
    )
    if all(values is None or name != key for name, values in parts[side]):
        return ("apart", id(one), *rest)
    return ("without", *rest, tuple(entry for entry in parts[side] if entry[0] != key))


def _too_long(group: Sequence[_Merged], side: int, key: str) -> bool:
    """Whether the list of values would be more than a person, or a sentence, takes."""
    values = {
        v for one in group for k, vs in (one.source, one.destination)[side] if k == key for v in vs or ()
    }
    return len(values) > _MANY_VALUES or sum(map(len, values)) > _LONG_LIST


def _united(group: Sequence[_Merged], side: int, key: str) -> _Merged:
    values = sorted(
        {v for one in group for k, vs in (one.source, one.destination)[side] if k == key for v in vs or ()}
    )
    draft = group[0].draft
    for other in group[1:]:
        draft = _joined_draft(draft, other.draft, services=False)
    parts = [group[0].source, group[0].destination]
    parts[side] = tuple((k, tuple(values) if k == key else vs) for k, vs in parts[side])
    return _Merged(draft, parts[0], parts[1])


# --- sentences --------------------------------------------------------------------------------------------------------


def _sentences(merged: Sequence[_Merged], base: DocumentSet) -> tuple[list[Suggested], list[NetworkDoc]]:
    names = Names(base)
    out: list[Suggested] = []
    for one in merged:
        draft = one.draft
        source, wide_source = _selector(draft.source, one.source, one.destination, names, outward=False)
        destination, wide = _selector(draft.destination, one.destination, one.source, names, outward=True)
        services = tuple(sorted(draft.services, key=lambda s: (s.protocol, s.low, s.high)))
        encrypted = draft.evidence.encrypted
        for at in range(0, len(services), 64):
            sentence = Sentence(Verb.ALLOW, source, destination, services[at : at + 64], encrypted)
            out.append(
                Suggested(
                    sentence,
                    draft.evidence,
                    draft.pairs,
                    draft.covered,
                    draft.examples,
                    (*draft.wider, *wide_source, *wide),
                )
            )
    out.sort(key=lambda s: (str(s.sentence.destination), str(s.sentence.source), str(s.sentence)))
    return out, names.made


def _selector(
    party: Clauses | Nets,
    clauses: Listed,
    others: Listed,
    names: Names,
    *,
    outward: bool,
) -> tuple[Selector, tuple[str, ...]]:
    if isinstance(party, Nets):
        return names.of(party.items, others, outward=outward)
    if not clauses:
        return Anyone(), ("any: everybody, identified or not",)
    return Labels(tuple(map(_clause, clauses))), ()


def _clause(entry: tuple[str, tuple[str, ...] | None]) -> Clause:
    key, values = entry
    if values is None:
        return Clause(key, Op.EXISTS)
    return Clause(key, Op.EQ if len(values) == 1 else Op.IN, values)


def _parted(party: Clauses | Nets) -> list[Clauses | Nets]:
    """Networks from all over the world apart from others, which are sentences of their own."""
    if not isinstance(party, Nets):
        return [party]
    public = tuple(n for n in party.items if n.is_global)
    rest = tuple(n for n in party.items if not n.is_global)
    if not rest or not worldwide(public):
        return [party]
    return [Nets(public), Nets(rest)]
