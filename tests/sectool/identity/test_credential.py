from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from sectool.clock import SECOND
from sectool.errors import CredentialError
from sectool.events import DropReason
from sectool.identity.authority import HostAuthority
from sectool.identity.credential import MAX_WIRE, Credential, PeerIdentity
from sectool.identity.spiffe import SpiffeId
from sectool.labels import LabelSet

NOW = 1_772_330_400 * SECOND


@pytest.fixture(scope="session")
def credential(authority: HostAuthority) -> Credential:
    return authority.issue("/host/web1/wl/shop", LabelSet({"app": "web", "env": "dev"}), NOW)


def raw(key: X25519PrivateKey) -> bytes:
    return key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())


def test_a_credential_reaches_the_worker_without_the_leaf_key(credential: Credential) -> None:
    wire = credential.to_wire()
    got = Credential.from_wire(wire)
    assert got.peer == credential.peer
    assert (got.blob, got.leaf_der, got.host_der) == (
        credential.blob,
        credential.leaf_der,
        credential.host_der,
    )
    assert (got.not_after_us, got.renew_at_us) == (credential.not_after_us, credential.renew_at_us)
    assert raw(got.x25519_private) == raw(credential.x25519_private)
    other = X25519PrivateKey.generate()
    secret = got.x25519_private.exchange(other.public_key())
    assert secret == other.exchange(X25519PublicKey.from_public_bytes(credential.peer.x25519))
    assert got.leaf_key is None
    key: Any = credential.leaf_key
    scalar = key.private_numbers().private_value.to_bytes(32, "big")
    assert scalar not in wire
    assert base64.b64encode(scalar) not in wire


def test_keys_are_not_shown(credential: Credential) -> None:
    secret = raw(credential.x25519_private)
    shown = repr(credential) + str(credential)
    assert repr(secret)[2:-1] not in shown
    assert secret.hex() not in shown
    assert "spiffe://example.org/host/web1/wl/shop" in shown


def test_the_domain_label_is_the_trust_domain_and_nothing_else() -> None:
    def of(labels: dict[str, str]) -> PeerIdentity:
        return PeerIdentity.of(SpiffeId("a.example", "/x"), labels, bytes(32), (0, 1), bytes(32), 1, "h")

    assert dict(of({}).labels) == {"domain": "a.example"}
    assert dict(of({"domain": "a.example"}).labels) == {"domain": "a.example"}
    with pytest.raises(CredentialError) as error:
        of({"domain": "b.example"})
    assert error.value.reason == DropReason.LABEL_NOT_PERMITTED
    with pytest.raises(CredentialError) as error:
        of({f"k{i}": "v" for i in range(64)})
    assert error.value.reason == DropReason.CREDENTIAL_MALFORMED


def change(credential: Credential, **fields: Any) -> bytes:
    return json.dumps({**json.loads(credential.to_wire()), **fields}).encode()


@pytest.mark.parametrize(
    "fields",
    [
        {"version": 2},
        {"blob": "AAAA"},
        {"blob": 7},
        {"key": base64.b64encode(bytes(range(32))).decode()},  # not the blob's key
        {"key": "short"},
        {"key": None},
        {"renew_at": "soon"},
        {"renew_at": True},
        {"not_after": 1.5},
        {"spiffe_id": "https://example.org"},
        {"spiffe_id": 1},
        {"labels": "a"},
        {"labels": ["a=1"]},
        {"labels": "domain=bank.example"},
        {"fingerprint": "00"},
        {"serial": "xyz"},
        {"host": 1},
    ],
)
def test_a_local_message_that_does_not_fit_is_refused(credential: Credential, fields: dict[str, Any]) -> None:
    assert Credential.from_wire(change(credential)).peer == credential.peer
    with pytest.raises(CredentialError):
        Credential.from_wire(change(credential, **fields))


def test_a_refusal_quotes_no_key_material(credential: Credential) -> None:
    secret = base64.b64encode(raw(credential.x25519_private)).decode()
    with pytest.raises(CredentialError) as error:
        Credential.from_wire(change(credential, serial=secret))
    assert secret[:10] not in f"{error.value.message}{error.value.hint}"


@given(
    st.binary(max_size=300)
    | st.recursive(st.none() | st.text() | st.integers(), st.lists).map(lambda v: json.dumps(v).encode())
)
def test_arbitrary_local_messages_are_refused(data: bytes) -> None:
    with pytest.raises(CredentialError):
        Credential.from_wire(data)


@given(data=st.data())
def test_a_changed_local_message_gives_a_credential_or_a_refusal(
    credential: Credential, data: st.DataObject
) -> None:
    wire = bytearray(credential.to_wire())
    at = data.draw(st.integers(0, len(wire) - 1))
    wire[at] = data.draw(st.integers(0, 255))
    try:
        got = Credential.from_wire(bytes(wire))
    except CredentialError:
        return
    assert got.x25519_public == got.peer.x25519 == credential.x25519_public


def test_oversized_and_deep_local_messages_are_refused() -> None:
    for data in (b" " * (MAX_WIRE + 1), b"[" * 60_000):
        with pytest.raises(CredentialError):
            Credential.from_wire(data)
