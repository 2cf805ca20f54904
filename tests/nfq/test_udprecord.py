"""Encrypted datagrams: any order, any loss, each once; keys that go on; what a restart may not repeat."""

from __future__ import annotations

import hmac

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from hypothesis import given, settings
from hypothesis import strategies as st

from nfq.recordstate import STATE_SIZE
from nfq.replay import WINDOW
from nfq.suites import ALL, by_number
from nfq.udpcontrol import is_candidate
from nfq.udprecord import LEAP, OVERHEAD, Datagrams
from sectool.events import DropReason

I2R, R2I = bytes(range(32)), bytes(range(32, 64))


def both(suite: int = 1, bits: int = 22) -> tuple[Datagrams, Datagrams]:
    chosen = by_number(suite)
    assert chosen is not None
    a, b = (Datagrams(chosen, I2R, R2I, initiator=side, epoch_bits=bits) for side in (True, False))
    return a, b


@pytest.mark.parametrize("suite", [int(s.cipher) for s in ALL])
def test_a_datagram_is_what_the_protocol_says(suite: int) -> None:
    a, _ = both(suite)
    prk = hmac.digest(bytes(32), I2R, "sha256")
    secret = hmac.digest(prk, b"sectool datagram 1" + bytes((suite, 1)), "sha256")
    key = hmac.digest(secret, b"key\x01", "sha256")
    cipher = AESGCM(key) if suite == 1 else ChaCha20Poly1305(key)
    for counter in (1, 2):
        head = counter.to_bytes(8, "big")
        sealed = a.seal(b"hello")
        assert sealed == head + cipher.encrypt(bytes(4) + head, b"hello", head)
        assert len(sealed) == 5 + OVERHEAD
        assert not is_candidate(sealed)


@settings(max_examples=60)
@given(
    payloads=st.lists(st.binary(max_size=60), min_size=1, max_size=80),
    order=st.lists(st.integers(0, 79), max_size=160),
    bits=st.sampled_from([2, 3, 22]),
)
def test_each_arrives_once_in_any_order(payloads: list[bytes], order: list[int], bits: int) -> None:
    a, b = both(bits=bits)
    sealed = [a.seal(p) for p in payloads]
    delivered: set[int] = set()
    for which in order:
        i = which % len(sealed)
        epoch, current = (i + 1) >> bits, b.accepted >> bits
        opened = b.open(sealed[i])
        if i in delivered:
            assert opened is DropReason.RECORD_REPLAYED
        elif isinstance(opened, bytes):
            assert opened == payloads[i]
            delivered.add(i)
        else:
            # Only what is more than one epoch away, or of one that was skipped, is beyond reach.
            assert opened is DropReason.RECORD_INVALID
            assert epoch > current + 1 or epoch < current
    for i, payload in enumerate(payloads):  # in order nothing newer is refused
        if i + 1 > b.accepted:
            opened = b.open(sealed[i])
            if (i + 1) >> bits <= (b.accepted >> bits) + 1:
                assert opened == payload


@given(data=st.binary(max_size=100), at=st.integers(0, 200), bit=st.integers(0, 7))
def test_no_changed_bit_is_delivered_or_moves_anything(data: bytes, at: int, bit: int) -> None:
    a, b = both()
    first, sealed = a.seal(b"first"), bytearray(a.seal(data))
    assert b.open(first) == b"first"
    sealed[at % len(sealed)] ^= 1 << bit
    assert isinstance(b.open(bytes(sealed)), DropReason)
    assert b.accepted == 1
    sealed[at % len(sealed)] ^= 1 << bit
    assert b.open(bytes(sealed)) == data


@given(junk=st.binary(max_size=80))
def test_garbage_is_refused(junk: bytes) -> None:
    _, b = both()
    assert isinstance(b.open(junk), DropReason)
    assert b.accepted == 0


def test_directions_do_not_mix() -> None:
    a, b = both()
    sealed = a.seal(b"x")
    assert a.open(sealed) is DropReason.RECORD_INVALID
    assert b.open(sealed) == b"x"


def test_what_is_older_than_the_window_is_refused() -> None:
    a, b = both()
    old = a.seal(b"old")
    edge = a.seal(b"edge")
    for _ in range(WINDOW):
        last = a.seal(b"")
    assert b.open(last) == b""
    assert b.open(old) is DropReason.RECORD_REPLAYED
    assert b.open(edge) is DropReason.RECORD_REPLAYED
    fresh = a.seal(b"new")
    assert b.open(fresh) == b"new"


def test_a_restart_leaps_ahead_and_repeats_no_counter() -> None:
    a, b = both(bits=17)
    slots = [memoryview(bytearray(STATE_SIZE)) for _ in range(2)]
    a.attach(slots[0])
    b.attach(slots[1])
    used: set[bytes] = set()
    for _ in range(4):
        for _ in range(3):
            sealed = a.seal(b"x")
            assert sealed[:8] not in used
            used.add(sealed[:8])
            assert b.open(sealed) == b"x"
        last = sealed
        a, b = Datagrams.restore(slots[0]), Datagrams.restore(slots[1])
        assert b.open(last) is DropReason.RECORD_REPLAYED, "everything accepted before is a replay"
        assert a.sent >= int.from_bytes(last[:8], "big") + LEAP
    sent = a.sent
    assert Datagrams.restore(slots[0]).sent == sent, "restarts alone move nothing"


def test_a_flow_that_is_over_leaves_no_key() -> None:
    a, _ = both()
    slot = memoryview(bytearray(STATE_SIZE))
    a.attach(slot)
    a.seal(b"x")
    assert any(slot)
    a.close()
    assert not any(slot)
