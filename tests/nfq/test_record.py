"""The record layer, case by case: what leaves, what arrives, what must not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nfq.frame import MAX_PACKET
from nfq.packet import PacketError
from nfq.reassembly import Pool
from nfq.record import LEAP, STATE_SIZE, Opened, OversizedError, Records
from nfq.suites import AES_256_GCM, ALL, Suite
from sectool.events import DropReason
from tests.nfq.plainrecords import record_key
from tests.nfq.plainrecords import seal as plain_seal
from tests.nfq.segments import TIMESTAMPS, Wire, segment, split

I2R, R2I = bytes(range(32)), bytes(range(100, 132))
ISN_A, ISN_B = 1000, 2**32 - 500
FIN, SYN, RST, PSH, ACK, URG, CWR = 1, 2, 4, 8, 16, 32, 128
SACK = b"\1\1\x05\x0a" + bytes(8)
NONE, INVALID = DropReason.NONE, DropReason.RECORD_INVALID
REPLAYED, MISSING = DropReason.RECORD_REPLAYED, DropReason.RECORD_MISSING


class End:
    """One side of a flow, speaking in Wires."""

    def __init__(self, records: Records) -> None:
        self.records = records

    def out(self, wire: Wire, *, gso: bool = False) -> Wire:
        packet = bytes(self.records.seal(wire.data, wire.tcp_off, wire.data_off, wire.v6, gso=gso).packet)
        return Wire.unchecked(packet) if gso else Wire.of(packet)

    def again(self, wire: Wire) -> bool:
        return self.records.seal(wire.data, wire.tcp_off, wire.data_off, wire.v6).again

    def opened(self, wire: Wire, now_us: int = 0) -> Opened:
        return self.records.open(wire.data, wire.tcp_off, wire.data_off, wire.v6, now_us)

    def into(self, wire: Wire, now_us: int = 0) -> Wire | DropReason:
        opened = self.opened(wire, now_us)
        return opened.reason if opened.packet is None else Wire.of(bytes(opened.packet))


class Flow:
    """A fresh flow: `a` connected to `b`."""

    def __init__(
        self, suite: Suite = AES_256_GCM, *, v6: bool = False, epoch_bits: int = 22, pool: Pool | None = None
    ) -> None:
        self.v6 = v6
        self.pool = pool or Pool()
        self.state_a, self.state_b = (memoryview(bytearray(STATE_SIZE)) for _ in range(2))
        self.a = End(
            Records(
                suite, I2R, R2I, initiator=True, isn_out=ISN_A, isn_in=ISN_B,
                state=self.state_a, epoch_bits=epoch_bits, pool=self.pool,
            )
        )  # fmt: skip
        self.b = End(
            Records(
                suite, I2R, R2I, initiator=False, isn_out=ISN_B, isn_in=ISN_A,
                state=self.state_b, epoch_bits=epoch_bits, pool=self.pool,
            )
        )  # fmt: skip

    def data(self, offset: int, payload: bytes, flags: int = PSH | ACK, **fields: Any) -> Wire:
        """A segment of a's stream."""
        return segment(ISN_A + 1 + offset, payload, flags, v6=self.v6, **fields)

    def reply(self, offset: int, payload: bytes, flags: int = PSH | ACK) -> Wire:
        """A segment of b's stream."""
        return segment(ISN_B + 1 + offset, payload, flags, v6=self.v6)


@pytest.fixture(
    params=[(s, v6) for s in ALL for v6 in (False, True)],
    ids=lambda p: f"{p[0].name}-{'v6' if p[1] else 'v4'}",
)
def flow(request: pytest.FixtureRequest) -> Flow:
    suite, v6 = request.param
    return Flow(suite, v6=v6)


def vectors() -> Iterator[Any]:
    path = Path(__file__).parent / "vectors" / "records.json"
    for case in json.loads(path.read_text(encoding="utf-8")):
        yield pytest.param(case, id=case["name"])


@pytest.mark.parametrize("case", list(vectors()))
def test_vectors(case: dict[str, Any]) -> None:
    plain = Wire.of(bytes.fromhex(case["plain"]))
    key, sealed = bytes.fromhex(case["key"]), bytes.fromhex(case["record"])
    number, counter, offset = case["suite"], case["counter"], case["offset"]
    assert plain_seal(plain, key, number, counter, offset).data == sealed
    assert record_key(key, number, counter >> 22).hex() == case["record_key"]
    suite = next(s for s in ALL if s.cipher == number)
    isn = (plain.seq - offset - 1) % 2**32
    sender = Records(suite, key, bytes(32), initiator=True, isn_out=isn, isn_in=0)
    receiver = Records(suite, key, bytes(32), initiator=False, isn_out=0, isn_in=isn)
    if counter > 1:
        sender._leap(counter - 1)
    sender._send_high = receiver._recv_high = offset
    for _ in range(counter >> 22):
        receiver._recv = receiver._recv.following()
    receiver._window.highest = counter - 1
    assert bytes(sender.seal(plain.data, plain.tcp_off, plain.data_off, plain.v6).packet) == sealed
    wire = Wire.of(sealed)
    assert (
        bytes(receiver.open(wire.data, wire.tcp_off, wire.data_off, wire.v6, 0).packet or b"") == plain.data
    )


@pytest.mark.parametrize("size", [1, 15, 16, 17, 1448, 9000, 64_000])
def test_a_record_arrives_as_it_left(flow: Flow, size: int) -> None:
    plain = flow.data(0, bytes(i * 7 & 255 for i in range(size)), tos=0x02)
    wire = flow.a.out(plain)
    assert wire.payload != plain.payload
    assert (wire.seq, wire.ack, wire.flags, wire.tos) == (plain.seq, plain.ack, plain.flags, plain.tos)
    assert len(wire.payload) == size
    assert wire.options[:12] == TIMESTAMPS
    assert flow.b.into(wire) == plain


def test_both_ways_at_once_and_in_any_order(flow: Flow) -> None:
    there = [flow.data(i * 10, bytes([i]) * 10) for i in range(8)]
    back = [flow.reply(i * 10, bytes([100 + i]) * 10) for i in range(8)]
    sealed = [(flow.a.out(p), flow.b.out(q)) for p, q in zip(there, back, strict=True)]
    for i in (3, 0, 7, 5, 6, 1, 2, 4):
        assert flow.b.into(sealed[i][0]) == there[i]
        assert flow.a.into(sealed[i][1]) == back[i]


def test_the_same_bytes_again_are_another_record(flow: Flow) -> None:
    plain = flow.data(0, b"the same bytes")
    first, second = flow.a.out(plain), flow.a.out(plain)
    assert first.payload != second.payload
    assert first.options != second.options
    assert flow.b.into(first) == plain
    assert flow.b.into(second) == plain  # overlapping what was delivered: the stack's to judge
    assert flow.b.into(first) is REPLAYED
    assert flow.b.into(second) is REPLAYED


def test_only_the_direction_it_was_made_for_opens_it(flow: Flow) -> None:
    wire = flow.a.out(flow.data(0, b"there"))
    assert flow.a.into(wire) is INVALID
    mirrored = wire.changed(seq=ISN_B + 1)
    assert flow.a.into(mirrored) is INVALID


def test_a_retransmission_is_told_and_probes_are_not() -> None:
    flow = Flow()
    assert not flow.a.again(flow.data(0, bytes(100)))
    assert not flow.a.again(flow.data(100, bytes(100)))
    assert flow.a.again(flow.data(100, bytes(100)))
    assert flow.a.again(flow.data(0, bytes(300)))
    assert not flow.a.again(flow.data(300, bytes(10)))
    assert not flow.a.again(flow.data(309, b"x"))  # keep-alive with a garbage byte
    assert not flow.a.again(flow.data(309, b""))
    assert not flow.a.again(flow.data(310, b"", FIN | ACK))
    assert not flow.a.again(flow.data(310, b"", FIN | ACK))
    assert flow.a.again(flow.data(305, bytes(5), FIN | ACK))


@pytest.mark.parametrize("payload", [b"", b"\0"])
def test_keep_alive_probes_below_everything_sent(flow: Flow, payload: bytes) -> None:
    for offset in (-1, 499):
        probe = flow.data(offset, payload, ACK)
        assert flow.b.into(flow.a.out(probe)) == probe
        assert flow.b.into(flow.a.out(flow.data(0, bytes(500)))) == flow.data(0, bytes(500))


def test_zero_window_probe_then_the_rest(flow: Flow) -> None:
    for offset, payload in ((0, b"a"), (0, b"a"), (0, b"abcdef"), (1, b"bcdef")):
        plain = flow.data(offset, payload)
        assert flow.b.into(flow.a.out(plain)) == plain


def test_fin_alone_is_a_record_of_length_0(flow: Flow) -> None:
    plain = flow.data(0, b"", FIN | ACK)
    wire = flow.a.out(plain)
    assert wire.payload == b""
    assert wire.options[-18:-16] == b"\0\0"
    assert flow.b.into(wire) == plain


def test_half_closed_flows_go_on_the_other_way(flow: Flow) -> None:
    flow.b.into(flow.a.out(flow.data(0, b"request", FIN | PSH | ACK)))
    for i in range(20):
        plain = flow.reply(i * 1000, bytes(1000))
        assert flow.a.into(flow.b.out(plain)) == plain
    last = flow.reply(20_000, b"", FIN | ACK)
    assert flow.a.into(flow.b.out(last)) == last


def test_a_forged_or_removed_fin_is_noticed(flow: Flow) -> None:
    for flags in (ACK, FIN | ACK):
        for payload in (b"some data", b""):
            wire = flow.a.out(flow.data(0, payload, flags))
            assert flow.b.into(wire.changed(flags=flags ^ FIN)) is INVALID
            assert flow.b.into(wire.changed(flags=flags | PSH)) == flow.data(0, payload, flags | PSH)


def test_urgent_data_survives(flow: Flow) -> None:
    plain = flow.data(0, b"look here" * 400, URG | PSH | ACK, urgent=4)
    wire = flow.a.out(plain)
    assert wire.urgent == 4
    assert flow.b.into(wire) == plain
    again = flow.data(3600, b"look here" * 400, URG | PSH | ACK, urgent=4)
    for piece in reversed(split(flow.a.out(again), 700)):
        got = flow.b.into(piece)
    assert isinstance(got, Wire)
    assert (got.payload, got.urgent, got.flags & URG) == (again.payload, 4, URG)


def test_an_urgent_pointer_is_authenticated(flow: Flow) -> None:
    """A stack takes the byte it points at out of the stream."""
    wire = flow.a.out(flow.data(0, b"pay 1000 to"))
    urgent = flow.data(11, b" the urgent", URG | ACK, urgent=3)
    assert flow.b.into(wire.changed(flags=wire.flags | URG)) is INVALID
    assert flow.b.into(wire) == flow.data(0, b"pay 1000 to")
    wire = flow.a.out(urgent)
    assert flow.b.into(wire.changed(flags=wire.flags & ~URG)) is INVALID
    moved = bytearray(wire.data)
    moved[wire.tcp_off + 19] ^= 7
    assert flow.b.opened(Wire.unchecked(bytes(moved))).reason is INVALID
    assert flow.b.into(wire) == urgent


def test_an_urgent_pointer_put_on_a_piece_spoils_nothing_but_the_record(flow: Flow) -> None:
    plain = flow.data(0, bytes(range(200)))
    first, *others = split(flow.a.out(plain), 50)
    got: Wire | DropReason = NONE
    for piece in (*(p.changed(flags=p.flags | URG) for p in others), first):
        got = flow.b.into(piece)
    assert got == plain
    first, *others = split(flow.a.out(plain), 50)
    for piece in (*others, first.changed(flags=first.flags | URG)):
        got = flow.b.into(piece)
    assert got is INVALID


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (b"", b""),
        (TIMESTAMPS, TIMESTAMPS),
        (TIMESTAMPS + SACK, TIMESTAMPS),
        (SACK, SACK),
        (TIMESTAMPS[2:] + b"\0\0", TIMESTAMPS),
        (SACK + TIMESTAMPS, TIMESTAMPS),
    ],
)
def test_options_of_data_segments(flow: Flow, options: bytes, kept: bytes) -> None:
    plain = flow.data(0, b"payload", options=options)
    wire = flow.a.out(plain)
    assert wire.options[:-28] == kept
    assert flow.b.into(wire) == flow.data(0, b"payload", options=kept)


def test_the_record_option_may_stand_anywhere(flow: Flow) -> None:
    wire = flow.a.out(flow.data(0, b"payload"))
    record = wire.options[12:]
    assert flow.b.into(wire.changed(options=record + TIMESTAMPS)) == flow.data(0, b"payload")
    wire = flow.a.out(flow.data(7, b"payload", options=b""))
    moved = flow.b.into(wire.changed(options=wire.options + b"\0" * 4))
    assert moved == flow.data(7, b"payload", options=b"")


@pytest.mark.parametrize("extension", [b"\x94\x04\0\0", b"\x06\0\x01\x04\0\0\0\0"])
def test_ip_options_and_extension_headers_stay(extension: bytes) -> None:
    flow = Flow(v6=len(extension) == 8)
    plain = flow.data(0, b"payload" * 300, extension=extension)
    assert flow.b.into(flow.a.out(plain)) == plain
    for piece in split(flow.a.out(flow.data(2100, b"payload" * 300)), 500):
        assert flow.b.into(piece) is NONE or piece.seq == ISN_A + 1 + 4100


def test_what_is_no_segment_of_a_flow_is_refused(flow: Flow) -> None:
    for flags in (SYN, SYN | ACK, RST, RST | ACK):
        with pytest.raises(PacketError):
            flow.a.out(flow.data(0, b"", flags))
        with pytest.raises(PacketError):
            flow.b.into(flow.a.out(flow.data(0, b"x")).changed(flags=flags))
    with pytest.raises(PacketError):
        flow.a.out(flow.data(0, b"x", options=b"\x1e\x04\0\0"))
    wire = flow.a.out(flow.data(0, b"x", options=b""))
    with pytest.raises(PacketError):
        flow.b.into(wire.changed(options=b"\x1e\x04\0\0" + wire.options))
    with pytest.raises(PacketError):
        flow.b.into(flow.data(0, b"x", options=b"\x1e\x04\0\0"))
    assert flow.b.records.accepted == 0


def test_payload_or_fin_without_a_record_is_dropped(flow: Flow) -> None:
    assert flow.b.into(flow.data(0, b"injected")) is MISSING
    assert flow.b.into(flow.data(0, b"", FIN | ACK)) is MISSING
    wire = flow.a.out(flow.data(0, b"sealed"))
    assert flow.b.into(wire.changed(options=TIMESTAMPS)) is MISSING
    assert flow.b.into(wire.changed(options=b"")) is MISSING
    for bare in (flow.data(0, b"", ACK), flow.data(0, b"", RST), flow.data(0, b"", ACK, options=SACK)):
        assert flow.b.into(bare) == bare


def test_the_handshake_s_proof_is_taken_off_a_bare_ack_and_is_no_record(flow: Flow) -> None:
    proof = b"\xfd\x1c\x5e\xc7" + bytes(4) + b"\0\1\0\0" + bytes(16)
    ack = flow.data(0, b"", ACK, options=TIMESTAMPS + proof)
    assert flow.b.into(ack) == flow.data(0, b"", ACK)
    assert flow.b.into(flow.data(0, b"x", ACK, options=TIMESTAMPS + proof)) is INVALID
    assert flow.b.into(flow.data(0, b"", FIN | ACK, options=TIMESTAMPS + proof)) is INVALID


def test_a_packet_too_large_for_a_verdict_is_refused_and_costs_no_counter(flow: Flow) -> None:
    room = MAX_PACKET - 28 - flow.data(0, b"").data_off
    fits, over = bytes(room), bytes(room + 1)
    with pytest.raises(OversizedError):
        flow.a.out(flow.data(0, over))
    assert flow.a.records.sent == 0
    assert flow.b.into(flow.a.out(flow.data(0, fits))) == flow.data(0, fits)
    with pytest.raises(OversizedError):
        flow.b.into(flow.data(0, bytes(MAX_PACKET)[: MAX_PACKET + 1 - flow.data(0, b"").data_off]))


def test_a_gso_packet_differs_in_nothing_but_its_checksum() -> None:
    one, two = Flow(), Flow()
    plain = one.data(0, bytes(30_000))
    full, gso = one.a.out(plain), two.a.out(plain, gso=True)
    off = full.tcp_off + 16
    assert gso.data[:off] + gso.data[off + 2 :] == full.data[:off] + full.data[off + 2 :]


def test_memoryviews_and_a_roomy_buffer_do_as_bytes_do(flow: Flow) -> None:
    plain = flow.data(0, b"from a view" * 500)
    buffer = memoryview(bytearray(70_000))
    buffer[: len(plain.data)] = plain.data
    view = buffer[: len(plain.data)]
    wire = Wire.of(bytes(flow.a.records.seal(view, plain.tcp_off, plain.data_off, plain.v6).packet))
    room = memoryview(bytearray(b"\xee" * 70_000))[8:]
    size = len(wire.data)
    room[:size] = wire.data
    opened = flow.b.records.open(room[:size], wire.tcp_off, wire.data_off, wire.v6, 0, room)
    assert opened.packet is not None
    assert bytes(opened.packet) == plain.data
    assert bytes(room[size + 16 :]) == b"\xee" * (len(room) - size - 16)
    tight = flow.a.out(flow.data(5500, b"more"))
    exact = memoryview(bytearray(tight.data + bytes(16)))
    got = flow.b.records.open(exact[:-16], tight.tcp_off, tight.data_off, tight.v6, 0, exact)
    assert bytes(got.packet or b"") == flow.data(5500, b"more").data


def test_a_replayed_flow_on_the_same_ports_is_a_stranger() -> None:
    old, new = Flow(), Flow()
    new.b = End(Records(AES_256_GCM, R2I, I2R, initiator=False, isn_out=ISN_B, isn_in=ISN_A))
    for offset in (0, 100):
        assert new.b.into(old.a.out(old.data(offset, bytes(100)))) is INVALID
    assert new.b.records.accepted == 0


def test_far_streams_are_bound_to_all_64_bits_of_their_offset() -> None:
    flow = Flow()
    step = 2**31 - 1000
    for i in range(9):
        plain = flow.data(i * step, b"x" * 1000)
        wire = flow.a.out(plain)
        counter = flow.a.records.sent
        assert wire.data == plain_seal(plain, I2R, 1, counter, i * step).data
        assert flow.b.into(wire) == plain
    low = flow.data(0, b"x" * 1000)
    forged = plain_seal(low, I2R, 1, 100, 0)
    assert flow.b.into(forged) is INVALID  # right for the first 4 GiB, not for where the stream is now


def test_the_wire_never_shows_a_counter_of_0() -> None:
    flow = Flow(epoch_bits=32)
    flow.a.records._leap(2**32 - 3)
    flow.b.records._window.highest = 2**32 - 3
    for i in range(6):
        plain = flow.data(i * 5, b"12345")
        wire = flow.a.out(plain)
        assert wire.options[16:20] != bytes(4)
        assert flow.b.into(wire) == plain
    assert flow.a.records.sent == 2**32 + 4  # 2^32 itself is left out


def test_closing_leaves_nothing_in_the_slot_or_the_pool() -> None:
    flow = Flow()
    flow.b.into(split(flow.a.out(flow.data(0, bytes(3000))), 1000)[0])
    assert flow.pool.bytes == 3000
    assert any(flow.state_b)
    flow.b.records.close()
    assert flow.pool.bytes == len(flow.pool) == flow.pool.given_up == 0
    assert not any(flow.state_b)


def test_a_restart_leaps_once_and_takes_nothing_twice(flow: Flow) -> None:
    first = flow.a.out(flow.data(0, b"before"))
    assert flow.b.into(first) == flow.data(0, b"before")
    a, b = End(Records.restore(flow.state_a)), End(Records.restore(flow.state_b))
    assert a.records.sent == 1 + LEAP
    assert b.into(first) is REPLAYED
    after = flow.data(6, b"after")
    assert b.into(a.out(after)) == after
    reply = flow.reply(0, b"reply")
    assert a.into(b.out(reply)) == reply
    for _ in range(1000):  # restarts alone do not move the counter on
        a = End(Records.restore(flow.state_a))
    assert a.records.sent == 2 + 2 * LEAP


@pytest.mark.parametrize("damage", [b"", bytes(STATE_SIZE - 1), bytes(STATE_SIZE), b"\xff" * STATE_SIZE])
def test_a_slot_that_holds_nothing_is_refused(damage: bytes) -> None:
    with pytest.raises(ValueError, match="slot"):
        Records.restore(memoryview(bytearray(damage)))


def test_a_slot_taken_late_holds_the_flow_as_it_is() -> None:
    flow = Flow()
    for i in range(3):
        flow.b.into(flow.a.out(flow.data(i * 5, b"early")))
    slot = memoryview(bytearray(STATE_SIZE))
    flow.b.records.attach(slot)
    flow.b.records.attach(slot)  # as often as one likes
    replayed = flow.a.out(flow.data(15, b"later"))
    assert flow.b.into(replayed) == flow.data(15, b"later")
    restored = End(Records.restore(slot))
    assert restored.records.accepted == 4
    assert restored.into(replayed) is REPLAYED
    assert restored.into(flow.a.out(flow.data(20, b"last"))) == flow.data(20, b"last")


def test_a_restarted_side_knows_where_a_long_stream_is() -> None:
    flow = Flow()
    step = 2**31 - 10
    for i in range(5):
        flow.b.into(flow.a.out(flow.data(i * step, b"x")))
    a, b = End(Records.restore(flow.state_a)), End(Records.restore(flow.state_b))
    plain = flow.data(4 * step + 1, b"y")
    wire = a.out(plain)
    assert wire.data == plain_seal(plain, I2R, 1, a.records.sent, 4 * step + 1).data
    assert b.into(wire) == plain


def test_the_secret_of_an_epoch_that_is_over_is_in_no_slot() -> None:
    flow = Flow(epoch_bits=2)
    seen: list[bytes] = []
    for i in range(20):
        flow.b.into(flow.a.out(flow.data(i, b"x")))
        for slot, ratchet in ((flow.state_a, flow.a.records._send), (flow.state_b, flow.b.records._recv)):
            assert ratchet.epoch == (i + 1) >> 2
            assert bytes(slot).count(ratchet.secret) == 1
            assert not any(old in bytes(slot) for old in seen if old != ratchet.secret)
        seen.append(flow.a.records._send.secret)
    assert len(set(seen)) == 6


def test_a_record_overtaken_by_the_whole_window_is_not_completed(flow: Flow) -> None:
    late = split(flow.a.out(flow.data(0, bytes(200))), 100)
    assert flow.b.into(late[0]) is NONE
    for i in range(4096):
        plain = flow.data(200 + i, b"x")
        record = flow.a.records.seal(plain.data, plain.tcp_off, plain.data_off, plain.v6).packet
        wire = Wire.unchecked(bytes(record))
        assert flow.b.opened(wire).packet is not None
    assert flow.b.into(late[1]) is REPLAYED
    assert flow.pool.bytes == 0


def test_what_cannot_become_a_record_takes_no_room() -> None:
    flow = Flow(epoch_bits=2)
    wires = [flow.a.out(flow.data(i * 200, bytes(200))) for i in range(9)]
    assert flow.b.into(split(wires[8], 100)[0]) is INVALID  # counter 9: two epochs ahead
    assert flow.b.into(split(wires[0], 100)[0]) is NONE
    assert flow.b.into(wires[0]) == flow.data(0, bytes(200))
    assert flow.b.into(split(wires[0], 100)[0]) is REPLAYED
    piece = split(wires[1], 100)[0]
    too_long = piece.options[:-18] + b"\xff\xff" + piece.options[-16:]
    assert flow.b.into(piece.changed(options=too_long)) is INVALID
    assert flow.pool.bytes == 0
