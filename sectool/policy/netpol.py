"""Kubernetes NetworkPolicies: what they say, and what of a flow they let through.

A workload is a pod when its labels say in which namespace it is (docs/networkpolicy.md). The rules of the API
(networking.k8s.io/v1), for each direction by itself:

    a pod is isolated     for ingress (egress) as soon as one policy in its namespace selects it and is of that type
    an isolated pod       may be called (may call) where any rule of any policy that isolates it says so
    a pod not isolated    may be called (may call) by anybody

A flow is allowed when egress of its source and ingress of its destination both say so. What is no pod has neither.
Since nothing else here is open by default, a namespace comes under this regime only with its first policy: of flows
between two namespaces (or hosts) without any, NetworkPolicies say nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from sectool.labels import FEDERATED_LABEL, stable_id
from sectool.policy.model import (
    NAMESPACE_LABEL,
    POD_LABEL,
    Mode,
    NetPeer,
    NetPort,
    NetRule,
    NetworkPolicyDoc,
)
from sectool.policy.rules import CompiledRule, Facts, Networks, Rule
from sectool.policy.selector import Anyone, Clause
from sectool.policy.sentence import Sentence, Verb
from sectool.policy.service import TCP, UDP

NAMESPACE_KEYS: Final = ("k8s.ns", "k8s.namespace")
PORT_LABEL: Final = "k8s.port."
METADATA_NAME: Final = "kubernetes.io/metadata.name"  # every namespace has it, with its own name
KIND: Final = "NetworkPolicy"

_SENTENCE: Final = Sentence(Verb.ALLOW, Anyone(), Anyone())


class Pod:
    """A pod as its workload's labels tell it. Labels of Kubernetes are asked for by their own keys."""

    __slots__ = ("labels", "namespace", "of_namespace")

    def __init__(self, namespace: str, labels: Mapping[str, str]) -> None:
        self.namespace = namespace
        self.labels = _PodLabels(labels)
        self.of_namespace = _NamespaceLabels(labels, namespace)

    def port(self, name: str) -> tuple[int, int] | None:
        """Protocol and number of a named port."""
        text = self.labels.all.get(PORT_LABEL + name)
        if text is None:
            return None
        number, _, protocol = text.partition("/")
        if not (number.isascii() and number.isdigit() and len(number) <= 5):
            return None
        return {"": TCP, "tcp": TCP, "udp": UDP, "sctp": 132}.get(protocol.lower(), -1), int(number)


class _PodLabels(Mapping[str, str]):
    """`k8s.label.KEY`, or failing that the workload's label KEY."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self.all = labels

    def __getitem__(self, key: str) -> str:
        value = self.all.get(POD_LABEL + key)
        return self.all[key] if value is None else value

    def __iter__(self) -> Iterator[str]:
        return iter(self.all)

    def __len__(self) -> int:
        return len(self.all)


class _NamespaceLabels(_PodLabels):
    """`k8s.nslabel.KEY`; its name is a label, too."""

    def __init__(self, labels: Mapping[str, str], namespace: str) -> None:
        super().__init__(labels)
        self._namespace = namespace

    def __getitem__(self, key: str) -> str:
        return self._namespace if key == METADATA_NAME else self.all[NAMESPACE_LABEL + key]


def pod_of(labels: Mapping[str, str] | None) -> Pod | None:
    """The pod that a workload with these labels is; None when it is none of our own cluster."""
    if labels is None or FEDERATED_LABEL in labels:
        return None
    namespace = next((labels[key] for key in NAMESPACE_KEYS if key in labels), None)
    return None if namespace is None else Pod(namespace, labels)


def holds(clauses: tuple[Clause, ...], labels: Mapping[str, str]) -> bool:
    """Whether a label selector of Kubernetes selects what has these labels. The empty one selects everything."""
    return all(clause.holds(labels) for clause in clauses)


@dataclass(slots=True)
class _Peer:
    """A peer, its addresses as a number of the engine's network table."""

    peer: NetPeer
    network: int

    def matches(self, facts: Facts, pod: Pod | None, namespace: str) -> bool:
        if self.network >= 0:
            return self.network in facts.networks
        if pod is None:
            return False
        if self.peer.namespaces is None:
            if pod.namespace != namespace:
                return False
        elif not holds(self.peer.namespaces, pod.of_namespace):
            return False
        return self.peer.pods is None or holds(self.peer.pods, pod.labels)


@dataclass(slots=True)
class _Rule:
    peers: list[_Peer]  # none: everybody
    ports: tuple[NetPort, ...]  # none: all, whatever the protocol
    compiled: CompiledRule

    def matches(
        self, peer: Facts, pod: Pod | None, namespace: str, called: Pod | None, protocol: int, port: int
    ) -> bool:
        if self.ports and not any(port_matches(p, called, protocol, port) for p in self.ports):
            return False
        return not self.peers or any(p.matches(peer, pod, namespace) for p in self.peers)


def port_matches(entry: NetPort, called: Pod | None, protocol: int, port: int) -> bool:
    """Whether a port entry speaks of a service of the called pod (None: it is no pod, and names no ports)."""
    if entry.protocol != protocol:
        return False
    if entry.name:
        return called is not None and called.port(entry.name) == (protocol, port)
    return entry.low <= port <= entry.high


@dataclass(slots=True)
class _Policy:
    """A compiled policy; a direction of which it says nothing is None."""

    doc: NetworkPolicyDoc
    ingress: list[_Rule] | None
    egress: list[_Rule] | None


@dataclass(slots=True)
class _Namespace:
    policies: list[_Policy] = field(default_factory=list)
    open: CompiledRule | None = None  # names itself where no policy isolates


class NetworkPolicies:
    """All NetworkPolicies of a set, by namespace."""

    def __init__(self, documents: Iterable[NetworkPolicyDoc], networks: Networks) -> None:
        self._enforced: dict[str, _Namespace] = {}
        self._all: dict[str, _Namespace] = {}
        self.rules: list[Rule] = []
        self._ids: set[int] = set()
        self.has_staged = False
        for doc in documents:
            if doc.mode is Mode.OFF:
                continue
            policy = _Policy(
                doc,
                self._compile(doc, "ingress", doc.ingress, networks),
                self._compile(doc, "egress", doc.egress, networks),
            )
            self.has_staged |= doc.mode is Mode.STAGE
            for table in (self._all,) if doc.mode is Mode.STAGE else (self._all, self._enforced):
                space = table.setdefault(doc.namespace, _Namespace())
                space.policies.append(policy)
                if space.open is None:
                    space.open = self._rule(
                        doc, 0, f"pods of namespace {doc.namespace} that no NetworkPolicy isolates", networks
                    )

    def __bool__(self) -> bool:
        return bool(self._all)

    def policies(self) -> Iterator[tuple[NetworkPolicyDoc, dict[tuple[str, int], Rule]]]:
        """Each policy that is not off, and its rules by direction and number (from 1)."""
        for space in self._all.values():
            for policy in space.policies:
                yield (
                    policy.doc,
                    {
                        (direction, number): rule.compiled.rule
                        for direction, rules in (("ingress", policy.ingress), ("egress", policy.egress))
                        for number, rule in enumerate(rules or (), 1)
                    },
                )

    def _compile(
        self, doc: NetworkPolicyDoc, direction: str, rules: tuple[NetRule, ...] | None, networks: Networks
    ) -> list[_Rule] | None:
        if rules is None:
            return None
        return [
            _Rule(
                [_Peer(p, networks.add(p.block) if p.block is not None else -1) for p in rule.peers],
                rule.ports,
                self._rule(doc, index, f"{direction} {rule.text(direction)}", networks),
            )
            for index, rule in enumerate(rules, 1)
        ]

    def _rule(self, doc: NetworkPolicyDoc, index: int, text: str, networks: Networks) -> CompiledRule:
        name = doc.name if index else doc.namespace
        number = stable_id(f"{KIND}/{name}/{text}".encode())
        rule = Rule(number, name, KIND, doc.owner, index, text, doc.where, doc.mode)
        if number not in self._ids:
            self._ids.add(number)
            self.rules.append(rule)
        return CompiledRule(rule, _SENTENCE, networks)

    def allowing(
        self, source: Facts, destination: Facts, protocol: int, port: int, *, staged: bool = False
    ) -> CompiledRule | None:
        """The rule that lets a flow through (that of its destination, if both ends have one), or None.

        `staged` counts staged policies, too, as if they were enforced.
        """
        table = self._all if staged else self._enforced
        ways = _ways(table, source, destination, protocol, port)
        if ways is None or ways.leaving is None or ways.entering is None:
            return None
        return ways.entering.compiled or ways.leaving.compiled or ways.space.open

    def refusing(
        self, source: Facts, destination: Facts, protocol: int, port: int
    ) -> list[tuple[str, tuple[NetworkPolicyDoc, ...]]]:
        """The directions in which enforced policies isolate and no rule lets the flow through, with these policies."""
        ways = _ways(self._enforced, source, destination, protocol, port)
        if ways is None:
            return []
        out = []
        for name, verdict, facts in (
            ("egress", ways.leaving, source),
            ("ingress", ways.entering, destination),
        ):
            pod = pod_of(facts.labels)
            if verdict is None and pod is not None:
                policies = self._enforced[pod.namespace].policies
                out.append((name, tuple(p.doc for p in policies if _isolates(p, pod, name == "ingress"))))
        return out


@dataclass(frozen=True, slots=True)
class _Yes:
    """A direction that is allowed, by a rule or because nobody isolates."""

    compiled: CompiledRule | None


_OPEN: Final = _Yes(None)


class _Ways(NamedTuple):
    """Both directions; None where a pod is isolated and no rule lets the flow through. `space` is under the regime."""

    leaving: _Yes | None
    entering: _Yes | None
    space: _Namespace


def _ways(
    table: Mapping[str, _Namespace], source: Facts, destination: Facts, protocol: int, port: int
) -> _Ways | None:
    """What the policies make of a flow; None when neither end is in a namespace that has any."""
    caller, called = pod_of(source.labels), pod_of(destination.labels)
    at = table.get(caller.namespace) if caller is not None else None
    to = table.get(called.namespace) if called is not None else None
    leaving: _Yes | None = _OPEN
    entering: _Yes | None = _OPEN
    if at is not None and caller is not None:
        leaving = _judge(at, caller, False, destination, called, called, protocol, port)
    if to is not None and called is not None:
        entering = _judge(to, called, True, source, caller, called, protocol, port)
    space = to or at
    return None if space is None else _Ways(leaving, entering, space)


def _isolates(policy: _Policy, pod: Pod, ingress: bool) -> bool:
    return (policy.ingress if ingress else policy.egress) is not None and holds(
        policy.doc.selector, pod.labels
    )


def _judge(
    space: _Namespace,
    pod: Pod,
    ingress: bool,
    other: Facts,
    other_pod: Pod | None,
    called: Pod | None,
    protocol: int,
    port: int,
) -> _Yes | None:
    isolated = False
    for policy in space.policies:
        if not _isolates(policy, pod, ingress):
            continue
        isolated = True
        for rule in (policy.ingress if ingress else policy.egress) or ():
            if rule.matches(other, other_pod, policy.doc.namespace, called, protocol, port):
                return _Yes(rule.compiled)
    return None if isolated else _OPEN
