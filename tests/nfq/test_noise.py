"""Noise IX: published vectors, agreement with an independent library, every way a message can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from noise.connection import Keypair, NoiseConnection

from nfq.noise import (
    DHLEN,
    MESSAGE_1_OVERHEAD,
    MESSAGE_2_OVERHEAD,
    PROTOCOL,
    TAGLEN,
    Initiator,
    KeyPair,
    NoiseError,
    Responder,
    TransportKeys,
)

_FILE = json.loads((Path(__file__).parent / "vectors" / "noise_ix.json").read_text(encoding="utf-8"))

# The u-coordinates whose product with every clamped scalar is zero, in every encoding X25519 accepts:
# 0, 1, two points of order 8, p-1, and the unreduced p and p+1; each also with the ignored top bit set.
_P = 2**255 - 19
_ORDER_8 = (
    0x00B8495F16056286FDB1329CEB8D09DA6AC49FF1FAE35616AEB8413B7C7AEBE0,
    0x57119FD0DD4E22D8868E1C58C45C44045BEF839C55B1D0B1248C50A3BC959C5F,
)
LOW_ORDER = [
    (u | top).to_bytes(32, "little") for u in (0, 1, *_ORDER_8, _P - 1, _P, _P + 1) for top in (0, 1 << 255)
]

_PROLOGUE = b"prologue"
_PAYLOAD_1 = b"payload one"
_PAYLOAD_2 = b"payload two!"
_INIT_S, _INIT_E, _RESP_S, _RESP_E = (KeyPair.of(bytes([n]) * 32) for n in (1, 2, 3, 4))
_MESSAGE_1_LEN = MESSAGE_1_OVERHEAD + len(_PAYLOAD_1)
_MESSAGE_2_LEN = MESSAGE_2_OVERHEAD + len(_PAYLOAD_2)


class Message(NamedTuple):
    payload: bytes
    wire: bytes


class Vector(NamedTuple):
    name: str
    prologue: bytes
    init_static: KeyPair
    init_ephemeral: KeyPair
    resp_static: KeyPair
    resp_ephemeral: KeyPair
    handshake_hash: bytes | None
    messages: list[Message]

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> Vector:
        def key(name: str) -> KeyPair:
            return KeyPair.of(bytes.fromhex(raw[name]))

        h = raw.get("handshake_hash")
        return cls(
            raw["name"],
            bytes.fromhex(raw["prologue"]),
            key("init_static"),
            key("init_ephemeral"),
            key("resp_static"),
            key("resp_ephemeral"),
            bytes.fromhex(h) if h else None,
            [Message(bytes.fromhex(m["payload"]), bytes.fromhex(m["ciphertext"])) for m in raw["messages"]],
        )


VECTORS = [Vector.parse(raw) for raw in _FILE["vectors"]]
each_vector = pytest.mark.parametrize("vector", VECTORS, ids=lambda v: v.name)


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def nonce(counter: int) -> bytes:
    """Noise AESGCM nonce (section 12.4)."""
    return b"\0\0\0\0" + counter.to_bytes(8, "big")


def initiator() -> Initiator:
    return Initiator(_INIT_S, _PROLOGUE, _PAYLOAD_1, _INIT_E)


def answer(message: bytes, prologue: bytes = _PROLOGUE) -> tuple[bytes, TransportKeys]:
    return Responder(prologue, message).write(_RESP_S, _PAYLOAD_2, _RESP_E)


# --- published vectors -------------------------------------------------------------------------------------


def test_vectors_cover_three_sources_prologue_and_payloads() -> None:
    assert _FILE["protocol_name"].encode() == PROTOCOL
    assert {raw["source"] for raw in _FILE["vectors"]} == set(_FILE["sources"])
    assert len(_FILE["sources"]) == 3
    assert {(bool(v.prologue), bool(v.messages[0].payload)) for v in VECTORS} == {
        (a, b) for a in (False, True) for b in (False, True)
    }
    assert any(v.handshake_hash for v in VECTORS)
    assert len({v.name for v in VECTORS}) == len(VECTORS)


@each_vector
def test_initiator_reproduces_vector(vector: Vector) -> None:
    first, second = vector.messages[:2]
    side = Initiator(vector.init_static, vector.prologue, first.payload, vector.init_ephemeral)
    assert side.message == first.wire
    remote, payload, keys = side.read(second.wire)
    assert (remote, payload) == (vector.resp_static.public, second.payload)
    check_keys(vector, keys)


@each_vector
def test_responder_reproduces_vector(vector: Vector) -> None:
    first, second = vector.messages[:2]
    side = Responder(vector.prologue, first.wire)
    assert side.payload == first.payload
    assert side.remote_ephemeral == vector.init_ephemeral.public
    assert side.remote_static == vector.init_static.public
    message, keys = side.write(vector.resp_static, second.payload, vector.resp_ephemeral)
    assert message == second.wire
    check_keys(vector, keys)


def check_keys(vector: Vector, keys: TransportKeys) -> None:
    """The keys give the vector's transport messages, in both directions, and its handshake hash."""
    transport = vector.messages[2:]
    assert len(transport) >= 2
    for index, message in enumerate(transport):
        key = keys.responder_to_initiator if index % 2 else keys.initiator_to_responder
        cipher = AESGCM(key)
        assert cipher.encrypt(nonce(index // 2), message.payload, b"") == message.wire
        assert cipher.decrypt(nonce(index // 2), message.wire, b"") == message.payload
    if vector.handshake_hash is not None:
        assert keys.handshake_hash == vector.handshake_hash


@each_vector
def test_vector_prologue_is_bound(vector: Vector) -> None:
    first, second = vector.messages[:2]
    side = Initiator(vector.init_static, vector.prologue + b"x", first.payload, vector.init_ephemeral)
    with pytest.raises(NoiseError, match="authenticate"):
        side.read(second.wire)


# --- an independent library -------------------------------------------------------------------------------


def library(*, initiator: bool, static: X25519PrivateKey, prologue: bytes) -> Any:
    side = NoiseConnection.from_name(PROTOCOL)
    side.set_prologue(prologue)
    side.set_keypair_from_private_bytes(Keypair.STATIC, static.private_bytes_raw())
    if initiator:
        side.set_as_initiator()
    else:
        side.set_as_responder()
    side.start_handshake()
    return side


def check_transport(theirs: Any, send: bytes, receive: bytes, texts: list[bytes]) -> None:
    """`theirs` decrypts what is sealed under `send`, and the reverse under `receive`; counters from zero."""
    for counter, text in enumerate(texts):
        assert theirs.decrypt(AESGCM(send).encrypt(nonce(counter), text, None)) == text
        assert AESGCM(receive).decrypt(nonce(counter), theirs.encrypt(text), None) == text


_texts = st.binary(max_size=300)
_transport = st.lists(st.binary(max_size=64), min_size=1, max_size=3)


@settings(max_examples=40, deadline=None)
@given(prologue=_texts, one=_texts, two=_texts, texts=_transport)
def test_our_initiator_with_library_responder(
    prologue: bytes, one: bytes, two: bytes, texts: list[bytes]
) -> None:
    static, other = KeyPair.generate(), KeyPair.generate()
    ours = Initiator(static, prologue, one)
    theirs = library(initiator=False, static=other.private, prologue=prologue)
    assert theirs.read_message(ours.message) == one
    remote, payload, keys = ours.read(bytes(theirs.write_message(two)))
    assert (remote, payload) == (other.public, two)
    assert theirs.handshake_finished
    assert keys.handshake_hash == theirs.get_handshake_hash()
    check_transport(theirs, keys.initiator_to_responder, keys.responder_to_initiator, texts)


@settings(max_examples=40, deadline=None)
@given(prologue=_texts, one=_texts, two=_texts, texts=_transport)
def test_library_initiator_with_our_responder(
    prologue: bytes, one: bytes, two: bytes, texts: list[bytes]
) -> None:
    static, other = KeyPair.generate(), KeyPair.generate()
    theirs = library(initiator=True, static=other.private, prologue=prologue)
    ours = Responder(prologue, bytes(theirs.write_message(one)))
    assert (ours.remote_static, ours.payload) == (other.public, one)
    message, keys = ours.write(static, two)
    assert theirs.read_message(message) == two
    assert theirs.handshake_finished
    assert keys.handshake_hash == theirs.get_handshake_hash()
    check_transport(theirs, keys.responder_to_initiator, keys.initiator_to_responder, texts)


def test_both_our_sides_agree_and_ephemerals_are_fresh() -> None:
    seen = set()
    for _ in range(3):
        side = Initiator(_INIT_S, _PROLOGUE, _PAYLOAD_1)
        message, keys = Responder(_PROLOGUE, side.message).write(_RESP_S, _PAYLOAD_2)
        assert side.read(message) == (_RESP_S.public, _PAYLOAD_2, keys)
        assert keys.initiator_to_responder != keys.responder_to_initiator
        seen |= {side.message[:DHLEN], message[:DHLEN], *keys[:4]}
    assert len(seen) == 3 * 6


# --- what was changed on the way ----------------------------------------------------------------------------

# Name of each part of a message, with its first and last+1 byte: together they are the whole message.
PARTS_1 = {
    "e": (0, DHLEN),
    "s": (DHLEN, 2 * DHLEN),
    "payload": (2 * DHLEN, _MESSAGE_1_LEN),
}
PARTS_2 = {
    "e": (0, 32),
    "encrypted s": (32, 64),
    "tag of s": (64, 80),
    "encrypted payload": (80, 80 + len(_PAYLOAD_2)),
    "tag of payload": (80 + len(_PAYLOAD_2), _MESSAGE_2_LEN),
}


def assert_refused_then_usable(side: Initiator, bad: bytes) -> None:
    """`bad` is refused, and the same initiator still accepts the genuine answer."""
    with pytest.raises(NoiseError):
        side.read(bad)
    good, keys = answer(side.message)
    assert side.read(good) == (_RESP_S.public, _PAYLOAD_2, keys)


def test_parts_tile_the_messages() -> None:
    for parts, length in (
        (PARTS_1, len(initiator().message)),
        (PARTS_2, len(answer(initiator().message)[0])),
    ):
        edges = [edge for part in parts.values() for edge in part]
        assert edges[0] == 0
        assert edges[-1] == length
        assert edges[1:-1:2] == edges[2::2]


@settings(max_examples=60, deadline=None)
@given(bit=st.integers(0, 8 * len(_PROLOGUE) - 1))
def test_flipped_prologue_is_noticed(bit: int) -> None:
    side = initiator()
    assert_refused_then_usable(side, answer(side.message, flip(_PROLOGUE, bit))[0])


@pytest.mark.parametrize("part", PARTS_1)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_flipped_message_1_is_noticed(part: str, data: st.DataObject) -> None:
    """The responder cannot tell (message 1 is in clear); its answer does not authenticate."""
    start, end = PARTS_1[part]
    bit = data.draw(st.integers(8 * start, 8 * end - 1))
    side = initiator()
    assert_refused_then_usable(side, answer(flip(side.message, bit))[0])


@pytest.mark.parametrize("part", PARTS_2)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_flipped_message_2_is_noticed(part: str, data: st.DataObject) -> None:
    start, end = PARTS_2[part]
    bit = data.draw(st.integers(8 * start, 8 * end - 1))
    side = initiator()
    assert_refused_then_usable(side, flip(answer(side.message)[0], bit))


def test_every_bit_of_both_messages() -> None:
    """The same, exhaustively, once: about 1,600 flips."""
    side = initiator()
    good = answer(side.message)[0]
    candidates = [answer(flip(side.message, bit))[0] for bit in range(8 * _MESSAGE_1_LEN)]
    candidates += [flip(good, bit) for bit in range(8 * _MESSAGE_2_LEN)]
    for bad in candidates:
        with pytest.raises(NoiseError):
            side.read(bad)
    assert side.read(good)[0] == _RESP_S.public


@pytest.mark.parametrize("key", ["e", "s"])
def test_ignored_top_bit_of_a_key_is_still_bound(key: str) -> None:
    """X25519 ignores bit 255, so all shared secrets are equal: only the transcript hash can notice."""
    bit = 8 * PARTS_1[key][1] - 1
    side = initiator()
    changed = flip(side.message, bit)
    exchange = _RESP_E.private.exchange
    start, end = PARTS_1[key]
    public = X25519PublicKey.from_public_bytes
    assert exchange(public(changed[start:end])) == exchange(public(side.message[start:end]))
    assert_refused_then_usable(side, answer(changed)[0])
    if key == "e":
        assert_refused_then_usable(side, flip(answer(side.message)[0], 255))


@pytest.mark.parametrize("extra", [b"\0", b"x" * TAGLEN])
def test_appended_bytes_are_noticed(extra: bytes) -> None:
    side = initiator()
    assert_refused_then_usable(side, answer(side.message + extra)[0])
    assert_refused_then_usable(side, answer(side.message)[0] + extra)


def test_swapped_keys_and_moved_payload_boundary_are_noticed() -> None:
    side = initiator()
    e, s, payload = side.message[:32], side.message[32:64], side.message[64:]
    assert_refused_then_usable(side, answer(s + e + payload)[0])
    moved = answer(side.message[1:], _PROLOGUE + side.message[:1])[0]
    assert_refused_then_usable(side, moved)


def test_answer_to_another_initiator_is_refused() -> None:
    side = initiator()
    for other in (
        Initiator(_INIT_S, _PROLOGUE, _PAYLOAD_1),
        Initiator(KeyPair.generate(), _PROLOGUE, _PAYLOAD_1, _INIT_E),
    ):
        assert_refused_then_usable(side, answer(other.message)[0])


def test_parts_of_two_genuine_answers_do_not_mix() -> None:
    side = initiator()
    a = answer(side.message)[0]
    b = Responder(_PROLOGUE, side.message).write(_RESP_S, _PAYLOAD_2)[0]
    c = Responder(_PROLOGUE, side.message).write(KeyPair.generate(), _PAYLOAD_2, _RESP_E)[0]
    for other in (b, c):
        for cut in (32, 80):
            if a[:cut] != other[:cut]:
                assert_refused_then_usable(side, a[:cut] + other[cut:])
                assert_refused_then_usable(side, other[:cut] + a[cut:])


# --- too short, or arbitrary --------------------------------------------------------------------------------


@pytest.mark.parametrize("length", range(MESSAGE_1_OVERHEAD))
def test_short_message_1(length: int) -> None:
    with pytest.raises(NoiseError, match="too short"):
        Responder(_PROLOGUE, initiator().message[:length])


@pytest.mark.parametrize("length", range(_MESSAGE_2_LEN))
def test_short_message_2(length: int) -> None:
    side = initiator()
    match = "too short" if length < MESSAGE_2_OVERHEAD else "authenticate"
    with pytest.raises(NoiseError, match=match):
        side.read(answer(side.message)[0][:length])


def test_shortest_messages_are_accepted() -> None:
    side = Initiator(_INIT_S, b"", b"")
    assert len(side.message) == MESSAGE_1_OVERHEAD
    message, keys = Responder(b"", side.message).write(_RESP_S, b"")
    assert len(message) == MESSAGE_2_OVERHEAD
    assert side.read(message) == (_RESP_S.public, b"", keys)


@settings(max_examples=200, deadline=None)
@given(message=st.binary(max_size=4 * MESSAGE_2_OVERHEAD))
def test_arbitrary_message_2_is_refused(message: bytes) -> None:
    assert_refused_then_usable(initiator(), message)


@settings(max_examples=200, deadline=None)
@given(prologue=_texts, message=st.binary(max_size=4 * MESSAGE_1_OVERHEAD))
def test_arbitrary_message_1_is_answered_or_refused(prologue: bytes, message: bytes) -> None:
    """Any 64 bytes are two public keys: an answer is made unless they are short or of low order."""
    try:
        wire, keys = Responder(prologue, message).write(_RESP_S, _PAYLOAD_2)
    except NoiseError:
        short = len(message) < MESSAGE_1_OVERHEAD
        assert short or message[:32] in LOW_ORDER or message[32:64] in LOW_ORDER
    else:
        assert len(wire) == _MESSAGE_2_LEN
        assert [len(k) for k in keys] == [32, 32, 32]


@settings(max_examples=100, deadline=None)
@given(message=st.binary(min_size=MESSAGE_1_OVERHEAD, max_size=2 * MESSAGE_1_OVERHEAD))
def test_reading_message_1_only_splits_it(message: bytes) -> None:
    side = Responder(_PROLOGUE, message)
    assert side.remote_ephemeral + side.remote_static + side.payload == message


# --- low-order points ---------------------------------------------------------------------------------------

each_low_order = pytest.mark.parametrize("point", LOW_ORDER, ids=bytes.hex)


@each_low_order
@pytest.mark.parametrize(
    "place",
    [
        pytest.param(lambda m, p: p + m[32:], id="e"),
        pytest.param(lambda m, p: m[:32] + p + m[64:], id="s"),
        pytest.param(lambda m, p: p + p + m[64:], id="both"),
    ],
)
def test_responder_refuses_low_order_keys(point: bytes, place: Callable[[bytes, bytes], bytes]) -> None:
    side = Responder(_PROLOGUE, place(initiator().message, point))
    with pytest.raises(NoiseError, match="unusable"):
        side.write(_RESP_S, _PAYLOAD_2)


@each_low_order
def test_initiator_refuses_low_order_ephemeral(point: bytes) -> None:
    side = initiator()
    good = answer(side.message)[0]
    with pytest.raises(NoiseError, match="unusable"):
        side.read(point + good[32:])
    assert_refused_then_usable(side, point + good[32:])


@each_low_order
def test_initiator_refuses_authenticated_low_order_static(point: bytes) -> None:
    """A responder that really encrypts a low-order s: the tag of s is right, the es result would be zero."""
    side = initiator()
    message, _ = Responder(_PROLOGUE, side.message).write(KeyPair(_RESP_S.private, point), _PAYLOAD_2)
    with pytest.raises(NoiseError, match="unusable"):
        side.read(message)
    assert_refused_then_usable(side, message)


def test_claimed_static_needs_its_private_key() -> None:
    """Naming another host's static key, without its private key, does not authenticate."""
    side = initiator()
    thief = KeyPair(KeyPair.generate().private, _RESP_S.public)
    message, _ = Responder(_PROLOGUE, side.message).write(thief, _PAYLOAD_2)
    with pytest.raises(NoiseError, match="authenticate"):
        side.read(message)
    claimed = Initiator(KeyPair(KeyPair.generate().private, _INIT_S.public), _PROLOGUE, _PAYLOAD_1, _INIT_E)
    with pytest.raises(NoiseError, match="authenticate"):
        claimed.read(answer(claimed.message)[0])


# --- state between calls ------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(bads=st.lists(st.binary(max_size=200), max_size=6), again=st.integers(1, 3))
def test_failed_reads_leave_nothing_behind(bads: list[bytes], again: int) -> None:
    side = initiator()
    good, keys = answer(side.message)
    assume(good not in bads)
    before = side.message
    for bad in bads:
        with pytest.raises(NoiseError):
            side.read(bad)
    for _ in range(again):
        assert side.read(good) == (_RESP_S.public, _PAYLOAD_2, keys)
    assert side.message == before


def test_failed_write_leaves_the_static_key_usable_for_others() -> None:
    side = Responder(_PROLOGUE, bytes(32) + initiator().message[32:])
    for _ in range(2):
        with pytest.raises(NoiseError):
            side.write(_RESP_S, _PAYLOAD_2)
    assert_refused_then_usable(initiator(), b"")


def test_errors_name_no_key_material() -> None:
    side = initiator()
    good = answer(side.message)[0]
    told = set()
    for bad in (b"", flip(good, 0), flip(good, 8 * 90), bytes(32) + good[32:]):
        with pytest.raises(NoiseError) as caught:
            side.read(bad)
        told.add(str(caught.value))
    assert told == {"message 2 is too short", "message 2 does not authenticate", "unusable public key"}
