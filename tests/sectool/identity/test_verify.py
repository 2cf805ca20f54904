from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from sectool.clock import DAY, HOUR, MINUTE, SECOND
from sectool.errors import CredentialError
from sectool.events import DropReason
from sectool.identity.authority import HostAuthority
from sectool.identity.blob import MAX_BLOB, P256_ORDER, Delegation, compress, pack, unpack
from sectool.identity.credential import Credential
from sectool.identity.dictionary import DICTIONARY
from sectool.identity.extensions import LabelConstraints, encode_constraints, encode_labels
from sectool.identity.profile import key_id, read_profile
from sectool.identity.trust import TrustBundle
from sectool.identity.verify import NEGATIVE_SIZE, NEGATIVE_TTL_S, PathRule, Verifier, path_labels
from sectool.labels import LabelSet, stable_id
from tests.sectool.identity.conftest import DOMAIN

NOW = 1_772_330_400 * SECOND
R = DropReason


def usage(digital: bool = False, cert: bool = False, crl: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(digital, False, False, False, False, cert, crl, False, False)


def uris(*texts: str) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(text) for text in texts])


def refused(verifier: Verifier, blob: bytes, now_us: int = NOW) -> int:
    with pytest.raises(CredentialError) as error:
        verifier.verify(blob, now_us)
    assert error.value.message
    return error.value.reason


def trusting(authority: HostAuthority) -> Verifier:
    """A verifier that trusts the root of the `authority` fixture."""
    root = authority._root.certificate
    pem = root.public_bytes(Encoding.PEM).decode()
    return Verifier(TrustBundle().with_root(authority.trust_domain, pem))


# ---- what is accepted


def test_an_issued_credential_is_what_the_issuer_said_it_would_be(authority: HostAuthority) -> None:
    credential = authority.issue("/host/web1/wl/shop", LabelSet({"app": "web", "env": "dev"}), NOW)
    peer = trusting(authority).verify(credential.blob, NOW)
    assert peer == credential.peer
    assert peer.spiffe_id == "spiffe://example.org/host/web1/wl/shop"
    assert peer.trust_domain == "example.org"
    assert str(peer.labels) == "app=web,domain=example.org,env=dev"
    assert peer.x25519 == credential.x25519_public
    assert peer.host == "web1"
    assert peer.id == stable_id(peer.fingerprint)
    assert peer.not_before_us == NOW - MINUTE
    assert peer.not_after_us == NOW + HOUR == credential.not_after_us


def test_a_forged_pki_without_faults_is_accepted(forge: Any) -> None:
    peer = Verifier(forge.bundle()).verify(forge.blob(), NOW)
    assert peer.x25519 == forge.x25519
    assert str(peer.labels) == "app=web,domain=example.org,env=dev"
    assert peer.serial == f"{forge.leaf.serial_number:x}"
    assert peer.fingerprint == forge.leaf.fingerprint(hashes.SHA256())


def test_an_ed25519_chain_is_accepted(forge: Any) -> None:
    forge.root_key, forge.host_key, forge.leaf_key = (ed25519.Ed25519PrivateKey.generate() for _ in range(3))
    forge.root, forge.host, forge.leaf = forge.sign_root(), forge.sign_host(), forge.sign_leaf()
    assert Verifier(forge.bundle()).verify(forge.blob(), NOW).host == "web1"


def test_times_are_the_narrowest_of_the_chain(forge: Any) -> None:
    forge.root = forge.sign_root(validity=(NOW - 10 * SECOND, NOW + DAY))
    forge.host = forge.sign_host(validity=(NOW - DAY, NOW + 20 * MINUTE))
    peer = Verifier(forge.bundle()).verify(forge.blob(), NOW)
    assert (peer.not_before_us, peer.not_after_us) == (NOW - 10 * SECOND, NOW + 20 * MINUTE)
    blob = forge.blob(not_after_s=NOW // SECOND + 60)
    assert Verifier(forge.bundle()).verify(blob, NOW).not_after_us == NOW + MINUTE


def test_a_second_root_of_the_same_name_is_found(forge: Any) -> None:
    old = forge.root
    forge.root_key = ec.generate_private_key(ec.SECP256R1())
    new = forge.sign_root()
    for order in ((old, new), (new, old)):
        assert Verifier(forge.bundle(*order)).verify(forge.blob(), NOW).host == "web1"
    assert refused(Verifier(forge.bundle(new)), forge.blob()) == R.UNTRUSTED_CHAIN


def test_an_expired_root_beside_its_renewal_does_no_harm(forge: Any) -> None:
    expired = forge.sign_root(validity=(NOW - 2 * DAY, NOW - DAY))
    assert Verifier(forge.bundle(expired, forge.root)).verify(forge.blob(), NOW).host == "web1"


def test_dns_names_and_both_purposes_do_not_disturb(forge: Any) -> None:
    names = [
        x509.UniformResourceIdentifier("spiffe://example.org/host/web1/wl/a"),
        x509.DNSName("a.example.org"),
    ]
    purposes = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    leaf = forge.sign_leaf(san=x509.SubjectAlternativeName(names), extra=(purposes, False), ca=False)
    assert Verifier(forge.bundle()).verify(forge.blob(leaf), NOW).spiffe_id.endswith("/a")


def test_an_svid_without_labels_gets_them_from_the_mapping(forge: Any) -> None:
    """As another SPIFFE issuer makes them: no extension of ours in leaf or intermediate."""
    host = forge.sign_host(constraints=None, subject="An intermediate CA")
    leaf = forge.sign_leaf(
        labels=None, san=uris("spiffe://example.org/ns/shop/sa/web"), issuer="An intermediate CA"
    )
    rules = [
        PathRule("spiffe://example.org/ns/shop/*", LabelSet({"ns": "shop", "tier": "any"})),
        PathRule("spiffe://example.org/ns/shop/sa/web", LabelSet({"tier": "web"})),
        PathRule("spiffe://example.org/ns/shop/sa", LabelSet({"never": "this"})),
    ]
    peer = Verifier(forge.bundle(), path_labels=path_labels(rules)).verify(forge.blob(leaf, host), NOW)
    assert str(peer.labels) == "domain=example.org,ns=shop,tier=web"
    assert peer.host == ""
    assert str(Verifier(forge.bundle()).verify(forge.blob(leaf, host), NOW).labels) == "domain=example.org"


# ---- what is refused, and why: each certificate really is issued that way

Case = Callable[[Any], bytes]

CASES: dict[str, tuple[DropReason, Case]] = {
    "leaf expired": (
        R.CREDENTIAL_EXPIRED,
        lambda f: f.blob(f.sign_leaf(validity=(NOW - HOUR, NOW - SECOND))),
    ),
    "host CA expired": (
        R.CREDENTIAL_EXPIRED,
        lambda f: f.blob(host=f.sign_host(validity=(NOW - HOUR, NOW - SECOND))),
    ),
    "leaf not yet valid": (
        R.CREDENTIAL_NOT_YET_VALID,
        lambda f: f.blob(f.sign_leaf(validity=(NOW + 31 * SECOND, NOW + HOUR))),
    ),
    "host CA not yet valid": (
        R.CREDENTIAL_NOT_YET_VALID,
        lambda f: f.blob(host=f.sign_host(validity=(NOW + 31 * SECOND, NOW + HOUR))),
    ),
    "leaf of another domain under our host": (
        R.UNTRUSTED_DOMAIN,
        lambda f: f.blob(f.sign_leaf(san=uris("spiffe://evil.example/host/web1/wl/shop"))),
    ),
    "whole chain of another domain": (
        R.UNTRUSTED_DOMAIN,
        lambda f: f.blob(
            f.sign_leaf(san=uris("spiffe://evil.example/host/web1/wl/shop")),
            f.sign_host(san=uris("spiffe://evil.example")),
        ),
    ),
    "host CA of another domain": (
        R.UNTRUSTED_CHAIN,
        lambda f: f.blob(host=f.sign_host(san=uris("spiffe://evil.example"))),
    ),
    "leaf is a CA": (
        R.KEY_USAGE_INVALID,
        lambda f: f.blob(f.sign_leaf(ca=True)),
    ),
    "leaf may sign certificates": (
        R.KEY_USAGE_INVALID,
        lambda f: f.blob(f.sign_leaf(usage=usage(True, cert=True))),
    ),
    "leaf may sign CRLs": (R.KEY_USAGE_INVALID, lambda f: f.blob(f.sign_leaf(usage=usage(True, crl=True)))),
    "leaf may not sign": (
        R.KEY_USAGE_INVALID,
        lambda f: f.blob(
            f.sign_leaf(
                usage=x509.KeyUsage(False, False, True, False, False, False, False, False, False),
            )
        ),
    ),
    "leaf without key usage": (R.KEY_USAGE_INVALID, lambda f: f.blob(f.sign_leaf(usage=None))),
    "leaf for servers only": (
        R.KEY_USAGE_INVALID,
        lambda f: f.blob(
            f.sign_leaf(extra=(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False))
        ),
    ),
    "host is no CA": (
        R.KEY_USAGE_INVALID,
        lambda f: f.blob(host=f.sign_host(ca=False, path_length=None)),
    ),
    "host may not sign certificates": (
        R.KEY_USAGE_INVALID,
        lambda f: f.blob(host=f.sign_host(usage=usage(True, crl=True))),
    ),
    "host without path length": (
        R.KEY_USAGE_INVALID,
        lambda f: f.blob(host=f.sign_host(path_length=None)),
    ),
    "host with path length 1": (R.KEY_USAGE_INVALID, lambda f: f.blob(host=f.sign_host(path_length=1))),
    "two SPIFFE IDs": (
        R.SPIFFE_ID_INVALID,
        lambda f: f.blob(
            f.sign_leaf(
                san=uris("spiffe://example.org/host/web1/wl/a", "spiffe://example.org/host/web1/wl/b")
            )
        ),
    ),
    "a second URI of another kind": (
        R.SPIFFE_ID_INVALID,
        lambda f: f.blob(f.sign_leaf(san=uris("spiffe://example.org/host/web1/wl/a", "https://example.org"))),
    ),
    "no SAN": (R.SPIFFE_ID_INVALID, lambda f: f.blob(f.sign_leaf(san=None))),
    "no URI": (
        R.SPIFFE_ID_INVALID,
        lambda f: f.blob(f.sign_leaf(san=x509.SubjectAlternativeName([x509.DNSName("a.example.org")]))),
    ),
    "not a SPIFFE ID": (
        R.SPIFFE_ID_INVALID,
        lambda f: f.blob(f.sign_leaf(san=uris("spiffe://Example.org/a"))),
    ),
    "leaf speaks for the domain": (
        R.SPIFFE_ID_INVALID,
        lambda f: f.blob(f.sign_leaf(san=uris("spiffe://example.org"))),
    ),
    "host's id has a path": (
        R.SPIFFE_ID_INVALID,
        lambda f: f.blob(host=f.sign_host(san=uris("spiffe://example.org/host/web1"))),
    ),
    "host without id": (R.SPIFFE_ID_INVALID, lambda f: f.blob(host=f.sign_host(san=None))),
    "path of another host": (
        R.SPIFFE_ID_INVALID,
        lambda f: f.blob(f.sign_leaf(san=uris("spiffe://example.org/host/db1/wl/shop"))),
    ),
    "label value beyond the constraints": (
        R.LABEL_NOT_PERMITTED,
        lambda f: f.blob(f.sign_leaf(labels=encode_labels(LabelSet({"env": "prod"})))),
    ),
    "label key beyond the constraints": (
        R.LABEL_NOT_PERMITTED,
        lambda f: f.blob(
            host=f.sign_host(constraints=encode_constraints(LabelConstraints({"env": ["dev"]})))
        ),
    ),
    "labels under a CA without constraints": (
        R.LABEL_NOT_PERMITTED,
        lambda f: f.blob(host=f.sign_host(constraints=None)),
    ),
    "another domain claimed as a label": (
        R.LABEL_NOT_PERMITTED,
        lambda f: f.blob(f.sign_leaf(labels=encode_labels(LabelSet({"domain": "bank.example"})))),
    ),
    "labels out of order": (
        R.CREDENTIAL_MALFORMED,
        lambda f: f.blob(f.sign_leaf(labels=b"\x0c\x07b=1,a=2")),
    ),
    "labels outside the alphabet": (
        R.CREDENTIAL_MALFORMED,
        lambda f: f.blob(f.sign_leaf(labels=b"\x0c\x05a=\x1b[m")),
    ),
    "constraints not canonical": (
        R.CREDENTIAL_MALFORMED,
        lambda f: f.blob(host=f.sign_host(constraints=b"\x0c\x03;;;")),
    ),
    "host CA names no host": (
        R.CREDENTIAL_MALFORMED,
        lambda f: f.blob(f.sign_leaf(issuer="a b"), f.sign_host(subject="a b")),
    ),
    "unknown critical extension in the leaf": (
        R.CREDENTIAL_MALFORMED,
        lambda f: f.blob(
            f.sign_leaf(
                extra=(x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"), True)
            )
        ),
    ),
    "unknown critical extension in the host CA": (
        R.CREDENTIAL_MALFORMED,
        lambda f: f.blob(
            host=f.sign_host(extra=(x509.NameConstraints([x509.DNSName("example.org")], None), True))
        ),
    ),
    "leaf signed by a stranger": (
        R.UNTRUSTED_CHAIN,
        lambda f: f.blob(f.sign_leaf(signer=ec.generate_private_key(ec.SECP256R1()))),
    ),
    "leaf signed by the root": (R.UNTRUSTED_CHAIN, lambda f: f.blob(f.sign_leaf(signer=f.root_key))),
    "leaf signed by itself": (R.UNTRUSTED_CHAIN, lambda f: f.blob(f.sign_leaf(signer=f.leaf_key))),
    "leaf names another issuer": (R.UNTRUSTED_CHAIN, lambda f: f.blob(f.sign_leaf(issuer="web2"))),
    "host CA signed by a stranger": (
        R.UNTRUSTED_CHAIN,
        lambda f: f.blob(host=f.sign_host(signer=ec.generate_private_key(ec.SECP256R1()))),
    ),
    "host CA signed by another host": (
        R.UNTRUSTED_CHAIN,
        lambda f: f.blob(host=f.sign_host(signer=f.host_key, issuer="web1")),
    ),
    "host CA names another root": (R.UNTRUSTED_CHAIN, lambda f: f.blob(host=f.sign_host(issuer="other"))),
    "leaf key on P-384": (
        R.UNTRUSTED_CHAIN,
        lambda f: f.blob(f.sign_leaf(public=ec.generate_private_key(ec.SECP384R1()).public_key())),
    ),
    "leaf key RSA": (
        R.UNTRUSTED_CHAIN,
        lambda f: f.blob(f.sign_leaf(public=rsa.generate_private_key(65537, 1024).public_key())),
    ),
    "signed with SHA-384": (R.UNTRUSTED_CHAIN, lambda f: f.blob(f.sign_leaf(digest=hashes.SHA384()))),
    "root handed in as the host CA": (R.KEY_USAGE_INVALID, lambda f: f.blob(host=f.root)),
    "certificates swapped": (R.SPIFFE_ID_INVALID, lambda f: f.blob(f.host, f.leaf)),
    "delegation by another key": (
        R.DELEGATION_INVALID,
        lambda f: f.blob(leaf_key=ec.generate_private_key(ec.SECP256R1())),
    ),
    "delegation of another kind of key": (
        R.DELEGATION_INVALID,
        lambda f: f.blob(leaf_key=ed25519.Ed25519PrivateKey.generate()),
    ),
    "delegation outlives the leaf": (
        R.DELEGATION_INVALID,
        lambda f: f.blob(not_after_s=(NOW + HOUR) // SECOND + 1),
    ),
    "delegation expired": (R.DELEGATION_EXPIRED, lambda f: f.blob(not_after_s=NOW // SECOND - 1)),
    "delegation of the distant future": (R.DELEGATION_INVALID, lambda f: f.blob(not_after_s=2**64 - 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_refusals(forge: Any, name: str) -> None:
    reason, build = CASES[name]
    verifier = Verifier(forge.bundle())
    assert verifier.verify(forge.blob(), NOW).host == "web1"  # nothing but the fault is in the way
    assert refused(verifier, build(forge)) == reason
    assert refused(Verifier(forge.bundle()), build(forge)) == reason  # with and without a remembered host CA


def test_every_identity_reason_has_a_case() -> None:
    covered = {reason for reason, _ in CASES.values()}
    covered |= {R.CREDENTIAL_OVERSIZED, R.CREDENTIAL_REVOKED}  # their own tests below
    identity = {reason for reason in DropReason if R.CREDENTIAL_MALFORMED <= reason <= R.SPIFFE_ID_INVALID}
    assert covered == identity


def test_an_expired_or_future_root_is_refused(forge: Any) -> None:
    past = forge.bundle(forge.sign_root(validity=(NOW - 2 * DAY, NOW - SECOND)))
    future = forge.bundle(forge.sign_root(validity=(NOW + MINUTE, NOW + DAY)))
    assert refused(Verifier(past), forge.blob()) == R.CREDENTIAL_EXPIRED
    assert refused(Verifier(future), forge.blob()) == R.CREDENTIAL_NOT_YET_VALID


def test_a_root_of_another_domain_does_not_vouch_for_ours(forge: Any) -> None:
    """A federated domain's root signs a host CA that claims to be of our domain."""
    ours = forge.bundle()
    foreign_key = ec.generate_private_key(ec.SECP256R1())
    foreign = forge.sign_root(
        public=foreign_key.public_key(), signer=foreign_key, san=uris("spiffe://b.example")
    )
    both = TrustBundle({**ours.roots, **forge.bundle(foreign, domain="b.example").roots})
    blob = forge.blob(host=forge.sign_host(signer=foreign_key))
    assert refused(Verifier(both), blob) == R.UNTRUSTED_CHAIN


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("other", ["300a06082a8648ce3d040303", "300506032b6570"])
def test_two_different_algorithms_in_one_certificate_are_refused(forge: Any, which: int, other: str) -> None:
    """The signature algorithm stands inside and behind the signed part; they must agree (RFC 5280, 4.1.1.2)."""
    ecdsa = bytes.fromhex("300a06082a8648ce3d040302")
    der = forge.leaf.public_bytes(Encoding.DER)
    at = der.index(ecdsa) if which == 0 else der.rindex(ecdsa)
    shorter = len(ecdsa) - len(bytes.fromhex(other))
    changed = der[:at] + bytes.fromhex(other) + der[at + len(ecdsa) :]
    if shorter:  # keep the lengths around it true, so that nothing else is wrong
        outer = int.from_bytes(der[2:4], "big") - shorter
        changed = changed[:2] + outer.to_bytes(2, "big") + changed[4:]
        if which == 0:
            inner = int.from_bytes(der[6:8], "big") - shorter
            changed = changed[:6] + inner.to_bytes(2, "big") + changed[8:]
    stream = compress(changed, forge.host.public_bytes(Encoding.DER))
    end = (NOW + HOUR) // SECOND
    blob = pack(Delegation.sign(forge.leaf_key, forge.x25519, end, stream), stream)
    assert refused(Verifier(forge.bundle()), blob) in (R.CREDENTIAL_MALFORMED, R.UNTRUSTED_CHAIN)
    with pytest.raises(CredentialError) as error:
        read_profile(changed, "leaf")
    assert "algorithm" in error.value.message


# ---- time


def test_the_edges_of_time(forge: Any) -> None:
    blob = forge.blob()
    end = NOW + HOUR
    for warm in (False, True):
        verifier = Verifier(forge.bundle())
        if warm:
            verifier.verify(blob, NOW)
        assert verifier.verify(blob, end).host == "web1"
        assert refused(verifier, blob, end + 1) == R.CREDENTIAL_EXPIRED
    begin = NOW - MINUTE - 30 * SECOND  # the clock skew allowed
    assert Verifier(forge.bundle()).verify(blob, begin).host == "web1"
    assert refused(Verifier(forge.bundle()), blob, begin - 1) == R.CREDENTIAL_NOT_YET_VALID
    strict = Verifier(forge.bundle(), clock_skew_s=0)
    strict.verify(blob, NOW)
    assert refused(strict, blob, NOW - MINUTE - 1) == R.CREDENTIAL_NOT_YET_VALID


def test_a_clock_that_jumps_is_followed_in_both_directions(forge: Any) -> None:
    verifier = Verifier(forge.bundle())
    blob = forge.blob()
    for now_us in (NOW, NOW + DAY, NOW, NOW - DAY, NOW):
        if now_us == NOW:
            assert verifier.verify(blob, now_us).host == "web1"
        else:
            refused(verifier, blob, now_us)


# ---- caches and revocation


def test_good_credentials_are_remembered_and_the_memory_is_bounded(authority: HostAuthority) -> None:
    verifier = Verifier(trusting(authority)._bundle, cache_size=3)
    credentials = [authority.issue(f"/host/web1/wl/w{i}", LabelSet(), NOW) for i in range(5)]
    for credential in credentials:
        first = verifier.verify(credential.blob, NOW)
        assert verifier.verify(credential.blob, NOW) is first
    assert verifier.cached == (3, 0)
    assert verifier.verify(credentials[0].blob, NOW) == credentials[0].peer


def test_garbage_evicts_no_good_credential_and_is_bounded(forge: Any) -> None:
    verifier = Verifier(forge.bundle(), cache_size=4)
    good = verifier.verify(forge.blob(), NOW)
    blob = forge.blob()
    verifier.verify(blob, NOW)
    for i in range(NEGATIVE_SIZE + 10):
        refused(verifier, b"\x01" + i.to_bytes(4, "big"))
    assert verifier.cached == (2, NEGATIVE_SIZE)
    assert verifier.verify(blob, NOW).fingerprint == good.fingerprint


def test_a_refusal_is_remembered_briefly(forge: Any) -> None:
    early = forge.blob(forge.sign_leaf(validity=(NOW + 31 * SECOND, NOW + HOUR)))
    verifier = Verifier(forge.bundle())
    assert refused(verifier, early) == R.CREDENTIAL_NOT_YET_VALID
    assert refused(verifier, early, NOW + 2 * SECOND) == R.CREDENTIAL_NOT_YET_VALID  # from memory
    later = NOW + (NEGATIVE_TTL_S + 1) * SECOND
    assert verifier.verify(early, later).host == "web1"
    assert verifier.cached == (1, 0)


def test_an_oversized_blob_is_not_even_hashed(forge: Any) -> None:
    verifier = Verifier(forge.bundle())
    assert refused(verifier, bytes(MAX_BLOB + 1)) == R.CREDENTIAL_OVERSIZED
    assert verifier.cached == (0, 0)


@pytest.mark.parametrize("what", ["leaf", "host"])
@pytest.mark.parametrize("by", ["fingerprint", "colons", "bytes", "serial"])
def test_revocation_takes_effect_at_once(forge: Any, what: str, by: str) -> None:
    certificate = getattr(forge, what)
    fingerprint = certificate.fingerprint(hashes.SHA256())
    item: str | bytes = {
        "fingerprint": fingerprint.hex(),
        "colons": fingerprint.hex(":").upper(),
        "bytes": fingerprint,
        "serial": f"{certificate.serial_number:040X}",
    }[by]
    verifier = Verifier(forge.bundle())
    blob = forge.blob()
    verifier.verify(blob, NOW)
    verifier.revoke(item)
    assert refused(verifier, blob) == R.CREDENTIAL_REVOKED
    verifier.revoke("1234")
    assert refused(verifier, blob) == R.CREDENTIAL_REVOKED
    verifier.set_revoked(())
    assert verifier.verify(blob, NOW).host == "web1"


def resigned(forge: Any, leaf_der: bytes) -> bytes:
    """A blob by the holder of the leaf's key around `leaf_der`, whatever that is."""
    stream = compress(leaf_der, forge.host.public_bytes(Encoding.DER))
    delegation = Delegation.sign(forge.leaf_key, forge.x25519, (NOW + HOUR) // SECOND, stream)
    return pack(delegation, stream)


@pytest.mark.parametrize("by", ["fingerprint", "serial"])
def test_the_other_form_of_a_signature_does_not_escape_revocation(forge: Any, by: str) -> None:
    """A revoked leaf's holder can change its CA's signature (r, s) into (r, n - s): another DER, as valid."""
    leaf = forge.leaf
    r, s = decode_dss_signature(leaf.signature)
    twin = encode_dss_signature(r, P256_ORDER - s)
    algorithm = bytes.fromhex("300a06082a8648ce3d040302")
    body = leaf.tbs_certificate_bytes + algorithm + bytes((3, len(twin) + 1, 0)) + twin
    der = b"\x30\x82" + len(body).to_bytes(2, "big") + body
    verifier = Verifier(forge.bundle())
    peer = verifier.verify(resigned(forge, der), NOW)
    assert peer.fingerprint != leaf.fingerprint(hashes.SHA256())
    verifier.revoke(leaf.fingerprint(hashes.SHA256()) if by == "fingerprint" else f"{leaf.serial_number:x}")
    assert refused(verifier, resigned(forge, der)) == R.CREDENTIAL_REVOKED
    assert refused(verifier, forge.blob()) == R.CREDENTIAL_REVOKED


def test_a_signature_with_unused_bits_is_refused(forge: Any) -> None:
    """Another way to another DER: call the last bit of the signature unused where it is 0 anyway."""
    while forge.leaf.signature[-1] & 1:
        forge.leaf = forge.sign_leaf()
    der = bytearray(forge.leaf.public_bytes(Encoding.DER))
    der[-len(forge.leaf.signature) - 1] = 1
    assert refused(Verifier(forge.bundle()), resigned(forge, bytes(der))) == R.CREDENTIAL_MALFORMED


def test_a_signature_that_is_none_is_refused_when_something_is_revoked(forge: Any) -> None:
    signature = forge.leaf.signature
    der = forge.leaf.public_bytes(Encoding.DER)
    broken = der[: -len(signature)] + b"\x31" + signature[1:]
    for revoked in ((), ("1234",)):
        verifier = Verifier(forge.bundle())
        verifier.set_revoked(revoked)
        assert refused(verifier, resigned(forge, broken)) == R.UNTRUSTED_CHAIN


def test_a_new_bundle_takes_effect_at_once(forge: Any) -> None:
    verifier = Verifier(forge.bundle())
    blob = forge.blob()
    verifier.verify(blob, NOW)
    verifier.set_bundle(TrustBundle())
    assert refused(verifier, blob) == R.UNTRUSTED_DOMAIN
    verifier.set_bundle(forge.bundle())
    assert verifier.verify(blob, NOW).host == "web1"


def test_whom_a_new_bundle_does_not_vouch_for_any_more(forge: Any) -> None:
    """Of another domain also by its root; of our own a root leaves when nothing depends on it any more."""
    ours, theirs = (Verifier(forge.bundle(), own_domain=own) for own in (DOMAIN, "other.example"))
    peer = ours.verify(forge.blob(), NOW)
    assert peer.root == key_id(forge.root_key.public_key())
    forge.root_key = ec.generate_private_key(ec.SECP256R1())
    another = forge.bundle(forge.sign_root())
    for verifier, own in ((ours, True), (theirs, False)):
        before = verifier.doubts()
        verifier.set_bundle(another)
        assert verifier.doubts()(peer) is (None if own else R.UNTRUSTED_CHAIN)
        assert verifier.doubts()(replace(peer, root="")) is None  # written down by an older version
        verifier.set_bundle(TrustBundle())
        assert verifier.doubts()(peer) is R.UNTRUSTED_DOMAIN
        assert before(peer) is None


# ---- arbitrary bytes


@pytest.fixture(scope="session")
def issued(authority: HostAuthority) -> Credential:
    return authority.issue("/host/web1/wl/shop", LabelSet({"app": "web", "env": "dev"}), NOW)


def test_every_flipped_bit_is_refused(authority: HostAuthority, issued: Credential) -> None:
    verifier = trusting(authority)
    verifier.verify(issued.blob, NOW)
    for position in range(len(issued.blob)):
        changed = bytearray(issued.blob)
        changed[position] ^= 1 << (position * 5 % 8)
        refused(verifier, bytes(changed))


@given(data=st.data())
def test_any_change_at_all_is_refused(
    authority: HostAuthority, issued: Credential, data: st.DataObject
) -> None:
    blob = issued.blob
    at = data.draw(st.integers(0, len(blob)))
    end = data.draw(st.integers(at, min(len(blob), at + 8)))
    changed = blob[:at] + data.draw(st.binary(max_size=8)) + blob[end:]
    if changed != blob:
        refused(trusting(authority), changed)


@given(
    leaf=st.binary(min_size=1, max_size=400), at=st.integers(0, 400), patch=st.binary(min_size=1, max_size=4)
)
def test_arbitrary_certificates_are_refused(
    authority: HostAuthority, issued: Credential, leaf: bytes, at: int, patch: bytes
) -> None:
    """Inside a well-formed blob: bytes that are no certificate, and certificates with bytes changed."""
    patched = issued.leaf_der[:at] + patch + issued.leaf_der[at + len(patch) :]
    for leaf_der, host_der in [
        (leaf, issued.host_der),
        (issued.leaf_der, leaf),
        (patched, issued.host_der),
        (issued.leaf_der, issued.host_der[:at] + patch + issued.host_der[at + len(patch) :]),
    ]:
        if (leaf_der, host_der) != (issued.leaf_der, issued.host_der):
            stream = compress(leaf_der, host_der)
            key: Any = issued.leaf_key
            delegation = Delegation.sign(key, issued.x25519_public, issued.delegation.not_after_s, stream)
            refused(trusting(authority), pack(delegation, stream))


def test_another_encoding_of_the_same_certificates_is_refused(forge: Any) -> None:
    """Deflate is not unique: without the leaf's key nobody can re-encode a credential and have it verified again."""
    blob = forge.blob()
    parts = unpack(blob)
    plain = len(parts.leaf_der).to_bytes(2, "big") + parts.leaf_der + parts.host_der
    z = zlib.compressobj(1, zlib.DEFLATED, -15, 9, zlib.Z_FIXED, DICTIONARY)
    other = pack(parts.delegation, z.compress(plain) + z.flush())
    assert other != blob
    assert unpack(other).leaf_der == parts.leaf_der
    assert refused(Verifier(forge.bundle()), other) == R.DELEGATION_INVALID
