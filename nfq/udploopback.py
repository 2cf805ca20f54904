"""UDP over the loopback device: both sockets belong to this kernel, which attests them. As nfq.loopback."""

from __future__ import annotations

from nfq.core import ACCEPT, RELEASE, Core, Result, party
from nfq.datagram import Datagram
from nfq.flow import LocalWorkload, State, reverse_key
from nfq.names import PORT as DNS
from nfq.udpcore import deny, release, request, workload
from nfq.udpflow import UdpFlow
from sectool.events import Auth, AuthResult, DropReason, Point


def handle(core: Core, d: Datagram, now_us: int) -> Result:
    """Any queued datagram that leaves through the loopback device."""
    if core.udp.live.get(d.key) is not None or core.udp.live.get(reverse_key(d.key)) is not None:
        return _carried(core, d, now_us)
    if core.udp.denied.knows(True, d.key, now_us):
        return core.turn_away(DropReason.DENIED_BEFORE)
    flow = UdpFlow(d.key, d.v6, Point.LOCAL, State.AUTHORISED, now_us)
    flow.auth = Auth.KERNEL
    peer = workload(core, d, flow, now_us, receiver=True)
    if isinstance(peer, Result):
        return peer
    if peer is DropReason.NO_LISTENER:
        return ACCEPT  # the kernel refuses by itself
    flow.peer_socket = flow.socket
    local = workload(core, d, flow, now_us, receiver=False)  # last: the flow is recorded as its
    if isinstance(local, Result):
        return local
    for unnamed in (peer, local):
        if isinstance(unnamed, DropReason):
            return deny(core, d, flow, unnamed, now_us)
    assert isinstance(local, LocalWorkload)
    assert isinstance(peer, LocalWorkload)
    flow.peer_local, flow.auth_result = peer, AuthResult.PROVEN
    flow.request = request(
        party(local, flow.local_address),
        party(peer, flow.remote_address),
        flow.remote_port,
        can_encrypt=True,  # it never leaves this kernel: docs/decisions/0002
    )
    decision = core.decide(flow, now_us)
    if not core.permitted(decision):
        return deny(core, d, flow, decision.reason, now_us)
    if core.udp.live.full:
        return core.turn_away(DropReason.TABLE_FULL)
    core.recorder.allowed(flow, now_us)
    release(core, flow, now_us)
    return _carried(core, d, now_us)


def _carried(core: Core, d: Datagram, now_us: int) -> Result:
    """A name server on this host is listened to; any other flow the kernel carries."""
    if d.key[-2:] == DNS:
        core.names.datagram(d.payload, True, d.key, now_us)
        return ACCEPT
    if d.key[-4:-2] == DNS:
        core.names.datagram(d.payload, False, reverse_key(d.key), now_us)
        return ACCEPT
    return RELEASE
