"""Encrypted live flows: every segment with payload or FIN leaves as a record and arrives as what the record held.

Segments without either (ACKs, keepalives of some stacks, RSTs) pass as they are. A flow that sends something again has
lost packets: for a while its records are one segment each, so that a loss costs a segment and not a super-packet.
"""

from __future__ import annotations

from nfq.core import ACCEPT, REQUEUE, Core, Result, Verdict
from nfq.flow import Flow, State
from nfq.handshake import is_proof
from nfq.packet import (
    FIN,
    RECORD_OPTION_LEN,
    RST,
    SYN,
    TCP,
    URG,
    Segment,
    carries,
    rebuild,
    record_option,
    without_ours,
)
from nfq.pathmtu import look, pieces
from nfq.record import OversizedError
from sectool.events import DropReason

LOSS_US = 300_000  # a loss that goes on renews it; a lone repetition (a tail loss probe) soon costs nothing any more
_KEPT = Result(Verdict.DROP)  # a piece, copied


def quick(
    core: Core,
    data: bytes | memoryview,
    outbound: bool,
    now_us: int,
    *,
    bulk: bool,
    gso: bool = False,
    room: memoryview | None = None,
) -> Result | None:
    """The short way of an ordinary segment with payload of a live encrypted flow; None: it has to take the long one.

    What it decides is what `outgoing` and `incoming` would: nearly every packet comes this way. Raises PacketError.
    `room`: see nfq.record.Records.open.
    """
    size, first = len(data), data[0] if data else 0
    if size > 60 and first == 0x45 and data[9] == TCP and not (data[6] & 0x3F or data[7]):
        tcp, v6, length = 20, False, data[2] << 8 | data[3]
        wire = bytes(data[12:24])
        key = wire if outbound else wire[4:8] + wire[:4] + wire[10:] + wire[8:10]
    elif size > 80 and first >> 4 == 6 and data[6] == TCP:
        tcp, v6, length = 40, True, 40 + (data[4] << 8 | data[5])
        wire = bytes(data[8:44])
        key = wire if outbound else wire[16:32] + wire[:16] + wire[34:] + wire[32:34]
    else:
        return None
    flow = core.live.get(key)
    if flow is None or flow.records is None or flow.state is not State.AUTHORISED:
        return None
    flags, at = data[tcp + 13], tcp + (data[tcp + 12] >> 2 & 0x3C)
    if flags & (SYN | RST) or not tcp + 20 <= at < size or length != size:
        return None
    if outbound:
        if flow.path_mtu or flow.path_seen != core.paths.version or core.connecting.get(key) is not None:
            return None
        try:
            packet, again = flow.records.seal(data, tcp, at, v6, gso=gso)
        except OversizedError:
            return None
        if flags & FIN:
            flow.fins |= 1
        if again:
            flow.small_until_us = now_us + LOSS_US
        return Result(_passing(flow, now_us, bulk), packet)
    if core.accepting.get(key) is not None:
        return None
    opened, reason = flow.records.open(data, tcp, at, v6, now_us, room)
    if opened is None:
        return _KEPT if reason is DropReason.NONE else core.drop(reason)
    if opened[tcp + 13] & FIN:
        flow.fins |= 2
    return Result(_passing(flow, now_us, bulk), opened)


def outgoing(
    core: Core, seg: Segment, flow: Flow, now_us: int, *, bulk: bool = False, gso: bool = False
) -> Result:
    """Seal what the local stack sends. `bulk`: it came through the bulk queue; `gso`: the kernel will split it."""
    if seg.flags & RST or not carries(seg):
        return ACCEPT
    assert flow.records is not None
    if too_large(core, seg, flow):
        return _cut(core, seg, flow, now_us, bulk)
    try:
        sealed = flow.records.seal(seg.data, seg.tcp_off, seg.data_off, seg.v6, gso=gso)
    except OversizedError:
        if bulk:
            return REQUEUE
        raise
    if seg.flags & FIN:
        flow.fins |= 1
    if sealed.again:
        flow.small_until_us = now_us + LOSS_US
    return Result(_passing(flow, now_us, bulk), sealed.packet)


def too_large(core: Core, seg: Segment, flow: Flow) -> bool:
    """Whether the segment, with a record option, does not fit the path."""
    if flow.path_seen != core.paths.version:
        look(core.paths, flow)
    return flow.path_mtu != 0 and len(seg.data) + RECORD_OPTION_LEN > flow.path_mtu


def _cut(core: Core, seg: Segment, flow: Flow, now_us: int, bulk: bool) -> Result:
    """Seal what is too large for the path piece by piece."""
    assert flow.records is not None
    # A loss costs a piece anyway, and there are fewer of a super-packet than of its segments.
    flow.small_until_us = 0
    parts = pieces(seg.data, seg.tcp_off, seg.data_off, seg.v6, flow.path_mtu)
    # What is left of a super-packet would still be marked as one, and a device that splits those refuses it. So then
    # all pieces go past the queue.
    for part in parts if bulk else parts[:-1]:
        core.ports.inject(bytes(flow.records.seal(part, seg.tcp_off, seg.data_off, seg.v6).packet))
    if bulk:
        return Result(Verdict.DROP)
    return Result(
        _passing(flow, now_us, bulk), flow.records.seal(parts[-1], seg.tcp_off, seg.data_off, seg.v6).packet
    )


def incoming(core: Core, seg: Segment, flow: Flow, now_us: int, *, bulk: bool = False) -> Result:
    """Open what the peer sent. Pieces of a record are kept until it is whole."""
    if seg.flags & RST:
        return Result(Verdict.ACCEPT, rebuild(seg, without_ours(seg.options), b"")) if seg.payload else ACCEPT
    if not carries(seg):
        option = record_option(seg)
        if option is None and not seg.flags & URG:
            return ACCEPT
        if option is None or is_proof(option):
            # The stack would take the byte that an urgent pointer names out of the stream: only a record may have one.
            bare = rebuild(seg, without_ours(seg.options), b"", flags=seg.data[seg.tcp_off + 13] & ~URG)
            return Result(_passing(flow, now_us, bulk), bare)
    assert flow.records is not None
    opened = flow.records.open(seg.data, seg.tcp_off, seg.data_off, seg.v6, now_us)
    if opened.packet is None:
        if opened.reason is DropReason.NONE:
            return _KEPT
        return core.drop(opened.reason)
    if opened.packet[seg.tcp_off + 13] & FIN:
        flow.fins |= 2
    return Result(_passing(flow, now_us, bulk), opened.packet)


def _passing(flow: Flow, now_us: int, bulk: bool) -> Verdict:
    """How a packet of the flow passes, so that the next ones come through the right queue."""
    if flow.small_until_us > now_us:
        return Verdict.SMALL
    return Verdict.ACCEPT if bulk else Verdict.ENCRYPT
