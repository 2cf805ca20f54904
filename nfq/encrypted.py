"""Encrypted live flows: every segment with payload or FIN leaves as a record and arrives as what the record held.

Segments without either (ACKs, keepalives of some stacks, RSTs) pass as they are. A flow that sends something again has
lost packets: for a while its records are one segment each, so that a loss costs a segment and not a super-packet.
"""

from __future__ import annotations

from nfq.core import ACCEPT, REQUEUE, Core, Result, Verdict
from nfq.flow import Flow
from nfq.packet import RST, Segment, carries, rebuild, record_option, without_ours
from nfq.record import OversizedError
from sectool.events import DropReason

LOSS_US = 2_000_000


def outgoing(
    core: Core, seg: Segment, flow: Flow, now_us: int, *, bulk: bool = False, gso: bool = False
) -> Result:
    """Seal what the local stack sends. `bulk`: it came through the bulk queue; `gso`: the kernel will split it."""
    if seg.flags & RST or not carries(seg):
        return ACCEPT
    assert flow.records is not None
    try:
        sealed = flow.records.seal(seg.data, seg.tcp_off, seg.data_off, seg.v6, gso=gso)
    except OversizedError:
        if bulk:
            return REQUEUE
        raise
    if sealed.again:
        flow.small_until_us = now_us + LOSS_US
    return Result(_passing(flow, now_us, bulk), sealed.packet)


def incoming(core: Core, seg: Segment, flow: Flow, now_us: int, *, bulk: bool = False) -> Result:
    """Open what the peer sent. Pieces of a record are kept until it is whole."""
    if seg.flags & RST:
        return Result(Verdict.ACCEPT, rebuild(seg, without_ours(seg.options), b"")) if seg.payload else ACCEPT
    if not carries(seg) and record_option(seg) is None:
        return ACCEPT
    assert flow.records is not None
    opened = flow.records.open(seg.data, seg.tcp_off, seg.data_off, seg.v6, now_us)
    if opened.packet is None:
        if opened.reason is DropReason.NONE:
            return Result(Verdict.DROP)  # a piece, copied
        return core.drop(opened.reason)
    return Result(_passing(flow, now_us, bulk), opened.packet)


def _passing(flow: Flow, now_us: int, bulk: bool) -> Verdict:
    """How a packet of the flow passes, so that the next ones come through the right queue."""
    if flow.small_until_us > now_us:
        return Verdict.SMALL
    return Verdict.ACCEPT if bulk else Verdict.ENCRYPT
