"""Multicast and broadcast: no handshake is possible, so only network rules can allow it, with the group's address.

A group's members are many. What arrives for one must be allowed for every local socket that would get it, and since
sockets come and go it is judged anew every REJUDGE_US; the kernel never carries it.
"""

from __future__ import annotations

from nfq.core import ACCEPT, DROP, Core, Result, Verdict, address, party, stranger
from nfq.datagram import Datagram
from nfq.flow import LocalWorkload
from nfq.recorder import Counts
from nfq.udpcore import deny, finish, plain, release, request, workload
from nfq.udpflow import DENIED_US, UdpFlow
from sectool.events import DropReason
from sectool.policy import Party

REJUDGE_US = 1_000_000
_ALL = b"\xff" * 4


def is_group(core: Core, d: Datagram) -> bool:
    """Whether a datagram goes to a multicast or broadcast address."""
    to = d.destination
    if d.v6:
        return to[0] == 0xFF
    return 0xE0 <= to[0] <= 0xEF or to == _ALL or core.ports.is_broadcast(to)


def out_new(core: Core, d: Datagram, flow: UdpFlow, now_us: int) -> Result:
    """A program sends to a group."""
    flow.group = True
    local = workload(core, d, flow, now_us, receiver=False)
    if isinstance(local, Result):
        return local
    if isinstance(local, DropReason):
        return deny(core, d, flow, local, now_us)
    flow.request = request(
        party(local, flow.local_address), stranger(core, flow.remote_address, now_us), flow.remote_port
    )
    decision = core.decide(flow, now_us)
    if not core.permitted(decision):
        return deny(core, d, flow, decision.reason, now_us)
    if core.udp.live.full:
        return core.turn_away(DropReason.TABLE_FULL)
    core.recorder.allowed(flow, now_us)
    release(core, flow, now_us)
    return plain(core, d, flow, now_us)


def in_new(core: Core, d: Datagram, flow: UdpFlow, now_us: int) -> Result:
    """Something arrives for a group."""
    if not core.syn_limit.take(d.source, now_us):
        if core.observing:
            return core.turn_away(DropReason.RATE_LIMITED)
        core.recorder.denied(flow, DropReason.RATE_LIMITED, now_us)
        return DROP
    flow.group = True
    outcome = _judge(core, d, flow, now_us)
    if isinstance(outcome, Result):
        return outcome
    if outcome is DropReason.NO_LISTENER:
        core.udp.denied.add(False, d.key, now_us + DENIED_US)
        return core.turn_away(outcome)
    if outcome is not DropReason.NONE:
        return deny(core, d, flow, outcome, now_us)
    if core.udp.live.full:
        return core.turn_away(DropReason.TABLE_FULL)
    core.recorder.allowed(flow, now_us)
    release(core, flow, now_us)
    return ACCEPT


def in_live(core: Core, d: Datagram, flow: UdpFlow, now_us: int) -> Result:
    """More of it."""
    if flow.let_in:
        return ACCEPT
    if now_us - flow.judged_us < REJUDGE_US:
        return ACCEPT
    before = flow.local
    outcome = _judge(core, d, flow, now_us)
    if isinstance(outcome, Result):
        return outcome
    if outcome is DropReason.NONE:
        return ACCEPT
    flow.local = before
    finish(core, flow, Counts(), now_us)
    return in_new(core, d, UdpFlow(flow.key, flow.v6, flow.point, flow.state, now_us), now_us)


def _judge(core: Core, d: Datagram, flow: UdpFlow, now_us: int) -> DropReason | Result:
    """For all sockets that would get it. A Result says to hold it until one of them is identified."""
    found = core.ports.attribute_datagram(d, receiver=True, group=True)
    if not found:
        return DropReason.NO_LISTENER
    source = stranger(core, flow.remote_address, now_us)
    for key, owner in {one.key: one.owner for one in found}.items():
        flow.owner = owner
        local = core.credentials.get(key, now_us)
        if local is None:
            return Result(Verdict.HOLD, hold=key)
        if not isinstance(local, LocalWorkload):
            return DropReason.NO_LOCAL_IDENTITY
        flow.local = local
        identity = local.identity
        here = Party(identity.labels, identity.spiffe_id, address(flow.local_address))
        flow.request = request(source, here, flow.local_port)
        decision = core.decide(flow, now_us)
        if not core.permitted(decision):
            return decision.reason
    flow.judged_us = now_us
    return DropReason.NONE
