"""Who may issue what: the trust domain's root issues host CAs, a host CA issues its workloads' SVIDs.

    root (self-signed, years)
      └─ host CA (pathlen 0, label constraints)    at enrolment
           └─ leaf and delegation                  every hour, one for each workload

Every certificate begins BACKDATE_S before the moment of issue, so that a host whose clock is that much behind
still accepts it at once. Names are as short as they can be, because every byte of leaf and host CA rides in a
SYN: the root is O=<trust domain>, a host CA is CN=<host name>, a leaf has no subject at all (its SAN is
critical then, RFC 5280, 4.2.1.6). CAs carry the SPIFFE ID of their trust domain without path (X509-SVID,
3.2).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, x25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from sectool.clock import DAY, SECOND, YEAR, iso, to_datetime
from sectool.errors import CredentialError, SectoolError, UsageError
from sectool.events import DropReason
from sectool.identity.blob import MAX_BLOB, Delegation, SigningKey, VerifyingKey, compress, pack, size_with
from sectool.identity.credential import Credential, PeerIdentity
from sectool.identity.extensions import (
    CONSTRAINTS_OID,
    LabelConstraints,
    decode_constraints,
    encode_constraints,
)
from sectool.identity.files import new_directory, read_file, write_atomic
from sectool.identity.leaf import (
    LEAF_PURPOSES,
    LEAF_USAGE,
    NO_CA,
    LeafMaker,
    authority_key,
    key_identifier,
    new_serial,
)
from sectool.identity.profile import Profile, is_host_name, key_id, read_profile
from sectool.identity.spiffe import SpiffeId, check_trust_domain
from sectool.labels import FEDERATED_LABEL, LabelSet

if TYPE_CHECKING:
    from sectool.identity.revocation import Entries

BACKDATE_S = 60
DEFAULT_TTL_S = 3600
DEFAULT_ROOT_YEARS = 10
DEFAULT_HOST_DAYS = 365

_CA_USAGE = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
_SHA256 = hashes.SHA256()
_MAX_ROOT_DOMAIN = 64  # upper bound of an organisation name (RFC 5280, appendix A.1)


def _builder(
    public_key: VerifyingKey, subject: x509.Name, issuer: x509.Name, begin_us: int, end_us: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .serial_number(new_serial())
        .public_key(public_key)
        .subject_name(subject)
        .issuer_name(issuer)
        .not_valid_before(to_datetime(begin_us // SECOND * SECOND))
        .not_valid_after(to_datetime(end_us // SECOND * SECOND))
    )


def _uri(spiffe_id: SpiffeId) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(spiffe_id))])


def digest_of(key: SigningKey) -> hashes.SHA256 | None:
    """What a signature by `key` hashes with; Ed25519 brings its own."""
    return None if isinstance(key, ed25519.Ed25519PrivateKey) else _SHA256


def encode_key(key: SigningKey, passphrase: bytes = b"") -> bytes:
    """PKCS #8 PEM, encrypted with the passphrase if there is one; for files of mode 0600 either way."""
    how = BestAvailableEncryption(passphrase) if passphrase else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how)


Passphrase = Callable[[], bytes]


def _no_passphrase() -> bytes:
    return b""


def load_authority_files(
    cert_path: Path, key_path: Path, role: str, hint: str, passphrase: Passphrase = _no_passphrase
) -> tuple[Profile, SigningKey]:
    """Read a CA certificate (PEM) and its private key (PEM, mode 0600) and check that they belong together.

    Raises UsageError for missing files, SectoolError for a key others can read, for content that is not what
    it should be and for a pair that does not fit. `passphrase` is asked only for a key that is encrypted.
    """
    missing = f"there is no {role} here"
    cert_pem = read_file(cert_path, missing, hint)
    key_pem = read_file(key_path, missing, hint, secret=True)
    try:
        certificate = x509.load_pem_x509_certificate(cert_pem)
        profile = read_profile(certificate.public_bytes(Encoding.DER), role)
        profile.check_ca()
    except (ValueError, CredentialError) as error:
        raise SectoolError(f"{cert_path} is not a usable {role} certificate: {error}", hint) from None
    try:
        encrypted = b"BEGIN ENCRYPTED PRIVATE KEY" in key_pem
        secret = passphrase() if encrypted else b""
        key = load_pem_private_key(key_pem, secret or None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        if encrypted:
            raise UsageError(
                f"{key_path} is encrypted, and the passphrase given does not open it",
                "type it when asked, or hand it over with --passphrase-fd N",
            ) from None
        raise SectoolError(f"{key_path} is not a private key in PEM", hint) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey):
        raise SectoolError(f"{key_path} is neither a P-256 nor an Ed25519 key", hint)
    if key.public_key() != profile.public_key:
        raise SectoolError(
            f"{key_path} is not the private key of {cert_path}", "restore both files from one backup"
        )
    return profile, key


@dataclass(frozen=True, slots=True)
class RootAuthority:
    """A trust domain's root: its certificate and private key. Kept where hosts are enrolled, nowhere else."""

    trust_domain: str
    certificate: x509.Certificate = field(repr=False)
    _key: SigningKey = field(repr=False)

    @classmethod
    def create(
        cls,
        directory: Path,
        trust_domain: str,
        now_us: int,
        years: int = DEFAULT_ROOT_YEARS,
        *,
        force: bool = False,
        passphrase: bytes = b"",
    ) -> RootAuthority:
        """Make a new P-256 root in `directory` (root.crt, root.key, trust-domain); all files or none.

        The key's file is encrypted with `passphrase` unless that is empty.

        UsageError if the directory exists and `force` is not given, or if the trust domain or years make no
        sense.
        """
        try:
            check_trust_domain(trust_domain)
        except CredentialError as error:
            raise UsageError(error.message, "a trust domain looks like example.org") from None
        if len(trust_domain) > _MAX_ROOT_DOMAIN:
            raise UsageError(
                f"a trust domain of ours has at most {_MAX_ROOT_DOMAIN} characters", "choose a shorter name"
            )
        if not 1 <= years <= 50:
            raise UsageError(f"a root cannot be valid for {years} years", "choose 1 to 50")
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, trust_domain)])
        begin_us = now_us - BACKDATE_S * SECOND
        certificate = (
            _builder(key.public_key(), name, name, begin_us, now_us + years * YEAR)
            .add_extension(x509.SubjectKeyIdentifier(key_identifier(key.public_key())), False)
            .add_extension(x509.BasicConstraints(True, 1), True)
            .add_extension(_CA_USAGE, True)
            .add_extension(_uri(SpiffeId(trust_domain, "")), False)
            .sign(key, _SHA256)
        )
        exists = "a certificate authority is already here"
        hint = "every host enrolled with it would lose its trust; use force only to start over"
        with new_directory(directory, exists, hint, force=force) as fresh:
            write_atomic(fresh / "root.key", encode_key(key, passphrase), 0o600)
            write_atomic(fresh / "root.crt", certificate.public_bytes(Encoding.PEM))
            write_atomic(fresh / "trust-domain", trust_domain.encode() + b"\n")
        return cls(trust_domain, certificate, key)

    @classmethod
    def load(cls, directory: Path, passphrase: Passphrase = _no_passphrase) -> RootAuthority:
        """Load what `create` wrote; errors as in `load_authority_files`."""
        hint = "make one with: sectool ca init --trust-domain NAME"
        if (directory / "root.crt").exists() and not (directory / "root.key").exists():
            raise UsageError(
                f"there is no root.key in {directory}: the root's key is not here",
                "is it kept offline? take a request there (sectool host request, sectool ca sign); "
                "a new root is made by sectool ca init",
            )
        profile, key = load_authority_files(
            directory / "root.crt", directory / "root.key", "root CA", hint, passphrase
        )
        named = read_file(directory / "trust-domain", "there is no root CA here", hint).decode(
            "ascii", "replace"
        )
        trust_domain = profile.spiffe_id().trust_domain
        if named.strip() != trust_domain:
            raise SectoolError(
                f"{directory}/trust-domain says {named.strip()[:100]!r}, the root is for {trust_domain!r}",
                "restore the directory from one backup",
            )
        return cls(trust_domain, profile.certificate, key)

    def sign_revocations(self, entries: Entries, number: int, now_us: int, days: int) -> bytes:
        """The trust domain's next revocation list, as its file holds it."""
        from sectool.identity.revocation import sign_list

        root = read_profile(self.certificate.public_bytes(Encoding.DER), "root")
        return sign_list(root, self._key, entries, number, now_us, days=days)

    def issue_service(self, public_key: VerifyingKey, now_us: int) -> x509.Certificate:
        """A certificate for the CA service itself, `spiffe://<trust domain>/ca`, valid for a day."""
        begin_us = now_us - BACKDATE_S * SECOND
        return (
            _builder(public_key, x509.Name([]), self.certificate.subject, begin_us, now_us + DAY)
            .add_extension(authority_key(self._key.public_key()), False)
            .add_extension(LEAF_USAGE, True)
            .add_extension(LEAF_PURPOSES, False)
            .add_extension(NO_CA, True)
            .add_extension(_uri(SpiffeId(self.trust_domain, "/ca")), True)
            .sign(self._key, digest_of(self._key))
        )

    def issue_host(
        self,
        public_key: VerifyingKey,
        host_name: str,
        constraints: LabelConstraints,
        now_us: int,
        days: int = DEFAULT_HOST_DAYS,
    ) -> x509.Certificate:
        """A host CA for `host_name`, valid `days` but no longer than the root; UsageError for bad values."""
        if not is_host_name(host_name):
            raise UsageError(
                f"host name {host_name[:100]!r} is not valid",
                "letters, digits and . _ - inside, at most 63 characters",
            )
        root_end = self.certificate.not_valid_after_utc
        end_us = now_us + days * DAY
        if days < 1 or to_datetime(now_us) >= root_end:
            raise UsageError(
                f"a host CA cannot be issued for {days} days: the root is valid until {root_end:%Y-%m-%d}",
                "choose at least one day, or make a new root",
            )
        if to_datetime(end_us) > root_end:
            end_us = int(root_end.timestamp()) * SECOND
        begin_us = now_us - BACKDATE_S * SECOND
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host_name)])
        root_key = self._key.public_key()
        return (
            _builder(public_key, subject, self.certificate.subject, begin_us, end_us)
            .add_extension(authority_key(root_key), False)
            .add_extension(x509.SubjectKeyIdentifier(key_identifier(public_key)), False)
            .add_extension(x509.BasicConstraints(True, 0), True)
            .add_extension(_CA_USAGE, True)
            .add_extension(_uri(SpiffeId(self.trust_domain, "")), False)
            .add_extension(
                x509.UnrecognizedExtension(CONSTRAINTS_OID, encode_constraints(constraints)), False
            )
            .sign(self._key, digest_of(self._key))
        )


@dataclass(frozen=True, slots=True)
class Portable:
    """An SVID for its workload to hold itself, for TLS with whoever knows SPIFFE. Times are UTC microseconds.

    It carries no labels, which is how enforcers tell it from a credential: in a handshake of theirs it is refused, so
    that a key which a program can lose opens no connection that policy allows to labels.
    """

    spiffe_id: str
    leaf_der: bytes = field(repr=False)
    host_der: bytes = field(repr=False)
    key: SigningKey = field(repr=False)
    fingerprint: bytes
    serial: str  # hexadecimal, as in PeerIdentity
    not_after_us: int
    renew_at_us: int  # half of the lifetime


class HostAuthority:
    """A host's own CA, which issues the SVIDs of the workloads on it."""

    __slots__ = (
        "_der",
        "_leaves",
        "_names",
        "_permits",
        "_profile",
        "_root",
        "_root_key",
        "constraints",
        "host_name",
        "trust_domain",
    )

    def __init__(
        self, certificate: x509.Certificate, key: SigningKey, root: x509.Certificate | None = None
    ) -> None:
        """Raise CredentialError if `certificate` is not a host CA of ours.

        `root`, when given, bounds the lifetimes that issued credentials announce, as verifiers will.
        """
        profile = read_profile(certificate.public_bytes(Encoding.DER), "host CA")
        profile.check_ca()
        if profile.constraints is None:
            raise CredentialError(DropReason.UNTRUSTED_CHAIN, "the host CA carries no label constraints")
        self._profile = profile
        self._der = certificate.public_bytes(Encoding.DER)
        self._leaves = LeafMaker(key, certificate.subject)
        self._root = read_profile(root.public_bytes(Encoding.DER), "root") if root is not None else profile
        self.trust_domain = profile.spiffe_id().trust_domain
        self.host_name = profile.host_name()
        self.constraints = decode_constraints(profile.constraints)
        self._permits = lru_cache(4096)(self.constraints.permits)  # a host's workloads share most labels
        self._names = key_id(profile.public_key), f"{profile.serial:x}"
        self._root_key = key_id(self._root.public_key) if root is not None else ""

    def __repr__(self) -> str:
        return f"HostAuthority({self.host_name!r}, {self.trust_domain!r})"

    @property
    def certificate(self) -> x509.Certificate:
        """The host CA's certificate."""
        return self._profile.certificate

    @property
    def root_fingerprint(self) -> str:
        """SHA-256 of the root that issued this CA, hexadecimal, as far as it was given."""
        return self._root.fingerprint.hex()

    @property
    def key_id(self) -> str:
        """By what lists of revoked credentials know this CA (sectool.identity.profile.key_id)."""
        return self._names[0]

    @property
    def not_after_us(self) -> int:
        """When this host CA stops to be valid, UTC microseconds, inclusive."""
        return min(self._profile.not_after_us, self._root.not_after_us)

    def _check(self, spiffe_id: SpiffeId, labels: LabelSet, now_us: int) -> None:
        hint = (
            f"change the constraints of host {self.host_name} by enrolling it again, or the workload's labels"
        )
        if not self.constraints.permits_path(spiffe_id.path):
            raise CredentialError(
                DropReason.SPIFFE_ID_INVALID,
                f"{spiffe_id} is not below {self.constraints.path_prefix}, which is all this host may issue",
                hint,
            )
        if FEDERATED_LABEL in labels:
            raise CredentialError(
                DropReason.LABEL_NOT_PERMITTED,
                f"the label {FEDERATED_LABEL} marks peers of other trust domains; no workload can carry it",
                "choose another key",
            )
        for key, value in labels.items():
            if not self._permits(key, value):
                raise CredentialError(
                    DropReason.LABEL_NOT_PERMITTED,
                    f"host {self.host_name} may not vouch for {key}={value}",
                    hint,
                )
        if now_us > self.not_after_us:
            raise CredentialError(
                DropReason.CREDENTIAL_EXPIRED,
                f"the CA of host {self.host_name} expired at {iso(self.not_after_us)}",
                "enroll the host again: sectool host enroll --force",
            )
        if now_us < self._profile.not_before_us:
            raise CredentialError(
                DropReason.CREDENTIAL_NOT_YET_VALID,
                f"the CA of host {self.host_name} is valid from {iso(self._profile.not_before_us)} only",
                "set this host's clock",
            )

    def issue_portable(self, spiffe_path: str, now_us: int, ttl_s: int = DEFAULT_TTL_S) -> Portable:
        """A new SVID with a key of its own, for its workload to hold. Raises CredentialError as `issue` does."""
        spiffe_id = SpiffeId(self.trust_domain, spiffe_path)
        self._check(spiffe_id, LabelSet(), now_us)
        end_us = min(now_us + ttl_s * SECOND, self.not_after_us) // SECOND * SECOND
        begin_us = (now_us - BACKDATE_S * SECOND) // SECOND * SECOND
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = self._leaves.make(key.public_key(), spiffe_id, None, begin_us, end_us)
        fingerprint = hashlib.sha256(leaf.der).digest()
        renew_us = now_us + (end_us - now_us) // 2
        serial = f"{leaf.serial:x}"
        return Portable(str(spiffe_id), leaf.der, self._der, key, fingerprint, serial, end_us, renew_us)

    def issue(
        self, spiffe_path: str, labels: LabelSet, now_us: int, ttl_s: int = DEFAULT_TTL_S
    ) -> Credential:
        """A new SVID with fresh keys and its delegation, valid for `ttl_s` seconds but no longer than this
        CA.

        `labels` may not include `domain` (verifiers set it). Raises CredentialError: SPIFFE_ID_INVALID,
        LABEL_NOT_PERMITTED, CREDENTIAL_EXPIRED or CREDENTIAL_NOT_YET_VALID (this CA's own),
        CREDENTIAL_OVERSIZED for an identity that would not fit into a SYN.
        """
        if ttl_s < 1:
            raise UsageError(f"an SVID cannot be valid for {ttl_s} seconds", "choose at least 1")
        spiffe_id = SpiffeId(self.trust_domain, spiffe_path)
        if not spiffe_path:
            raise CredentialError(
                DropReason.SPIFFE_ID_INVALID,
                "a workload's SPIFFE ID needs a path",
                "give one like /host/web1/wl/shop",
            )
        self._check(spiffe_id, labels, now_us)
        host = self._profile
        end_us = min(now_us + ttl_s * SECOND, self.not_after_us) // SECOND * SECOND
        begin_us = (now_us - BACKDATE_S * SECOND) // SECOND * SECOND
        leaf_key = ec.generate_private_key(ec.SECP256R1())
        leaf = self._leaves.make(leaf_key.public_key(), spiffe_id, labels, begin_us, end_us)
        stream = compress(leaf.der, self._der)
        if size_with(stream) > MAX_BLOB:
            raise CredentialError(
                DropReason.CREDENTIAL_OVERSIZED,
                f"the credential of {spiffe_id} takes {size_with(stream)} bytes; a SYN holds {MAX_BLOB}",
                f"shorten its {len(labels)} labels, its path, or the constraints of host {self.host_name}",
            )
        private = x25519.X25519PrivateKey.generate()
        public = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        delegation = Delegation.sign(leaf_key, public, end_us // SECOND, stream)
        fingerprint = hashlib.sha256(leaf.der).digest()
        validity = (max(begin_us, host.not_before_us, self._root.not_before_us), end_us)
        peer = PeerIdentity.of(
            spiffe_id,
            labels,
            public,
            validity,
            fingerprint,
            leaf.serial,
            self.host_name,
            self._names,
            self._root_key,
        )
        return Credential(
            leaf_der=leaf.der,
            host_der=self._der,
            delegation=delegation,
            blob=pack(delegation, stream),
            x25519_private=private,
            x25519_public=public,
            leaf_key=leaf_key,
            peer=peer,
            not_after_us=end_us,
            renew_at_us=now_us + (end_us - now_us) // 2,
        )
