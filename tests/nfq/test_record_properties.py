"""What must hold of records whatever the network, an attacker or a crash does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.utils import Buffer
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from nfq import recordstate
from nfq.packet import PacketError, parse
from nfq.reassembly import Pool
from nfq.record import Records
from nfq.recordstate import STATE_SIZE, Saved, StateError
from nfq.suites import AES_256_GCM, ALL, Suite
from sectool.events import DropReason
from tests.nfq.plainrecords import seal as plain_seal
from tests.nfq.segments import Wire, cut, segment, split

I2R, R2I = b"\x11" * 32, b"\x22" * 32
FIN, PSH, ACK = 1, 8, 16
MAX_AGE_US = 1_000_000


class SpyAead:
    """A cipher that remembers each key and nonce it seals with, and fails at the second use."""

    def __init__(self, real: AESGCM | ChaCha20Poly1305, key: bytes, used: set[tuple[bytes, bytes]]) -> None:
        self._real, self._key, self._used = real, key, used

    def encrypt_into(self, nonce: Buffer, data: Buffer, associated_data: Buffer | None, buf: Buffer) -> int:
        pair = self._key, bytes(nonce)
        assert pair not in self._used, "a nonce was used twice under one key"
        self._used.add(pair)
        return self._real.encrypt_into(nonce, data, associated_data, buf)

    def decrypt_into(self, nonce: Buffer, data: Buffer, associated_data: Buffer | None, buf: Buffer) -> int:
        return self._real.decrypt_into(nonce, data, associated_data, buf)


def spied(suite: Suite, used: set[tuple[bytes, bytes]]) -> Suite:
    """The suite with every cipher spied on."""
    real = AESGCM if suite is AES_256_GCM else ChaCha20Poly1305
    return Suite(suite.cipher, suite.name, lambda key: SpyAead(real(key), key, used))


@contextmanager
def restoring(suite: Suite) -> Iterator[None]:
    """Restored flows use this suite."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recordstate, "by_number", lambda number: suite if number == suite.cipher else None)
        yield


def opened(records: Records, data: bytes, now_us: int = 0) -> Wire | DropReason:
    """What comes of a packet; one that cannot be parsed is PACKET_MALFORMED. Whole packets only are believed."""
    try:
        seg = parse(data, False)
        result = records.open(seg.data, seg.tcp_off, seg.data_off, seg.v6, now_us)
    except PacketError:
        return DropReason.PACKET_MALFORMED
    if result.packet is None:
        return result.reason
    if result.packet is seg.data:  # passed as it came, for the stack to judge: it has neither payload nor FIN
        wire = Wire.unchecked(data)
        assert not wire.payload
        assert not wire.flags & FIN
        return wire
    return Wire.of(bytes(result.packet))


def same(got: Wire, plain: Wire) -> bool:
    """Whether the stream sees the same: place, bytes and end."""
    return (got.seq, got.payload, got.flags & FIN) == (plain.seq, plain.payload, plain.flags & FIN)


class Life(RuleBasedStateMachine):
    """A flow's life: both sides send, lose, reorder, duplicate, restart; somebody flips bits. Epochs are short."""

    BITS, LEAP = 6, 16

    @initialize(
        suite=st.sampled_from(ALL), v6=st.booleans(), isns=st.tuples(*[st.integers(0, 2**32 - 1)] * 2)
    )
    def start(self, suite: Suite, v6: bool, isns: tuple[int, int]) -> None:
        self.used: set[tuple[bytes, bytes]] = set()
        self.suite = spied(suite, self.used)
        self.v6, self.isns, self.now_us = v6, isns, 0
        self.pool = Pool(limit=200_000, max_age_us=MAX_AGE_US)
        self.slots = [memoryview(bytearray(STATE_SIZE)) for _ in isns]
        self.sides = [
            Records(
                self.suite, I2R, R2I, initiator=not i, isn_out=isns[i], isn_in=isns[1 - i],
                state=self.slots[i], epoch_bits=self.BITS, pool=self.pool,
            )
            for i in range(2)
        ]  # fmt: skip
        self.end = [0, 0]
        self.sent: list[dict[int, Wire]] = [{}, {}]
        self.network: list[list[tuple[int, Wire]]] = [[], []]
        self.delivered: list[set[int]] = [set(), set()]

    def put(self, side: int, offset: int, payload: bytes, flags: int, cuts: list[int]) -> None:
        plain = segment(self.isns[side] + 1 + offset, payload, flags, v6=self.v6)
        records = self.sides[side]
        sealed = records.seal(plain.data, plain.tcp_off, plain.data_off, plain.v6)
        wire = Wire.of(bytes(sealed.packet))
        assert sealed.again == (offset < self.end[side] and len(payload) > 1)
        assert records.sent not in self.sent[side]
        self.sent[side][records.sent] = plain
        self.end[side] = max(self.end[side], offset + len(payload) + (flags & FIN))
        self.network[side] += [(records.sent, piece) for piece in cut(wire, cuts)]

    SIDE = st.integers(0, 1)
    SIZE = st.one_of(st.integers(1, 40), st.integers(1000, 4000))
    CUTS = st.lists(st.integers(1, 4000), max_size=4)

    @rule(side=SIDE, size=SIZE, fin=st.booleans(), cuts=CUTS)
    def send(self, side: int, size: int, fin: bool, cuts: list[int]) -> None:
        payload = bytes((self.end[side] + i) * 31 & 255 for i in range(size))
        self.put(side, self.end[side], payload, PSH | ACK | fin, cuts)

    @rule(side=SIDE, back=st.integers(-1, 5000), size=SIZE, cuts=CUTS)
    def send_again(self, side: int, back: int, size: int, cuts: list[int]) -> None:
        self.put(side, max(self.end[side] - back, 0), bytes(size), ACK, cuts)

    @rule(side=SIDE, payload=st.sampled_from([b"", b"\0"]))
    def probe(self, side: int, payload: bytes) -> None:
        self.put(side, self.end[side] - 1, payload, ACK, [])

    @rule(side=SIDE, ahead=st.integers(0, 2**30))
    def leave_a_gap(self, side: int, ahead: int) -> None:
        """As if much had been sent and arrived: the stream is elsewhere. (The far side learns by the next record.)"""
        if self.sides[side].sent and self.in_reach(side):
            self.end[side] += ahead
            self.put(side, self.end[side], b"a gap before this", ACK, [])
            counter, wire = self.network[side].pop()
            self.arrive(side, counter, wire)

    def in_reach(self, side: int) -> bool:
        """Whether the far side can open the next record: losses have not put it two epochs ahead."""
        return (self.sides[side].sent + 1) >> self.BITS <= (self.sides[1 - side].accepted >> self.BITS) + 1

    def arrive(self, side: int, counter: int, wire: Wire) -> None:
        got = opened(self.sides[1 - side], wire.data, self.now_us)
        assert got is not DropReason.PACKET_MALFORMED
        if isinstance(got, Wire):
            self.check(side, counter, got)

    def check(self, side: int, counter: int, got: Wire) -> None:
        assert same(got, self.sent[side][counter])
        assert counter not in self.delivered[side], "a record was delivered twice"
        self.delivered[side].add(counter)

    @rule(side=SIDE, at=st.integers(0, 10_000), keep=st.booleans())
    def deliver(self, side: int, at: int, keep: bool) -> None:
        if self.network[side]:
            at %= len(self.network[side])
            self.arrive(side, *(self.network[side][at] if keep else self.network[side].pop(at)))

    @rule(side=SIDE)
    def deliver_all_in_order(self, side: int) -> None:
        while self.network[side]:
            self.arrive(side, *self.network[side].pop(0))

    @precondition(lambda self: any(self.network))
    @rule(side=SIDE, at=st.integers(0, 10_000), bit=st.integers(0, 100_000))
    def flip(self, side: int, at: int, bit: int) -> None:
        if not self.network[side]:
            return
        counter, wire = self.network[side][at % len(self.network[side])]
        first = wire.tcp_off * 8
        bit = first + bit % (len(wire.data) * 8 - first)
        data = bytearray(wire.data)
        data[bit // 8] ^= 0x80 >> bit % 8
        got = opened(self.sides[1 - side], bytes(data), self.now_us)
        if isinstance(got, Wire) and (got.payload or got.flags & FIN):
            self.check(side, counter, got)  # what was flipped says nothing about the stream

    @rule(side=SIDE)
    def restart(self, side: int) -> None:
        slot = memoryview(bytearray(self.slots[side]))
        self.slots[side] = slot
        with restoring(self.suite):
            self.sides[side] = Records.restore(slot, leap=self.LEAP, pool=self.pool)

    @rule(us=st.integers(0, 2 * MAX_AGE_US))
    def time_passes(self, us: int) -> None:
        self.now_us += us
        self.pool.expire(self.now_us)

    @invariant()
    def buffers_are_bounded_and_counted(self) -> None:
        if hasattr(self, "pool"):
            assert 0 <= self.pool.bytes <= self.pool.limit
            assert self.pool.bytes == sum(part.length for part in self.pool._parts)
            assert all(self.now_us - part.born_us <= 3 * MAX_AGE_US for part in self.pool._parts)

    def teardown(self) -> None:
        if not hasattr(self, "sides"):
            return
        for side in range(2):
            if self.in_reach(side):
                self.put(side, self.end[side], b"the flow is not stuck", ACK, [])
                counter = self.sides[side].sent
                self.arrive(side, *self.network[side].pop())
                assert counter in self.delivered[side]


TestLife = Life.TestCase
TestLife.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def pair(suite: Suite = AES_256_GCM, **more: Any) -> tuple[Records, Records]:
    """A flow's two sides: sequence numbers begin at 1 and wrap soon in the other direction."""
    a = Records(suite, I2R, R2I, initiator=True, isn_out=0, isn_in=2**32 - 9, **more)
    b = Records(suite, I2R, R2I, initiator=False, isn_out=2**32 - 9, isn_in=0, **more)
    return a, b


def sealed(records: Records, plain: Wire) -> Wire:
    """A packet sealed."""
    return Wire.of(bytes(records.seal(plain.data, plain.tcp_off, plain.data_off, plain.v6).packet))


@pytest.mark.parametrize("suite", ALL, ids=lambda s: s.name)
@pytest.mark.parametrize(
    ("v6", "flags", "payload"), [(False, ACK, b"payload"), (True, ACK | FIN, b"end"), (False, ACK | FIN, b"")]
)
def test_no_flipped_bit_is_delivered(suite: Suite, v6: bool, flags: int, payload: bytes) -> None:
    a, b = pair(suite)
    wire = sealed(a, segment(1, payload, flags, v6=v6))
    off = wire.tcp_off
    # sequence number, FIN, option, payload; lengths and the rest of the header are not the record's to protect
    bits = [*range(8 * (off + 4), 8 * (off + 8)), 8 * (off + 13) + 7]
    bits += range(8 * (wire.data_off - 28), 8 * len(wire.data))
    for bit in bits:
        data = bytearray(wire.data)
        data[bit // 8] ^= 0x80 >> bit % 8
        got = opened(b, bytes(data))
        assert got in (DropReason.RECORD_INVALID, DropReason.RECORD_REPLAYED, DropReason.RECORD_MISSING,
                       DropReason.PACKET_MALFORMED, DropReason.NONE), bit  # fmt: skip
        assert b.accepted == 0
    assert isinstance(opened(b, wire.data), Wire)


@given(
    st.integers(0, 2**31),
    st.binary(max_size=60),
    st.sampled_from(["seq", "payload", "longer", "shorter", "fin"]),
    st.data(),
)
def test_a_changed_piece_never_changes_what_is_delivered(
    place: int, extra: bytes, what: str, data: st.DataObject
) -> None:
    a, b = pair()
    plain = segment(1, bytes(range(200)), ACK)
    whole = sealed(a, plain)
    pieces = split(whole, 50)
    victim = data.draw(st.integers(0, 3))
    piece = pieces[victim]
    bad = {
        "seq": piece.changed(seq=piece.seq + 1 + place),
        "payload": piece.changed(payload=bytes(b ^ 1 << place % 8 for b in piece.payload)),
        "longer": piece.changed(payload=piece.payload + b"x" + extra),
        "shorter": piece.changed(payload=piece.payload[:-1]),
        "fin": piece.changed(flags=piece.flags | FIN),
    }[what]
    order = data.draw(st.permutations([p for i, p in enumerate(pieces) if i != victim] + [bad]))
    for one in order:
        got = opened(b, one.data)
        # A piece that is too long is put right when the true next one comes after it.
        assert not isinstance(got, Wire) or (same(got, plain) and what == "longer")


@st.composite
def parted(draw: st.DrawFn) -> tuple[list[Wire], list[tuple[int, int, int]]]:
    """Plain packets, and which ranges of which of them arrive in which order (number, begin, end)."""
    plains, offset, arrivals = [], 1, []
    for number in range(draw(st.integers(1, 4))):
        size = draw(st.one_of(st.integers(1, 30), st.integers(1, 9000)))
        flags = draw(st.sampled_from([ACK, PSH | ACK, FIN | PSH | ACK, 0x80 | ACK]))
        plains.append(
            segment(offset, bytes(i * 7 + number & 255 for i in range(size)), flags, v6=draw(st.booleans()))
        )
        offset += size + (flags & FIN)
        cuts = [0, *sorted(draw(st.sets(st.integers(1, size), max_size=6)) - {size}), size]
        pieces = list(pairwise(cuts))
        if draw(st.integers(0, 4)) == 0:
            pieces.pop(draw(st.integers(0, len(pieces) - 1)))
        for _ in range(draw(st.integers(0, 3))):  # seen twice, and merged differently the second time
            begin = draw(st.integers(0, size - 1))
            pieces.append((begin, draw(st.integers(begin + 1, size))))
        arrivals += [(number, *piece) for piece in pieces]
    return plains, draw(st.permutations(arrivals))


@given(parted(), st.sampled_from(ALL))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_pieces_in_any_shape_and_order_give_each_complete_record_once(
    case: tuple[list[Wire], list[tuple[int, int, int]]], suite: Suite
) -> None:
    plains, arrivals = case
    a, b = pair(suite, pool=Pool())
    wires = [sealed(a, p) for p in plains]
    here = [bytearray(len(p.payload)) for p in plains]
    done: set[int] = set()
    for number, begin, end in arrivals:
        wire = wires[number]
        flags = wire.flags & ~(PSH | FIN) if end < len(wire.payload) else wire.flags
        flags = flags & ~0x80 if begin else flags
        piece = wire.changed(seq=wire.seq + begin, payload=wire.payload[begin:end], flags=flags)
        got = opened(b, piece.data)
        here[number][begin:end] = b"\1" * (end - begin)
        if number in done:
            assert got is DropReason.RECORD_REPLAYED
        elif all(here[number]):
            assert got == plains[number]
            done.add(number)
        else:
            assert got is DropReason.NONE


@given(st.lists(st.sampled_from([0, 1, 2, 3]), min_size=2, max_size=8), st.booleans())
def test_congestion_marks_of_pieces_are_kept(marks: list[int], v6: bool) -> None:
    a, b = pair()
    plain = segment(1, bytes(100 * len(marks)), ACK, v6=v6)
    got: Wire | DropReason = DropReason.NONE
    for piece, mark in zip(split(sealed(a, plain), 100), marks, strict=True):
        got = opened(b, piece.changed(tos=mark).data)
    assert isinstance(got, Wire)
    assert got.tos == (3 if 3 in marks else marks[-1])
    assert got.payload == plain.payload


def test_keys_change_at_each_epoch_and_what_was_overtaken_still_opens() -> None:
    bits = 4
    a, b = pair(epoch_bits=bits)
    plains = [segment(1 + i * 5, b"bytes", ACK) for i in range(200)]
    wires = []
    for i, plain in enumerate(plains):
        wires.append(sealed(a, plain))
        assert wires[-1].data == plain_seal(plain, I2R, 1, i + 1, i * 5, bits).data
    for i in range(0, 200, 10):  # each ten backwards: across the borders of epochs too
        for j in reversed(range(i, i + 10)):
            assert opened(b, wires[j].data) == plains[j]
    c = pair(epoch_bits=bits)[1]
    assert opened(c, wires[40].data) is DropReason.RECORD_INVALID  # two epochs ahead
    assert opened(c, wires[20].data) == plains[20]
    assert opened(c, wires[40].data) == plains[40]
    assert opened(c, wires[16].data) == plains[16]  # the epoch before
    assert opened(c, wires[3].data) is DropReason.RECORD_INVALID  # its key is forgotten


class Traced:
    """A slot that remembers what it held after every single store."""

    def __init__(self, words: memoryview) -> None:
        self.words = words
        self.history = [bytes(words)]

    def __getitem__(self, at: int | slice) -> Any:
        return self.words[at]

    def __setitem__(self, at: int | slice, value: Any) -> None:
        places = range(*at.indices(len(self.words))) if isinstance(at, slice) else [at]
        for place, word in zip(places, value if isinstance(at, slice) else [value], strict=True):
            self.words[place] = word
            self.history.append(bytes(self.words))


def restored(state: bytes, leap: int) -> Records:
    """A worker that finds this in its slot."""
    return Records.restore(memoryview(bytearray(state)), leap=leap)


@pytest.mark.parametrize("leap", [0, 3])
def test_a_crash_between_any_two_stores_reuses_no_counter_and_opens_nothing_twice(leap: int) -> None:
    bits = 3
    slots = [memoryview(bytearray(STATE_SIZE)) for _ in range(2)]
    a, b = pair(epoch_bits=bits)
    a.attach(slots[0])
    b.attach(slots[1])
    traces: list[Any] = [Traced(s.cast("Q")) for s in slots]
    a._state, b._state = traces
    wires: list[Wire] = []
    for i in range(40):
        plain = segment(1 + 4 * i, b"word", ACK)
        following = segment(5 + 4 * i, b"next", ACK)
        traces[0].history, traces[1].history = [bytes(traces[0].words)], [bytes(traces[1].words)]
        wires.append(sealed(a, plain))
        assert len(traces[0].history) > 1
        for n, state in enumerate(traces[0].history):
            again = restored(state, leap)
            data = sealed(again, following).data
            assert again.sent > i or (again.sent == i + 1 and n == 0)
            if again.sent == i + 1:
                assert (
                    struct_sent(state) <= i
                )  # the counter had not been taken, so nothing was sealed with it
            assert data == plain_seal(following, I2R, 1, again.sent, 4 * i + 4, bits).data
        assert opened(b, wires[-1].data) == plain
        later = sealed(restored(bytes(traces[0].words), 0), following)
        for n, state in enumerate(traces[1].history):
            again = restored(state, leap)
            for wire in wires[:-1]:
                assert not isinstance(opened(again, wire.data), Wire)
            if n == len(traces[1].history) - 1:
                assert opened(again, wires[-1].data) is DropReason.RECORD_REPLAYED
            assert opened(restored(state, leap), later.data) == following


def struct_sent(state: bytes) -> int:
    """The counter a slot says was used last."""
    return int(memoryview(state).cast("Q")[recordstate.SENT])


def test_a_slot_half_written_holds_nothing() -> None:
    slot = memoryview(bytearray(STATE_SIZE))
    a, _ = pair()
    sealed(a, segment(1, b"x", ACK))
    a.attach(slot)
    old = bytes(slot)
    trace: Any = Traced(slot.cast("Q"))
    recordstate.write(trace, Saved(ALL[1], 22, 5, 6, 7, 8, b"s" * 32, 9, 10, b"r" * 32))
    assert trace.history[0] == old
    for state in trace.history[1:-1]:
        with pytest.raises(StateError):
            recordstate.read(memoryview(state).cast("Q"))
    saved = recordstate.read(slot.cast("Q"))
    assert saved == Saved(ALL[1], 22, 5, 6, 7, 8, b"s" * 32, 9, 10, b"r" * 32, True)


@given(st.binary(min_size=STATE_SIZE, max_size=STATE_SIZE), st.booleans())
def test_any_slot_is_restored_or_refused(state: bytes, plausible: bool) -> None:
    if plausible:
        head = (0x5EC7_0001 << 32 | 22 << 8 | 1 + state[0] % 2).to_bytes(8, "little")
        state = head + bytes(24) + state[32:]
    words = memoryview(state).cast("Q")
    assume(words[recordstate.SENT] < 1 << 40)
    try:
        records = restored(state, 1)
    except StateError:
        assert not plausible
        return
    sealed(records, segment(1, b"x", ACK))


@given(st.binary(max_size=120), st.booleans(), st.integers(0, 60))
def test_any_bytes_are_dropped_and_change_nothing(noise: bytes, v6: bool, options: int) -> None:
    _, b = pair(pool=Pool())
    header = noise[: options & ~3].ljust(options & ~3, b"\1")[:40]
    try:
        wire = segment(1, noise, ACK, v6=v6, options=header)
        got = opened(b, wire.data)
    except PacketError:
        return
    assert not isinstance(got, Wire) or not got.payload
    assert b.accepted == 0
