"""SPIFFE bundle documents: what is read, what is left out, what is refused; any bytes give a bundle or SectoolError."""

from __future__ import annotations

import base64
import json
import os
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from sectool.errors import SectoolError
from sectool.identity.bundle import MAX_DOCUMENT, SpiffeBundle, of_roots, parse_bundle, read_bundle
from sectool.identity.trust import TrustBundle, read_root

from .conftest import DOMAIN, Forge, uris

EXAMPLES = int(os.environ.get("SECTOOL_EXAMPLES", "60"))


def pem(certificate: Any) -> str:
    return str(certificate.public_bytes(Encoding.PEM).decode())


@pytest.fixture
def document(forge: Forge) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(of_roots(DOMAIN, [read_root(pem(forge.root), DOMAIN)], 7).to_json())
    return made


def parse(document: object) -> SpiffeBundle:
    return parse_bundle(json.dumps(document).encode(), DOMAIN)


def test_a_bundle_survives_its_document(forge: Forge, document: dict[str, Any]) -> None:
    assert set(document) == {"keys", "spiffe_sequence", "spiffe_refresh_hint"}
    (key,) = document["keys"]
    assert {name: key[name] for name in ("kty", "crv", "use")} == {
        "kty": "EC", "crv": "P-256", "use": "x509-svid"
    }  # fmt: skip
    assert base64.b64decode(key["x5c"][0]) == forge.root.public_bytes(Encoding.DER)
    read = parse(document)
    assert (read.sequence, read.refresh_hint_s, read.ignored) == (7, 300, ())
    assert read.to_json() == json.dumps(document, indent=2) + "\n"
    assert read.added_to(TrustBundle()).roots[DOMAIN] == forge.bundle().roots[DOMAIN]


def test_an_ed25519_root_is_an_okp_key(forge: Forge) -> None:
    forge.root_key = ed25519.Ed25519PrivateKey.generate()
    root = read_root(pem(forge.sign_root()), DOMAIN)
    text = of_roots(DOMAIN, [root], 1).to_json()
    assert json.loads(text)["keys"][0]["kty"] == "OKP"
    assert parse_bundle(text.encode(), DOMAIN).fingerprints == (root.fingerprint.hex(),)


def test_what_other_implementations_add_is_ignored(document: dict[str, Any]) -> None:
    document["keys"] += [
        {"use": "jwt-svid", "kty": "EC", "kid": "x"},
        {"use": "something-new", "kty": "??"},
        {"kty": "EC"},
    ]
    document["keys"][0]["kid"] = "k"
    document["more"] = [1]
    read = parse(document)
    assert len(read.roots) == 1
    assert read.ignored == ()


def test_an_authority_that_cannot_be_an_anchor_here_is_left_out_with_its_reason(
    forge: Forge, document: dict[str, Any]
) -> None:
    other = Forge()
    key = rsa.generate_private_key(65537, 2048)
    for certificate in (
        other.sign_root(signer=key, public=key.public_key()),
        other.sign_root(ca=False),
        other.sign_root(san=uris("spiffe://elsewhere.example")),
        forge.host,
    ):
        der = base64.b64encode(certificate.public_bytes(Encoding.DER)).decode()
        document["keys"].append({"use": "x509-svid", "kty": "EC", "x5c": [der]})
    read = parse(document)
    assert len(read.roots) == 1
    assert [text.partition(":")[0] for text in read.ignored] == ["key 2", "key 3", "key 4", "key 5"]
    assert "elsewhere.example" in read.ignored[2]
    document["keys"].pop(0)
    with pytest.raises(SectoolError, match="no key in it can be used"):
        parse(document)


def test_no_keys_means_that_nobody_is_trusted_any_more() -> None:
    empty = parse({"keys": [], "spiffe_sequence": 9})
    assert empty.roots == ()
    assert empty.added_to(TrustBundle()).roots == {DOMAIN: ()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"keys": None}, "no list 'keys'"),
        ({"keys": [1]}, "not an object"),
        ({"keys": [{}] * 257}, "257 keys"),
        ({"spiffe_sequence": -1}, "spiffe_sequence"),
        ({"spiffe_sequence": 1 << 63}, "spiffe_sequence"),
        ({"spiffe_sequence": True}, "spiffe_sequence"),
        ({"spiffe_refresh_hint": "300"}, "spiffe_refresh_hint"),
    ],
)
def test_what_a_document_must_not_say(document: dict[str, Any], change: dict[str, Any], words: str) -> None:
    with pytest.raises(SectoolError, match=words):
        parse(document | change)


@pytest.mark.parametrize(
    "key",
    [
        {"x5c": []},
        {"x5c": ["AAAA", "AAAA"]},
        {"x5c": ["!"]},
        {"x5c": ["MAA="]},
        {"x5c": "MAA="},
        {"kty": "RSA"},
        {"x": "AAAA"},
        {"y": None},
    ],
)
def test_a_key_that_contradicts_itself_does_not_count(document: dict[str, Any], key: dict[str, Any]) -> None:
    document["keys"][0] |= key
    with pytest.raises(SectoolError, match="no key in it can be used"):
        parse(document)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{",
        b'{"keys": [], "keys": []}',
        b'{"keys": [NaN]}',
        b"\xff",
        b"[" * 10_000,
        b" " * (MAX_DOCUMENT + 1),
    ],
)
def test_what_is_no_document(data: bytes) -> None:
    with pytest.raises(SectoolError):
        parse_bundle(data, DOMAIN)


def test_pem_is_a_bundle_without_a_number(forge: Forge) -> None:
    read = read_bundle(pem(forge.root).encode(), DOMAIN)
    assert (len(read.roots), read.sequence) == (1, None)
    with pytest.raises(SectoolError, match="elsewhere"):
        read_bundle(pem(forge.root).encode(), "elsewhere.example")
    with pytest.raises(SectoolError, match="trust domain"):
        read_bundle(pem(forge.root).encode(), "Not A Domain")


def test_the_hint_is_taken_within_bounds(document: dict[str, Any]) -> None:
    wanted = {0: 60, 1: 60, 300: 300, 10**12: 86_400}
    assert {hint: parse(document | {"spiffe_refresh_hint": hint}).refresh_s for hint in wanted} == wanted
    del document["spiffe_refresh_hint"]
    assert parse(document).refresh_s == 300


_FORGE = Forge()
_GOOD = of_roots(DOMAIN, [read_root(pem(_FORGE.root), DOMAIN)], 3).to_json().encode()
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["keys", "use", "x5c", "kty", "x", "y", "crv", "spiffe_sequence", "x509-svid"]),
            inner,
        )
    ),
    max_leaves=12,
)


@given(data=st.one_of(st.binary(max_size=200), _JSON.map(lambda v: json.dumps(v).encode())))
@settings(max_examples=EXAMPLES, deadline=None)
def test_any_bytes_give_a_bundle_or_an_error(data: bytes) -> None:
    try:
        assert all(root.is_ca for root in read_bundle(data, DOMAIN).roots)
    except SectoolError as error:
        assert error.message


@given(at=st.integers(0, len(_GOOD) - 1), byte=st.integers(0, 255))
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_changed_document_gives_the_same_root_or_none(at: int, byte: int) -> None:
    changed = _GOOD[:at] + bytes((byte,)) + _GOOD[at + 1 :]
    try:
        read = parse_bundle(changed, DOMAIN)
    except SectoolError:
        return
    assert all(root.certificate == _FORGE.root for root in read.roots)
