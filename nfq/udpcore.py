"""The small steps that all roles of a UDP flow share: whose socket, denied, live, sealed, over."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from hashlib import sha256

from nfq.core import ACCEPT, DROP, RELEASE, Core, Result, Verdict
from nfq.datagram import COPIED, Datagram, rebuild, unreachable
from nfq.flow import LocalWorkload, State
from nfq.ip import UDP
from nfq.names import PORT as DNS
from nfq.observing import note
from nfq.recorder import Counts
from nfq.suites import by_number
from nfq.udpflow import DENIED_US, TAILS, UdpFlow
from nfq.udprecord import OVERHEAD, Datagrams
from sectool.errors import SectoolError
from sectool.events import Action, Auth, ConnState, DropReason, Point
from sectool.policy import Party, Request

MTU_LIFE_US = 1_000_000
_SMALL = 1200  # bytes: what is no larger, sealed, fits every path


def request(source: Party, destination: Party, port: int, *, can_encrypt: bool = False) -> Request:
    """A UDP request for the engine."""
    return Request(source, destination, UDP, port, can_encrypt=can_encrypt)


def workload(
    core: Core, d: Datagram, flow: UdpFlow, now_us: int, *, receiver: bool
) -> LocalWorkload | Result | DropReason:
    """Whose socket a datagram is from, or (`receiver`) for; noted in `flow`. As Core.local_workload.

    Sockets of different workloads that could have sent it: nobody can be named.
    """
    found = core.ports.attribute_datagram(d, receiver=receiver)
    if not found:
        return DropReason.NO_LISTENER if receiver else DropReason.NO_LOCAL_IDENTITY
    first = found[0]
    flow.owner = first.owner
    if any(other.key != first.key for other in found):
        return DropReason.NO_LOCAL_IDENTITY
    local = core.credentials.get(first.key, now_us)
    if local is None:
        return Result(Verdict.HOLD, hold=first.key)
    if isinstance(local, str):
        return DropReason.NO_LOCAL_IDENTITY
    flow.local, flow.socket = local, first.socket
    return local


def wait(flow: UdpFlow) -> Result:
    """Keep the datagram until the flow's handshake is settled."""
    flow.waited += 1
    return Result(Verdict.WAIT, hold=flow.key)


def deny(
    core: Core, d: Datagram, flow: UdpFlow, reason: DropReason, now_us: int, action: Action = Action.DENY
) -> Result:
    """Record it, remember it for a while, and tell the sender if that is wanted."""
    if core.observing:
        return let_in(core, d, flow, reason, now_us)
    flow.state = State.DENIED
    flow.revision = core.revision
    if core.config.reject and flow.auth is not Auth.NOISE_IX:
        flow.conn_state = ConnState.REJ
        reject(core, d, now_us)
    core.recorder.denied(flow, reason, now_us, action)
    core.udp.denied.add(d.outbound, d.key, now_us + DENIED_US)
    return DROP


def let_in(core: Core, d: Datagram, flow: UdpFlow, reason: DropReason, now_us: int) -> Result:
    """As nfq.observing.let_in, for a flow of datagrams."""
    unproven(core, flow, reason, now_us)
    return ACCEPT if flow.group and not d.outbound else plain(core, d, flow, now_us)


def unproven(core: Core, flow: UdpFlow, reason: DropReason, now_us: int) -> None:
    """A flow is live that would have been denied for `reason`, as that of a peer without an enforcer."""
    note(core, flow, reason, now_us)
    if core.udp.live.full:
        core.recorder.count(DropReason.TABLE_FULL)
        return
    flow.sealed = None
    release(core, flow, now_us)


def reject(core: Core, d: Datagram, now_us: int) -> None:
    """ICMP 'port unreachable' to whoever sent it; to a remote host only as much as came from there."""
    answer = unreachable(d)
    if d.outbound or (len(answer) <= len(d.data) and core.refusal_limit.take(d.source, now_us)):
        core.ports.inject(answer)


def settle(core: Core, flow: UdpFlow, now_us: int) -> None:
    """A flow takes its place among the live ones. One that held the same 5-tuple before has ended."""
    before = core.udp.find(core.udp.live, flow.key)
    if before is not None and before is not flow:
        finish(core, before, Counts(), now_us)
    latest = core.udp.find(core.udp.accepting, flow.key)
    for other in () if latest is None else (latest, *latest.rivals):
        if other is not flow and other.resume is not None:  # its first datagram was let in
            action = other.decision.action if other.decision is not None else Action.ALLOW
            core.recorder.ended(other, action, Counts(), now_us)
    core.udp.enter(flow)
    watch(core, flow)


def forget_early(core: Core, flow: UdpFlow) -> Sequence[bytes]:
    """Give up, and give back, the copies of packets whose datagrams were sent behind RESUME."""
    sent, flow.early = flow.early, ()
    core.udp.early_bytes -= sum(map(len, sent))
    return sent


def note_early(flow: UdpFlow, payload: bytes) -> None:
    """A datagram was delivered that came behind RESUME."""
    if flow.early_digests is None:
        flow.early_digests = set()
    flow.early_digests.add(sha256(payload).digest())


def seen_early(flow: UdpFlow, payload: bytes) -> bool:
    """Whether a datagram was delivered before, behind the RESUME of the flow that this one has replaced; says so once.

    An initiator sends it again when it is told that its session is unknown, and anybody on the path may tell so.
    """
    digests = flow.early_digests
    if digests is None or flow.resume is not None:
        return False
    digest = sha256(payload).digest()
    if digest not in digests:
        return False
    digests.remove(digest)
    return True


def watch(core: Core, flow: UdpFlow) -> None:
    """Note when the flow's decision has to be made anew, if ever."""
    until = flow.decision.valid_until_us if flow.decision is not None else None
    if until is None or until == flow.until_us:
        return
    flow.until_us = until
    tables = core.udp
    heapq.heappush(tables.expiring, (until, id(flow), flow))
    if len(tables.expiring) > 1024 + 2 * len(tables.live):
        tables.expiring = [
            e for e in tables.expiring if tables.live.get(e[2].key) is e[2] and e[0] == e[2].until_us
        ]
        heapq.heapify(tables.expiring)


def release(core: Core, flow: UdpFlow, now_us: int) -> None:
    """Policy allows it and whoever has to has proven it: from here on the kernel carries it, or `sealed` does."""
    settle(core, flow, now_us)
    flow.state = State.AUTHORISED
    flow.hello = flow.greeting = flow.keys = flow.held = flow.issued = None
    core.udp.arm(flow, 0)
    if flow.journal_slot < 0:
        journal(core, flow)


def journal(core: Core, flow: UdpFlow) -> None:
    """Let a flow, and the state of its keys, outlive this worker."""
    state = core.ports.journal(flow)
    if flow.sealed is not None and state is not None:
        flow.sealed.attach(state)


def finish(core: Core, flow: UdpFlow, counts: Counts, now_us: int) -> None:
    """A live flow has ended: write END and forget it."""
    core.udp.leave(flow)
    if flow.sealed is not None:
        flow.sealed.close()
        flow.sealed = None
    core.ports.unjournal(flow)
    action = flow.decision.action if flow.decision is not None else Action.ALLOW
    core.recorder.ended(flow, action, counts, now_us)


def cut(core: Core, flow: UdpFlow) -> Counts:
    """Have the kernel ask again about the flow's datagrams; its counters so far. Tried again later if need be."""
    try:
        return core.ports.cut(flow)
    except (SectoolError, OSError):
        core.udp.uncut.append(flow)
        return Counts()


# -- datagrams of live flows -----------------------------------------------------------------------------------------


def seal_with(flow: UdpFlow) -> Datagrams:
    """What seals and opens the datagrams of a flow whose handshake is done, under its suite."""
    suite = by_number(flow.suite)
    assert flow.keys is not None
    assert suite is not None
    initiator = flow.point is Point.INITIATOR
    return Datagrams(
        suite, flow.keys.initiator_to_responder, flow.keys.responder_to_initiator, initiator=initiator
    )


def plain(core: Core, d: Datagram, flow: UdpFlow, now_us: int) -> Result:
    """A datagram of an authorised plain flow. Name servers are listened to; any other flow the kernel carries."""
    if flow.suite:
        return core.drop(
            DropReason.RECORD_MISSING
        )  # it was to be encrypted: never plain, whatever has failed
    if d.key[-2:] == DNS:
        core.names.datagram(d.payload, d.outbound, d.key, now_us)
        return ACCEPT
    return RELEASE if flow.state is State.AUTHORISED else ACCEPT


def sealed_out(core: Core, d: Datagram, flow: UdpFlow, now_us: int) -> Result:
    """Encrypt what a program sends."""
    assert flow.sealed is not None
    size = len(d.data) + OVERHEAD
    if size > COPIED or not d.whole:
        return core.drop(DropReason.DATAGRAM_OVERSIZED)
    payload = d.payload
    if d.key[-2:] == DNS:
        core.names.datagram(payload, True, d.key, now_us)
    sealed = flow.sealed.seal(payload)
    if flow.point is Point.INITIATOR:
        if flow.tails is None:
            flow.tails = deque(maxlen=TAILS)
        flow.tails.append(sealed[-8:])
    if size <= _SMALL:
        return Result(Verdict.ENCRYPT, rebuild(d, sealed))
    mtu = _path_mtu(core, d, flow, now_us)
    packet = rebuild(d, sealed, may_fragment=size > mtu)
    if d.v6 and size > mtu and d.udp_off == 40:
        # If the program asked for no fragments the stack would refuse it, and tell the program less than it knows.
        core.ports.inject_large(packet)
        return DROP
    return Result(Verdict.ENCRYPT, packet)


def _path_mtu(core: Core, d: Datagram, flow: UdpFlow, now_us: int) -> int:
    if now_us >= flow.mtu_until_us:
        flow.mtu = core.ports.path_mtu(d.destination, d.device)
        flow.mtu_until_us = now_us + MTU_LIFE_US
    known = core.paths.mtu(d.destination)
    return min(flow.mtu, known) if known else flow.mtu


def sealed_in(core: Core, d: Datagram, flow: UdpFlow, now_us: int) -> Result:
    """Decrypt what the peer sent; anything but a sealed datagram is dropped."""
    assert flow.sealed is not None
    opened = flow.sealed.open(d.payload)
    if isinstance(opened, DropReason):
        return core.drop(opened)
    if seen_early(flow, opened):
        return core.drop(DropReason.RECORD_REPLAYED)
    if d.key[-2:] == DNS:
        core.names.datagram(opened, False, d.key, now_us)
    return Result(Verdict.ENCRYPT, rebuild(d, opened, deliver=True))
