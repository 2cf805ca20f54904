"""What a CA remembers: the host CAs it has issued, and its list of what is revoked.

    ca/hosts/<serial number>.crt     every host CA issued here, in PEM
    ca/revoked.pem                   the root's newest revocation list

The register is a convenience, not a source of trust: a host CA that was issued elsewhere with the same key can be
revoked by its serial number or certificate all the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from sectool.errors import CredentialError, SectoolError, UsageError
from sectool.identity.authority import RootAuthority
from sectool.identity.extensions import LabelConstraints, decode_constraints
from sectool.identity.files import read_file, write_atomic
from sectool.identity.hostcas import HOSTS
from sectool.identity.lists import next_number
from sectool.identity.profile import Profile, key_id, read_profile
from sectool.identity.revocation import DEFAULT_DAYS, Entries, RevocationList, read_list
from sectool.identity.spiffe import SpiffeId
from sectool.identity.trust import TrustBundle

REVOKED = "revoked.pem"


@dataclass(frozen=True, slots=True)
class Registered:
    """One host CA issued here. Times are UTC microseconds."""

    name: str
    serial: str
    key: str
    constraints: LabelConstraints
    not_before_us: int
    not_after_us: int
    issuer: bytes  # DER of the name of its root
    profile: Profile

    @classmethod
    def of(cls, profile: Profile) -> Registered:
        """From its certificate; CredentialError if it is not a host CA of ours."""
        profile.check_ca()
        raw = profile.constraints
        if raw is None:
            raise CredentialError(0, "it carries no label constraints")
        return cls(
            profile.host_name(),
            f"{profile.serial:x}",
            key_id(profile.public_key),
            decode_constraints(raw),
            profile.not_before_us,
            profile.not_after_us,
            profile.issuer,
            profile,
        )

    @property
    def entries(self) -> Entries:
        """What revokes it: this certificate, and any other with its key."""
        return Entries(frozenset({self.serial}), frozenset({self.key}))


def read_host_certificate(pem: bytes) -> Registered:
    """A host CA's certificate in PEM; UsageError if it is none."""
    try:
        der = x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)
        return Registered.of(read_profile(der, "host CA"))
    except (ValueError, CredentialError) as error:
        raise UsageError(
            f"this is not a host CA's certificate: {error}", "give the host's host/host.crt"
        ) from None


def registered(ca_dir: Path) -> list[Registered]:
    """The host CAs issued here, oldest first; files that are none are passed over."""
    found = []
    folder = ca_dir / HOSTS
    for path in folder.glob("*.crt") if folder.is_dir() else ():
        try:
            found.append(read_host_certificate(read_file(path, "there is no such host", "sectool ca hosts")))
        except UsageError:
            continue
    return sorted(found, key=lambda each: (each.not_before_us, each.serial))


def of_host(ca_dir: Path, name: str, now_us: int) -> Entries:
    """What revokes every unexpired CA of the host with that name; UsageError when none is known."""
    entries = Entries()
    for each in registered(ca_dir):
        if each.name == name and each.not_after_us >= now_us:
            entries |= each.entries
    if not entries:
        known = ", ".join(sorted({each.name for each in registered(ca_dir)})) or "none"
        raise UsageError(
            f"no valid host CA of {name[:100]!r} was issued here (known hosts: {known})",
            "give its certificate (--certificate FILE) or serial number (--serial HEX)",
        )
    return entries


def own_bundle(root: x509.Certificate, trust_domain: str) -> TrustBundle:
    """A trust bundle of that root alone."""
    return TrustBundle().with_root(trust_domain, root.public_bytes(Encoding.PEM).decode("ascii"))


def current_list(
    ca_dir: Path, root: x509.Certificate, trust_domain: str, now_us: int
) -> RevocationList | None:
    """The root's newest list; None before the first. SectoolError for a damaged one: it must not be forgotten."""
    path = ca_dir / REVOKED
    if not path.exists():
        return None
    pem = read_file(path, "there is no revocation list", "sectool ca revoke")
    try:
        return read_list(pem, own_bundle(root, trust_domain), now_us, clock_skew_s=1 << 32)
    except CredentialError as error:
        raise SectoolError(f"{path} does not hold: {error.message}", "restore it from a backup") from None


def revoke(
    ca_dir: Path,
    root: RootAuthority,
    more: Entries,
    now_us: int,
    *,
    less: Entries = Entries(),  # noqa: B008 - immutable
    days: int = DEFAULT_DAYS,
) -> RevocationList:
    """Sign the root's next list: what it held, and `more`, without `less`; keep it and return it."""
    for name in more.workloads:
        if SpiffeId.parse(name).trust_domain != root.trust_domain:
            raise UsageError(
                f"{name} is not of trust domain {root.trust_domain}", "its own domain has to revoke it"
            )
    before = current_list(ca_dir, root.certificate, root.trust_domain, now_us)
    held = before.entries if before else Entries()
    entries = _without_expired(ca_dir, held, now_us) - less | more
    pem = root.sign_revocations(entries, next_number(before, now_us), now_us, days)
    made = read_list(pem, own_bundle(root.certificate, root.trust_domain), now_us)
    write_atomic(ca_dir / REVOKED, pem)
    return made


def _without_expired(ca_dir: Path, entries: Entries, now_us: int) -> Entries:
    """An expired certificate is refused anyway: its serial number and key need not be listed for ever."""
    past: Iterable[Registered] = (each for each in registered(ca_dir) if each.not_after_us < now_us)
    for each in past:
        entries -= each.entries
    return entries
