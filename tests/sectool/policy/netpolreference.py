"""Another evaluator of NetworkPolicies, written from the field documentation of networking.k8s.io/v1 alone.

It works on the YAML as a plain loader gives it (dictionaries and lists), shares no code with the product, and says for
each direction what the API says. It takes its time.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Any

Json = Any


@dataclass(frozen=True)
class End:
    """A pod (with a namespace), or something outside the cluster (without)."""

    address: str
    namespace: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    namespace_labels: dict[str, str] = field(default_factory=dict)
    ports: dict[str, tuple[str, int]] = field(default_factory=dict)  # name: protocol, number


def allowed(policies: list[Json], source: End, destination: End, protocol: str, port: int) -> bool:
    """Whether the source may open this connection."""
    return direction(policies, source, destination, "egress", protocol, port) and direction(
        policies, destination, source, "ingress", protocol, port
    )


def governed(policies: list[Json], end: End) -> bool:
    """Whether the namespace of a pod has a policy at all."""
    return end.namespace is not None and any(namespace_of(p) == end.namespace for p in policies)


def namespace_of(policy: Json) -> str:
    return str(policy["metadata"].get("namespace") or "default")


def types_of(policy: Json) -> list[str]:
    """policyTypes: if not specified it defaults based on the existence of egress rules; ingress always."""
    spec = policy.get("spec") or {}
    given = spec.get("policyTypes") or []
    if given:
        return list(given)
    return ["Ingress", "Egress"] if spec.get("egress") else ["Ingress"]


def direction(policies: list[Json], pod: End, peer: End, way: str, protocol: str, port: int) -> bool:
    """Traffic is allowed if no policy selects the pod, or if it matches a rule of one that does."""
    if pod.namespace is None:
        return True
    selecting = []
    for policy in policies:
        if namespace_of(policy) != pod.namespace or way.capitalize() not in types_of(policy):
            continue
        spec = policy.get("spec") or {}
        if selected(spec.get("podSelector") or {}, pod.labels):
            selecting.append(spec)
    if not selecting:
        return True
    called = pod if way == "ingress" else peer
    for spec in selecting:
        for rule in spec.get(way) or []:
            rule = rule or {}
            peers = rule.get("from" if way == "ingress" else "to") or []
            ports = rule.get("ports") or []
            peer_fits = not peers or any(is_peer(p, peer, pod.namespace) for p in peers)
            port_fits = not ports or any(is_port(p, called, protocol, port) for p in ports)
            if peer_fits and port_fits:
                return True
    return False


def selected(selector: Json, labels: dict[str, str]) -> bool:
    """matchLabels and matchExpressions are ANDed; an empty selector matches everything."""
    for key, value in (selector.get("matchLabels") or {}).items():
        if key not in labels or labels[key] != value:
            return False
    for expression in selector.get("matchExpressions") or []:
        key, operator = expression["key"], expression["operator"]
        values = expression.get("values") or []
        if operator == "In" and not (key in labels and labels[key] in values):
            return False
        if operator == "NotIn" and key in labels and labels[key] in values:
            return False
        if operator == "Exists" and key not in labels:
            return False
        if operator == "DoesNotExist" and key in labels:
            return False
    return True


def is_peer(peer: Json, end: End, namespace: str) -> bool:
    if peer.get("ipBlock") is not None:
        block = peer["ipBlock"]
        address = ipaddress.ip_address(end.address)
        inside = address in ipaddress.ip_network(block["cidr"], strict=False)
        return inside and not any(
            address in ipaddress.ip_network(net, strict=False) for net in block.get("except") or []
        )
    if end.namespace is None:
        return False
    if peer.get("namespaceSelector") is not None:
        if not selected(peer["namespaceSelector"], end.namespace_labels):
            return False
    elif end.namespace != namespace:
        return False
    return peer.get("podSelector") is None or selected(peer["podSelector"], end.labels)


def is_port(entry: Json, called: End, protocol: str, port: int) -> bool:
    entry = entry or {}
    if (entry.get("protocol") or "TCP") != protocol:
        return False
    wanted = entry.get("port")
    if wanted is None:
        return True
    if isinstance(wanted, str):
        return called.namespace is not None and called.ports.get(wanted) == (protocol, port)
    return bool(wanted <= port <= (entry.get("endPort") or wanted))
