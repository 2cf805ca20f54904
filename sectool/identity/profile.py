"""What we read out of one X.509 certificate, once, and the shape we demand of leaves and CAs.

Sources: X509-SVID specification sections 2 to 5, RFC 5280 section 4. Reading proves nothing: signatures,
trust and time are the business of sectool.identity.verify.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, NameOID, SignatureAlgorithmOID

from sectool.clock import from_datetime
from sectool.errors import CredentialError
from sectool.events import DropReason
from sectool.identity.blob import P256_ORDER, VerifyingKey
from sectool.identity.der import BIT_STRING, SEQUENCE, element
from sectool.identity.extensions import CONSTRAINTS_OID, LABELS_OID
from sectool.identity.spiffe import SpiffeId

ECDSA_SHA256 = ec.ECDSA(SHA256())

# AlgorithmIdentifiers in DER (RFC 5758, 3.2; RFC 8410, 3).
ECDSA_SHA256_DER = bytes.fromhex("300a06082a8648ce3d040302")
ED25519_DER = bytes.fromhex("300506032b6570")
_SIGNATURE_ALGORITHMS = {
    SignatureAlgorithmOID.ECDSA_WITH_SHA256: ECDSA_SHA256_DER,
    SignatureAlgorithmOID.ED25519: ED25519_DER,
}
_UNDERSTOOD = frozenset(
    (
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
        ExtensionOID.SUBJECT_KEY_IDENTIFIER,
        ExtensionOID.AUTHORITY_KEY_IDENTIFIER,
        LABELS_OID,
        CONSTRAINTS_OID,
    )
)
_HOST_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


def is_host_name(name: str) -> bool:
    """Whether `name` can name a host: it becomes a common name, a SPIFFE path segment and text in events."""
    return _HOST_NAME.fullmatch(name) is not None


def key_id(key: VerifyingKey) -> str:
    """SHA-256 of a public key (SubjectPublicKeyInfo) in hexadecimal: a CA goes by it whatever certificate it has."""
    return hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


def refusal(reason: DropReason, message: str, hint: str = "") -> CredentialError:
    """A CredentialError; the one spelling of it in this package's verifying half."""
    return CredentialError(reason, message, hint)


@dataclass(frozen=True, slots=True)
class Profile:
    """One certificate, read. `role` (leaf, host CA, root) is for messages; times are UTC microseconds."""

    role: str
    certificate: x509.Certificate
    fingerprint: bytes  # SHA-256 of the DER
    serial: int
    not_before_us: int
    not_after_us: int  # inclusive
    issuer: bytes  # DER of the name
    subject: bytes
    public_key: VerifyingKey
    algorithm: x509.ObjectIdentifier  # of the signature on it
    uris: tuple[str, ...]  # URI SANs
    is_ca: bool
    path_length: int | None
    key_usage: x509.KeyUsage | None
    extended_key_usage: tuple[x509.ObjectIdentifier, ...] | None
    labels: bytes | None  # raw value of our extensions
    constraints: bytes | None

    def spiffe_id(self) -> SpiffeId:
        """The one SPIFFE ID of this certificate; CredentialError(SPIFFE_ID_INVALID) for none or several."""
        if len(self.uris) != 1:
            raise refusal(
                DropReason.SPIFFE_ID_INVALID,
                f"the {self.role} has {len(self.uris)} URI names; exactly one is needed",
            )
        return SpiffeId.parse(self.uris[0])

    def fingerprints(self) -> tuple[bytes, ...]:
        """The fingerprints that this certificate can go under: with (r, s), its P-256 signature may be (r, n - s).

        Whoever holds a certificate can change the one into the other without its issuer's key. There are no further
        forms: everything else is signed, or is DER that has just one.
        """
        if self.algorithm == SignatureAlgorithmOID.ED25519:
            return (self.fingerprint,)
        try:
            r, s = decode_dss_signature(self.certificate.signature)
        except ValueError:
            raise refusal(DropReason.UNTRUSTED_CHAIN, f"the {self.role}'s signature is malformed") from None
        twin = encode_dss_signature(r, (P256_ORDER - s) % P256_ORDER)
        algorithm = _SIGNATURE_ALGORITHMS[self.algorithm]
        body = self.certificate.tbs_certificate_bytes + algorithm + element(BIT_STRING, b"\x00" + twin)
        return self.fingerprint, hashlib.sha256(element(SEQUENCE, body)).digest()

    def host_name(self) -> str:
        """The host a host CA is for: its common name."""
        names = self.certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        name = names[0].value if len(names) == 1 else ""
        if not isinstance(name, str) or not is_host_name(name):
            raise refusal(DropReason.CREDENTIAL_MALFORMED, f"the {self.role} names no host")
        return name

    def check_leaf(self) -> None:
        """X509-SVID 4.1 to 4.4: not a CA, may sign, may not sign certificates or CRLs."""
        usage = self.key_usage
        if self.is_ca:
            raise refusal(DropReason.KEY_USAGE_INVALID, "the leaf is a CA certificate")
        if usage is None or not usage.digital_signature or usage.key_cert_sign or usage.crl_sign:
            raise refusal(
                DropReason.KEY_USAGE_INVALID,
                "the leaf's key usage must be digitalSignature, not keyCertSign or cRLSign",
            )
        purposes = self.extended_key_usage
        if purposes is not None and not {
            ExtendedKeyUsageOID.CLIENT_AUTH,
            ExtendedKeyUsageOID.SERVER_AUTH,
        } <= set(purposes):
            raise refusal(
                DropReason.KEY_USAGE_INVALID,
                "the leaf's extended key usage must allow both client and server",
            )

    def check_ca(self) -> None:
        """X509-SVID 3.2 and 4.1: a CA that may sign certificates, with a SPIFFE ID without path."""
        if not self.is_ca:
            raise refusal(DropReason.KEY_USAGE_INVALID, f"the {self.role} is not a CA certificate")
        if self.key_usage is None or not self.key_usage.key_cert_sign:
            raise refusal(DropReason.KEY_USAGE_INVALID, f"the {self.role} may not sign certificates")

    def issued_by(self, issuer: Profile) -> None:
        """Raise CredentialError(UNTRUSTED_CHAIN) unless `issuer` signed this (one public-key operation)."""
        message, signature = self.certificate.tbs_certificate_bytes, self.certificate.signature
        key = issuer.public_key
        try:
            if self.issuer != issuer.subject:
                raise InvalidSignature
            if isinstance(key, ed25519.Ed25519PublicKey) and self.algorithm == SignatureAlgorithmOID.ED25519:
                key.verify(signature, message)
                return
            if isinstance(key, ec.EllipticCurvePublicKey) and self.algorithm != SignatureAlgorithmOID.ED25519:
                key.verify(signature, message, ECDSA_SHA256)
                return
            raise InvalidSignature
        except InvalidSignature:
            raise refusal(
                DropReason.UNTRUSTED_CHAIN, f"the {self.role} was not signed by the {issuer.role} it names"
            ) from None


def _header(der: bytes) -> int:
    """Length of the tag and length octets that `der`, already parsed, begins with."""
    return 2 if der[1] < 0x80 else 2 + (der[1] & 0x7F)


def _algorithms_are(der: bytes, tbs: bytes, algorithm: bytes) -> bool:
    """Whether both signature algorithms of a version 3 certificate, the one inside the signed part and the one
    behind it, are `algorithm` (RFC 5280, 4.1.1.2). Both texts have been parsed: their lengths hold.
    """
    serial_at = _header(tbs) + 5  # behind the version
    inner = serial_at + 2 + tbs[serial_at + 1]
    return tbs.startswith(algorithm, inner) and der.startswith(algorithm, _header(der) + len(tbs))


def _read_key(certificate: x509.Certificate) -> VerifyingKey | None:
    key = certificate.public_key()
    if isinstance(key, ed25519.Ed25519PublicKey):
        return key
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return key
    return None


def _read(der: bytes, role: str) -> Profile:
    certificate = x509.load_der_x509_certificate(der)
    uris: tuple[str, ...] = ()
    is_ca = False
    path_length: int | None = None
    usage: x509.KeyUsage | None = None
    purposes: tuple[x509.ObjectIdentifier, ...] | None = None
    private: dict[x509.ObjectIdentifier, bytes] = {}
    for extension in certificate.extensions:
        value = extension.value
        if isinstance(value, x509.SubjectAlternativeName):
            uris = tuple(value.get_values_for_type(x509.UniformResourceIdentifier))
        elif isinstance(value, x509.BasicConstraints):
            is_ca, path_length = value.ca, value.path_length
        elif isinstance(value, x509.KeyUsage):
            usage = value
        elif isinstance(value, x509.ExtendedKeyUsage):
            purposes = tuple(value)
        elif isinstance(value, x509.UnrecognizedExtension):
            private[extension.oid] = value.value
        if extension.critical and extension.oid not in _UNDERSTOOD:
            raise refusal(
                DropReason.CREDENTIAL_MALFORMED,
                f"the {role}'s critical extension {extension.oid.dotted_string} is not understood here",
            )
    key = _read_key(certificate)
    algorithm = certificate.signature_algorithm_oid
    encoded = _SIGNATURE_ALGORITHMS.get(algorithm)
    if key is None or encoded is None:
        raise refusal(
            DropReason.UNTRUSTED_CHAIN,
            f"the {role} uses an algorithm that is not accepted here",
            "P-256 with SHA-256 and Ed25519 are accepted",
        )
    if certificate.version is not x509.Version.v3 or certificate.serial_number <= 0:
        raise refusal(
            DropReason.CREDENTIAL_MALFORMED, f"the {role} is not a version 3 certificate with a serial number"
        )
    if der[-len(certificate.signature) - 1] != 0:
        raise refusal(
            DropReason.CREDENTIAL_MALFORMED, f"the {role}'s signature is not a whole number of bytes"
        )
    if not _algorithms_are(der, certificate.tbs_certificate_bytes, encoded):
        raise refusal(DropReason.CREDENTIAL_MALFORMED, f"the {role} names two different signature algorithms")
    return Profile(
        role=role,
        certificate=certificate,
        fingerprint=hashlib.sha256(der).digest(),
        serial=certificate.serial_number,
        not_before_us=from_datetime(certificate.not_valid_before_utc),
        not_after_us=from_datetime(certificate.not_valid_after_utc),
        issuer=certificate.issuer.public_bytes(),
        subject=certificate.subject.public_bytes(),
        public_key=key,
        algorithm=algorithm,
        uris=uris,
        is_ca=is_ca,
        path_length=path_length,
        key_usage=usage,
        extended_key_usage=purposes,
        labels=private.get(LABELS_OID),
        constraints=private.get(CONSTRAINTS_OID),
    )


def read_profile(der: bytes, role: str) -> Profile:
    """Read DER; any bytes give a Profile or CredentialError (CREDENTIAL_MALFORMED, UNTRUSTED_CHAIN)."""
    try:
        return _read(der, role)
    except CredentialError:
        raise
    except (
        Exception
    ) as error:  # the parser has a dozen exception types for bad input; each means the same here
        raise refusal(
            DropReason.CREDENTIAL_MALFORMED,
            f"the {role} is not a well-formed certificate ({type(error).__name__})",
        ) from None
