"""The accepting side: SYN in, SYN-ACK out, proof in, release. Cheap checks first, state last."""

from __future__ import annotations

from nfq import encrypted, observing
from nfq.core import (
    ACCEPT,
    DROP,
    RELEASE,
    SYN_RECEIVED_TIMEOUT_US,
    Core,
    Result,
    Verdict,
    carried,
    party,
    request,
    stranger,
    stripped,
)
from nfq.flow import Flow, State
from nfq.handshake import (
    Decision,
    EncryptWish,
    Grant,
    Greeting,
    HandshakeError,
    check_proof,
    is_proof,
    open_refusal,
)
from nfq.noise import TransportKeys
from nfq.packet import (
    FIN,
    HANDSHAKE_OPTION,
    RST,
    Segment,
    carries,
    has_handshake,
    rebuild,
    record_option,
    reply_reset,
    require_checksum,
    syn_options,
    without_ours,
)
from nfq.session import Issued, is_resume, lifetime_s, unknown
from nfq.suites import choose
from sectool.events import Action, Auth, AuthResult, ConnState, Decider, DropReason, Point

# Whoever is on the path can make a SYN fail so; its next, true transmission must not be taken for a repetition.
_ANYBODYS_DOING = frozenset(
    (DropReason.HANDSHAKE_MALFORMED, DropReason.HANDSHAKE_STALE, DropReason.VERSION_UNSUPPORTED)
)


def in_syn(core: Core, seg: Segment, now_us: int) -> Result:
    """Somebody connects to this host."""
    flow = core.accepting.get(seg.key)
    # Identity counts only where it is expected; elsewhere a SYN is judged by its address, whatever it carries.
    ours = core.enforced(seg.source) and has_handshake(seg)
    if flow is not None and flow.isn == seg.seq:
        if ours and (_repeats(seg, flow) or _repeats(seg, flow.former)):
            if not _repeats(seg, flow):
                flow = _exchange(core, flow, now_us)
            return stripped(core, seg, flow, encrypted=must_encrypt(flow))
        # A new greeting is that of an enforcer that was started anew, or that has not heard our answer under a session.
        if not ours or is_resume(seg.payload):
            if not core.observing or ours:
                return core.drop(DropReason.SYN_REPLAYED)
            core.accepting.remove(flow)  # the same connection, given up to do without a handshake
    if core.connecting.get(seg.key) is not None:
        return core.turn_away(DropReason.UNKNOWN_FLOW)  # simultaneous open has no initiator to prove
    if core.denials.knows(seg.key, seg.seq, now_us):
        return core.turn_away(DropReason.DENIED_BEFORE)
    live = core.live.get(seg.key)
    if live is not None and live.auth is Auth.NONE and live.isn == seg.seq and live.state is State.AUTHORISED:
        return _bare(seg)
    if ours and is_resume(seg.payload):
        return _resumed(core, seg, now_us)
    require_checksum(seg)
    if not core.syn_limit.take(seg.source, now_us):
        return _limited(core, seg, now_us)
    if ours:
        return _greeted(core, seg, now_us)
    flow = Flow(seg.key, seg.v6, Point.RESPONDER, State.SYN_RECEIVED, seg.seq, now_us)
    if core.enforced(seg.source):
        if core.observing:
            local = core.local_workload(seg, flow, now_us, listener=True)
            if isinstance(local, Result):
                return local
        return _deny(core, seg, flow, DropReason.NO_IDENTITY, now_us)
    return _from_outside(core, seg, flow, now_us)


def _bare(seg: Segment) -> Result:
    """Released without a handshake: what somebody put into the SYN all the same does not reach the stack."""
    if seg.payload or has_handshake(seg):
        return Result(Verdict.RELEASE, rebuild(seg, syn_options(seg.options, lower_mss=False), b""))
    return RELEASE


def _repeats(seg: Segment, flow: Flow | None) -> bool:
    """Whether the SYN carries what the flow's did."""
    if flow is None:
        return False
    if flow.greeting is not None:
        return flow.greeting.ephemeral == seg.payload[12:44]
    return flow.resume is not None and flow.resume.payload == seg.payload


def _exchange(core: Core, flow: Flow, now_us: int) -> Flow:
    """Of two claims to one SYN, let the former be answered next; it."""
    former = flow.former
    assert former is not None
    flow.former, former.former = None, flow
    core.accepting.add(former)
    core.accepting.expire_after(former, now_us, SYN_RECEIVED_TIMEOUT_US)
    return former


def _limited(core: Core, seg: Segment, now_us: int) -> Result:
    """Too many SYNs from there. Not remembered: the next transmission of an honest one may find room."""
    if core.observing:
        core.recorder.count(DropReason.RATE_LIMITED)
        return observing.once(seg)
    flow = Flow(seg.key, seg.v6, Point.RESPONDER, State.DENIED, seg.seq, now_us)
    core.recorder.denied(flow, DropReason.RATE_LIMITED, now_us)
    return DROP


def _greeted(core: Core, seg: Segment, now_us: int) -> Result:
    """A SYN that presents a credential."""
    flow = Flow(seg.key, seg.v6, Point.RESPONDER, State.SYN_RECEIVED, seg.seq, now_us)
    flow.auth, flow.auth_result = Auth.NOISE_IX, AuthResult.FAILED
    try:
        greeting = Greeting(seg.payload, now_us)
        if greeting.ephemeral in core.seen:
            raise HandshakeError(DropReason.SYN_REPLAYED, "handshake seen before")
        flow.peer = greeting.peer(core.verifier, now_us)
    except HandshakeError as e:
        if core.observing:
            local = core.local_workload(seg, flow, now_us, listener=True)
            if isinstance(local, Result):
                return local
        return _deny(core, seg, flow, e.reason, now_us)
    flow.auth_result = AuthResult.CLAIMED
    local = core.local_workload(seg, flow, now_us, listener=True)
    if isinstance(local, Result):
        return local
    core.seen.add(greeting.ephemeral, now_us)
    if isinstance(local, DropReason):
        return _deny(core, seg, flow, local, now_us)
    flow.greeting = greeting
    return _judge(core, seg, flow, greeting.suites, now_us)


def _resumed(core: Core, seg: Segment, now_us: int) -> Result:
    """A SYN under a session: its tag proves the sender's key, its number that it is new. Nothing is limited by rate.

    None of what can be wrong is remembered: the true SYN, or a full handshake under the same number, may still come.
    """
    try:
        resume = core.sessions.open(seg.payload, now_us)
    except HandshakeError as e:
        if e.reason is DropReason.SESSION_UNKNOWN:
            return _hint(core, seg, now_us)
        flow = Flow(seg.key, seg.v6, Point.RESPONDER, State.DENIED, seg.seq, now_us)
        flow.auth, flow.auth_result = Auth.SESSION, AuthResult.FAILED
        core.recorder.denied(flow, e.reason, now_us)
        return DROP
    require_checksum(seg)
    flow = Flow(seg.key, seg.v6, Point.RESPONDER, State.SYN_RECEIVED, seg.seq, now_us)
    flow.auth, flow.auth_result, flow.peer = Auth.SESSION, AuthResult.CLAIMED, resume.session.peer
    local = core.local_workload(seg, flow, now_us, listener=True)
    if isinstance(local, Result):
        return local
    if isinstance(local, DropReason):
        resume.take()
        return _deny(core, seg, flow, local, now_us)
    if local.identity.id != resume.session.local:
        return _hint(core, seg, now_us)  # another workload listens now, or its credential was renewed
    resume.take()
    flow.resume = resume
    return _judge(core, seg, flow, resume.suites, now_us)


def _hint(core: Core, seg: Segment, now_us: int) -> Result:
    """Spare the initiator the wait for its retransmission. It proves nothing, and may be lost or limited."""
    require_checksum(seg)
    if core.hint_limit.take(seg.source, now_us):
        core.ports.inject(reply_reset(seg, options=HANDSHAKE_OPTION, payload=unknown(seg.payload)))
    return core.drop(DropReason.SESSION_UNKNOWN)


def _judge(core: Core, seg: Segment, flow: Flow, offered: int, now_us: int) -> Result:
    """Ingress policy on who claims to connect; `offered`: its cipher suites as a mask."""
    assert flow.peer is not None
    assert flow.local is not None
    suite = choose(offered, core.config.suites)
    flow.request = core.ask(
        (flow.peer, flow.remote_address),
        (flow.local.identity, flow.local_address),
        flow.local_port,
        suite is not None,
    )
    decision = core.decide(flow, now_us)
    flow.suite = suite.cipher if suite is not None else 0
    if not core.permitted(decision):
        _refuse(core, seg, flow, now_us)
        return _deny(core, seg, flow, decision.reason, now_us)
    if core.accepting.full:
        # A flood of SYNs that will never prove: the oldest has had its chance.
        core.accepting.evict()
        core.recorder.count(DropReason.TABLE_FULL)
    before = core.accepting.get(seg.key)
    if before is not None and before.isn == flow.isn:
        # Nothing of this is proven: it must not take another's place for good.
        flow.former, before.former = before, None
    core.accepting.add(flow)
    core.accepting.expire_after(flow, now_us, SYN_RECEIVED_TIMEOUT_US)
    return stripped(core, seg, flow, encrypted=must_encrypt(flow))


def _refuse(core: Core, seg: Segment, flow: Flow, now_us: int) -> None:
    """Tell the initiator's enforcer, readable only to the credential's owner, who denies and by which rule.

    Costs three exchanges after a greeting, so it is limited in rate; without it the initiator only sees silence.
    """
    if not core.refusal_limit.take(seg.source, now_us):
        return
    try:
        payload, _ = _answer(core, flow, Decision.REFUSE, now_us)
    except HandshakeError:
        return
    flow.conn_state = ConnState.REJ
    core.ports.inject(reply_reset(seg, options=HANDSHAKE_OPTION, payload=payload))


def _deny(core: Core, seg: Segment, flow: Flow, reason: DropReason, now_us: int) -> Result:
    if core.observing:
        return observing.let_in(core, seg, flow, reason, now_us)
    flow.state = State.DENIED
    flow.revision = core.revision
    if core.config.reject and flow.auth is Auth.NONE and core.refusal_limit.take(seg.source, now_us):
        flow.conn_state = ConnState.REJ
        core.ports.inject(reply_reset(seg))
    core.recorder.denied(flow, reason, now_us)
    if reason not in _ANYBODYS_DOING:
        core.denials.add(seg.key, seg.seq, now_us)
    return DROP


def _from_outside(core: Core, seg: Segment, flow: Flow, now_us: int) -> Result:
    """From a network that is not enforced: only network rules can allow it."""
    local = core.local_workload(seg, flow, now_us, listener=True)
    if isinstance(local, Result):
        return local
    if isinstance(local, DropReason):
        return _deny(core, seg, flow, local, now_us)
    flow.request = request(
        stranger(core, flow.remote_address, now_us), party(local, flow.local_address), flow.local_port
    )
    decision = core.decide(flow, now_us)
    if not core.permitted(decision):
        return _deny(core, seg, flow, decision.reason, now_us)
    if core.live.full:
        return core.turn_away(DropReason.TABLE_FULL)
    core.recorder.allowed(flow, now_us)
    core.release(flow, now_us)
    return _bare(seg)


def out_synack(core: Core, seg: Segment, now_us: int) -> Result:
    """Our stack answers a SYN that was let in."""
    flow, live = core.accepting.get(seg.key), core.live.get(seg.key)
    repeated = (
        live is not None
        and live.state is State.AUTHORISED
        and live.point is Point.RESPONDER
        and seg.ack == (live.isn + 1) & 0xFFFFFFFF
    )
    if flow is None:
        if live is not None and repeated:
            # No enforcer over there, or its proof is in and the program is slow to accept.
            return carried(live)
        return core.turn_away(DropReason.UNKNOWN_FLOW)
    if seg.ack != (flow.isn + 1) & 0xFFFFFFFF:
        return core.drop(DropReason.UNKNOWN_FLOW)  # answers an older SYN of the same ports
    if live is not None:
        if repeated and seg.seq == live.peer_isn:
            return carried(live)
        # A stack that still has the old socket does not open anew. The old flow must not vouch for what comes now.
        core.displace(live, now_us)
    if not flow.answer_wire:
        decision = Decision.ENCRYPT if must_encrypt(flow) else Decision.PLAIN
        try:
            flow.answer_wire, flow.keys = _answer(core, flow, decision, now_us)
        except HandshakeError as e:
            core.recorder.denied(flow, e.reason, now_us, Action.ERROR)
            core.accepting.remove(flow)
            return DROP
    if seg.seq != flow.peer_isn:
        # The last one counts: a stack that has forgotten its first answer picks another.
        flow.peer_isn = seg.seq
        flow.forget_keys()  # of records that count from the one before; nothing has been sealed
    options = syn_options(seg.options, lower_mss=True, add=HANDSHAKE_OPTION)
    return Result(Verdict.ACCEPT, rebuild(seg, options, flow.answer_wire))


def _answer(core: Core, flow: Flow, decision: Decision, now_us: int) -> tuple[bytes, TransportKeys]:
    """Payload of a SYN-ACK or RST, and the connection's keys. Raises HandshakeError."""
    assert flow.decision is not None
    refused = decision is Decision.REFUSE
    suite = 0 if refused else flow.suite
    reason = flow.decision.reason if refused else DropReason.NONE
    rule = flow.decision.rule.id if flow.decision.rule is not None else 0
    if flow.resume is not None:
        return flow.resume.answer(decision, suite=suite, reason=reason, revision=core.revision, rule=rule)
    assert flow.greeting is not None
    assert flow.local is not None
    assert flow.peer is not None
    mine = flow.local.identity
    life = 0 if refused else lifetime_s(now_us, mine.not_after_us, flow.peer.not_after_us)
    payload, keys = flow.greeting.answer(
        flow.local.static,
        flow.local.blob,
        decision,
        suite=suite,
        reason=reason,
        revision=core.revision,
        rule=rule,
        grant=Grant(life, core.config.worker, core.config.workers),
        ephemeral=core.ephemerals.take(),
    )
    flow.issued = Issued(mine.id, flow.peer, keys, life, now_us) if life else None
    return payload, keys


def must_encrypt(flow: Flow) -> bool:
    """Whether this side or the other insists."""
    asks = flow.resume or flow.greeting
    assert flow.decision is not None
    assert asks is not None
    # Without a suite in common a flow that has to be encrypted is denied, or lives because nothing is enforced.
    return flow.suite != 0 and (flow.decision.encrypt or asks.wish is EncryptWish.REQUIRED)


def out_segment(core: Core, seg: Segment) -> Result:
    """Before the proof only a RST leaves (the listener went away), or an ACK that challenges an odd segment."""
    if not seg.payload and not seg.flags & FIN:
        return ACCEPT
    return core.drop(DropReason.PROOF_MISSING)


def in_segment(core: Core, seg: Segment, flow: Flow, now_us: int) -> Result:
    """The initiator's proof, on its ACK or whatever segment arrives first. Nothing else reaches the program."""
    if seg.flags & RST:
        return _in_reset(core, seg, flow, now_us)
    option = record_option(seg)
    if option is not None and flow.former is not None and _proves(flow.former, option):
        flow = _exchange(core, flow, now_us)
    if flow.keys is None or option is None:
        if core.observing and option is None:
            return observing.unproven(core, seg, flow, now_us)
        return core.drop(DropReason.PROOF_MISSING)
    if flow.resume is not None and flow.resume.session.ended:
        return core.drop(DropReason.SESSION_UNKNOWN)  # revoked since the SYN
    if not is_proof(option):
        return _first_record(core, seg, flow, now_us)
    suite = check_proof(flow.keys, option)
    if suite is None or suite not in (0, flow.suite) or (not suite and must_encrypt(flow)):
        return _unproven(core, flow, now_us)
    if suite and carries(seg):
        return core.drop(DropReason.RECORD_MISSING)  # proves who, but not what
    require_checksum(seg)
    if core.live.full:
        return core.drop(DropReason.TABLE_FULL)
    flow.suite = suite
    _proven(core, flow, now_us)
    if suite:
        return encrypted.incoming(core, seg, flow, now_us)
    return Result(Verdict.RELEASE, rebuild(seg, without_ours(seg.options), seg.payload))


def _proves(flow: Flow, option: bytes) -> bool:
    return flow.keys is not None and is_proof(option) and check_proof(flow.keys, option) is not None


def _first_record(core: Core, seg: Segment, flow: Flow, now_us: int) -> Result:
    """The proving ACK was lost, or is late: a record that opens proves as well."""
    if not flow.suite:
        return _unproven(core, flow, now_us)
    require_checksum(seg)
    if flow.records is None:
        flow.records = core.records(flow)
    if core.live.full:
        return core.drop(DropReason.TABLE_FULL)
    result = encrypted.incoming(core, seg, flow, now_us)
    if result.verdict is not Verdict.DROP:
        _proven(core, flow, now_us)
    return result


def _unproven(core: Core, flow: Flow, now_us: int) -> Result:
    if flow.recorded:
        return core.drop(DropReason.PROOF_INVALID)
    flow.auth_result = AuthResult.FAILED
    core.recorder.denied(flow, DropReason.PROOF_INVALID, now_us, Action.ERROR)
    return DROP


def _proven(core: Core, flow: Flow, now_us: int) -> None:
    flow.auth_result = AuthResult.PROVEN
    flow.event_id = b""  # a forged proof seen before, if any, was an event of its own
    assert flow.decision is not None
    flow.reason = flow.decision.reason
    if flow.issued is not None:
        core.sessions.issue(flow.issued)
    core.enforcers.add(flow.remote_address)
    core.ports.proven(flow.remote_address, now_us)
    core.recorder.allowed(flow, now_us, later=True)
    core.release(flow, now_us)


def _in_reset(core: Core, seg: Segment, flow: Flow, now_us: int) -> Result:
    """The initiator gives up, or its enforcer refuses. The stack checks the sequence number; no data passes."""
    require_checksum(seg)
    if has_handshake(seg) and flow.keys is not None:
        try:
            refusal = open_refusal(flow.keys, seg.payload)
        except HandshakeError as e:
            return core.drop(e.reason)
        flow.auth_result = AuthResult.PROVEN
        flow.decider, flow.peer_reason, flow.peer_rule = Decider.PEER, refusal.reason, refusal.rule
        flow.conn_state = ConnState.REJ
        core.recorder.denied(flow, DropReason.PEER_DENIED, now_us)
        core.accepting.remove(flow)
    return Result(Verdict.ACCEPT, rebuild(seg, without_ours(seg.options), b""))
