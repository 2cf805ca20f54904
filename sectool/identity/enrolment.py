"""Setting up a trust domain and enrolling hosts, with files alone (docs/identity.md, "Enrolment").

    init_ca        state/ca/root.crt root.key trust-domain
    enroll_host    state/host/host.crt host.key trust.pem host.yaml
    load_host      what the agent starts from

Directories appear whole or not at all; keys have mode 0600 and are refused with any other.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from sectool.errors import CredentialError, SectoolError, UsageError
from sectool.events import now_us as wall_clock
from sectool.identity.authority import (
    DEFAULT_HOST_DAYS,
    DEFAULT_ROOT_YEARS,
    HostAuthority,
    Passphrase,
    RootAuthority,
    encode_key,
    load_authority_files,
)
from sectool.identity.extensions import LabelConstraints
from sectool.identity.files import new_directory, read_file, write_atomic
from sectool.identity.hostcas import remember
from sectool.identity.profile import is_host_name
from sectool.identity.trust import TrustBundle
from sectool.identity.workload import ATTESTED
from sectool.labels import LabelError, LabelSet
from sectool.origins import Origin, refusal

PRIVATE_NETWORKS = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_ENROLL_HINT = "enroll this host: sectool host enroll --name NAME --ca DIRECTORY"
_FIELDS = {"name", "trust_domain", "labels", "constraints", "enforced_networks"}


@dataclass(frozen=True, slots=True)
class HostIdentity:
    """An enrolled host: its CA, whom it trusts, and what was declared at enrolment."""

    authority: HostAuthority
    bundle: TrustBundle
    name: str
    trust_domain: str
    labels: LabelSet
    constraints: LabelConstraints
    enforced_networks: tuple[Network, ...]


def ca_directory(state_dir: Path) -> Path:
    """Where the root CA of a state directory is."""
    return state_dir / "ca"


def host_directory(state_dir: Path) -> Path:
    """Where the enrolment of a state directory is."""
    return state_dir / "host"


def init_ca(
    state_dir: Path,
    trust_domain: str,
    *,
    years: int = DEFAULT_ROOT_YEARS,
    force: bool = False,
    passphrase: bytes = b"",
    now_us: int | None = None,
) -> RootAuthority:
    """Make the root of a new trust domain under `state_dir`; errors of RootAuthority.create."""
    now = wall_clock() if now_us is None else now_us
    return RootAuthority.create(
        ca_directory(state_dir), trust_domain, now, years, force=force, passphrase=passphrase
    )


def default_constraints(host_name: str, labels: LabelSet) -> LabelConstraints:
    """What a host may vouch for unless told otherwise: its own labels as they are, any other key, its own
    paths.

    The host's labels are pinned, so a stolen host enrolled with env=dev can issue nothing for env=prod.
    """
    allow: dict[str, tuple[str, ...]] = {"*": ("*",)}
    allow.update({key: (value,) for key, value in labels.items()})
    return LabelConstraints(allow, f"/host/{host_name}/")


def within_reach(constraints: LabelConstraints, host_name: str, labels: LabelSet) -> LabelConstraints:
    """Given constraints with the host's path prefix where none is set, and room for what every workload
    carries.

    Raises UsageError for host labels that the constraints forbid.
    """
    allow = dict(constraints.allow)
    if "*" not in allow:
        for key in ATTESTED:
            allow.setdefault(key, ("*",))
    full = LabelConstraints(allow, constraints.path_prefix or f"/host/{host_name}/")
    for key, value in labels.items():
        if not full.permits(key, value):
            raise UsageError(
                f"the host's label {key}={value} is not within its own constraints",
                f"allow it: {key}={value}, or drop the label",
            )
    if not f"/host/{host_name}/".startswith(full.path_prefix):
        raise UsageError(
            f"path prefix {full.path_prefix} leaves no room for this host's workloads",
            f"use /host/{host_name}/ or a prefix of it",
        )
    return full


def parse_networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """Networks as written by people; UsageError for what is none."""
    try:
        return tuple(ipaddress.ip_network(text) for text in texts)
    except ValueError as error:
        raise UsageError(f"enforced network: {error}", "write networks as 10.0.0.0/8 or fd00::/8") from None


def enroll_host(
    state_dir: Path,
    name: str,
    ca_dir: Path,
    labels: Mapping[str, str] | None = None,
    constraints: LabelConstraints | None = None,
    enforced_networks: Iterable[str] | None = None,
    *,
    days: int = DEFAULT_HOST_DAYS,
    force: bool = False,
    passphrase: Passphrase = bytes,
    now_us: int | None = None,
) -> HostIdentity:
    """Issue a host CA from the root in `ca_dir` and write the enrolment under `state_dir`.

    Without `constraints` those of `default_constraints` hold; without `enforced_networks` the private ranges.
    UsageError for a missing CA, an existing enrolment (unless `force`, which starts it afresh), bad names,
    labels or networks, and constraints too long for a SYN.
    """
    now = wall_clock() if now_us is None else now_us
    if not is_host_name(name):
        raise UsageError(
            f"host name {name[:100]!r} is not valid", "letters, digits and . _ - inside, at most 63"
        )
    try:
        label_set = LabelSet(labels)
    except LabelError as error:
        raise UsageError(str(error)) from None
    for label in label_set:
        if why := refusal(label, Origin.HOST):
            raise UsageError(why, "choose another key")
    networks = parse_networks(PRIVATE_NETWORKS if enforced_networks is None else enforced_networks)
    root = RootAuthority.load(ca_dir, passphrase)
    try:
        limits = (
            default_constraints(name, label_set)
            if constraints is None
            else within_reach(constraints, name, label_set)
        )
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = root.issue_host(key.public_key(), name, limits, now, days)
        authority = HostAuthority(certificate, key, root.certificate)
        authority.issue(f"/host/{name}/wl/trial", label_set, now)
    except CredentialError as error:
        raise UsageError(f"host {name} cannot be enrolled: {error.message}", error.hint) from None
    root_pem = root.certificate.public_bytes(Encoding.PEM).decode("ascii")
    bundle = TrustBundle().with_root(root.trust_domain, root_pem)
    document = {
        "name": name,
        "trust_domain": root.trust_domain,
        "labels": dict(label_set),
        "constraints": {
            "path_prefix": limits.path_prefix,
            "allow": {pattern: list(values) for pattern, values in limits.allow.items()},
        },
        "enforced_networks": [str(network) for network in networks],
    }
    hint = "use --force to enroll it again; workloads get new SVIDs from the new host CA"
    with new_directory(
        host_directory(state_dir), "this host is enrolled already", hint, force=force
    ) as fresh:
        write_atomic(fresh / "host.key", encode_key(key), 0o600)
        write_atomic(fresh / "host.crt", certificate.public_bytes(Encoding.PEM))
        bundle.save(fresh / "trust.pem")
        write_atomic(fresh / "host.yaml", yaml.safe_dump(document, sort_keys=False).encode())
    remember(ca_dir, certificate)
    return HostIdentity(authority, bundle, name, root.trust_domain, label_set, limits, networks)


def _read_host_yaml(path: Path) -> dict[str, Any]:
    text = read_file(path, "this host is not enrolled", _ENROLL_HINT)
    try:
        document = yaml.safe_load(text)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise SectoolError(
            f"{path} is not YAML: {error}", "restore it from a backup, or enroll again"
        ) from None
    if not isinstance(document, dict) or set(document) != _FIELDS:
        raise SectoolError(f"{path} must have exactly the fields {', '.join(sorted(_FIELDS))}", _ENROLL_HINT)
    if not all(isinstance(document[field], str) for field in ("name", "trust_domain")):
        raise SectoolError(f"{path}: name and trust_domain must be text", _ENROLL_HINT)
    return document


def load_host(state_dir: Path) -> HostIdentity:
    """Load an enrolment; UsageError if there is none, SectoolError for damaged or unfitting files."""
    directory = host_directory(state_dir)
    profile, key = load_authority_files(
        directory / "host.crt", directory / "host.key", "host CA", _ENROLL_HINT
    )
    bundle = TrustBundle.load(directory / "trust.pem")
    path = directory / "host.yaml"
    document = _read_host_yaml(path)
    try:
        domain = profile.spiffe_id().trust_domain
        roots = [root for root in bundle.roots.get(domain, ()) if root.subject == profile.issuer]
        for root in roots:
            try:
                profile.issued_by(root)
            except CredentialError:
                continue
            break
        else:
            raise SectoolError(
                f"no root of {domain} in {directory}/trust.pem signed {directory}/host.crt", _ENROLL_HINT
            )
        authority = HostAuthority(profile.certificate, key, root.certificate)
    except CredentialError as error:
        raise SectoolError(f"{directory}/host.crt is not a host CA: {error.message}", _ENROLL_HINT) from None
    if (document["name"], document["trust_domain"]) != (authority.host_name, authority.trust_domain):
        raise SectoolError(f"{path} and {directory}/host.crt are of different hosts", _ENROLL_HINT)
    try:
        labels = LabelSet(document["labels"])
        networks = parse_networks(document["enforced_networks"])
    except (LabelError, UsageError, TypeError, AttributeError) as error:
        raise SectoolError(f"{path}: {error}", "correct the file, or enroll again") from None
    return HostIdentity(
        authority,
        bundle,
        authority.host_name,
        authority.trust_domain,
        labels,
        authority.constraints,
        networks,
    )
