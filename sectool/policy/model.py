"""The documents of a policy set, once they are known to be sound."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import ClassVar, Final

from sectool.labels import LabelSet
from sectool.policy.flow import FlowSpec
from sectool.policy.network import NetworkSpec
from sectool.policy.selector import Clause
from sectool.policy.sentence import Sentence


class Mode(StrEnum):
    """Whether a document decides (enforce), only says what it would decide (stage), or sleeps (off)."""

    ENFORCE = "enforce"
    STAGE = "stage"
    OFF = "off"


class DocumentKind(StrEnum):
    """`kind:` of a document."""

    POLICY = "Policy"
    GUARDRAIL = "Guardrail"
    NETWORK = "Network"
    WORKLOAD = "Workload"
    TEST = "Test"
    NETWORK_POLICY = "NetworkPolicy"  # of Kubernetes, networking.k8s.io/v1


@dataclass(frozen=True, slots=True)
class RuleDoc:
    """A sentence and where it stands (`file:line:column`)."""

    sentence: Sentence
    where: str


@dataclass(frozen=True, slots=True)
class PolicyDoc:
    """A Policy (a developer's intent) or a Guardrail (the box around all intents)."""

    kind: DocumentKind
    name: str
    owner: str
    rules: tuple[RuleDoc, ...]
    mode: Mode = Mode.ENFORCE
    description: str = ""
    where: str = ""


@dataclass(frozen=True, slots=True)
class NetworkDoc:
    """A named set of addresses, `net:NAME` in sentences."""

    name: str
    spec: NetworkSpec
    owner: str = ""
    description: str = ""
    where: str = ""

    kind: ClassVar[DocumentKind] = DocumentKind.NETWORK


@dataclass(frozen=True, slots=True)
class WorkloadDoc:
    """Labels for the processes whose attested facts match. All of `match` must hold."""

    name: str
    match: tuple[tuple[str, str], ...]
    labels: LabelSet
    owner: str = ""
    description: str = ""
    where: str = ""

    kind: ClassVar[DocumentKind] = DocumentKind.WORKLOAD

    def matches(self, facts: Mapping[str, str]) -> bool:
        """Whether the facts satisfy all keys (systemd.unit, user, executable, sha256, cgroup).

        A pattern that ends with `*` asks for a prefix. A fact that is not known never matches.
        """
        for key, pattern in self.match:
            fact = facts.get(key)
            if fact is None:
                return False
            if pattern.endswith("*"):
                if not fact.startswith(pattern[:-1]):
                    return False
            elif fact != pattern:
                return False
        return True


@dataclass(frozen=True, slots=True)
class Expectation:
    """One line of a Test: this flow must be let through (`allow`) or not."""

    flow: FlowSpec
    allow: bool
    text: str
    where: str


@dataclass(frozen=True, slots=True)
class TestDoc:
    """Flows whose verdict is fixed. With `mode: stage` the pending verdict is asked, with `off` nothing."""

    name: str
    expectations: tuple[Expectation, ...]
    mode: Mode = Mode.ENFORCE
    owner: str = ""
    description: str = ""
    where: str = ""

    kind: ClassVar[DocumentKind] = DocumentKind.TEST
    __test__: ClassVar[bool] = False  # pytest: this is no test class


POD_LABEL: Final = "k8s.label."  # a pod's label KEY is its workload's label k8s.label.KEY
NAMESPACE_LABEL: Final = "k8s.nslabel."


@dataclass(frozen=True, slots=True)
class NetPeer:
    """A peer of a NetworkPolicy: addresses, or pods by labels; None where the field is not there."""

    pods: tuple[Clause, ...] | None = None
    namespaces: tuple[Clause, ...] | None = None
    block: NetworkSpec | None = None

    def __str__(self) -> str:
        if self.block is not None:
            but = f" except {' '.join(map(str, self.block.excepts))}" if self.block.excepts else ""
            return f"{' '.join(map(str, self.block.cidrs))}{but}"
        pods = "all pods" if not self.pods else f"pods {','.join(map(str, self.pods))}"
        if self.namespaces is None:
            return f"{pods} of its namespace"
        return f"{pods} of " + (
            f"namespaces {','.join(map(str, self.namespaces))}" if self.namespaces else "all namespaces"
        )


@dataclass(frozen=True, slots=True)
class NetPort:
    """A port of a NetworkPolicy: numbers from `low` to `high`, or a name of the called pod's."""

    protocol: int
    low: int = 0
    high: int = 65535
    name: str = ""

    def __str__(self) -> str:
        family = {6: "tcp", 17: "udp", 132: "sctp"}[self.protocol]
        if self.name:
            return f"{family}/{self.name}"
        if (self.low, self.high) == (0, 65535):
            return family
        return f"{family}/{self.low}" + (f"-{self.high}" if self.high != self.low else "")


@dataclass(frozen=True, slots=True)
class NetRule:
    """An ingress or egress rule of a NetworkPolicy. No peers: everybody; no ports: everything."""

    peers: tuple[NetPeer, ...] = ()
    ports: tuple[NetPort, ...] = ()

    def text(self, direction: str) -> str:
        """For people."""
        peers = "; ".join(map(str, self.peers)) or "everybody"
        on = f" on {','.join(map(str, self.ports))}" if self.ports else ""
        return f"{'from' if direction == 'ingress' else 'to'} {peers}{on}"


@dataclass(frozen=True, slots=True)
class NetworkPolicyDoc:
    """A NetworkPolicy of Kubernetes. `name` is NAMESPACE/NAME; a direction it does not isolate is None."""

    name: str
    namespace: str
    selector: tuple[Clause, ...]  # in keys of Kubernetes; none: all pods of the namespace
    ingress: tuple[NetRule, ...] | None
    egress: tuple[NetRule, ...] | None
    owner: str = ""
    mode: Mode = Mode.ENFORCE
    description: str = ""
    where: str = ""

    kind: ClassVar[DocumentKind] = DocumentKind.NETWORK_POLICY


Document = PolicyDoc | NetworkDoc | WorkloadDoc | TestDoc | NetworkPolicyDoc


@dataclass(frozen=True)
class DocumentSet:
    """All documents of one policy revision, each kind in order of names, and the text they came from."""

    policies: tuple[PolicyDoc, ...] = ()
    guardrails: tuple[PolicyDoc, ...] = ()
    networks: tuple[NetworkDoc, ...] = ()
    workloads: tuple[WorkloadDoc, ...] = ()
    tests: tuple[TestDoc, ...] = ()
    sources: tuple[tuple[str, str], ...] = ()  # file name, text
    network_policies: tuple[NetworkPolicyDoc, ...] = ()

    def documents(self) -> Iterator[Document]:
        yield from self.guardrails
        yield from self.policies
        yield from self.networks
        yield from self.workloads
        yield from self.tests
        yield from self.network_policies

    def __len__(self) -> int:
        return sum(1 for _ in self.documents())

    @cached_property
    def text(self) -> str:
        """The full text as given. `parse` takes it back, with file names and line numbers as they were.

        Each file is led by a line `--- # file: "NAME"`, itself YAML (the start of a document), so the whole
        is one readable YAML stream.
        """
        if len(self.sources) == 1 and self.sources[0][0] == UNNAMED:
            return self.sources[0][1]
        return "".join(f"{FILE_LINE}{json.dumps(name)}\n{text}" for name, text in self.sources)

    @cached_property
    def hash(self) -> str:
        """Hex SHA-256 of the meaning: the same for any order of files and documents, spacing and comments."""
        canonical = [canonical_document(document) for document in self.documents()]
        return hashlib.sha256(
            json.dumps(canonical, sort_keys=True, separators=(",", ":")).encode()
        ).hexdigest()

    def merge(self, other: DocumentSet) -> DocumentSet:
        """Both sets as one. Raises DocumentError for a name that both define."""
        from sectool.policy.documents import join

        return join([self, other])


UNNAMED: Final = "<text>"
FILE_LINE: Final = "--- # file: "


def canonical_document(document: Document) -> dict[str, object]:
    """What a document says, without where it stands: JSON-ready, the basis of hash and diff."""
    out: dict[str, object] = {"kind": document.kind.value, "name": document.name}
    if document.owner:
        out["owner"] = document.owner
    if document.description:
        out["description"] = document.description
    match document:
        case PolicyDoc():
            out["mode"] = document.mode.value
            out["rules"] = [str(rule.sentence) for rule in document.rules]
        case NetworkDoc():
            out["cidrs"] = sorted(map(str, document.spec.cidrs))
            out["except"] = sorted(map(str, document.spec.excepts))
        case WorkloadDoc():
            out["match"] = dict(document.match)
            out["labels"] = dict(document.labels)
        case TestDoc():
            out["mode"] = document.mode.value
            out["allow"] = [str(e.flow) for e in document.expectations if e.allow]
            out["deny"] = [str(e.flow) for e in document.expectations if not e.allow]
        case NetworkPolicyDoc():
            out["mode"] = document.mode.value
            out["podSelector"] = ",".join(map(str, document.selector))
            for direction in ("ingress", "egress"):
                rules: tuple[NetRule, ...] | None = getattr(document, direction)
                if rules is not None:
                    out[direction] = [rule.text(direction) for rule in rules]
    return out
