"""UDP's front door: one datagram in, one verdict out; timers, policy changes, ends. docs/protocol.md, UDP.

Order of checks: header, what enforcers say to each other, known live flow, half-open flow, memory of a denial, and only
then whose socket it is and what policy says.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from hashlib import sha256

from nfq import udpgroup, udpinitiator, udploopback, udpresponder, udpresume
from nfq.core import ACCEPT, Core, Result, Verdict
from nfq.datagram import Datagram, parse
from nfq.flow import State
from nfq.observing import over
from nfq.recorder import Counts
from nfq.udpcontrol import Control, Kind, is_candidate, read
from nfq.udpcore import cut, finish, plain, reject, sealed_in, sealed_out, wait, watch
from nfq.udpflow import ENDED_US, Settled, UdpFlow
from sectool.errors import SectoolError
from sectool.events import Action, Auth, ConnState, DropReason, Phase, Point
from sectool.identity.verify import PeerIdentity
from sectool.labels import LabelSet

ENDS_AT_ONCE = 64  # flows of closed sockets accounted for between two looks at the packet queue


def handle(
    core: Core, data: bytes | memoryview, outbound: bool, local: bool, now_us: int, device: int = 0
) -> Result:
    """Judge one IP packet that carries UDP. As nfq.datapath.handle. Raises PacketError."""
    d = parse(data, outbound, device)
    if local:
        return udploopback.handle(core, d, now_us)
    return (_outgoing if outbound else _incoming)(core, d, now_us)


def _outgoing(core: Core, d: Datagram, now_us: int) -> Result:
    tables = core.udp
    begun = tables.find(tables.connecting, d.key)
    if begun is not None:
        return wait(begun) if begun.attempt is None else udpresume.early(core, d, begun)
    live = tables.find(tables.live, d.key)
    if live is not None and not live.doubted:
        return _out_live(core, d, live, now_us)
    asked = tables.find(tables.accepting, d.key)
    if asked is not None and asked.resume is not None:
        return ACCEPT  # a program answers what came behind RESUME
    if tables.denied.knows(True, d.key, now_us):
        if core.config.reject and not core.observing:
            reject(core, d, now_us)
        return core.turn_away(DropReason.DENIED_BEFORE)
    flow = UdpFlow(d.key, d.v6, Point.INITIATOR, State.SYN_SENT, now_us)
    if live is not None:
        flow.told_us = live.told_us
    if udpgroup.is_group(core, d):
        return udpgroup.out_new(core, d, flow, now_us)
    local = udpinitiator.sender(core, d, flow, now_us)
    if isinstance(local, Result):
        return local
    return udpresume.begin(core, d, flow, local, now_us) or udpinitiator.begin(core, flow, now_us)


def _out_live(core: Core, d: Datagram, flow: UdpFlow, now_us: int) -> Result:
    if flow.sealed is not None:
        return sealed_out(core, d, flow, now_us)
    if flow.state is State.PROVING:
        return udpinitiator.proving(core, d, flow)
    return plain(core, d, flow, now_us)


def _incoming(core: Core, d: Datagram, now_us: int) -> Result:
    tables = core.udp
    payload = d.payload
    said = read(payload) if is_candidate(payload) and core.enforced(d.source) else None
    if said is not None:
        result = _control(core, d, said, now_us)
        if result is not None:
            return result
        known = any(t.get(d.key) for t in (tables.live, tables.accepting, tables.connecting))
        if known or said.kind not in (Kind.PROOF, Kind.PROOF_DATA):
            # No answer, so that two hosts never go on telling each other.
            return core.drop(DropReason.HANDSHAKE_FORGED if known else DropReason.UNKNOWN_FLOW)
    live = tables.find(tables.live, d.key)
    half_open = tables.find(tables.accepting, d.key)
    if live is not None:
        result = _in_live(core, d, live, now_us)
        if result.verdict is Verdict.DROP and half_open is not None and half_open.suite:
            return udpresponder.in_sealed(core, d, now_us)
        return result
    if half_open is not None:
        return udpresponder.in_sealed(core, d, now_us)
    begun = tables.find(tables.connecting, d.key)
    if begun is not None:
        return udpinitiator.in_bare(core, begun, now_us)
    if tables.denied.knows(False, d.key, now_us):
        if core.enforced(d.source) and not core.observing:
            udpresponder.tell_unknown(core, d, now_us)
        return core.turn_away(DropReason.DENIED_BEFORE)
    flow = UdpFlow(d.key, d.v6, Point.RESPONDER, State.SYN_RECEIVED, now_us)
    take = udpgroup.in_new if udpgroup.is_group(core, d) else udpresponder.in_new
    return take(core, d, flow, now_us)


def _in_live(core: Core, d: Datagram, flow: UdpFlow, now_us: int) -> Result:
    if flow.group:
        return udpgroup.in_live(core, d, flow, now_us)
    if flow.sealed is None:
        return plain(core, d, flow, now_us)
    result = sealed_in(core, d, flow, now_us)
    if flow.state is State.PROVING and result.verdict is not Verdict.DROP:
        udpinitiator.heard(core, flow, now_us)
    return result


def _control(core: Core, d: Datagram, control: Control, now_us: int) -> Result | None:
    """What the other enforcer says; None: it proves nothing to any flow."""
    if control.kind in (Kind.HELLO, Kind.RESUME):
        mine = core.udp.find(core.udp.connecting, d.key)
        if mine is not None and sha256(control.body).digest() <= _opening(mine):
            return core.drop(DropReason.UNKNOWN_FLOW)  # both began at once, and ours goes on
    match control.kind:
        case Kind.HELLO:
            return udpresponder.in_hello(core, d, control.body, now_us)
        case Kind.ANSWER:
            return udpinitiator.in_answer(core, d, control.body, now_us)
        case Kind.RESUME:
            return udpresume.in_resume(core, d, control, now_us)
        case Kind.RESUMED:
            return udpresume.in_resumed(core, d, control.body, now_us)
        case Kind.UNKNOWN_SESSION:
            return udpresume.in_unknown_session(core, d, control.body, now_us)
        case Kind.REFUSAL:
            return udpresponder.in_refusal(core, d, control.body, now_us)
        case Kind.PROOF | Kind.PROOF_DATA:
            return udpresponder.in_proof(core, d, control, now_us)
        case Kind.ACK:
            return udpinitiator.in_ack(core, d, now_us)
        case Kind.UNKNOWN:
            return udpinitiator.in_unknown(core, d, control.body, now_us)


def _opening(flow: UdpFlow) -> bytes:
    """SHA-256 of what a flow of ours began with."""
    begun = flow.attempt or flow.hello
    return b"" if begun is None else sha256(begun.payload).digest()


# -- time ------------------------------------------------------------------------------------------------------------


def due_us(core: Core, otherwise: int) -> int:
    """When `timers` has something to do."""
    if core.udp.ending:
        return 0
    due = core.udp.next_us()
    return otherwise if due is None else min(due, otherwise)


def timers(core: Core, now_us: int) -> None:
    """Handshakes that nobody answered, and some of the flows whose sockets were closed."""
    for flow in core.udp.due(now_us):
        (udpinitiator if flow.attempt is None else udpresume).timer(core, flow, now_us)
    for _ in range(min(ENDS_AT_ONCE, len(core.udp.ending))):
        ended = core.udp.find(core.udp.live, core.udp.ending.popleft())
        if ended is not None:
            _over(core, ended, now_us)


def tick(core: Core, now_us: int) -> None:
    """Once a second: half-open flows that were never proven, what could not be cut, decisions with an end."""
    tables = core.udp
    for found in tables.accepting.expired(now_us):
        tables.accepting.remove(found)
        assert isinstance(found, UdpFlow)
        for flow in (found, *found.rivals):
            if flow.resume is not None:
                _answered(core, flow, now_us)
            elif not flow.recorded:
                flow.conn_state = ConnState.SH
                core.recorder.denied(flow, DropReason.PROOF_MISSING, now_us, Action.ERROR)
    again, tables.uncut = tables.uncut, []
    for flow in again:
        try:
            core.ports.cut(flow)
        except (SectoolError, OSError):
            tables.uncut.append(flow)
    while tables.expiring and tables.expiring[0][0] <= now_us:
        _, _, flow = heapq.heappop(tables.expiring)
        if tables.live.get(flow.key) is flow and flow.request is not None:
            flow.until_us = 0
            _judge_again(core, flow, now_us)


def _answered(core: Core, flow: UdpFlow, now_us: int) -> None:
    """A plain flow under a session whose initiator said no more than its first words: over, as most are."""
    action = flow.decision.action if flow.decision is not None else Action.ALLOW
    core.recorder.ended(flow, action, cut(core, flow), now_us)
    core.udp.denied.add(False, flow.key, now_us + ENDED_US)


# -- policy ----------------------------------------------------------------------------------------------------------


def activate(core: Core, now_us: int) -> int:
    """Another policy revision is in force: cut every live flow it denies. Returns how many were cut."""
    tables = core.udp
    tables.denied.clear()
    for half_open in tables.accepting:
        asked = half_open.decision is not None and half_open.decision.encrypt
        decision = core.decide(half_open, now_us)
        if not core.permitted(decision) or (decision.encrypt and not asked):
            tables.accepting.remove(half_open)
            if half_open.resume is None:
                core.recorder.denied(half_open, DropReason.POLICY_CHANGED, now_us)
            else:
                half_open.reason, half_open.conn_state = DropReason.POLICY_CHANGED, ConnState.RSTO
                core.recorder.count(DropReason.POLICY_CHANGED)
                core.recorder.flow(half_open, Phase.END, Action.DENY, now_us)
    count = 0
    for live in tables.live:
        flow = tables.find(tables.live, live.key)
        if flow is not None and over(core, flow):
            _end(core, flow, now_us, flow.let_in)
            count += 1
        elif flow is not None and flow.request is not None:
            count += _judge_again(core, flow, now_us)
    return count


def distrust(core: Core, doubtful: Callable[[PeerIdentity], bool], reason: DropReason, now_us: int) -> int:
    """As nfq.datapath.distrust, for flows of datagrams."""
    tables = core.udp
    for half_open in tables.accepting:
        if any(map(doubtful, half_open.identities)):
            tables.accepting.remove(half_open)
            if half_open.resume is None:
                core.recorder.denied(half_open, reason, now_us)
            else:
                half_open.reason, half_open.conn_state = reason, ConnState.RSTO
                core.recorder.count(reason)
                core.recorder.flow(half_open, Phase.END, Action.DENY, now_us)
    count = 0
    for live in tables.live:
        flow = tables.find(tables.live, live.key)
        if flow is not None and any(map(doubtful, flow.identities)):
            _end(core, flow, now_us, reason)
            count += 1
    return count


def relabel(core: Core, workload: int, labels: LabelSet, now_us: int) -> int:
    """As nfq.datapath.relabel, for flows of datagrams."""
    tables, count = core.udp, 0
    for live in tables.live:
        flow = tables.find(tables.live, live.key)
        if flow is not None and core.relabelled(flow, workload, labels):
            count += _judge_again(core, flow, now_us)
    return count


def _judge_again(core: Core, flow: UdpFlow, now_us: int) -> bool:
    """True: it was cut."""
    if core.still_permitted(flow, core.decide(flow, now_us)):
        watch(core, flow)
        return False
    _end(core, flow, now_us, DropReason.POLICY_CHANGED)
    return True


def _end(core: Core, flow: UdpFlow, now_us: int, reason: DropReason) -> None:
    """Cut a live flow."""
    flow.reason, flow.conn_state = reason, ConnState.RSTO
    counts = cut(core, flow)
    core.recorder.count(reason)
    core.recorder.flow(flow, Phase.END, Action.DENY, now_us, counts=counts)
    core.udp.leave(flow)
    if flow.sealed is not None:
        flow.sealed.close()
    core.ports.unjournal(flow)
    core.udp.settled.append(Settled(flow.key))


# -- ends ------------------------------------------------------------------------------------------------------------


def ended(core: Core, key: bytes, counts: Counts, now_us: int) -> None:
    """Connection tracking has forgotten the flow: nothing came for long."""
    flow = core.udp.find(core.udp.live, key)
    if flow is not None:
        finish(core, flow, counts, now_us)


def restored(core: Core, flow: UdpFlow) -> None:
    """A live flow of a worker before this one. If it was still proving itself, most likely it has been heard."""
    flow.state = State.AUTHORISED
    core.udp.enter(flow)


def socket_ended(core: Core, cookie: int) -> None:
    """A local socket was closed: its flows must not become those of the next one with its port."""
    core.udp.ending.extend(core.udp.by_socket.get(cookie, ()))


def _over(core: Core, flow: UdpFlow, now_us: int) -> None:
    pushed_out = (
        flow.point is Point.RESPONDER and flow.auth is Auth.NONE and flow.key not in core.udp.strangers
    )
    finish(core, flow, cut(core, flow), now_us)
    if not pushed_out:  # that is no end: its next datagram is judged
        core.udp.denied.add(False, flow.key, now_us + ENDED_US)
