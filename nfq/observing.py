"""Nothing is enforced: what policy denies passes as an AUDIT (Core.decide); what is denied for other reasons, as here.

So `observe` mode and a broken glass work: identities are shown where the handshake succeeds, every flow is judged and
recorded, and nothing is dropped that a host without an enforcer would have let through. What stays dropped: packets
that are broken or forged where the true one is still to come, records that do not open, and repetitions. What the
other side's enforcer refuses stays refused.

A flow that lives for such a reason remembers it (`Flow.let_in`): it is cut when denial begins again.
"""

from __future__ import annotations

from nfq.core import RELEASE, Core, Result, Verdict
from nfq.flow import Flow, State
from nfq.packet import Segment, has_handshake, rebuild, record_option, syn_options, without_ours
from sectool.events import Action, Auth, DropReason, Point
from sectool.policy import Decision

GIVEN_UP = (
    2  # transmissions of a SYN with a handshake; the next goes without: something on the way may dislike it
)


def note(core: Core, flow: Flow, reason: DropReason, now_us: int) -> None:
    """Record a flow that would be denied for `reason` whatever policy says as one that passes."""
    flow.let_in = flow.reason = reason
    flow.revision = core.revision
    flow.request = None
    flow.decision = Decision(Action.AUDIT, reason)
    flow.suite = 0
    if flow.recorded:
        flow.event_id = b""  # an earlier answer that did not authenticate was an event of its own
    core.recorder.count(reason)
    core.recorder.allowed(flow, now_us)
    if flow.point is not Point.LOCAL:
        flow.auth = (
            Auth.NONE
        )  # nothing of it is proven, and its packets go as those of a peer without an enforcer


def let_in(core: Core, seg: Segment, flow: Flow, reason: DropReason, now_us: int) -> Result:
    """Let a TCP flow in by this segment of its own.

    Not in the place of a live one whose ends are proven: a SYN from anywhere can claim its 5-tuple, and what was to
    be encrypted would go on in the clear. The stack that has the connection answers such a SYN by itself.
    """
    live = core.live.get(seg.key)
    if flow.point is Point.RESPONDER and live is not None and live is not flow and _proven(live):
        core.recorder.count(reason)
        return once(seg)
    note(core, flow, reason, now_us)
    if core.live.full:
        core.recorder.count(DropReason.TABLE_FULL)
        return once(seg)
    core.release(flow, now_us)
    return bare(seg)


def _proven(live: Flow) -> bool:
    return live.auth is not Auth.NONE and live.state in (State.AUTHORISED, State.PROVING)


def once(seg: Segment) -> Result:
    """A segment as its stack sent it; what follows is looked at again, so that none of it outlives the mode."""
    return bare(seg)._replace(verdict=Verdict.ACCEPT)


def bare(seg: Segment) -> Result:
    """A segment as its stack sent it, and all that follow without asking."""
    if has_handshake(seg):
        return Result(Verdict.RELEASE, rebuild(seg, syn_options(seg.options, lower_mss=False), b""))
    if record_option(seg) is not None:
        return Result(Verdict.RELEASE, rebuild(seg, without_ours(seg.options), seg.payload))
    return RELEASE


def unproven(core: Core, seg: Segment, flow: Flow, now_us: int) -> Result:
    """A segment without a proof where one was to come: whoever called goes on without, or could not make one.

    Not if the flow may be encrypted: its records would reach the program as they are.
    """
    if flow.state is not State.SYN_RECEIVED or flow.suite:
        return core.drop(DropReason.PROOF_MISSING)
    return let_in(core, seg, flow, DropReason.PROOF_MISSING, now_us)


def over(core: Core, flow: Flow) -> bool:
    """Whether a live flow has to go: it was let in while nothing was enforced, and that is over."""
    return flow.let_in is not DropReason.NONE and not core.observing
