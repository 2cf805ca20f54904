from __future__ import annotations

import zlib
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import given
from hypothesis import strategies as st

from sectool.errors import CredentialError
from sectool.events import DropReason
from sectool.identity.blob import MAX_BLOB, MAX_INFLATED, Delegation, compress, pack, unpack
from sectool.identity.dictionary import DICTIONARY

HEAD = b"\x01" + bytes(104)
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


def deflate(plain: bytes, dictionary: bytes = DICTIONARY) -> bytes:
    z = zlib.compressobj(9, zlib.DEFLATED, -15, 9, 0, dictionary)
    return z.compress(plain) + z.flush()


def reason_of(blob: bytes) -> int:
    with pytest.raises(CredentialError) as refused:
        unpack(blob)
    return refused.value.reason


@given(st.binary(min_size=1, max_size=300), st.binary(min_size=1, max_size=300), st.integers(0, 2**64 - 1))
def test_a_blob_comes_apart_as_it_was_put_together(leaf: bytes, host: bytes, not_after: int) -> None:
    delegation = Delegation(bytes(range(32)), not_after, bytes(range(64)))
    parts = unpack(pack(delegation, compress(leaf, host)))
    assert (parts.delegation, parts.leaf_der, parts.host_der) == (delegation, leaf, host)


def test_the_layout_is_the_one_that_is_documented() -> None:
    stream = compress(b"LEAF", b"HOST")
    blob = pack(Delegation(b"x" * 32, 0x0102030405060708, b"s" * 64), stream)
    assert blob == b"\x01" + b"x" * 32 + bytes(range(1, 9)) + b"s" * 64 + stream
    assert zlib.decompressobj(-15, zdict=DICTIONARY).decompress(stream) == b"\x00\x04LEAFHOST"


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\x01",
        HEAD,
        b"\x00" + HEAD[1:] + deflate(b"\x00\x01ab"),
        b"\x02" + HEAD[1:] + deflate(b"\x00\x01ab"),
        HEAD + deflate(b"\x00\x01ab")[:-1],
        HEAD + deflate(b"\x00\x01ab") + b"\x00",
        HEAD + deflate(b"\x00\x01ab") + deflate(b"\x00\x01ab"),
        HEAD + deflate(b""),
        HEAD + deflate(b"\x00"),
        HEAD + deflate(b"\x00\x00ab"),
        HEAD + deflate(b"\x00\x02ab"),
        HEAD + deflate(b"\xff\xffab"),
        HEAD + b"\xff" * 20,
        HEAD + zlib.compress(b"\x00\x01ab"),
    ],
)
def test_malformed_blobs_are_refused(blob: bytes) -> None:
    assert reason_of(blob) == DropReason.CREDENTIAL_MALFORMED


def test_oversized_blobs_are_refused() -> None:
    assert reason_of(HEAD + bytes(MAX_BLOB - len(HEAD) + 1)) == DropReason.CREDENTIAL_OVERSIZED


@pytest.mark.parametrize("size", [MAX_INFLATED + 1, MAX_INFLATED + 2, 20_000, 800_000])
def test_a_decompression_bomb_is_refused(size: int) -> None:
    bomb = HEAD + deflate(b"\x00\x01" + bytes(size - 2))
    assert len(bomb) <= MAX_BLOB
    assert reason_of(bomb) == DropReason.CREDENTIAL_OVERSIZED


def test_certificates_of_exactly_the_limit_are_still_read() -> None:
    parts = unpack(HEAD + deflate(b"\x00\x01" + bytes(MAX_INFLATED - 2)))
    assert len(parts.host_der) == MAX_INFLATED - 3


@given(
    st.binary(max_size=1200)
    | st.binary(max_size=300).map(lambda b: HEAD + b)
    | st.binary().map(lambda b: HEAD + deflate(b))
)
def test_arbitrary_bytes_give_a_blob_or_a_refusal(data: bytes) -> None:
    try:
        parts = unpack(data)
    except CredentialError as error:
        assert error.reason in (DropReason.CREDENTIAL_MALFORMED, DropReason.CREDENTIAL_OVERSIZED)
    else:
        assert pack(parts.delegation, parts.stream) == data
        assert parts.leaf_der
        assert parts.host_der


@pytest.mark.parametrize(
    "key", [ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()]
)
def test_a_delegation_binds_key_time_and_certificates(key: Any) -> None:
    good = Delegation.sign(key, b"x" * 32, 1000, b"stream")
    assert len(good.signature) == 64
    good.verify(key.public_key(), b"stream")
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    for delegation, public, stream in [
        (Delegation(b"y" * 32, 1000, good.signature), key.public_key(), b"stream"),
        (Delegation(b"x" * 32, 1001, good.signature), key.public_key(), b"stream"),
        (Delegation(b"x" * 32, 1000, bytes(64)), key.public_key(), b"stream"),
        (Delegation(b"x" * 32, 1000, b"\xff" * 64), key.public_key(), b"stream"),
        (good, key.public_key(), b"streaM"),
        (good, other, b"stream"),
    ]:
        with pytest.raises(CredentialError) as refused:
            delegation.verify(public, stream)
        assert refused.value.reason == DropReason.DELEGATION_INVALID


def test_the_other_form_of_a_p256_signature_is_refused() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    for _ in range(8):  # either half of s comes up when signing
        good = Delegation.sign(key, b"x" * 32, 1000, b"stream")
        s = int.from_bytes(good.signature[32:], "big")
        assert s <= ORDER // 2
        twin = Delegation(b"x" * 32, 1000, good.signature[:32] + (ORDER - s).to_bytes(32, "big"))
        with pytest.raises(CredentialError) as refused:
            twin.verify(key.public_key(), b"stream")
        assert refused.value.reason == DropReason.DELEGATION_INVALID
