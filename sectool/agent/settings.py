"""state/sectool.yaml: the daemon's optional settings, read as strictly as policy documents."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nfq.marks import MASK
from nfq.rules import RulesConfig
from nfq.suites import ALL
from sectool.context.kinds import KINDS
from sectool.errors import CredentialError, DocumentError, UsageError
from sectool.identity.spiffe import check_trust_domain
from sectool.labels import LabelError, LabelSet
from sectool.origins import Origin, refusal
from sectool.policy.service import PROTOCOL_NAMES


@dataclass(frozen=True, slots=True)
class Settings:
    """What an operator may change about one daemon. Times in seconds, rates per second."""

    enforced_networks: tuple[str, ...] | None = None  # None: what enrolment declared
    queue: int = 5300  # first NFQUEUE number; worker n takes queue + 2n and the one after it
    workers: int = 1
    mask: int | None = None  # three bits of packet and connection marks; None: the packet path's own
    reject: bool = False  # answer denied connections with RST instead of silence
    svid_lifetime_s: int = 3600
    spire_socket: Path | None = None  # Workload API of a SPIRE agent, whose SVIDs are used where there is one
    path_labels: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()  # labels of SVIDs that carry none
    context: tuple[str, ...] = ("cloud",)  # what of this host's surroundings makes labels
    workload_api: bool = True  # serve the SPIFFE Workload API in the run folder
    clock_skew_s: int = 60
    resolvers: tuple[str, ...] | None = None  # networks whose DNS answers count; None: those of resolv.conf
    syn_rate: int = 2000  # inbound handshakes per second and source prefix
    stranger_rate: int = 150  # the same per second and worker, of hosts not proven lately; 0: no bound
    activation_timeout_s: int = 5  # how long a worker may take to switch the policy revision
    suites: tuple[
        str, ...
    ] = ()  # cipher suites for encrypted flows, best first; none: by what the CPU is good at
    other_protocols: tuple[
        int, ...
    ] = ()  # IP protocols beside TCP, UDP, ICMP that pass; all others are dropped
    revocation_expired: str = (
        "closed"  # when a revocation list has expired: `closed` refuses, `open` lets pass
    )
    revocation_required: tuple[str, ...] = ()  # trust domains of which a list has to be there; * for all
    socket_group: str | None = None  # group that may read over the local API; None: root only
    enforce_inside: tuple[str, ...] = ()  # containers, pods and named namespaces to enforce in; see `_inside`
    kubernetes_namespaces: Path | None = None  # file with the labels of namespaces (sectool.agent.kubernetes)
    pod_labels: tuple[str, ...] = ("*",)  # which labels of a pod its workloads bear; patterns
    roles: dict[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # role -> groups that hold it; none: root only


def rules_config(settings: Settings) -> RulesConfig:
    """What the kernel rules have to be for these settings."""
    return RulesConfig(
        settings.queue,
        settings.workers,
        MASK if settings.mask is None else settings.mask,
        others=settings.other_protocols,
        strangers=settings.stranger_rate,
        known=settings.syn_rate,
    )


def _number(low: int, high: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"expected a whole number from {low} to {high}")
        return value

    return read


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def _networks(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ValueError("expected a list of networks, such as [10.0.0.0/8, 'fd00::/8']")
    try:
        return tuple(str(ipaddress.ip_network(v)) for v in value)
    except ValueError as error:
        raise ValueError(f"not a network: {error}") from None


def _name(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("expected a name")
    return value


def _mask(value: Any) -> int:
    mask: int = _number(1, 0xFFFF_FFFF)(value)
    if mask.bit_count() < 3:
        raise ValueError("expected at least three bits, such as 0x70000000")
    return mask


def _protocols(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError("expected a list of IP protocols, such as [esp, 47]")
    return tuple(sorted({_protocol(entry) for entry in value}))


def _protocol(value: Any) -> int:
    try:
        number = socket.getprotobyname(value.lower()) if isinstance(value, str) else _number(0, 255)(value)
    except (OSError, ValueError):
        raise ValueError(f"{value!r} is neither an IP protocol's name nor a number from 0 to 255") from None
    if number in PROTOCOL_NAMES:
        raise ValueError(f"{value!r} is judged by policy: say who may use it there")
    return int(number)


def _suites(value: Any) -> tuple[str, ...]:
    known = [suite.name for suite in ALL]
    if not isinstance(value, list) or not value or any(v not in known for v in value):
        raise ValueError(f"expected a list of cipher suites, best first; there are {', '.join(known)}")
    if len(set(value)) != len(value):
        raise ValueError("a cipher suite is given twice")
    return tuple(value)


def _roles(value: Any) -> dict[str, tuple[str, ...]]:
    shape = "expected groups by role, such as {security: [secops], team-shop: [shop-dev]}"
    if not isinstance(value, dict):
        raise ValueError(shape)
    out = {}
    for role, groups in value.items():
        if not isinstance(role, str) or not role or not isinstance(groups, list) or not groups:
            raise ValueError(shape)
        if not all(isinstance(group, str) and group for group in groups):
            raise ValueError(f"role {role}: {shape}")
        if role == "root":
            raise ValueError("root holds every role already; 'root' cannot be given to a group")
        out[role] = tuple(groups)
    return out


def _inside(value: Any) -> tuple[str, ...]:
    kinds = ("container:", "pod:", "netns:")
    if not isinstance(value, list) or not all(isinstance(v, str) and v.startswith(kinds) for v in value):
        raise ValueError("expected a list such as ['container:shop-*', 'pod:shop/web-*', 'netns:blue']")
    if bad := [v for v in value if not v.partition(":")[2]]:
        raise ValueError(f"{bad[0]!r} names nothing; '{bad[0]}*' would be all of them")
    return tuple(value)


def _patterns(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
        raise ValueError("expected a list of label keys, such as [app, 'app.kubernetes.io/*']; * for all")
    return tuple(value)


def _context(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or any(v not in KINDS for v in value):
        raise ValueError(f"expected a list out of {', '.join(KINDS)}; [] asks nobody")
    return tuple(value)


def _path(value: Any) -> Path:
    if not isinstance(value, str) or not value.startswith("/"):
        raise ValueError("expected an absolute path")
    return Path(value)


def _path_labels(value: Any) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    if not isinstance(value, dict):
        raise ValueError("expected SPIFFE IDs with labels, such as {'spiffe://td/ns/shop/*': {ns: shop}}")
    out = []
    for pattern, labels in value.items():
        if not isinstance(pattern, str) or not pattern.startswith("spiffe://") or "*" in pattern[:-1]:
            raise ValueError(f"{pattern!r} is no SPIFFE ID, and no beginning of one with a * behind it")
        if not isinstance(labels, dict) or not all(isinstance(v, str) for v in labels.values()):
            raise ValueError(f"{pattern}: expected labels, such as {{app: web}}")
        for key in map(str, labels):
            if refused := refusal(key, Origin.OPERATOR):
                raise ValueError(f"{pattern}: {refused}")
        try:
            LabelSet(labels)
        except LabelError as error:
            raise ValueError(f"{pattern}: {error}") from None
        out.append((pattern, tuple(sorted(labels.items()))))
    return tuple(out)


def _domains(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise ValueError("expected a list of trust domains, such as [shop.example], or ['*'] for all")
    for name in value:
        if name != "*":
            try:
                check_trust_domain(name)
            except CredentialError as error:
                raise ValueError(error.message) from None
    return tuple(value)


def _closed_or_open(value: Any) -> str:
    if value not in ("closed", "open"):
        raise ValueError(
            "expected closed (refuse whom an expired revocation list speaks of) or open (let them pass)"
        )
    return str(value)


_READ: dict[str, Callable[[Any], Any]] = {
    "enforce_inside": _inside,
    "enforced_networks": _networks,
    "queue": _number(0, 65000),
    "workers": _number(1, 64),
    "mask": _mask,
    "reject": _truth,
    "svid_lifetime_s": _number(10, 86400),
    "spire_socket": _path,
    "path_labels": _path_labels,
    "context": _context,
    "workload_api": _truth,
    "clock_skew_s": _number(0, 600),
    "resolvers": _networks,
    "syn_rate": _number(1, 1_000_000),
    "stranger_rate": _number(0, 1_000_000),
    "activation_timeout_s": _number(1, 60),
    "suites": _suites,
    "other_protocols": _protocols,
    "revocation_expired": _closed_or_open,
    "revocation_required": _domains,
    "kubernetes_namespaces": _path,
    "pod_labels": _patterns,
    "socket_group": _name,
    "roles": _roles,
}


def load_settings(path: Path) -> Settings:
    """Settings from `path`; defaults when there is no such file. Raises DocumentError with the place of any mistake."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return Settings()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}", "make it a UTF-8 file that root can read") from None
    return parse_settings(text, str(path))


def parse_settings(text: str, name: str = "sectool.yaml") -> Settings:
    """Parse the settings document `text`; `name` is what errors call it."""
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        problem = getattr(error, "problem", None) or str(error)
        raise DocumentError(where, f"not YAML: {problem}", "one `setting: value` a line") from None
    if root is None or root.tag == "tag:yaml.org,2002:null":
        return Settings()
    if not isinstance(root, yaml.MappingNode):
        raise DocumentError(
            _where(name, root), "expected `setting: value` lines", "put one setting on each line"
        )
    loader = yaml.SafeLoader("")
    values: dict[str, Any] = {}
    for key_node, value_node in root.value:
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if key not in _READ:
            known = ", ".join(sorted(_READ))
            raise DocumentError(_where(name, key_node), f"unknown setting {key!r}", f"settings are: {known}")
        if key in values:
            raise DocumentError(_where(name, key_node), f"{key} is given twice", "keep one of the two lines")
        try:
            values[key] = _READ[key](loader.construct_object(value_node, deep=True))
        except (ValueError, yaml.YAMLError) as error:
            raise DocumentError(
                _where(name, value_node),
                f"{key}: {error}",
                "correct the value, or remove the line: there is a default",
            ) from None
    return replace(Settings(), **values)


def _where(name: str, node: Any) -> str:
    return f"{name}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"
