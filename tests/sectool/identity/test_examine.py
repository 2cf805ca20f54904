"""`identity verify`: every refusal of the verifier by its name; what we issue is an X.509-SVID for others, too."""

from __future__ import annotations

import base64
import inspect
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given, settings
from hypothesis import strategies as st

from sectool.clock import DAY, HOUR, SECOND
from sectool.errors import CredentialError
from sectool.events import DropReason
from sectool.identity import authority as a
from sectool.identity import blob, extensions, profile, spiffe, verify
from sectool.identity.blob import Delegation, pack
from sectool.identity.enrolment import enroll_host, init_ca, load_host
from sectool.identity.examine import examine
from sectool.identity.extensions import (
    CONSTRAINTS_OID,
    LABELS_OID,
    LabelConstraints,
    encode_constraints,
    encode_labels,
)
from sectool.identity.leaf import LEAF_USAGE, NO_CA
from sectool.identity.lists import Lists
from sectool.identity.register import of_host, registered, revoke
from sectool.identity.revocation import Entries
from sectool.identity.spiffe import SpiffeId
from sectool.labels import LabelSet
from tests.sectool.identity.test_revocation import EXAMPLES

VERIFYING = (blob, extensions, profile, spiffe, verify)  # whose refusals a credential can meet
NOW = 1_772_330_400 * SECOND
DOMAIN = "example.org"
R = DropReason


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("state")
    init_ca(made, DOMAIN, now_us=NOW - DAY)
    enroll_host(made, "web1", made / "ca", {"env": "dev"}, now_us=NOW - HOUR)
    return made


def chain(state: Path, **over: Any) -> bytes:
    """An SVID and its host CA in PEM, any field of the leaf replaced."""
    host = load_host(state)
    key = ec.generate_private_key(ec.SECP256R1())
    begin, end = over.get("validity", (NOW - HOUR, NOW + HOUR))
    signer = over.get("signer", host.authority._leaves._key)
    leaf = a._builder(
        over.get("public", key.public_key()), x509.Name([]), host.authority.certificate.subject, begin, end
    )
    usage = over.get("usage", LEAF_USAGE)
    leaf = leaf.add_extension(usage, True) if usage else leaf
    leaf = leaf.add_extension(over.get("basic", NO_CA), True)
    san = over.get("san", a._uri(SpiffeId(DOMAIN, over.get("path", "/host/web1/wl/shop"))))
    leaf = leaf.add_extension(san, True) if san else leaf
    labels = over.get("labels", encode_labels(LabelSet({"env": "dev"})))
    leaf = leaf.add_extension(x509.UnrecognizedExtension(LABELS_OID, labels), False)
    for extra in over.get("extra", ()):
        leaf = leaf.add_extension(*extra)
    signed: bytes = leaf.sign(signer, a._SHA256).public_bytes(Encoding.PEM)
    behind: bytes = over.get("host", host.authority.certificate.public_bytes(Encoding.PEM))
    return signed + behind


def reason(state: Path, data: bytes, now_us: int = NOW) -> int:
    """0: it holds."""
    try:
        examine(data, state, now_us)
    except CredentialError as error:
        assert error.message
        return error.reason
    return 0


def uris(*texts: str) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(text) for text in texts])


def other_usage(**over: bool) -> x509.KeyUsage:
    names = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement key_cert_sign crl_sign"
        " encipher_only decipher_only"
    )
    return x509.KeyUsage(**{name: over.get(name, name == "digital_signature") for name in names.split()})


ID = f"spiffe://{DOMAIN}/host/web1/wl/shop"
BAD: dict[str, tuple[Callable[[Path], bytes], DropReason]] = {
    "no URI": (lambda s: chain(s, san=None), R.SPIFFE_ID_INVALID),
    "two URIs": (lambda s: chain(s, san=uris(ID, ID + "2")), R.SPIFFE_ID_INVALID),
    "no path": (lambda s: chain(s, san=uris(f"spiffe://{DOMAIN}")), R.SPIFFE_ID_INVALID),
    "a web name": (lambda s: chain(s, san=uris("https://example.org/")), R.SPIFFE_ID_INVALID),
    "another host's path": (lambda s: chain(s, path="/host/web10/wl/shop"), R.SPIFFE_ID_INVALID),
    "the prefix walked out of": (
        lambda s: chain(s, san=uris(f"spiffe://{DOMAIN}/host/web1/../x")),
        R.SPIFFE_ID_INVALID,
    ),
    "another domain": (
        lambda s: chain(s, san=uris("spiffe://evil.example/host/web1/wl/x")),
        R.UNTRUSTED_DOMAIN,
    ),
    "a CA": (lambda s: chain(s, basic=x509.BasicConstraints(True, 0)), R.KEY_USAGE_INVALID),
    "no key usage": (lambda s: chain(s, usage=None), R.KEY_USAGE_INVALID),
    "signs certificates": (lambda s: chain(s, usage=other_usage(key_cert_sign=True)), R.KEY_USAGE_INVALID),
    "signs lists": (lambda s: chain(s, usage=other_usage(crl_sign=True)), R.KEY_USAGE_INVALID),
    "signs nothing": (
        lambda s: chain(s, usage=other_usage(digital_signature=False, key_agreement=True)),
        R.KEY_USAGE_INVALID,
    ),
    "servers only": (
        lambda s: chain(s, extra=[(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)]),
        R.KEY_USAGE_INVALID,
    ),
    "a label not allowed": (
        lambda s: chain(s, labels=encode_labels(LabelSet({"env": "prod"}))),
        R.LABEL_NOT_PERMITTED,
    ),
    "labels out of order": (lambda s: chain(s, labels=b"\x0c\x07b=1,a=1"), R.CREDENTIAL_MALFORMED),
    "huge labels": (lambda s: chain(s, labels=b"\x0c\x82\xff\xff" + b"a" * 65_535), R.CREDENTIAL_MALFORMED),
    "a critical name constraint": (
        lambda s: chain(
            s, extra=[(x509.NameConstraints([x509.UniformResourceIdentifier(".org")], None), True)]
        ),
        R.CREDENTIAL_MALFORMED,
    ),
    "an RSA key": (
        lambda s: chain(s, public=rsa.generate_private_key(65537, 2048).public_key()),
        R.UNTRUSTED_CHAIN,
    ),
    "another's signature": (
        lambda s: chain(s, signer=ec.generate_private_key(ec.SECP256R1())),
        R.UNTRUSTED_CHAIN,
    ),
    "expired": (lambda s: chain(s, validity=(NOW - HOUR, NOW - SECOND)), R.CREDENTIAL_EXPIRED),
    "not begun": (lambda s: chain(s, validity=(NOW + HOUR // 2, NOW + HOUR)), R.CREDENTIAL_NOT_YET_VALID),
    "no host CA": (lambda s: chain(s, host=b""), R.UNTRUSTED_CHAIN),
    "a chain too long": (lambda s: chain(s) + (s / "host/host.crt").read_bytes() * 2, R.UNTRUSTED_CHAIN),
    "the root as host CA": (lambda s: chain(s, host=(s / "ca/root.crt").read_bytes()), R.KEY_USAGE_INVALID),
    "too large": (lambda _: b"-----BEGIN" * 200_000, R.CREDENTIAL_OVERSIZED),
    "nothing": (lambda _: b"", R.CREDENTIAL_MALFORMED),
}


def test_what_is_good_holds(state: Path) -> None:
    assert reason(state, chain(state)) == 0
    assert reason(state, chain(state) + (state / "ca/root.crt").read_bytes()) == 0
    credential = load_host(state).authority.issue("/host/web1/wl/shop", LabelSet({"env": "dev"}), NOW)
    assert examine(credential.blob, state, NOW)["spiffe_id"] == ID


@pytest.mark.parametrize("what", BAD)
def test_every_refusal_has_its_reason(state: Path, what: str) -> None:
    made, why = BAD[what]
    assert DropReason(reason(state, made(state))) == why


def test_constraints_cannot_be_widened_by_a_second_certificate_of_the_host(state: Path) -> None:
    """A host CA that signs itself another one is no host CA: the chain ends at a root."""
    host = load_host(state)
    key = ec.generate_private_key(ec.SECP256R1())
    wider = x509.UnrecognizedExtension(
        CONSTRAINTS_OID, encode_constraints(LabelConstraints({"*": ("*",)}, ""))
    )
    forged = (
        a._builder(
            key.public_key(),
            host.authority.certificate.subject,
            host.authority.certificate.subject,
            NOW - HOUR,
            NOW + HOUR,
        )
        .add_extension(x509.BasicConstraints(True, 0), True)
        .add_extension(a._CA_USAGE, True)
        .add_extension(uris(f"spiffe://{DOMAIN}"), False)
        .add_extension(wider, False)
        .sign(host.authority._leaves._key, a._SHA256)
    )
    data = chain(state, signer=key, path="/host/prod1/wl/x", host=forged.public_bytes(Encoding.PEM))
    assert reason(state, data) == R.UNTRUSTED_CHAIN


@given(st.data())
@settings(max_examples=EXAMPLES, deadline=None)
def test_changed_certificates_never_pass_and_never_crash(state: Path, data: st.DataObject) -> None:
    """Flipped, cut or stuffed DER of leaf or host CA: refused with a reason. (s and n - s of a signature are one.)"""
    certificates = x509.load_pem_x509_certificates(_GOOD.setdefault(state, chain(state)))
    ders = [bytearray(each.public_bytes(Encoding.DER)) for each in certificates]
    which = data.draw(st.integers(0, 1))
    body = len(certificates[which].tbs_certificate_bytes)
    at = data.draw(st.integers(0, body - 1))
    change = data.draw(st.sampled_from(["flip", "cut", "add"]))
    if change == "flip":
        ders[which][at] ^= data.draw(st.integers(1, 255))
    elif change == "cut":
        del ders[which][at : at + data.draw(st.integers(1, 60))]
    else:
        ders[which][at:at] = data.draw(st.binary(min_size=1, max_size=30))
    pem = b"".join(
        b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(bytes(der)) + b"-----END CERTIFICATE-----\n"
        for der in ders
    )
    assert reason(state, pem) != 0


_GOOD: dict[Path, bytes] = {}


def test_openssl_accepts_what_we_issue_and_it_follows_the_x509_svid_rules(
    state: Path, tmp_path: Path
) -> None:
    """What go-spiffe checks (x509svid.Verify, ParseAndVerify): one URI name, usages, no CA, a path."""
    authority = load_host(state).authority
    credential = authority.issue("/host/web1/wl/shop", LabelSet({"env": "dev"}), NOW)
    portable = authority.issue_portable("/host/web1/wl/shop", NOW)
    for der in (credential.leaf_der, portable.leaf_der):
        leaf = x509.load_der_x509_certificate(der)
        san = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        assert [str(each.value) for each in san.value] == [ID]
        assert san.critical == (not leaf.subject.rdns)
        usage = leaf.extensions.get_extension_for_class(x509.KeyUsage)
        assert usage.critical and usage.value.digital_signature
        assert not usage.value.key_cert_sign and not usage.value.crl_sign
        assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        purposes = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert set(purposes) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
        (tmp_path / "leaf").write_bytes(leaf.public_bytes(Encoding.PEM))
        words = ["openssl", "verify", "-x509_strict", "-attime", str(NOW // SECOND)]
        words += ["-CAfile", str(state / "ca/root.crt"), "-untrusted", str(state / "host/host.crt"), "leaf"]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.stdout == "leaf: OK\n", done.stderr


def test_revoking_by_name_at_the_ca_and_back(state: Path) -> None:
    ca, root = state / "ca", a.RootAuthority.load(state / "ca")
    assert [each.name for each in registered(ca)] == ["web1"]
    entries = of_host(ca, "web1", NOW)
    listed = revoke(ca, root, entries, NOW)
    lists = Lists(state, load_host(state).bundle, NOW)
    lists.take(listed.pem, NOW)
    assert reason(state, chain(state)) == R.CREDENTIAL_REVOKED
    again = revoke(ca, root, Entries(), NOW + SECOND, less=entries)
    assert again.number > listed.number and not again.entries
    lists.take(again.pem, NOW + SECOND)
    assert reason(state, chain(state), NOW + SECOND) == 0
    with pytest.raises(Exception, match="number"):
        lists.take(listed.pem, NOW + SECOND)  # an older list brings nothing back


def test_a_list_that_is_required_and_not_there_refuses_unless_left_open(tmp_path: Path) -> None:
    init_ca(tmp_path, DOMAIN, now_us=NOW - DAY)
    enroll_host(tmp_path, "web1", tmp_path / "ca", {"env": "dev"}, now_us=NOW - HOUR)
    data = chain(tmp_path)
    assert examine(data, tmp_path, NOW, required=["other.example"])["spiffe_id"] == ID
    assert examine(data, tmp_path, NOW, closed=False, required=[DOMAIN])["spiffe_id"] == ID
    for required in ([DOMAIN], ["*"]):
        with pytest.raises(CredentialError, match=f"no revocation list of {DOMAIN}") as error:
            examine(data, tmp_path, NOW, required=required)
        assert error.value.reason == R.REVOCATION_STALE
    host = load_host(tmp_path)
    first = revoke(tmp_path / "ca", a.RootAuthority.load(tmp_path / "ca"), Entries(), NOW)
    Lists(tmp_path, host.bundle, NOW).take(first.pem, NOW)
    assert examine(data, tmp_path, NOW, required=["*"])["spiffe_id"] == ID


def test_no_delegation_holds_but_the_leafs_own(state: Path) -> None:
    """Of credentials as a handshake shows them."""
    authority = load_host(state).authority
    good = authority.issue("/host/web1/wl/shop", LabelSet({"env": "dev"}), NOW)
    other = authority.issue("/host/web1/wl/other", LabelSet({"env": "dev"}), NOW)
    assert reason(state, good.blob) == 0
    assert reason(state, other.blob[:105] + good.blob[105:]) == R.DELEGATION_INVALID
    stream = good.blob[105:]
    assert good.leaf_key is not None
    for end_us, why in (
        (NOW - SECOND, R.DELEGATION_EXPIRED),
        (good.not_after_us + SECOND, R.DELEGATION_INVALID),
    ):
        delegation = Delegation.sign(good.leaf_key, good.x25519_public, end_us // SECOND, stream)
        assert reason(state, pack(delegation, stream)) == why


def test_identity_verify_gives_every_reason_there_is_for_a_credential() -> None:
    elsewhere = {
        R.CREDENTIAL_REVOKED,
        R.REVOCATION_STALE,
        R.DELEGATION_INVALID,
        R.DELEGATION_EXPIRED,
    }  # above, below
    tried = {why for _, why in BAD.values()} | elsewhere
    raised = set(re.findall(r"DropReason\.([A-Z_]+)", "".join(inspect.getsource(m) for m in VERIFYING)))
    assert {DropReason[name] for name in raised} == tried


def test_a_damaged_list_of_a_root_counts_as_expired(state: Path) -> None:
    """What it revoked is not known any more; a good one heals it."""
    ca, now = state / "ca", NOW + 10 * SECOND
    listed = revoke(ca, a.RootAuthority.load(ca), Entries(frozenset({"aa"})), now)
    lists = Lists(state, load_host(state).bundle, now)
    lists.take(listed.pem, now)
    path = lists.folder / f"{listed.issuer}.pem"
    path.write_bytes(listed.pem[:-80])
    assert reason(state, chain(state), now) == R.REVOCATION_STALE
    lists = Lists(state, load_host(state).bundle, now)
    assert path.name in lists.damaged
    lists.take(listed.pem, now)
    assert lists.damaged == {}
    assert reason(state, chain(state), now) == 0
