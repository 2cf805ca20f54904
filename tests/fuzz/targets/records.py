"""Records of an encrypted TCP flow: `Records.open`, on whatever comes in place of what was sealed.

A stream is sealed; its segments then arrive in pieces, in any order, changed, repeated. Whatever is delivered is,
at its place in the stream, exactly what was sent, and no end of the stream comes before its end; buffers stay within
their bounds. Nothing raises but PacketError.
"""

from __future__ import annotations

from functools import cache

from nfq.packet import FIN, PacketError, Segment, parse
from nfq.reassembly import FLOW_BYTES, Pool
from nfq.record import Records
from nfq.suites import ALL, Suite
from sectool.events import DropReason
from tests.fuzz.script import CUT, FLIP, Script, change
from tests.nfq.segments import segment

I2R, R2I = bytes(range(32)), bytes(range(100, 132))
ISN_A, ISN_B = 0xFFFF_FF00, 5_000  # the stream passes the end of sequence numbers
STREAM = bytes((n * n + n // 251) & 0xFF for n in range(6_000))
SIZES = (1, 100, 700, 0, 1400, 800, 1, 1200, 1798)


def _records(suite: Suite, initiator: bool, pool: Pool) -> Records:
    out, into = (ISN_A, ISN_B) if initiator else (ISN_B, ISN_A)
    return Records(suite, I2R, R2I, initiator=initiator, isn_out=out, isn_in=into, epoch_bits=3, pool=pool)


@cache
def _sealed(number: int) -> tuple[bytes, ...]:
    """All of STREAM in segments as they leave, the last with FIN, some of them twice; epochs of 8 records."""
    v6, sender = bool(number & 1), _records(ALL[number >> 1 & 1], True, Pool())
    out, at = [], 0
    for size in (*SIZES, -1):
        fin = size < 0
        payload = b"" if fin else STREAM[at : at + size]
        wire = segment(ISN_A + 1 + at, payload, 0x11 if fin else 0x18, v6=v6)
        if payload or fin:
            for _ in range(1 + (size == 1400)):
                sealed = sender.seal(wire.data, wire.tcp_off, wire.data_off, v6)
                out.append(bytes(sealed.packet))
        at += len(payload)
    assert at == len(STREAM)
    return tuple(out)


def one(data: bytes) -> None:
    """Which flow in the first byte; then steps: which segment, which part of it, and how it was changed."""
    script = Script(data)
    number = script.below(4)
    pool = Pool(limit=20_000, max_age_us=1_000)
    receiver = _records(ALL[number >> 1], False, pool)
    sealed, now, pure = _sealed(number), 0, True
    for _ in range(64):
        if not script:
            break
        which, how = script.below(256), script.below(256)
        packet = sealed[which % len(sealed)]
        seg = parse(packet, False)
        if how & 1:  # a piece, as segmentation on the way would cut it
            start = script.below(len(seg.payload) + 1)
            packet = _piece(packet, seg, start, start + script.below(len(seg.payload) + 1 - start))
        if how & 2:
            packet = script.changed(packet)
        if how & 4:
            now += script.below(1 << 16)
            receiver.expire(now)
        _arrives(receiver, packet, now, pool)
        pure = pure and not how & 7
    if pure:  # what came was genuine, in whatever order: all of it can still come
        for packet in sealed:
            _arrives(receiver, packet, now, pool)
        assert receiver.accepted == len(sealed)
    receiver.close()
    assert pool.bytes == 0


def _piece(packet: bytes, seg: Segment, start: int, stop: int) -> bytes:
    """Bytes start to stop of the payload with the same options, its FIN only behind the last one."""
    body = seg.payload[start:stop]
    head = bytearray(packet[: seg.data_off])
    head[seg.tcp_off + 4 : seg.tcp_off + 8] = ((seg.seq + start) & 0xFFFFFFFF).to_bytes(4, "big")
    if stop < len(seg.payload):
        head[seg.tcp_off + 13] &= ~FIN
    length = len(head) + len(body) - (40 if seg.v6 else 0)
    at = 4 if seg.v6 else 2
    head[at : at + 2] = length.to_bytes(2, "big")
    return bytes(head) + body


def _arrives(receiver: Records, packet: bytes, now: int, pool: Pool) -> None:
    """What becomes of one packet, as the packet path would ask."""
    try:
        seg = parse(packet, False)
        opened = receiver.open(packet, seg.tcp_off, seg.data_off, seg.v6, now)
    except PacketError:
        return
    finally:
        assert pool.bytes <= pool.limit + 65_535
        assert pool.bytes <= FLOW_BYTES
    if opened.packet is None:
        assert opened.reason in (
            DropReason.NONE,
            DropReason.RECORD_INVALID,
            DropReason.RECORD_REPLAYED,
            DropReason.RECORD_MISSING,
        )
        return
    got = parse(bytes(opened.packet), False)
    if not got.payload and not got.flags & FIN:
        return
    place = (got.seq - ISN_A - 1) & 0xFFFFFFFF
    assert got.payload == STREAM[place : place + len(got.payload)], "other bytes than were sent"
    assert place + len(got.payload) <= len(STREAM)
    if got.flags & FIN:
        assert place + len(got.payload) == len(STREAM), "an end that is none"


def seeds() -> dict[str, bytes]:
    """In order, backwards, in pieces, with every field of a segment changed."""
    total = len(_sealed(0))
    out = {f"in-order-{n}": bytes((n,)) + b"".join(bytes((k, 0)) for k in range(total)) for n in range(4)}
    out["backwards"] = b"\0" + b"".join(bytes((k, 0)) for k in reversed(range(total)))
    out["twice"] = b"\2" + b"".join(bytes((k, 0, k, 0)) for k in range(total))
    halves = b"".join(
        bytes((k, 1, *start.to_bytes(2, "big"), *size.to_bytes(2, "big")))
        for k in (4, 6, 7)
        for start, size in ((0, 600), (600, 100), (700, 700))
    )
    out["pieces"] = b"\0" + halves
    for at in (0, 2, 9, 20, 24, 32, 33, 52, 56, 60, 64, 80, 100):
        out[f"flip-{at}"] = (
            b"\0" + bytes((1, 2, 1)) + change(FLIP, at, 0, size=len(_sealed(0)[1])) + bytes((1, 0))
        )
    out["cut"] = b"\1" + bytes((1, 2, 1)) + change(CUT, 90, size=len(_sealed(1)[1])) + bytes((1, 0))
    return out
