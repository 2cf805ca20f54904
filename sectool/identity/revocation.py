"""Signed lists of what is revoked: X.509 CRLs (RFC 5280, section 5) with one private extension.

    issuer               says of                        with
    a trust domain's     every credential of that       serial numbers (of host CAs or leaves), SHA-256 of a CA's
    root                 domain                         public key, SPIFFE IDs
    a host CA            credentials it issued itself   serial numbers of leaves, SPIFFE IDs

In a file: the CRL in PEM, behind the certificate of the host CA if it is one's. Whoever reads a list verifies it
against the trust bundle; of one issuer only the list with the greatest number counts. A list is fresh until its
nextUpdate: past that a verifier cannot know what has been revoked since (`Revocations.stale`).

The extension (arc `.3`, not critical, so that openssl can use the list) is a DER UTF8String of entries in byte order,
joined by `;`:

    key:<64 hexadecimal digits>            every certificate with that public key, and all it signed
    spiffe://example.org/host/a/wl/shop    every SVID of that ID, for good
    spiffe://example.org/host/a/wl/shop@N  those whose notBefore lies before N (UTC seconds): later ones hold
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtensionOID, SignatureAlgorithmOID

from sectool.clock import DAY, SECOND, from_datetime, iso, to_datetime
from sectool.errors import CredentialError, UsageError
from sectool.events import DropReason
from sectool.identity.authority import BACKDATE_S, digest_of
from sectool.identity.blob import SigningKey
from sectool.identity.credential import PeerIdentity
from sectool.identity.extensions import ARC
from sectool.identity.leaf import authority_key
from sectool.identity.profile import Profile, key_id, read_profile, refusal
from sectool.identity.spiffe import SpiffeId
from sectool.identity.trust import TrustBundle

REVOKED_OID: Final = x509.ObjectIdentifier(f"{ARC}.3")
MAX_LIST: Final = 1 << 20  # bytes of a list's file
MAX_SERIALS: Final = 16_384
MAX_ENTRIES: Final = 4_096  # of keys and SPIFFE ids
DEFAULT_DAYS: Final = 30
MAX_DAYS: Final = 3_650

_PEM = re.compile(
    rb"-----BEGIN (?P<what>CERTIFICATE|X509 CRL)-----[A-Za-z0-9+/=\s]+-----END (?P=what)-----\s*"
)
_KEY = re.compile(r"key:([0-9a-f]{64})")
_UNDERSTOOD = frozenset((ExtensionOID.CRL_NUMBER, ExtensionOID.AUTHORITY_KEY_IDENTIFIER, REVOKED_OID))
_ALGORITHMS = frozenset((SignatureAlgorithmOID.ECDSA_WITH_SHA256, SignatureAlgorithmOID.ED25519))


def plain_serial(text: str) -> str:
    """A serial number or fingerprint as this package compares them; UsageError for what is no hexadecimal number."""
    plain = text.replace(":", "").lower().removeprefix("0x").lstrip("0")
    if not plain or len(plain) > 64 or not re.fullmatch(r"[0-9a-f]+", plain):
        raise UsageError(
            f"{text[:100]!r} is not a serial number", "give it in hexadecimal, as `openssl x509 -serial`"
        )
    return plain


@dataclass(frozen=True, slots=True)
class Entries:
    """What a list revokes. `workloads`: SPIFFE ID to notBefore bound in UTC seconds (0: whenever it begins)."""

    serials: frozenset[str] = frozenset()  # lower-case hexadecimal without leading zeros
    keys: frozenset[str] = frozenset()
    workloads: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    def __bool__(self) -> bool:
        return bool(self.serials or self.keys or self.workloads)

    def __or__(self, more: Entries) -> Entries:
        """Both; of one SPIFFE ID the wider."""
        workloads = dict(self.workloads)
        for name, before in more.workloads.items():
            known = workloads.get(name)
            workloads[name] = before if known is None else 0 if 0 in (known, before) else max(known, before)
        return Entries(self.serials | more.serials, self.keys | more.keys, workloads)

    def __sub__(self, less: Entries) -> Entries:
        """Without these: serials, keys and SPIFFE ids (whatever their bound)."""
        workloads = {name: before for name, before in self.workloads.items() if name not in less.workloads}
        return Entries(self.serials - less.serials, self.keys - less.keys, workloads)

    def concern(self, serials: tuple[str, ...], key: str, spiffe_id: str, not_before_us: int) -> str:
        """In words, which entry covers a credential; '' if none does. `key`: key_id of its host CA."""
        for serial in serials:
            if serial in self.serials:
                return f"serial number {serial} is revoked"
        if key in self.keys:
            return f"the key {key[:16]} of its host CA is revoked"
        before = self.workloads.get(spiffe_id)
        if before is not None and (not before or not_before_us < before * SECOND):
            return f"{spiffe_id} is revoked" + (f" if issued before {iso(before * SECOND)}" if before else "")
        return ""


def _encode(entries: Entries) -> bytes:
    parts = [f"key:{key}" for key in entries.keys]
    parts += [name + (f"@{before}" if before else "") for name, before in entries.workloads.items()]
    if len(parts) > MAX_ENTRIES or len(entries.serials) > MAX_SERIALS:
        raise UsageError(
            f"a list holds at most {MAX_SERIALS} serial numbers and {MAX_ENTRIES} keys and SPIFFE IDs",
            "revoke the host's key instead of each of its workloads",
        )
    body = ";".join(sorted(parts)).encode("ascii")
    n = len(body)
    if n < 0x80:
        return bytes((0x0C, n)) + body
    size = n.to_bytes((n.bit_length() + 7) // 8, "big")  # X.690, 8.1.3.5
    return bytes((0x0C, 0x80 | len(size))) + size + body


def _decode(data: bytes) -> tuple[frozenset[str], dict[str, int]]:
    text = b""
    if len(data) >= 2 and data[0] == 0x0C:
        text = data[2 + (data[1] & 0x7F if data[1] & 0x80 else 0) :]
    keys: set[str] = set()
    workloads: dict[str, int] = {}
    parts = text.decode("ascii").split(";") if text else []
    for part in parts:
        if found := _KEY.fullmatch(part):
            keys.add(found[1])
            continue
        name, at, before = part.partition("@")
        if not SpiffeId.parse(name).path or (at and (not before.isdecimal() or len(before) > 12)):
            raise ValueError("entry")
        workloads[name] = int(before or 0)
    if _encode(Entries(frozenset(), frozenset(keys), workloads)) != data:
        raise ValueError("not canonical")
    return frozenset(keys), workloads


@dataclass(frozen=True, slots=True)
class RevocationList:
    """One list, its signature verified. Times are UTC microseconds."""

    trust_domain: str
    issuer: str  # key_id of who signed it
    issuer_name: str  # the host's name; '' for the root
    number: int
    issued_us: int
    next_update_us: int
    entries: Entries
    pem: bytes = field(repr=False, default=b"")

    @property
    def by_root(self) -> bool:
        """Whether it speaks for the whole trust domain, or for one host's own credentials."""
        return not self.issuer_name

    @property
    def who(self) -> str:
        """Whose list it is, in words."""
        return f"host {self.issuer_name}" if self.issuer_name else f"the root of {self.trust_domain}"

    @property
    def warn_us(self) -> int:
        """From when on its coming end is worth a warning: a quarter of its life before."""
        return self.next_update_us - (self.next_update_us - self.issued_us) // 4


def sign_list(
    issuer: Profile,
    key: SigningKey,
    entries: Entries,
    number: int,
    now_us: int,
    *,
    days: int = DEFAULT_DAYS,
) -> bytes:
    """A list signed by a root or host CA, as its file holds it. `number` has to be greater than the one before."""
    if not 1 <= days <= MAX_DAYS:
        raise UsageError(f"a list cannot be valid for {days} days", f"choose 1 to {MAX_DAYS}")
    builder = (
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer.certificate.subject)
        .last_update(to_datetime((now_us - BACKDATE_S * SECOND) // SECOND * SECOND))
        .next_update(to_datetime((now_us + days * DAY) // SECOND * SECOND))
        .add_extension(x509.CRLNumber(number), False)
        .add_extension(authority_key(issuer.public_key), False)
    )
    if entries.keys or entries.workloads:
        builder = builder.add_extension(x509.UnrecognizedExtension(REVOKED_OID, _encode(entries)), False)
    elif len(entries.serials) > MAX_SERIALS:
        _encode(entries)
    for serial in sorted(entries.serials):
        revoked = x509.RevokedCertificateBuilder().serial_number(int(serial, 16))
        builder = builder.add_revoked_certificate(
            revoked.revocation_date(to_datetime(now_us // SECOND * SECOND)).build()
        )
    signed = builder.sign(key, digest_of(key)).public_bytes(Encoding.PEM)
    if issuer.constraints is None:
        return signed
    return issuer.certificate.public_bytes(Encoding.PEM) + signed


def read_list(pem: bytes, bundle: TrustBundle, now_us: int, *, clock_skew_s: int = 60) -> RevocationList:
    """Read and verify one list; any bytes give one or CredentialError with the reason.

    CREDENTIAL_OVERSIZED, CREDENTIAL_MALFORMED; UNTRUSTED_CHAIN (no root or host CA we trust signed it),
    KEY_USAGE_INVALID (it may not sign lists), CREDENTIAL_NOT_YET_VALID, CREDENTIAL_EXPIRED (the host CA has). A list
    that is past its nextUpdate is read: what it revokes stays revoked.
    """
    if len(pem) > MAX_LIST:
        raise refusal(DropReason.CREDENTIAL_OVERSIZED, f"the list is larger than {MAX_LIST} bytes")
    parts = list(_PEM.finditer(pem))
    kinds = [part["what"] for part in parts]
    if b"".join(part[0] for part in parts) != pem.lstrip() or kinds not in (
        [b"X509 CRL"],
        [b"CERTIFICATE", b"X509 CRL"],
    ):
        raise refusal(
            DropReason.CREDENTIAL_MALFORMED,
            "this is no revocation list: a CRL in PEM, behind its host CA's certificate if a host signed it",
        )
    try:
        crl = x509.load_pem_x509_crl(parts[-1][0])
        found = _read(crl)
        certificate = x509.load_pem_x509_certificate(parts[0][0]) if len(parts) == 2 else None
        der = certificate.public_bytes(Encoding.DER) if certificate is not None else b""
    except CredentialError:
        raise
    except (
        Exception
    ) as error:  # the parser has a dozen exception types for bad input; each means the same here
        raise refusal(
            DropReason.CREDENTIAL_MALFORMED, f"the list is not a well-formed CRL ({type(error).__name__})"
        ) from None
    issuer, domain = _issuer(crl, der, bundle, now_us, clock_skew_s)
    usage = issuer.key_usage
    if usage is None or not usage.crl_sign:
        raise refusal(DropReason.KEY_USAGE_INVALID, f"the {issuer.role} may not sign revocation lists")
    if found.issued_us > now_us + clock_skew_s * SECOND:
        raise refusal(
            DropReason.CREDENTIAL_NOT_YET_VALID,
            f"the list was issued at {iso(found.issued_us)}, which has not come yet",
            "compare the clocks of both hosts",
        )
    return replace(
        found,
        trust_domain=domain,
        issuer=key_id(issuer.public_key),
        issuer_name=issuer.host_name() if der else "",
        pem=bytes(pem),
    )


def _read(crl: x509.CertificateRevocationList) -> RevocationList:
    if crl.signature_algorithm_oid not in _ALGORITHMS:
        raise refusal(DropReason.UNTRUSTED_CHAIN, "the list is signed with an algorithm that is not accepted")
    for extension in crl.extensions:
        if extension.critical and extension.oid not in _UNDERSTOOD:
            raise refusal(
                DropReason.CREDENTIAL_MALFORMED,
                f"the list's critical extension {extension.oid.dotted_string} is not understood here",
            )
    crl.issuer.public_bytes()  # parsed only when asked for
    number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
    if len(crl) > MAX_SERIALS or number < 0 or number >= 1 << 63 or crl.next_update_utc is None:
        raise ValueError("bounds")
    serials = set()
    for entry in crl:
        if any(each.critical for each in entry.extensions):
            raise ValueError("critical entry extension")
        serials.add(f"{entry.serial_number:x}")
    keys: frozenset[str] = frozenset()
    workloads: dict[str, int] = {}
    for extension in crl.extensions:
        if extension.oid == REVOKED_OID and isinstance(extension.value, x509.UnrecognizedExtension):
            keys, workloads = _decode(extension.value.value)
    begin, end = from_datetime(crl.last_update_utc), from_datetime(crl.next_update_utc)
    if end <= begin:
        raise ValueError("dates")
    return RevocationList("", "", "", number, begin, end, Entries(frozenset(serials), keys, workloads))


def _issuer(
    crl: x509.CertificateRevocationList, host_der: bytes, bundle: TrustBundle, now_us: int, skew_s: int
) -> tuple[Profile, str]:
    """Who signed it, and for which trust domain it speaks."""
    if host_der:
        host = read_profile(host_der, "host CA")
        host.check_ca()
        if host.constraints is None:
            raise refusal(DropReason.UNTRUSTED_CHAIN, "the list's host CA is not one of ours")
        domain = host.spiffe_id().trust_domain
        root = next((r for r in bundle.roots.get(domain, ()) if _signed(host, r)), None)
        if root is None:
            raise refusal(
                DropReason.UNTRUSTED_CHAIN, f"no root of {domain} we trust signed the list's host CA"
            )
        if now_us > host.not_after_us:
            raise refusal(
                DropReason.CREDENTIAL_EXPIRED, f"the list's host CA expired at {iso(host.not_after_us)}"
            )
        if now_us + skew_s * SECOND < host.not_before_us:
            raise refusal(DropReason.CREDENTIAL_NOT_YET_VALID, "the list's host CA is not valid yet")
        if _made(crl, host):
            return host, domain
        raise refusal(DropReason.UNTRUSTED_CHAIN, "the host CA in the file did not sign the list")
    for domain, roots in bundle.roots.items():
        for root in roots:
            if _made(crl, root):
                return root, domain
    raise refusal(
        DropReason.UNTRUSTED_CHAIN,
        "no root this host trusts signed the list",
        "a host's list carries the host CA's certificate; a partner's needs `sectool trust add` first",
    )


def _signed(profile: Profile, issuer: Profile) -> bool:
    try:
        profile.issued_by(issuer)
    except CredentialError:
        return False
    return True


def _made(crl: x509.CertificateRevocationList, issuer: Profile) -> bool:
    if crl.issuer.public_bytes() != issuer.subject:
        return False
    try:
        return crl.is_signature_valid(issuer.public_key)
    except Exception:  # another kind of key than the signature's
        return False


class Revocations:
    """All lists that count on this host, looked up by what a credential says of itself."""

    __slots__ = (
        "_by_domain",
        "_by_host",
        "_fresh_us",
        "_hosts_fresh_us",
        "closed",
        "first_stale_us",
        "lists",
    )

    def __init__(self, lists: Iterable[RevocationList] = (), *, closed: bool = True) -> None:
        """`closed`: credentials that an expired list would have to speak for are refused."""
        self.lists = tuple(lists)
        self.closed = closed
        self._by_domain: dict[str, Entries] = {}
        self._by_host: dict[str, Entries] = {}
        self._fresh_us: dict[str, int] = {}
        self._hosts_fresh_us: dict[str, int] = {}
        for each in self.lists:
            if (
                each.by_root
            ):  # of several roots of a domain each may publish; a rollover leaves the old one's behind
                known = self._by_domain.get(each.trust_domain, Entries())
                self._by_domain[each.trust_domain] = known | each.entries
                fresh = self._fresh_us.get(each.trust_domain, 0)
                self._fresh_us[each.trust_domain] = max(fresh, each.next_update_us)
            else:
                self._by_host[each.issuer] = each.entries
                self._hosts_fresh_us[each.issuer] = each.next_update_us
        ends = [*self._fresh_us.values(), *self._hosts_fresh_us.values()]
        self.first_stale_us = min(ends, default=1 << 62) if closed else 1 << 62

    def __bool__(self) -> bool:
        return bool(self.lists)

    def why(
        self,
        trust_domain: str,
        spiffe_id: str,
        serial: str,
        not_before_us: int,
        issuer: tuple[str, str],
    ) -> str:
        """In words, why a credential is revoked; '' if it is not. `issuer`: key_id and serial number of its host CA."""
        key, number = issuer
        domain = self._by_domain.get(trust_domain)
        if domain is not None and (why := domain.concern((serial, number), key, spiffe_id, not_before_us)):
            return why
        host = self._by_host.get(key)
        return host.concern((serial,), "", spiffe_id, not_before_us) if host is not None else ""

    def of(self, peer: PeerIdentity) -> str:
        """The same of an identity that was verified before."""
        issuer = peer.issuer, peer.issuer_serial
        return self.why(peer.trust_domain, peer.spiffe_id, peer.serial, peer.not_before_us, issuer)

    def stale(self, trust_domain: str, issuer: str, now_us: int) -> str:
        """In words, which list that would have to speak for a credential has expired; '' if none, or if that is let
        pass."""
        if now_us <= self.first_stale_us:
            return ""
        if now_us > (fresh_us := self._fresh_us.get(trust_domain, now_us)):
            if not fresh_us:
                return f"there is no revocation list of {trust_domain} here that counts"
            return f"the revocation list of {trust_domain} expired at {iso(fresh_us)}"
        if now_us > self._hosts_fresh_us.get(issuer, now_us):
            return f"the revocation list of its host expired at {iso(self._hosts_fresh_us[issuer])}"
        return ""

    def to_wire(self) -> bytes:
        """For the socketpair between agent and packet worker."""
        return json.dumps(
            {
                "closed": self.closed,
                "lists": [
                    [
                        each.trust_domain,
                        each.issuer,
                        each.issuer_name,
                        each.number,
                        each.issued_us,
                        each.next_update_us,
                        sorted(each.entries.serials),
                        sorted(each.entries.keys),
                        dict(each.entries.workloads),
                    ]
                    for each in self.lists
                ],
            }
        ).encode("ascii")

    @classmethod
    def from_wire(cls, data: bytes) -> Revocations:
        """Inverse of `to_wire`; the sender is our own agent, which verified the lists."""
        if not data:
            return cls()
        fields = json.loads(data)
        return cls(
            (
                RevocationList(
                    domain,
                    issuer,
                    name,
                    number,
                    begin,
                    end,
                    Entries(frozenset(serials), frozenset(keys), workloads),
                )
                for domain, issuer, name, number, begin, end, serials, keys, workloads in fields["lists"]
            ),
            closed=bool(fields["closed"]),
        )
