"""Connections within the host. Both sockets belong to this kernel, which attests them: no handshake is needed.

Judged once, where the packet leaves (the input chain lets the loopback device pass). Both workloads' SVIDs are
the ones the network would see, so the same rules apply; docs/decisions/0002 says why no Noise runs here.
"""

from __future__ import annotations

from nfq.core import ACCEPT, RELEASE, Core, Result, Verdict, party, request
from nfq.flow import Flow, LocalWorkload, State, reverse_key
from nfq.initiator import deny_syn
from nfq.packet import RST, SYN, SYN_ACK, Segment, as_reset
from sectool.events import Auth, AuthResult, DropReason, Point


def segment(core: Core, seg: Segment, now_us: int) -> Result:
    """Any queued TCP segment that leaves through the loopback device."""
    if seg.flags & SYN_ACK == SYN:
        return _syn(core, seg, now_us)
    flow = core.live.get(seg.key) or core.live.get(reverse_key(seg.key))
    if flow is None:
        # The kernel's own answer to a closed port; carries nothing.
        return ACCEPT if seg.flags & RST and not seg.payload else core.turn_away(DropReason.UNKNOWN_FLOW)
    if flow.state is State.CUT:
        return Result(Verdict.ACCEPT, as_reset(seg))
    return RELEASE


def _syn(core: Core, seg: Segment, now_us: int) -> Result:
    live = core.live.get(seg.key)
    if live is not None and live.isn == seg.seq and live.state is State.AUTHORISED:
        return RELEASE  # retransmitted
    if core.denials.knows(seg.key, seg.seq, now_us):
        return core.turn_away(DropReason.DENIED_BEFORE)
    flow = Flow(seg.key, seg.v6, Point.LOCAL, State.AUTHORISED, seg.seq, now_us)
    flow.auth = Auth.KERNEL
    peer = core.local_workload(seg, flow, now_us, listener=True)
    if isinstance(peer, Result):
        return peer
    if peer is DropReason.NO_LISTENER:
        return ACCEPT  # the kernel refuses by itself
    local = core.local_workload(seg, flow, now_us, listener=False)  # last: the flow is recorded as its
    if isinstance(local, Result):
        return local
    for unnamed in (peer, local):
        if isinstance(unnamed, DropReason):
            return deny_syn(core, seg, flow, unnamed, now_us)
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
        return deny_syn(core, seg, flow, decision.reason, now_us)
    if core.live.full:
        return core.turn_away(DropReason.TABLE_FULL)
    core.recorder.allowed(flow, now_us)
    core.release(flow, now_us)
    return RELEASE
