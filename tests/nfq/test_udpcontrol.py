"""Control datagrams: exactly what the protocol says, or none."""

from __future__ import annotations

import struct

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from nfq.noise import TransportKeys
from nfq.udpcontrol import HEADER, HELLO_SIZE, MAGIC, Kind, ack, is_candidate, read, unknown, write

bodies = st.binary(max_size=1180)


@given(kind=st.sampled_from(Kind), body=bodies, rest=st.binary(max_size=50))
def test_what_is_written_is_read(kind: Kind, body: bytes, rest: bytes) -> None:
    if kind is Kind.HELLO:
        assert len(write(kind, body)) == HELLO_SIZE
    behind = rest if kind is Kind.PROOF_DATA else b""
    assert read(write(kind, body, behind)) == (kind, body, behind)


@given(body=bodies)
def test_the_header_is_what_the_protocol_says(body: bytes) -> None:
    data = write(Kind.ANSWER, body)
    assert data == MAGIC + b"\x01\x02" + struct.pack(">H", len(body)) + bytes(4) + body
    assert MAGIC[0] >> 6 == 3, "no counter of a sealed datagram begins so"


@given(data=st.binary(max_size=100))
def test_garbage_is_none(data: bytes) -> None:
    assert read(data) is None or data.startswith(MAGIC)


@given(data=st.binary(max_size=60))
def test_candidates_are_read_strictly(data: bytes) -> None:
    found = read(MAGIC + data)
    assert is_candidate(MAGIC + data)
    if found is not None:
        assert write(found.kind, found.body, found.rest) == MAGIC + data


@pytest.mark.parametrize("at", [*range(8), 8, 10, 12, 13, 14, 15])
def test_every_header_field_must_hold(at: int) -> None:
    data = bytearray(write(Kind.ACK, bytes(16)))
    data[at] ^= 1
    assert read(bytes(data)) is None


def test_only_proofs_carry_something_behind_and_hellos_zeros() -> None:
    assert read(write(Kind.PROOF, bytes(28)) + b"x") is None
    hello = write(Kind.HELLO, b"body")
    assert read(hello[:-1]) is None
    assert read(hello + b"\0") is None
    assert read(hello[:-1] + b"\1") is None
    assert read(write(Kind.PROOF_DATA, bytes(28), b"data")) == (Kind.PROOF_DATA, bytes(28), b"data")


def test_an_ack_is_a_tag_under_the_responders_key() -> None:
    keys = TransportKeys(bytes(32), bytes(range(32)), b"")
    data = ack(keys)
    assert len(data) == HEADER + 16
    assert AESGCM(bytes(range(32))).decrypt(bytes(12), data[HEADER:], data[:HEADER]) == b""


@given(data=st.binary(max_size=40))
def test_unknown_names_the_end_of_what_it_answers(data: bytes) -> None:
    found = read(unknown(data))
    assert found is not None
    assert found.kind is Kind.UNKNOWN
    assert (bytes(8) + data).endswith(found.body)
    assert len(found.body) == 8
