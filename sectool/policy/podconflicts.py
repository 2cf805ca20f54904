"""What guardrails and other owners' denials take of NetworkPolicies, each with an example flow.

NetworkPolicies only add to each other, so nothing but our own rules can stand against one. Its rules are made regions
like sentences are; a pod is known by one of two labels and bears its own under two names (docs/networkpolicy.md), so
there is a region for each way to write it, and the first with an example is told. Rules that speak of ports by name are
not looked at: which port that is only the called pod knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Final

from sectool.labels import FEDERATED_LABEL
from sectool.policy.algebra import EVERYBODY, SERVICES, Parties, Proof, Region, block_of
from sectool.policy.model import NAMESPACE_LABEL, POD_LABEL, NetPeer, NetRule, NetworkPolicyDoc
from sectool.policy.netpol import METADATA_NAME, NAMESPACE_KEYS
from sectool.policy.overlap import Overlaps
from sectool.policy.rules import CompiledRule
from sectool.policy.selector import Clause
from sectool.policy.valuesets import Ranges, Values, ranges, values_of
from sectool.policy.witness import Witness

MAX_EACH: Final = 3  # told per rule
_GONE: Final = Values(True, frozenset())  # the label is not there

Asked = Callable[[Region], Witness | None]


class _Bounds:
    """Bounds of labels, met one after the other."""

    def __init__(self) -> None:
        self.labels: dict[str, Values] = {FEDERATED_LABEL: _GONE}
        self.possible = True

    def add(self, key: str, values: Values) -> None:
        mine = self.labels.get(key)
        self.labels[key] = values if mine is None else mine.meet(values)
        self.possible &= not self.labels[key].empty

    def parties(self) -> Parties | None:
        return Parties(Proof.PROVEN, self.labels) if self.possible else None


def _pods(
    namespace: str | None,
    of_namespaces: tuple[Clause, ...],
    pods: tuple[Clause, ...],
    space_key: str,
    plain: bool,
) -> Parties | None:
    """Pods whose namespace is told by `space_key`, their labels plainly or as `k8s.label.KEY`; None: there are none."""
    bounds = _Bounds()
    for key in NAMESPACE_KEYS:
        bounds.add(key, Values(False) if key == space_key else _GONE)
    if namespace is not None:
        bounds.add(space_key, Values(False, frozenset((namespace,))))
    for clause in of_namespaces:
        key = space_key if clause.key == METADATA_NAME else NAMESPACE_LABEL + clause.key
        bounds.add(key, values_of(clause))
    for clause in pods:
        if plain:
            bounds.add(POD_LABEL + clause.key, _GONE)
        bounds.add(clause.key if plain else POD_LABEL + clause.key, values_of(clause))
    return bounds.parties()


def _peers(rule: NetRule, doc: NetworkPolicyDoc, space_key: str, plain: bool) -> Iterator[Parties]:
    if not rule.peers:
        yield EVERYBODY
    for peer in rule.peers:
        found = _block(peer) or _pods(
            doc.namespace if peer.namespaces is None else None,
            peer.namespaces or (),
            peer.pods or (),
            space_key,
            plain,
        )
        if found is not None:
            yield found


def _block(peer: NetPeer) -> Parties | None:
    return None if peer.block is None else Parties(addresses=block_of(peer.block))


def _services(rule: NetRule) -> Ranges:
    """Of all ports that have numbers; empty when there are none."""
    if not rule.ports:
        return SERVICES
    return ranges(
        (port.protocol << 16 | port.low, port.protocol << 16 | port.high)
        for port in rule.ports
        if not port.name
    )


def regions(doc: NetworkPolicyDoc, direction: str, rule: NetRule) -> Iterator[Region]:
    """What a rule (of `ingress` or `egress`) speaks of, in each way that its pods may be labelled."""
    services = _services(rule)
    if not services:
        return
    for plain, space_key in product((False, True), NAMESPACE_KEYS):
        own = _pods(doc.namespace, (), doc.selector, space_key, plain)
        if own is None:
            return
        for peer in _peers(rule, doc, space_key, plain):
            ends = (peer, own) if direction == "ingress" else (own, peer)
            yield Region(*ends, services)


def takings(
    doc: NetworkPolicyDoc, direction: str, rule: NetRule, takers: Overlaps, ask: Asked
) -> Iterator[tuple[CompiledRule, Witness]]:
    """Rules among `takers` that take something of a NetworkPolicy's rule, at most MAX_EACH, and an example of each."""
    told: set[int] = set()
    for region in regions(doc, direction, rule):
        for other, theirs in takers.near(region):
            if other.rank in told:
                continue
            common = region.meet(theirs)
            point = None if common is None else ask(common)
            if point is None:
                continue
            told.add(other.rank)
            yield other, point
            if len(told) == MAX_EACH:
                return


def rules_of(doc: NetworkPolicyDoc) -> Iterable[tuple[str, int, NetRule]]:
    """Direction, number from 1, rule."""
    for direction, rules in (("ingress", doc.ingress), ("egress", doc.egress)):
        for number, rule in enumerate(rules or (), 1):
            yield direction, number, rule
