"""A host CA from a root that is elsewhere: a request goes there, an answer comes back; by file, or over the network.

    host    make_request    a key that stays here (state/request/host.key), a PKCS #10 request that does not
    CA      grant           the request's proof of its key, constraints decided at the CA ──► host CA certificate
    host    accept          certificate and roots ──► state/host, all or nothing; also for renewal, in place

An answer is PEM: the host CA's certificate, then the trust bundle (sectool.identity.trust). Nothing in it is secret.
Whoever brings it decides whom the host trusts: by file that is the operator, over the network a server whose root was
pinned (sectool.identity.caservice).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import NameOID

from sectool.errors import CredentialError, SectoolError, UsageError
from sectool.events import DropReason
from sectool.identity.authority import (
    DEFAULT_HOST_DAYS,
    HostAuthority,
    RootAuthority,
    digest_of,
    encode_key,
)
from sectool.identity.blob import SigningKey, VerifyingKey
from sectool.identity.enrolment import (
    PRIVATE_NETWORKS,
    HostIdentity,
    host_directory,
    load_host,
    parse_networks,
)
from sectool.identity.extensions import (
    CONSTRAINTS_OID,
    LabelConstraints,
    decode_constraints,
    encode_constraints,
)
from sectool.identity.files import new_directory, read_file, write_atomic
from sectool.identity.hostcas import remember
from sectool.identity.lists import Lists
from sectool.identity.profile import Profile, is_host_name, key_id, read_profile, refusal
from sectool.identity.trust import TrustBundle
from sectool.labels import LabelSet

MAX_REQUEST = 16 * 1024  # bytes of a request in PEM
MAX_ANSWER = 256 * 1024
REQUEST = "request"  # folder in the state folder

_HINT = "make one on the host: sectool host request --name NAME"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a request asks for. Its constraints are a wish: what is granted is decided at the CA."""

    name: str
    public_key: VerifyingKey
    constraints: LabelConstraints | None


def make_request(key: SigningKey, name: str, constraints: LabelConstraints | None = None) -> bytes:
    """A PKCS #10 request in PEM; UsageError for a bad name."""
    if not is_host_name(name):
        raise UsageError(
            f"host name {name[:100]!r} is not valid", "letters, digits and . _ - inside, at most 63"
        )
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    )
    if constraints is not None:
        wish = x509.UnrecognizedExtension(CONSTRAINTS_OID, encode_constraints(constraints))
        builder = builder.add_extension(wish, False)
    return builder.sign(key, digest_of(key)).public_bytes(Encoding.PEM)


def read_request(pem: bytes) -> Wanted:
    """Read a request and check that its sender holds the key; any bytes give one or CredentialError."""
    if len(pem) > MAX_REQUEST:
        raise refusal(DropReason.CREDENTIAL_OVERSIZED, f"a request has at most {MAX_REQUEST} bytes")
    try:
        return _read(pem)
    except CredentialError:
        raise
    except Exception as error:  # the parser has a dozen exception types for bad input
        raise refusal(
            DropReason.CREDENTIAL_MALFORMED,
            f"this is no certification request ({type(error).__name__})",
            _HINT,
        ) from None


def _read(pem: bytes) -> Wanted:
    request = x509.load_pem_x509_csr(pem)
    key = request.public_key()
    names = request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    name = names[0].value if len(names) == 1 and len(list(request.subject)) == 1 else ""
    if not isinstance(name, str) or not is_host_name(name):
        raise refusal(DropReason.CREDENTIAL_MALFORMED, "the request names no host", _HINT)
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise refusal(DropReason.UNTRUSTED_CHAIN, "the request's key is not a P-256 key", _HINT)
    if not request.is_signature_valid:
        raise refusal(DropReason.UNTRUSTED_CHAIN, "the request was not signed with the key it is for", _HINT)
    wish: LabelConstraints | None = None
    for extension in request.extensions:
        if extension.oid == CONSTRAINTS_OID and isinstance(extension.value, x509.UnrecognizedExtension):
            wish = decode_constraints(extension.value.value)
        elif extension.critical:
            raise refusal(
                DropReason.CREDENTIAL_MALFORMED, "a critical extension of the request is not understood"
            )
    return Wanted(name, key, wish)


def grant(
    root: RootAuthority,
    wanted: Wanted,
    constraints: LabelConstraints,
    bundle: TrustBundle,
    now_us: int,
    *,
    days: int = DEFAULT_HOST_DAYS,
    ca_dir: Path | None = None,
) -> bytes:
    """The answer to a request: a host CA with these constraints, and whom to trust. UsageError for bad values."""
    certificate = root.issue_host(wanted.public_key, wanted.name, constraints, now_us, days)
    if ca_dir is not None:
        remember(ca_dir, certificate)
    return certificate.public_bytes(Encoding.PEM) + bundle.to_pem().encode("ascii")


def pinned(constraints: LabelConstraints) -> LabelSet:
    """The labels a host has by its constraints: the keys they bind to one literal value."""
    return LabelSet(
        {
            key: values[0]
            for key, values in constraints.allow.items()
            if not key.endswith("*") and len(values) == 1 and values[0] and not values[0].endswith("*")
        }
    )


def prepare(state: Path, name: str, constraints: LabelConstraints | None, *, force: bool = False) -> bytes:
    """Make a key under `state`/request and the request for it; UsageError if one is under way already."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem = make_request(key, name, constraints)
    hint = "sectool host accept ANSWER takes its answer; --force begins anew"
    with new_directory(state / REQUEST, "a request is under way", hint, force=force) as fresh:
        write_atomic(fresh / "host.key", encode_key(key), 0o600)
        write_atomic(fresh / "host.csr", pem)
    return pem


def accept(
    state: Path,
    answer: bytes,
    now_us: int,
    *,
    enforced_networks: Iterable[str] | None = None,
    force: bool = False,
) -> HostIdentity:
    """Take the answer to the request under way: enrols this host, or renews its enrolment in place.

    An enrolment of the same name and trust domain keeps its labels, networks and the domains it trusts besides; any
    other has to be replaced with `force`. Verified first, written last, all or nothing.
    """
    key_pem = read_file(state / REQUEST / "host.key", "no request is under way", _HINT, secret=True)
    leading, bundle = read_answer(answer)
    if leading is None:
        raise UsageError("the answer has no host CA certificate", "sectool ca sign makes one")
    try:
        certificate = x509.load_pem_x509_certificate(leading)
        profile = read_profile(certificate.public_bytes(Encoding.DER), "host CA")
        key = load_pem_private_key(key_pem, None)
    except (ValueError, TypeError, CredentialError) as error:
        raise UsageError(f"the answer holds no usable host CA: {error}", _HINT) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != profile.public_key:
        raise UsageError("the answer is to another request than the one under way", _HINT)
    try:
        domain = profile.spiffe_id().trust_domain
        root = next((r for r in bundle.roots.get(domain, ()) if _by(profile, r)), None)
        if root is None:
            raise CredentialError(DropReason.UNTRUSTED_CHAIN, "no root in the answer signed the host CA")
        authority = HostAuthority(profile.certificate, key, root.certificate)
        before = _present(state)
        renewal = before is not None and (before.name, before.trust_domain) == (authority.host_name, domain)
        labels = before.labels if before is not None and renewal else pinned(authority.constraints)
        authority.issue(f"/host/{authority.host_name}/wl/trial", labels, now_us)
    except CredentialError as error:
        raise UsageError(f"the answer cannot be taken: {error.message}", error.hint or _HINT) from None
    if before is not None and not renewal and not force:
        raise UsageError(
            f"this host is enrolled already, as {before.name} in {before.trust_domain}",
            "use --force to replace that",
        )
    if before is not None and renewal:
        for other, roots in before.bundle.roots.items():
            if other != domain:
                bundle = TrustBundle({**bundle.roots, other: roots})
        networks = before.enforced_networks
    else:
        networks = parse_networks(PRIVATE_NETWORKS if enforced_networks is None else enforced_networks)
    document = {
        "name": authority.host_name,
        "trust_domain": domain,
        "labels": dict(labels),
        "constraints": {
            "path_prefix": authority.constraints.path_prefix,
            "allow": {pattern: list(values) for pattern, values in authority.constraints.allow.items()},
        },
        "enforced_networks": [str(network) for network in networks],
    }
    with new_directory(host_directory(state), "this host is enrolled already", "", force=True) as fresh:
        write_atomic(fresh / "host.key", key_pem, 0o600)
        write_atomic(fresh / "host.crt", leading)
        bundle.save(fresh / "trust.pem")
        write_atomic(fresh / "host.yaml", yaml.safe_dump(document, sort_keys=False).encode())
    shutil.rmtree(state / REQUEST)
    return load_host(state)


def take_roots(state: Path, answer: bytes, now_us: int) -> HostIdentity:
    """Trust the roots in a bundle for our own domain, and no others: a rollover's steps. Returns the host as it is now.

    UsageError for a bundle by which this host's own CA would not hold: it has to be renewed first; and for one that
    drops a root whose revocation list is in force while there is none of another root of the domain.
    """
    host = load_host(state)
    _, bundle = read_answer(answer)
    roots = bundle.roots.get(host.trust_domain, ())
    own = read_profile(host.authority.certificate.public_bytes(Encoding.DER), "host CA")
    if not any(_by(own, root) for root in roots):
        raise UsageError(
            f"by this bundle the CA of host {host.name} itself would not be trusted",
            "renew it first: sectool host request --renew, and sectool host accept",
        )
    ids = {key_id(root.public_key) for root in roots}
    lists = Lists(state, host.bundle, now_us)
    of_roots = [
        each for each in lists.known.values() if each.by_root and each.trust_domain == host.trust_domain
    ]
    dropped = [each for each in of_roots if each.issuer not in ids]
    if dropped and len(dropped) == len(of_roots):
        raise UsageError(
            "the revocation list in force is by a root that this bundle drops, and there is no other: revocations "
            "would be forgotten",
            "take the new root's list first: sectool revocation import FILE",
        )
    TrustBundle({**host.bundle.roots, host.trust_domain: roots}).save(host_directory(state) / "trust.pem")
    for each in dropped:
        (lists.folder / f"{each.issuer}.pem").unlink(missing_ok=True)
    return load_host(state)


def read_answer(answer: bytes) -> tuple[bytes | None, TrustBundle]:
    """The host CA's certificate in PEM, if there is one, and the roots; SectoolError for anything else."""
    if len(answer) > MAX_ANSWER:
        raise SectoolError(f"the answer is larger than {MAX_ANSWER} bytes", "check the file")
    head, mark, rest = answer.partition(b"# trust domain:")
    bundle = TrustBundle.from_pem((mark + rest).decode("ascii", "replace"))
    if not mark or head.count(b"-----BEGIN CERTIFICATE-----") > 1:
        raise SectoolError(
            "this is no answer of a CA", "it comes from: sectool ca sign, or sectool ca bundle"
        )
    return (head.strip() + b"\n") if head.strip() else None, bundle


def _by(profile: Profile, root: Profile) -> bool:
    try:
        profile.issued_by(root)
    except CredentialError:
        return False
    return True


def _present(state: Path) -> HostIdentity | None:
    return load_host(state) if host_directory(state).exists() else None
