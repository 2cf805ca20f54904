"""The packet path's front door: one packet in, one verdict out; policy changes, flow ends and timers.

Order of checks on every packet: header, known half-open flow, known live flow, then what its flags make of it.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

from nfq import encrypted, icmp, initiator, loopback, observing, responder, udp
from nfq.core import ACCEPT, CUT_MEMORY_US, RELEASE, Core, Result, Verdict
from nfq.flow import Flow, FlowTable, State
from nfq.handshake import is_proof
from nfq.ip import ICMP, ICMP6, TCP, UDP, header
from nfq.packet import (
    RST,
    SYN,
    SYN_ACK,
    PacketError,
    Segment,
    as_reset,
    carries,
    parse,
    record_option,
    reply_reset,
    require_checksum,
)
from nfq.recorder import Counts
from nfq.steering import worker_of
from sectool.errors import SectoolError
from sectool.events import Action, ConnState, DropReason, Phase
from sectool.identity.verify import PeerIdentity
from sectool.labels import LabelSet
from sectool.policy import Engine

_CARRIED = (State.AUTHORISED, State.PROVING)


def handle(
    core: Core, data: bytes | memoryview, outbound: bool, local: bool, now_us: int, device: int = 0
) -> Result:
    """Judge one IP packet. `local`: it leaves through the loopback device; `device`: interface index, 0 unknown."""
    try:
        if len(data) >= 20 and data[9 if data[0] >> 4 == 4 else 6] != TCP:
            return _other(core, bytes(data), outbound, local, now_us, device)
        return encrypted.quick(core, data, outbound, now_us, bulk=False) or _tcp(
            core, data, outbound, local, now_us, device
        )
    except PacketError:
        return broken(core, data, outbound, DropReason.PACKET_MALFORMED)


def broken(core: Core, data: bytes | memoryview, outbound: bool, reason: DropReason) -> Result:
    """What cannot be judged, because of what it is or of a defect here. While observing it passes.

    Unless it is of a flow that may be encrypted: it would leave in the clear, or get past the records that a program
    relies on. In doubt it is: a stack takes packets that we cannot read.
    """
    if not core.observing:
        return core.drop(reason)
    try:
        head = header(bytes(data))
    except PacketError:
        return core.drop(reason)
    here, there = (head.source, head.destination) if outbound else (head.destination, head.source)
    ports = bytes(data[head.off : head.off + 4])
    key = here + there + (ports if outbound else ports[2:] + ports[:2])
    tables: tuple[FlowTable, ...] = ()
    if head.protocol == TCP:
        tables = (core.live, core.accepting, core.connecting)
    elif head.protocol == UDP:
        tables = (core.udp.live, core.udp.accepting, core.udp.connecting)
    flows = (table.get(key) for table in tables)
    if any(flow is not None and flow.suite for flow in flows):
        return core.drop(reason)
    return core.turn_away(reason)


def _other(core: Core, data: bytes, outbound: bool, local: bool, now_us: int, device: int) -> Result:
    """Not TCP, or TCP behind IPv6 extension headers."""
    protocol = data[9] if data[0] >> 4 == 4 else data[6]
    if protocol not in (UDP, ICMP, ICMP6):
        protocol = header(data).protocol
    if protocol == UDP:
        return udp.handle(core, data, outbound, local, now_us, device)
    if protocol in (ICMP, ICMP6):
        return icmp.handle(core, data, outbound, local, now_us, device)
    return _tcp(core, data, outbound, local, now_us, device)


def _tcp(
    core: Core, data: bytes | memoryview, outbound: bool, local: bool, now_us: int, device: int
) -> Result:
    seg = parse(data, outbound)
    seg.device = device
    if local:
        return loopback.segment(core, seg, now_us)
    kind = seg.flags & SYN_ACK
    if kind == SYN:
        if seg.flags & RST:
            return core.drop(DropReason.PACKET_MALFORMED)
        return (initiator.out_syn if outbound else responder.in_syn)(core, seg, now_us)
    if kind == SYN_ACK:
        return (responder.out_synack if outbound else initiator.in_synack)(core, seg, now_us)
    return _segment(core, seg, now_us)


def _segment(core: Core, seg: Segment, now_us: int) -> Result:
    flow = core.connecting.get(seg.key)
    live = core.live.get(seg.key)
    if flow is None and live is not None and live.state is State.PROVING:
        flow = live
    if flow is not None:
        if seg.outbound:
            return initiator.out_segment(core, seg, flow, now_us)
        return initiator.in_segment(core, seg, flow, now_us)
    flow = core.accepting.get(seg.key)
    # A SYN from anywhere can claim the 5-tuple of a live connection: that one goes on until a proof replaces it.
    if flow is not None and (live is None or (not seg.outbound and _for_half_open(seg, live))):
        if seg.outbound:
            return responder.out_segment(core, seg)
        return responder.in_segment(core, seg, flow, now_us)
    if live is None:
        return _unknown(core, seg, now_us)
    result = _live(core, seg, live, now_us)
    if flow is not None and result.verdict is Verdict.DROP and not seg.outbound and record_option(seg):
        return responder.in_segment(core, seg, flow, now_us)  # a record of the new connection, perhaps
    return result


def _unknown(core: Core, seg: Segment, now_us: int) -> Result:
    """Nobody here knows this connection. A peer whose enforcer does is told, so that its program need not wait in vain.

    It was half open when a worker before this one died, or found no place in the journal.
    While observing it goes on, unless it is encrypted: neither in the clear, nor a record to a program.
    """
    option = record_option(seg)
    record = option is not None and not is_proof(option)
    if core.observing and not record and not (carries(seg) and core.ports.sealed(seg)):
        return core.turn_away(DropReason.UNKNOWN_FLOW)
    mine = worker_of(seg.key, core.config.workers) == core.config.worker  # else its own may know it
    if seg.outbound or seg.flags & RST or not mine or not core.enforced(seg.source) or option is None:
        return core.drop(DropReason.UNKNOWN_FLOW)
    require_checksum(seg)
    if core.refusal_limit.take(seg.source, now_us):
        core.ports.inject(reply_reset(seg))
    return core.drop(DropReason.UNKNOWN_FLOW)


def _for_half_open(seg: Segment, live: Flow) -> bool:
    """Whether a segment of a live connection's 5-tuple is to be tried as the proof of a half-open one first."""
    option = record_option(seg)
    return option is not None and (live.records is None or is_proof(option))


def _live(core: Core, seg: Segment, flow: Flow, now_us: int) -> Result:
    if flow.state is State.CUT:
        return ACCEPT if seg.flags & RST else Result(Verdict.ACCEPT, as_reset(seg))
    if flow.records is None:
        if flow.suite:
            return core.drop(
                DropReason.RECORD_MISSING
            )  # it was to be encrypted: never plain, whatever has failed
        return RELEASE  # the kernel has lost the mark, or had not yet set it
    if seg.outbound:
        return encrypted.outgoing(core, seg, flow, now_us)
    return encrypted.incoming(core, seg, flow, now_us)


def bulk(
    core: Core,
    data: bytes | memoryview,
    outbound: bool,
    gso: bool,
    now_us: int,
    room: memoryview | None = None,
) -> Result:
    """Judge a packet of the bulk queue: a segment, often a super-packet, of an encrypted flow.

    `gso`: the kernel has still to split it, and will make its checksums. `room`: see nfq.record.Records.open.
    """
    try:
        result = encrypted.quick(core, data, outbound, now_us, bulk=True, gso=gso, room=room)
        if result is not None:
            return result
        seg = parse(data, outbound)
        flow = core.live.get(seg.key)
        if flow is None or flow.records is None or flow.state is not State.AUTHORISED or seg.flags & SYN:
            return handle(core, data, outbound, False, now_us)
        if outbound:
            return encrypted.outgoing(core, seg, flow, now_us, bulk=True, gso=gso)
        result = encrypted.incoming(core, seg, flow, now_us, bulk=True)
        if result.verdict is Verdict.DROP and core.accepting.get(seg.key) is not None:
            return _segment(core, seg, now_us)
        return result
    except PacketError:
        return core.drop(DropReason.PACKET_MALFORMED)


def activate(core: Core, engine: Engine, revision: int, policy_hash: int, now_us: int) -> int:
    """Switch to another policy revision at once and cut every live flow it denies. Returns how many were cut."""
    core.engine, core.revision = engine, revision
    core.recorder.policy_hash = policy_hash
    core.names.watch(engine)
    core.denials.clear()
    for flow in core.accepting:
        # Nothing has passed yet. (A connecting flow is judged when its answer comes.)
        if flow.request is not None and not _still_wanted(core, flow, now_us):
            core.accepting.remove(flow)
            core.recorder.denied(flow, DropReason.POLICY_CHANGED, now_us)
    cut = 0
    for flow in core.live:
        if flow.state not in _CARRIED:
            continue
        if observing.over(core, flow):
            _cut(core, flow, now_us, flow.let_in)
            cut += 1
        elif flow.request is not None:
            if core.still_permitted(flow, core.decide(flow, now_us)):
                core.watch(flow)
            else:
                _cut(core, flow, now_us)
                cut += 1
    return cut + udp.activate(core, now_us)


def observe(core: Core, on: bool, now_us: int) -> int:
    """Stop denying, or begin again: then every live flow is judged anew. Returns how many were cut."""
    if core.observing == on:
        return 0
    core.observing = on
    return activate(core, core.engine, core.revision, core.recorder.policy_hash, now_us)


def distrust(core: Core, doubtful: Callable[[PeerIdentity], bool], reason: DropReason, now_us: int) -> int:
    """Cut every flow, half open or live, plain or encrypted, one of whose ends is `doubtful`. How many live ones.

    For identities that are not trusted any more; `reason` is what their records say. The caller ends their sessions,
    and with them connections that are being made under one; a peer that has still to answer is verified when it does.
    While nothing is enforced they are only marked, to be cut when denial begins.
    """
    if core.observing:
        for table in (core.live, core.udp.live):
            for flow in table:
                if any(map(doubtful, flow.identities)):
                    flow.let_in = reason
        return 0
    for flow in core.accepting:
        if any(map(doubtful, flow.identities)):
            core.accepting.remove(flow)
            if not flow.recorded:
                core.recorder.denied(flow, reason, now_us)
    for flow in core.connecting:
        if any(map(doubtful, flow.identities)):
            core.connecting.remove(flow)
            if not flow.recorded:
                core.recorder.denied(flow, reason, now_us)
    cut = 0
    for flow in core.live:
        if flow.state in _CARRIED and any(map(doubtful, flow.identities)):
            _cut(core, flow, now_us, reason)
            cut += 1
    return cut + udp.distrust(core, doubtful, reason, now_us)


def relabel(core: Core, workload: int, labels: LabelSet, now_us: int) -> int:
    """A workload of this host has other labels now: judge its live flows by them. Returns how many were cut.

    (Those being made were judged a moment ago; the peer knows the labels of its next handshake.)
    """
    cut = 0
    for flow in core.live:
        if flow.state in _CARRIED and core.relabelled(flow, workload, labels):
            if core.still_permitted(flow, core.decide(flow, now_us)):
                core.watch(flow)
            else:
                _cut(core, flow, now_us)
                cut += 1
    return cut + udp.relabel(core, workload, labels, now_us)


def _still_wanted(core: Core, flow: Flow, now_us: int) -> bool:
    """Whether a half-open connection may go on; one that was already answered cannot become encrypted any more."""
    answered, asked = bool(flow.answer_wire), flow.decision is not None and flow.decision.encrypt
    decision = core.decide(flow, now_us)
    return core.permitted(decision) and (asked or not decision.encrypt or not answered)


def _cut(core: Core, flow: Flow, now_us: int, reason: DropReason = DropReason.POLICY_CHANGED) -> None:
    flow.state = State.CUT
    flow.forget_handshake()
    flow.forget_keys()
    flow.reason = reason
    flow.conn_state = ConnState.RSTO
    try:
        counts = core.ports.cut(flow)
    except (SectoolError, OSError):
        counts = Counts()
        core.uncut.append(flow)  # tick tries again; until then the kernel still carries it
    core.recorder.count(reason)
    core.recorder.flow(flow, Phase.END, Action.DENY, now_us, counts=counts)
    core.ports.unjournal(flow)
    core.live.expire_after(flow, now_us, CUT_MEMORY_US)


def expired_rules(core: Core, now_us: int) -> int:
    """Re-judge live flows whose decision was valid only until now (`until`, ages). Returns how many were cut."""
    cut = 0
    while core.expiring and core.expiring[0][0] <= now_us:
        _, _, flow = heapq.heappop(core.expiring)
        if core.live.get(flow.key) is not flow or flow.state not in _CARRIED or flow.request is None:
            continue
        flow.until_us = 0
        if core.still_permitted(flow, core.decide(flow, now_us)):
            core.watch(flow)
        else:
            _cut(core, flow, now_us)
            cut += 1
    return cut


def ended(core: Core, key: bytes, counts: Counts, conn_state: ConnState, now_us: int) -> None:
    """The kernel says that a connection is over."""
    flow = core.live.get(key)
    if flow is None:
        return
    if flow.state in (State.CUT, State.ENDED):
        return  # its END is written; it stays a while for what still comes
    flow.conn_state = conn_state
    core.finish(flow, counts, now_us)


def abandoned(core: Core, key: bytes, now_us: int) -> None:
    """A local socket ended whose connection was never made: the program gave up, or was told no."""
    flow = core.connecting.get(key)
    if flow is None:
        return
    core.connecting.remove(flow)
    if not flow.recorded:
        core.recorder.denied(flow, DropReason.HANDSHAKE_TIMEOUT, now_us, Action.ERROR)


def tick(core: Core, now_us: int) -> None:
    """Once a second: give up half-open flows, flush coalesced denials, re-judge what has an end date."""
    for flow in core.accepting.expired(now_us):
        core.accepting.remove(flow)
        if not flow.recorded:
            flow.conn_state = ConnState.SH
            core.recorder.denied(flow, DropReason.PROOF_MISSING, now_us, Action.ERROR)
    for flow in core.connecting.expired(now_us):
        core.connecting.remove(flow)
        if not flow.recorded:
            core.recorder.denied(flow, DropReason.HANDSHAKE_TIMEOUT, now_us, Action.ERROR)
    for flow in core.live.expired(now_us):
        core.forget(flow)
    again, core.uncut = core.uncut, []
    for flow in again:
        try:
            core.ports.cut(flow)
        except (SectoolError, OSError):
            core.uncut.append(flow)
    core.reassembly.expire(now_us)
    core.sessions.tick(now_us)
    icmp.tick(core, now_us)
    udp.tick(core, now_us)
    core.recorder.tick(now_us)
    expired_rules(core, now_us)
