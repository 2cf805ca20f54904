"""A NetworkPolicy of Kubernetes (networking.k8s.io/v1) from YAML: fields, defaults and refusals as in its API.

What the API server would refuse is refused, with its place. Absent, null and empty mean what they mean there: a list
that is not there or empty in a rule is everybody, `ingress` that is not there or empty is nobody, `{}` as a selector is
everything, and no selector is none.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Any, Final, TypeGuard

import yaml

from sectool.labels import LabelError, check_label
from sectool.policy.model import (
    NAMESPACE_LABEL,
    POD_LABEL,
    DocumentKind,
    Mode,
    NetPeer,
    NetPort,
    NetRule,
    NetworkPolicyDoc,
)
from sectool.policy.network import IPNetwork, NetworkSpec
from sectool.policy.selector import Clause, Op
from sectool.policy.yamlpos import Items, Node, Scalar, Table, bad_character, closest

API_VERSION: Final = "networking.k8s.io/v1"
OWNER: Final = "sectool/owner"  # annotations that say what Kubernetes has no field for
MODE: Final = "sectool/mode"
DEFAULT_OWNER: Final = "security"

_ROOT: Final = ("apiVersion", "kind", "metadata", "spec", "status")
_METADATA: Final = (
    *("name", "namespace", "labels", "annotations"),
    *("uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp", "managedFields"),
    *("selfLink", "ownerReferences", "finalizers", "generateName", "deletionGracePeriodSeconds"),
)
_SPEC: Final = ("podSelector", "policyTypes", "ingress", "egress")
_PEER: Final = ("podSelector", "namespaceSelector", "ipBlock")
_SELECTOR: Final = ("matchLabels", "matchExpressions")
_PROTOCOLS: Final = {"TCP": 6, "UDP": 17, "SCTP": 132}
_OPERATORS: Final = {"In": Op.IN, "NotIn": Op.NOTIN, "Exists": Op.EXISTS, "DoesNotExist": Op.ABSENT}
_NAMESPACE = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_NAME = re.compile(r"(?=.{1,253}\Z)[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*")
_PORT_NAME = re.compile(r"(?=.*[a-z])(?!.*--)[a-z0-9](?:[a-z0-9-]{0,13}[a-z0-9])?")
_MOST: Final = 1024  # rules, peers or ports of one list


def is_network_policy(node: Node) -> TypeGuard[Table]:
    """Whether a document is one of Kubernetes: it says so by its apiVersion or its kind."""
    if not isinstance(node, Table):
        return False
    if "apiVersion" in node.entries:
        return True
    kind = node.entries.get("kind")
    return kind is not None and isinstance(kind[1], Scalar) and kind[1].value == DocumentKind.NETWORK_POLICY


class NetworkPolicyFields:
    """Reads one NetworkPolicy. It refers to no Network documents."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self.references: list[tuple[str, Scalar]] = []  # none: it speaks of no Network
        _known(table, _ROOT, "a NetworkPolicy")
        version = _text(table, "apiVersion")
        if version is None:
            raise table.fail(
                "this NetworkPolicy has no 'apiVersion'", f"add a line 'apiVersion: {API_VERSION}'"
            )
        if version.value != API_VERSION:
            raise version.fail(
                f"apiVersion {version.value!r} is not known", f"write apiVersion: {API_VERSION}"
            )
        kind = _text(table, "kind")
        if kind is None or kind.value != DocumentKind.NETWORK_POLICY:
            at = kind or table
            raise at.fail("of Kubernetes, only the kind NetworkPolicy is taken", "kind: NetworkPolicy")
        metadata = _table(table, "metadata")
        if metadata is None:
            raise table.fail("this NetworkPolicy has no 'metadata'", "add 'metadata:' with at least a name")
        _known(metadata, _METADATA, "metadata")
        name = _text(metadata, "name")
        if name is None:
            raise metadata.fail("metadata has no 'name'", "add 'name: …'")
        if not _NAME.fullmatch(name.value):
            raise name.fail(
                f"{name.value!r} is not a name", "small letters, digits and - inside, parts joined by ."
            )
        self.name_node = name
        self._metadata = metadata

    def document(self) -> NetworkPolicyDoc:
        """The policy. Raises DocumentError."""
        namespace = _text(self._metadata, "namespace")
        if namespace is not None and not _NAMESPACE.fullmatch(namespace.value):
            raise namespace.fail(
                f"{namespace.value!r} is not a namespace", "small letters, digits and - inside"
            )
        space = namespace.value if namespace is not None else "default"
        owner, mode = self._annotations()
        spec = _table(self.table, "spec")
        selector: tuple[Clause, ...] = ()
        ingress: tuple[NetRule, ...] = ()
        egress: tuple[NetRule, ...] = ()
        types: set[str] = set()
        if spec is not None:
            _known(spec, _SPEC, "spec")
            selector = _selector(spec, "podSelector", POD_LABEL) or ()
            ingress = tuple(_rule(item, "from") for item in _list(spec, "ingress"))
            egress = tuple(_rule(item, "to") for item in _list(spec, "egress"))
            types = self._types(spec)
        if not types:  # as the API server fills it in
            types = {"Ingress", "Egress"} if egress else {"Ingress"}
        return NetworkPolicyDoc(
            f"{space}/{self.name_node.value}",
            space,
            selector,
            ingress if "Ingress" in types else None,
            egress if "Egress" in types else None,
            owner,
            mode,
            where=self.name_node.where,
        )

    def _types(self, spec: Table) -> set[str]:
        out: set[str] = set()
        for item in _list(spec, "policyTypes"):
            node = _scalar(item, "a policy type")
            if node.value not in ("Ingress", "Egress"):
                raise node.fail(f"there is no policy type {node.value!r}", "Ingress or Egress")
            out.add(node.value)
        return out

    def _annotations(self) -> tuple[str, Mode]:
        notes = _table(self._metadata, "annotations")
        owner, mode = DEFAULT_OWNER, Mode.ENFORCE
        if notes is None:
            return owner, mode
        for key, (key_node, node) in notes.entries.items():
            if not key.startswith("sectool/"):
                continue
            value = _scalar(node, key)
            if key == OWNER:
                if bad_character(value.value) >= 0 or len(value.value) > 120 or not value.value.strip():
                    raise value.fail("this is not an owner", "a word of at most 120 characters")
                owner = value.value.strip()
            elif key == MODE:
                if value.value not in {m.value for m in Mode}:
                    raise value.fail(f"there is no mode {value.value!r}", "enforce, stage or off")
                mode = Mode(value.value)
            else:
                raise key_node.fail(f"there is no annotation {key!r}", closest(key, (OWNER, MODE)))
        return owner, mode


def _rule(node: Node, peers_field: str) -> NetRule:
    table = _as_table(node, "a rule") if not _null(node) else None
    if table is None:
        return NetRule()
    _known(table, (peers_field, "ports"), "a rule")
    return NetRule(
        tuple(_peer(item) for item in _list(table, peers_field)),
        tuple(_port(item) for item in _list(table, "ports")),
    )


def _peer(node: Node) -> NetPeer:
    if _null(node):
        raise node.fail("a peer must say whom it means", "podSelector, namespaceSelector or ipBlock")
    table = _as_table(node, "a peer")
    _known(table, _PEER, "a peer")
    block = _table(table, "ipBlock")
    pods = _selector(table, "podSelector", POD_LABEL)
    namespaces = _selector(table, "namespaceSelector", NAMESPACE_LABEL)
    if block is not None:
        if pods is not None or namespaces is not None:
            raise block.fail("ipBlock cannot stand beside a selector", "make two peers of it")
        return NetPeer(block=_block(block))
    if pods is None and namespaces is None:
        raise table.fail("a peer must say whom it means", "podSelector, namespaceSelector or ipBlock")
    return NetPeer(pods, namespaces)


def _block(table: Table) -> NetworkSpec:
    _known(table, ("cidr", "except"), "ipBlock")
    node = _text(table, "cidr")
    if node is None:
        raise table.fail("ipBlock has no 'cidr'", "e.g. cidr: 10.0.0.0/8")
    cidr = _cidr(node)
    excepts: list[IPNetwork] = []
    for item in _list(table, "except"):
        text = _scalar(item, "a network")
        inner = _cidr(text)
        inside = inner.version == cidr.version and inner.prefixlen > cidr.prefixlen
        if not inside or inner.network_address not in cidr:
            raise text.fail(
                f"{inner} is not a part of {cidr}", "except takes networks inside of cidr, and smaller"
            )
        excepts.append(inner)
    return NetworkSpec((cidr,), tuple(excepts))


def _cidr(node: Scalar) -> IPNetwork:
    """As Kubernetes takes it: bits beyond the prefix are cut off."""
    try:
        if "/" not in node.value:
            raise ValueError
        network = ipaddress.ip_network(node.value, strict=False)
    except ValueError:
        raise node.fail(f"{node.value!r} is not a network", "e.g. 10.0.0.0/8 or 2001:db8::/32") from None
    if network.version == 6 and network.network_address.ipv4_mapped is not None:
        raise node.fail("IPv4 addresses are written as such", "e.g. 10.0.0.0/8")
    return network


def _port(node: Node) -> NetPort:
    if _null(node):
        return NetPort(6)
    table = _as_table(node, "a port")
    _known(table, ("protocol", "port", "endPort"), "a port")
    protocol = 6
    named = _text(table, "protocol")
    if named is not None:
        if named.value not in _PROTOCOLS:
            raise named.fail(f"there is no protocol {named.value!r}", "TCP, UDP or SCTP")
        protocol = _PROTOCOLS[named.value]
    port, end = _text(table, "port"), _text(table, "endPort")
    if port is None:
        if end is not None:
            raise end.fail("endPort needs a port", "add 'port: …', the first of the range")
        return NetPort(protocol)
    if port.style or not re.fullmatch(r"[0-9]+", port.value):
        if not _PORT_NAME.fullmatch(port.value):
            raise port.fail(
                f"{port.value!r} is not a port", "a number from 1 to 65535, or the name of a pod's port"
            )
        if end is not None:
            raise end.fail("endPort goes with a port's number, not its name", "give the port as a number")
        return NetPort(protocol, name=port.value)
    low = _number(port)
    if end is None:
        return NetPort(protocol, low, low)
    high = _number(end)
    if high < low:
        raise end.fail(f"endPort {high} is below port {low}", "the range goes from port to endPort")
    return NetPort(protocol, low, high)


def _number(node: Scalar) -> int:
    plain = not node.style and re.fullmatch(r"[1-9][0-9]{0,4}", node.value)
    if not plain or int(node.value) > 65535:
        raise node.fail(f"{node.value!r} is not a port", "a number from 1 to 65535")
    return int(node.value)


def _selector(table: Table, name: str, prefix: str) -> tuple[Clause, ...] | None:
    """A label selector; None when the field is not there."""
    selector = _table(table, name)
    if selector is None:
        return None
    _known(selector, _SELECTOR, name)
    out: list[Clause] = []
    labels = _table(selector, "matchLabels")
    for key_node, node in labels.entries.values() if labels is not None else ():
        out.append(Clause(_key(key_node, prefix), Op.EQ, (_value(key_node, node),)))
    return (*out, *(_expression(item, prefix) for item in _list(selector, "matchExpressions")))


def _expression(item: Node, prefix: str) -> Clause:
    table = _as_table(item, "an expression")
    _known(table, ("key", "operator", "values"), "an expression")
    key, operator = _text(table, "key"), _text(table, "operator")
    if key is None or operator is None:
        raise table.fail(
            "an expression needs a 'key' and an 'operator'", "operator: In, NotIn, Exists, DoesNotExist"
        )
    if operator.value not in _OPERATORS:
        raise operator.fail(
            f"there is no operator {operator.value!r}",
            closest(operator.value, list(_OPERATORS)) or f"one of {', '.join(_OPERATORS)}",
        )
    op = _OPERATORS[operator.value]
    values = tuple(_value(key, node) for node in _list(table, "values"))
    if op in (Op.IN, Op.NOTIN) and not values:
        raise operator.fail(f"{operator.value} needs values", "values: [one, other]")
    if op in (Op.EXISTS, Op.ABSENT) and values:
        raise operator.fail(f"{operator.value} takes no values", "remove 'values'")
    return Clause(_key(key, prefix), op, values)


def _key(node: Scalar, prefix: str) -> str:
    try:
        check_label(prefix + node.value, "")
    except LabelError:
        raise node.fail(
            f"a workload cannot bear the label {node.value!r}",
            f"it would be {prefix}{node.value}: letters, digits and . _ - / inside, at most 63 characters",
        ) from None
    return node.value


def _value(key: Scalar, node: Node) -> str:
    value = _scalar(node, f"the value of {key.value!r}")
    _must_be_text(value)
    try:
        check_label("x", value.value)
    except LabelError as error:
        raise value.fail(
            str(error).replace(" of label 'x'", ""), "choose a value that labels can have"
        ) from None
    return value.value


_RESOLVER: Final[Any] = yaml.SafeLoader("")


def _must_be_text(node: Scalar) -> None:
    """Kubernetes takes texts for labels; what YAML reads as a number or a truth must be quoted."""
    tag = _RESOLVER.resolve(yaml.ScalarNode, node.value, (not node.style, bool(node.style)))
    if tag != "tag:yaml.org,2002:str":
        raise node.fail(f"{node.value} is not a text", f'put it in quotes: "{node.value}"')


# --- nodes ------------------------------------------------------------------------------------------------------------


def _null(node: Node) -> bool:
    return isinstance(node, Scalar) and node.is_null


def _known(table: Table, fields: tuple[str, ...], what: str) -> None:
    for key, (key_node, _) in table.entries.items():
        if key not in fields:
            raise key_node.fail(
                f"{what} has no field {key!r}", closest(key, fields) or f"its fields are {', '.join(fields)}"
            )


def _as_table(node: Node, what: str) -> Table:
    if not isinstance(node, Table):
        raise node.fail(f"{what} must be a mapping", "write 'key: value' lines, or {} for an empty one")
    return node


def _table(table: Table, field: str) -> Table | None:
    if field not in table.entries or _null(table.entries[field][1]):
        return None
    return _as_table(table.entries[field][1], repr(field))


def _list(table: Table, field: str) -> tuple[Node, ...]:
    if field not in table.entries or _null(table.entries[field][1]):
        return ()
    node = table.entries[field][1]
    if not isinstance(node, Items):
        raise node.fail(f"{field!r} must be a list", f"put '- ' in front: {field}: [ … ]")
    if len(node.items) > _MOST:
        raise node.fail(
            f"{field!r} has {len(node.items)} entries; at most {_MOST} are taken",
            "split the policy: what several allow is added up",
        )
    return node.items


def _text(table: Table, field: str) -> Scalar | None:
    if field not in table.entries or _null(table.entries[field][1]):
        return None
    return _scalar(table.entries[field][1], repr(field))


def _scalar(node: Node, what: str) -> Scalar:
    if not isinstance(node, Scalar) or node.is_null:
        raise node.fail(f"{what} must be a word", "write the word after the colon, in quotes if need be")
    return node
