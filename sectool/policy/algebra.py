"""Sets of flows, as rules describe them: intersected, subtracted, tested for emptiness, and given an example.

A `Region` is a product: the parties that may call, the parties that may be called, the services, and the label
comparisons (`where`) that are not yet decided. Everything but those comparisons is exact: two rules overlap exactly
when `meet` says so, and what `minus` leaves is exactly what the other does not speak of. Comparisons with an order,
or of one side's label with the other's, are carried along; `witness` looks for values that satisfy them.

Every party of a real flow has an address, so that is the universe here. Host names are sets (an address may be known
by several), so two `fqdn:` selectors always have parties in common.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import lru_cache
from typing import Final

from sectool.policy.condition import Condition, LabelRef
from sectool.policy.network import NetworkSpec
from sectool.policy.selector import Anyone, Cidr, Fqdn, Labels, NamedNet, Selector
from sectool.policy.sentence import Sentence
from sectool.policy.service import ICMP, ICMP6, Service
from sectool.policy.valuesets import ALL_VALUES, PRESENT, Ranges, Values, both, ranges, values_of, without

SIX: Final = 1 << 128  # IPv6 addresses count from here on
_MAPPED: Final = (SIX + (0xFFFF << 32), SIX + (0xFFFF << 32) + 0xFFFF_FFFF)  # they are IPv4 addresses
ADDRESSES: Final[Ranges] = (
    (0, (1 << 32) - 1),
    (SIX, _MAPPED[0] - 1),
    (_MAPPED[1] + 1, 2 * SIX - 1),
)
# protocol << 16 | port, or for ICMP protocol << 16 | type << 8 | code
SERVICES: Final[Ranges] = ((0, (256 << 16) - 1),)


class Proof(Enum):
    """Whether a party has a proven identity."""

    EITHER = "either"
    PROVEN = "proven"
    NONE = "none"


_NO_LABELS: Final[Mapping[str, Values]] = {}
_NO_NAMES: Final[frozenset[Fqdn]] = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class Parties:
    """A set of parties. `labels` bounds those of parties with a proven identity; `named` are patterns that some name of
    the party must match, `unnamed` those that none may."""

    proof: Proof = Proof.EITHER
    labels: Mapping[str, Values] = field(default_factory=dict)
    addresses: Ranges = ADDRESSES
    named: frozenset[Fqdn] = _NO_NAMES
    unnamed: frozenset[Fqdn] = _NO_NAMES

    def meet(self, other: Parties) -> Parties | None:
        """Parties in both sets, or None when there are none."""
        if self is other or other is EVERYBODY:
            return self
        if self is EVERYBODY:
            return other
        proof = self.proof if other.proof is Proof.EITHER else other.proof
        if self.proof is not Proof.EITHER and self.proof is not proof:
            return None
        labels: Mapping[str, Values] = other.labels or self.labels
        if self.labels and other.labels:
            merged = dict(self.labels)
            for key, values in other.labels.items():
                mine = merged.get(key)
                if mine is not None:
                    values = mine.meet(values)
                    if values.empty:
                        return None
                merged[key] = values
            labels = merged
        addresses = both(self.addresses, other.addresses)
        if not addresses:
            return None
        out = Parties(proof, labels, addresses, self.named | other.named, self.unnamed | other.unnamed)
        return None if out.named and out.unnamed and out.nameless else out

    @property
    def nameless(self) -> bool:
        """Whether no set of names satisfies `named` and `unnamed`."""
        return any(_only_below(pattern, self.unnamed) for pattern in self.named)

    def minus(self, other: Parties) -> Iterator[Parties]:
        """Parties here and not in `other`, as disjoint sets without empty ones."""
        rest = self
        if other.proof is not Proof.EITHER:
            opposite = Proof.NONE if other.proof is Proof.PROVEN else Proof.PROVEN
            if rest.proof is not other.proof:
                yield replace(
                    rest, proof=opposite, labels=rest.labels if opposite is Proof.PROVEN else _NO_LABELS
                )
                if rest.proof is opposite:
                    return
                rest = replace(rest, proof=other.proof)
        for key, values in other.labels.items():
            mine = rest.labels.get(key, ALL_VALUES)
            for part in mine.minus(values):
                if not part.empty:
                    yield replace(rest, labels={**rest.labels, key: part})
            common = mine.meet(values)
            if common.empty:
                return
            rest = replace(rest, labels={**rest.labels, key: common})
        outside = without(rest.addresses, other.addresses)
        if outside:
            yield replace(rest, addresses=outside)
        common_addresses = both(rest.addresses, other.addresses)
        if not common_addresses:
            return
        rest = replace(rest, addresses=common_addresses)
        for pattern in sorted(other.named, key=str):
            part_ = replace(rest, unnamed=rest.unnamed | {pattern})
            if not part_.nameless:
                yield part_
            rest = replace(rest, named=rest.named | {pattern})
        for pattern in sorted(other.unnamed, key=str):
            part_ = replace(rest, named=rest.named | {pattern})
            if not part_.nameless:
                yield part_
            rest = replace(rest, unnamed=rest.unnamed | {pattern})
            if rest.nameless:
                return

    def within(self, other: Parties) -> bool:
        """Whether all of them are in `other`, too."""
        return next(self.minus(other), None) is None


EVERYBODY: Final = Parties()
PROVEN: Final = Parties(Proof.PROVEN)
STRANGERS: Final = Parties(Proof.NONE)


def _only_below(pattern: Fqdn, others: frozenset[Fqdn]) -> bool:
    """Whether every name that matches `pattern` matches one of `others` (or no name can match it at all)."""
    if not pattern.wildcard:
        return any(o.matches(frozenset((pattern.name,))) for o in others)
    if len(pattern.name) > 251:
        return True
    return any(o.wildcard and ("." + pattern.name).endswith("." + o.name) for o in others)


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """A set of flows. `conditions` must hold, too; they are what is not decided by the sets."""

    source: Parties
    destination: Parties
    services: Ranges = SERVICES
    conditions: frozenset[Condition] = frozenset()

    def meet(self, other: Region) -> Region | None:
        """Flows in both, or None when there are none (whatever the conditions)."""
        services = both(self.services, other.services)
        if not services:
            return None
        source = self.source.meet(other.source)
        if source is None:
            return None
        destination = self.destination.meet(other.destination)
        if destination is None:
            return None
        return Region(source, destination, services, self.conditions | other.conditions)

    def minus(self, other: Region) -> Iterator[Region]:
        """Flows here and not in `other`, as disjoint regions.

        Exact when all of the conditions of `other` are among ours, and when it has none. With others, what they might
        spare is lost, so ask `subtractable` first.
        """
        rest = self
        for source in rest.source.minus(other.source):
            yield replace(rest, source=source)
        common = rest.source.meet(other.source)
        if common is None:
            return
        rest = replace(rest, source=common)
        for destination in rest.destination.minus(other.destination):
            yield replace(rest, destination=destination)
        common = rest.destination.meet(other.destination)
        if common is None:
            return
        rest = replace(rest, destination=common)
        services = without(rest.services, other.services)
        if services:
            yield replace(rest, services=services)

    def subtractable(self, other: Region) -> bool:
        """Whether `minus` is exact: `other` asks for nothing that we leave open."""
        return other.conditions <= self.conditions

    def within(self, other: Region) -> bool:
        """Whether all flows here are in `other`, too. False when its conditions leave that open."""
        return self.subtractable(other) and next(self.minus(other), None) is None


def parties_of(selector: Selector, networks: Mapping[str, NetworkSpec]) -> Parties | None:
    """The parties a selector speaks of; None when its clauses contradict each other."""
    match selector:
        case Anyone():
            return EVERYBODY
        case Labels(clauses):
            labels: dict[str, Values] = {}
            for clause in clauses:
                values = values_of(clause)
                if clause.key in labels:
                    values = values.meet(labels[clause.key])
                if values.empty:
                    return None
                labels[clause.key] = values
            return Parties(Proof.PROVEN, labels)
        case Cidr(network):
            return Parties(addresses=block_of(NetworkSpec((network,))))
        case NamedNet(name):
            found = block_of(networks[name])
            return Parties(addresses=found) if found else None
        case Fqdn():
            only = Parties(named=frozenset((selector,)))
            return None if only.nameless else only


@lru_cache(maxsize=65_536)
def block_of(spec: NetworkSpec) -> Ranges:
    """The addresses of a network without its exceptions."""

    def put(networks: Iterable[object]) -> Ranges:
        pairs = []
        for net in networks:
            base = 0 if net.version == 4 else SIX  # type: ignore[attr-defined]
            pairs.append((base + int(net.network_address), base + int(net.broadcast_address)))  # type: ignore[attr-defined]
        return ranges(pairs)

    return both(without(put(spec.cidrs), put(spec.excepts)), ADDRESSES)


@lru_cache(maxsize=65_536)
def services_of(services: tuple[Service, ...]) -> Ranges:
    """The services of a rule as ranges; none means all, whatever the protocol."""
    if not services:
        return SERVICES
    pairs = []
    for service in services:
        base = service.protocol << 16
        if service.protocol in (ICMP, ICMP6):
            high = min(service.high, 255)
            if service.code is None:
                pairs.append((base | service.low << 8, base | high << 8 | 255))
            else:
                pairs.append((base | service.low << 8 | service.code,) * 2)
        else:
            pairs.append((base | service.low, base | service.high))
    return ranges(pairs)


class Regions:
    """Makes regions of sentences; each selector is worked out once."""

    def __init__(self, networks: Mapping[str, NetworkSpec]) -> None:
        self._networks = networks
        self._parties: dict[Selector, Parties | None] = {}

    def parties(self, selector: Selector) -> Parties | None:
        """See `parties_of`."""
        if selector not in self._parties:
            self._parties[selector] = parties_of(selector, self._networks)
        return self._parties[selector]

    def of(self, sentence: Sentence) -> Region | None:
        """The flows a sentence speaks of, `until` aside; None when there cannot be any."""
        source, destination = self.parties(sentence.source), self.parties(sentence.destination)
        if source is None or destination is None:
            return None
        open_: list[Condition] = []
        for condition in sentence.conditions:
            bound = _bounds(condition)
            if bound is None:
                open_.append(condition)
                # No condition holds on labels of a party without proven identity.
                bound = [
                    (ref.side, PROVEN)
                    for ref in (condition.left, condition.right)
                    if isinstance(ref, LabelRef)
                ]
            for side, parties in bound:
                if side == "source":
                    source = source.meet(parties)
                else:
                    destination = destination.meet(parties)
                if source is None or destination is None:
                    return None
        return Region(source, destination, services_of(sentence.services), frozenset(open_))


def _bounds(condition: Condition) -> list[tuple[str, Parties]] | None:
    """What `=` or `!=` with a text asks of one side, which is exact; None for every other comparison."""
    if isinstance(condition.right, LabelRef) or condition.operator not in ("=", "!="):
        return None
    value = frozenset((condition.right,))
    values = Values(False, value) if condition.operator == "=" else Values(True, None, "", value)
    return [(condition.left.side, Parties(Proof.PROVEN, {condition.left.key: values}))]


__all__ = [
    "ADDRESSES",
    "EVERYBODY",
    "PRESENT",
    "PROVEN",
    "SERVICES",
    "STRANGERS",
    "Parties",
    "Proof",
    "Region",
    "Regions",
    "block_of",
    "parties_of",
    "services_of",
]
