"""Intents as NetworkPolicies of Kubernetes, as far as they can be said there; and what cannot.

A flow needs egress of its source and ingress of its destination, so a rule between pods becomes two policies. Every
namespace spoken of gets a policy that isolates all its pods in both directions: what no intent allows is denied here,
and open there. `net:` is taken for addresses outside the cluster.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from sectool.policy.model import NAMESPACE_LABEL, POD_LABEL, DocumentSet, Mode, PolicyDoc
from sectool.policy.netpol import METADATA_NAME, NAMESPACE_KEYS
from sectool.policy.network import NetworkSpec
from sectool.policy.selector import Anyone, Cidr, Clause, Fqdn, Labels, NamedNet, Op, Selector
from sectool.policy.sentence import Sentence, Verb
from sectool.policy.service import TCP, UDP, Service

ISOLATE: Final = "isolate-all"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A rule that NetworkPolicies cannot say."""

    document: str
    rule: str
    why: str
    where: str


@dataclass(frozen=True, slots=True)
class Exported:
    """Documents as Kubernetes takes them (for a YAML writer), and what is missing."""

    documents: tuple[Mapping[str, Any], ...]
    left_out: tuple[LeftOut, ...]


class _CannotSay(Exception):  # noqa: N818 -- not an error: an answer
    """Why a rule cannot be said."""


@dataclass(slots=True)
class _Pods:
    """Pods: where a policy for them goes, and how they are selected."""

    namespaces: tuple[str, ...]
    pods: Mapping[str, Any]
    spaces: Mapping[str, Any]  # the namespaces, as a selector

    def peer(self) -> dict[str, Any]:
        return {"namespaceSelector": dict(self.spaces), "podSelector": dict(self.pods)}


@dataclass(slots=True)
class _Blocks:
    """Addresses."""

    spec: NetworkSpec

    def peers(self) -> list[dict[str, Any]]:
        out = []
        for net in self.spec.cidrs:
            block: dict[str, Any] = {"cidr": str(net)}
            inside = [
                str(e) for e in self.spec.excepts if e.version == net.version and e.network_address in net
            ]
            if str(net) in inside:
                continue  # nothing is left of it
            if inside:
                block["except"] = inside
            out.append({"ipBlock": block})
        return out


_Side = _Pods | _Blocks | None  # None: anybody


@dataclass(slots=True)
class _Plan:
    """What goes where: rules by namespace, selector of its pods, and direction."""

    entries: list[tuple[str, str, Mapping[str, Any], str, dict[str, Any]]] = field(default_factory=list)
    everywhere: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    namespaces: set[str] = field(default_factory=set)


def export(documents: DocumentSet) -> Exported:
    """NetworkPolicies for the enforced intents of a set. Those it has already are not repeated."""
    networks = {doc.name: doc.spec for doc in documents.networks}
    plan = _Plan()
    left: list[LeftOut] = []
    nowhere: list[LeftOut] = []
    for doc in (*documents.guardrails, *documents.policies):
        if doc.mode is not Mode.ENFORCE:
            continue
        for rule in doc.rules:
            name, text = f"{doc.kind} {doc.name}", str(rule.sentence)
            before = len(plan.entries)
            try:
                _add(plan, doc, rule.sentence, networks)
            except _CannotSay as answer:
                left.append(LeftOut(name, text, str(answer), rule.where))
                continue
            if len(plan.entries) == before:
                nowhere.append(LeftOut(name, text, "no rule names a namespace it could stand in", rule.where))
    # A rule for any pod stands in all namespaces that others name.
    return Exported(tuple(_written(plan)), (*left, *(() if plan.namespaces else nowhere)))


def _add(plan: _Plan, doc: PolicyDoc, sentence: Sentence, networks: Mapping[str, NetworkSpec]) -> None:
    if sentence.verb is not Verb.ALLOW:
        raise _CannotSay("NetworkPolicies only allow")
    for there, word in (
        (sentence.encrypted, "encrypted"),
        (sentence.conditions, "where"),
        (sentence.until, "until"),
    ):
        if there:
            raise _CannotSay(f"there is nothing like '{word}'")
    ports = [_port(service) for service in sentence.services]
    source, destination = _side(sentence.source, networks), _side(sentence.destination, networks)
    if isinstance(source, _Blocks) and isinstance(destination, _Blocks):
        raise _CannotSay("neither end is a pod")
    extra: dict[str, Any] = {"ports": ports} if ports else {}
    entries: list[tuple[str, str, Mapping[str, Any], str, dict[str, Any]]] = []
    everywhere: list[tuple[str, str, dict[str, Any]]] = []
    for way, here, there_, word in (
        ("ingress", destination, source, "from"),
        ("egress", source, destination, "to"),
    ):
        rule = {**({} if there_ is None else {word: _peers(there_)}), **extra}
        if isinstance(here, _Pods):
            entries += [(doc.name, namespace, here.pods, way, rule) for namespace in here.namespaces]
        elif here is None:  # pods of all namespaces that are isolated
            everywhere.append((doc.name, way, rule))
    plan.entries += entries
    plan.everywhere += everywhere
    plan.namespaces.update(namespace for _, namespace, *_ in entries)


def _peers(side: _Pods | _Blocks) -> list[dict[str, Any]]:
    if isinstance(side, _Pods):
        return [side.peer()]
    peers = side.peers()
    if not peers:
        raise _CannotSay("nothing is left of the network")
    return peers


def _port(service: Service) -> dict[str, Any]:
    if service.protocol not in (TCP, UDP):
        raise _CannotSay("there is no ICMP")
    out: dict[str, Any] = {"protocol": "TCP" if service.protocol == TCP else "UDP"}
    if (service.low, service.high) == (0, 65535):
        return out
    out["port"] = service.low
    if service.high != service.low:
        out["endPort"] = service.high
    return out


def _side(selector: Selector, networks: Mapping[str, NetworkSpec]) -> _Side:
    match selector:
        case Anyone():
            return None
        case NamedNet(name):
            return _Blocks(networks[name])
        case Cidr(network):
            return _Blocks(NetworkSpec((network,)))
        case Fqdn():
            raise _CannotSay("there are no host names")
        case Labels(clauses):
            return _pods(clauses)


def _pods(clauses: Sequence[Clause]) -> _Pods:
    namespaces: set[str] | None = None
    pods: list[Clause] = []
    spaces: list[Clause] = []
    for clause in clauses:
        if clause.op is Op.PREFIX:
            raise _CannotSay(f"there are no prefixes ({clause})")
        if clause.key in NAMESPACE_KEYS and clause.op in (Op.EQ, Op.IN):
            namespaces = set(clause.values) if namespaces is None else namespaces & set(clause.values)
        elif clause.key in NAMESPACE_KEYS and clause.op in (Op.NE, Op.NOTIN):
            spaces.append(Clause(METADATA_NAME, Op.NOTIN, clause.values))
        elif clause.key.startswith(POD_LABEL):
            pods.append(Clause(clause.key.removeprefix(POD_LABEL), clause.op, clause.values))
        elif clause.key.startswith(NAMESPACE_LABEL):
            spaces.append(Clause(clause.key.removeprefix(NAMESPACE_LABEL), clause.op, clause.values))
        else:
            raise _CannotSay(f"{clause.key} is no label of a pod or namespace")
    if not namespaces:
        raise _CannotSay("a policy stands in a namespace, and k8s.ns=… names none")
    if any(c.key != METADATA_NAME for c in spaces):
        raise _CannotSay("a policy stands in a namespace by its name, not by its labels")
    excluded = {value for clause in spaces for value in clause.values}
    kept = tuple(sorted(namespaces - excluded))
    if not kept:
        raise _CannotSay("it names no namespace that is left")
    names = [Clause(METADATA_NAME, Op.IN, kept)]
    return _Pods(kept, _selector(pods), _selector(names))


_OPERATORS: Final = {
    Op.IN: "In",
    Op.NE: "NotIn",
    Op.NOTIN: "NotIn",
    Op.EXISTS: "Exists",
    Op.ABSENT: "DoesNotExist",
}


def _selector(clauses: Sequence[Clause]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    labels = {clause.key: clause.values[0] for clause in clauses if _plain(clause)}
    if labels:
        out["matchLabels"] = labels
    expressions: list[dict[str, Any]] = []
    for clause in clauses:
        if not _plain(clause):
            one: dict[str, Any] = {"key": clause.key, "operator": _OPERATORS[clause.op]}
            if clause.values:
                one["values"] = list(clause.values)
            expressions.append(one)
    if expressions:
        out["matchExpressions"] = expressions
    return out


def _plain(clause: Clause) -> bool:
    return clause.op in (Op.EQ, Op.IN) and len(clause.values) == 1


def _written(plan: _Plan) -> list[dict[str, Any]]:
    out = [
        _document(ns, ISOLATE, {}, {"policyTypes": ["Ingress", "Egress"]}) for ns in sorted(plan.namespaces)
    ]
    numbers: dict[tuple[str, str], int] = {}
    todo = [
        *plan.entries,
        *((name, ns, {}, way, rule) for name, way, rule in plan.everywhere for ns in sorted(plan.namespaces)),
    ]
    for name, namespace, pods, way, rule in todo:
        stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "policy"
        number = numbers[namespace, stem] = numbers.get((namespace, stem), 0) + 1
        spec = {"policyTypes": [way.capitalize()], way: [rule]}
        out.append(_document(namespace, f"{stem}-{number}", pods, spec))
    return out


def _document(namespace: str, name: str, pods: Mapping[str, Any], spec: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {"podSelector": dict(pods), **spec},
    }
