"""The connecting side: SYN out, SYN-ACK in, proof out, release."""

from __future__ import annotations

from nfq import encrypted, observing
from nfq.core import (
    ACCEPT,
    DROP,
    RELEASE,
    SYN_SENT_TIMEOUT_US,
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
from nfq.handshake import Answer, Decision, Grant, HandshakeError, Hello, Refusal, proof_option, seal_refusal
from nfq.packet import (
    ACK,
    HANDSHAKE_OPTION,
    RST,
    TCP,
    Segment,
    as_reset,
    carries,
    has_handshake,
    parse,
    rebuild,
    reply_ack,
    reply_reset,
    require_checksum,
    syn_options,
    with_option,
    without_ours,
)
from nfq.pathmtu import pieces
from nfq.session import Held, is_resumed, is_unknown, lifetime_s
from sectool.events import Action, Auth, AuthResult, ConnState, Decider, DropReason, Point

PLAUSIBLE = 1 << 24  # bytes either side can have sent before the first packet is seen


def out_syn(core: Core, seg: Segment, now_us: int) -> Result:
    """A local program connects."""
    flow = core.connecting.get(seg.key)
    if flow is not None and flow.isn == seg.seq:
        if flow.attempt is not None:
            # Nobody has answered: the session may be unknown over there.
            core.sessions.forget(flow.attempt.session)
            _greet(core, flow, now_us)
        flow.proofs += 1
        if core.observing and flow.proofs > observing.GIVEN_UP:
            return ACCEPT
        return _with_hello(seg, flow)
    live = core.live.get(seg.key)
    if live is not None and live.auth is Auth.NONE and live.isn == seg.seq and live.state is State.AUTHORISED:
        return RELEASE  # retransmitted towards a peer without an enforcer
    if core.denials.knows(seg.key, seg.seq, now_us):
        return core.turn_away(DropReason.DENIED_BEFORE)
    flow = Flow(seg.key, seg.v6, Point.INITIATOR, State.SYN_SENT, seg.seq, now_us)
    local = core.local_workload(seg, flow, now_us, listener=False)
    if isinstance(local, Result):
        return local
    if isinstance(local, DropReason):
        return deny_syn(core, seg, flow, local, now_us)
    if not core.enforced(seg.destination):
        return _outside(core, seg, flow, now_us)
    if core.connecting.full:
        return core.turn_away(DropReason.TABLE_FULL)
    session = core.sessions.choose(local.identity.id, _where(flow), now_us, core.lane(seg.key))
    if session is not None:
        flow.attempt, flow.syn = session.attempt(core.suites), bytes(seg.data)
    else:
        _greet(core, flow, now_us)
    core.connecting.add(flow)
    core.connecting.expire_after(flow, now_us, SYN_SENT_TIMEOUT_US)
    return _with_hello(seg, flow)


def _where(flow: Flow) -> tuple[int, bytes, bytes]:
    """What a session leads to: protocol, address, port."""
    return TCP, flow.remote_address, flow.key[-2:]


def _greet(core: Core, flow: Flow, now_us: int) -> None:
    """Let a full handshake be made with the next transmission."""
    assert flow.local is not None
    flow.attempt, flow.syn = None, b""
    flow.hello = Hello(flow.local.static, flow.local.blob, now_us, core.suites, core.ephemerals.take())


def _with_hello(seg: Segment, flow: Flow) -> Result:
    hello = flow.attempt or flow.hello
    assert hello is not None
    options = syn_options(seg.options, lower_mss=True, add=HANDSHAKE_OPTION)
    return Result(Verdict.ACCEPT, rebuild(seg, options, hello.payload))


def _read(core: Core, flow: Flow, payload: bytes, now_us: int) -> Answer:
    """Authenticate what answers our SYN, and note how. Raises HandshakeError."""
    if flow.attempt is not None:
        flow.auth = Auth.SESSION
        return flow.attempt.read(payload, now_us)
    assert flow.hello is not None
    flow.auth = Auth.NOISE_IX
    return flow.hello.read(payload, core.verifier, now_us)


def _outside(core: Core, seg: Segment, flow: Flow, now_us: int) -> Result:
    """Towards a network that is not enforced: only network rules can allow it, and no identity leaves."""
    flow.request = request(
        party(flow.local, flow.local_address),
        stranger(core, flow.remote_address, now_us),
        flow.remote_port,
    )
    decision = core.decide(flow, now_us)
    if not core.permitted(decision):
        return deny_syn(core, seg, flow, decision.reason, now_us)
    if core.live.full:
        return core.turn_away(DropReason.TABLE_FULL)
    core.recorder.allowed(flow, now_us)
    core.release(flow, now_us)
    return RELEASE


def deny_syn(core: Core, seg: Segment, flow: Flow, reason: DropReason, now_us: int) -> Result:
    """A local SYN is denied before it leaves."""
    if core.observing:
        return observing.let_in(core, seg, flow, reason, now_us)
    flow.state = State.DENIED
    flow.revision = core.revision
    if core.config.reject:
        flow.conn_state = ConnState.REJ
        core.ports.reset_local(seg)
    core.recorder.denied(flow, reason, now_us)
    core.denials.add(seg.key, seg.seq, now_us)
    return DROP


def in_synack(core: Core, seg: Segment, now_us: int) -> Result:
    """The peer answers."""
    flow = core.connecting.get(seg.key)
    if flow is None:
        return _again(core, seg)
    if seg.ack != (flow.isn + 1) & 0xFFFFFFFF:
        return core.drop(DropReason.HANDSHAKE_FORGED)
    require_checksum(seg)
    if not has_handshake(seg):
        return _bare_answer(core, seg, flow, now_us)
    if flow.attempt is None and is_resumed(seg.payload):
        return core.drop(DropReason.HANDSHAKE_TIMEOUT)  # too late: the session was given up by our next SYN
    try:
        answer = _read(core, flow, seg.payload, now_us)
    except HandshakeError as e:
        return _bad_answer(core, seg, flow, e.reason, now_us)
    flow.auth_result, flow.peer = AuthResult.PROVEN, answer.peer
    core.enforcers.add(flow.remote_address)
    if answer.decision is Decision.REFUSE:
        return _deny_answer(core, seg, flow, DropReason.HANDSHAKE_MALFORMED, now_us)
    assert flow.local is not None
    flow.request = core.ask(
        (flow.local.identity, flow.local_address),
        (answer.peer, flow.remote_address),
        flow.remote_port,
        answer.suite != 0,
    )
    decision = core.decide(flow, now_us)
    flow.peer_rule = answer.rule
    # The last word on encryption is ours, and the proof says it: either side's wish is enough.
    flow.suite = answer.suite if decision.encrypt or answer.decision is Decision.ENCRYPT else 0
    if core.live.full:
        core.recorder.count(DropReason.TABLE_FULL)
        return observing.once(seg) if core.observing else DROP
    if not core.permitted(decision):
        refusal = Refusal(decision.reason, core.revision, decision.rule.id if decision.rule else 0)
        core.ports.inject(
            reply_reset(seg, options=HANDSHAKE_OPTION, payload=seal_refusal(answer.keys, refusal))
        )
        return _deny_answer(core, seg, flow, decision.reason, now_us)
    flow.keys = answer.keys
    flow.peer_isn = seg.seq
    if flow.suite:
        flow.records = core.records(flow)  # before anything may leave: what fails must not leave it plain
    flow.held = _granted(flow, answer, now_us)
    flow.proof = proof_option(answer.keys, flow.suite)
    flow.state, flow.proofs = State.PROVING, 0
    # A refusal of an earlier transmission, if any, was an event of its own.
    flow.event_id, flow.decider, flow.peer_reason = b"", Decider.LOCAL, DropReason.NONE
    core.recorder.allowed(flow, now_us, later=True)
    core.settle(flow, now_us)
    core.journal(flow)  # if we die now, the successor takes the proof as seen: most likely it was
    return stripped(core, seg, flow, encrypted=flow.suite != 0)


def _granted(flow: Flow, answer: Answer, now_us: int) -> tuple[Held, Grant] | None:
    """The session that a full handshake leaves, to be used once the responder is known to have seen our proof."""
    if not answer.grant.lifetime_s:
        return None
    assert flow.local is not None
    mine = flow.local.identity
    life = min(answer.grant.lifetime_s, lifetime_s(now_us, mine.not_after_us))
    return (Held(mine.id, answer.peer, answer.keys, life, now_us), answer.grant) if life else None


def _proven(core: Core, flow: Flow, now_us: int) -> None:
    """The responder has seen our proof, or will most likely."""
    if flow.held is not None:
        session, grant = flow.held
        core.sessions.learn(session, _where(flow), grant, core.lane(flow.key))
    core.release(flow, now_us)


def _again(core: Core, seg: Segment) -> Result:
    """A SYN-ACK of a connection that is made on this side: our ACK was lost, or the server's queue was full.

    The stack answers it with an ACK and takes nothing else from it, so it passes bare, whatever it carries.
    """
    flow = core.live.get(seg.key)
    if flow is None or flow.point is not Point.INITIATOR or flow.state is State.CUT:
        return core.turn_away(DropReason.UNKNOWN_FLOW)
    if flow.auth is Auth.NONE:
        return observing.bare(seg)
    if seg.seq != flow.peer_isn or seg.ack != (flow.isn + 1) & 0xFFFFFFFF:
        return core.drop(DropReason.HANDSHAKE_FORGED)
    if flow.state is State.AUTHORISED and flow.proof and has_handshake(seg):
        core.ports.inject(
            reply_ack(seg, flow.proof)
        )  # none of our proofs has arrived, and the kernel makes no more
    bare = stripped(core, seg, flow, encrypted=flow.suite != 0)
    return bare if flow.state is State.PROVING else bare._replace(verdict=carried(flow).verdict)


def _bare_answer(core: Core, seg: Segment, flow: Flow, now_us: int) -> Result:
    """No enforcer answers over there, or somebody in between wants it to look so: then the true answer may still come.

    A program that is to learn of denials at once is told all the same.
    """
    if core.observing:
        return observing.let_in(core, seg, flow, DropReason.NO_IDENTITY, now_us)
    if core.config.reject:
        return _deny_answer(core, seg, flow, DropReason.NO_IDENTITY, now_us)
    if flow.recorded:
        return core.drop(DropReason.NO_IDENTITY)
    flow.revision = core.revision
    core.recorder.denied(flow, DropReason.NO_IDENTITY, now_us)
    return DROP


def _bad_answer(core: Core, seg: Segment, flow: Flow, reason: DropReason, now_us: int) -> Result:
    """An answer that does not authenticate may be an attacker's: the true one may still come.

    A credential that is refused inside an answer that does authenticate is the peer's own: that is final.
    """
    if reason is DropReason.SESSION_UNKNOWN:
        return core.drop(reason)  # revoked or expired since our SYN: the next one is a full handshake
    if core.observing and reason not in (DropReason.HANDSHAKE_FORGED, DropReason.SESSION_FORGED):
        flow.auth_result = AuthResult.FAILED
        return observing.let_in(core, seg, flow, reason, now_us)
    if reason in (
        DropReason.HANDSHAKE_FORGED,
        DropReason.SESSION_FORGED,
        DropReason.HANDSHAKE_MALFORMED,
        DropReason.VERSION_UNSUPPORTED,
    ):
        if not flow.recorded:
            flow.auth_result = AuthResult.FAILED
            core.recorder.denied(flow, reason, now_us, Action.ERROR)
            return DROP
        return core.drop(reason)
    flow.auth_result = AuthResult.FAILED
    return _deny_answer(core, seg, flow, reason, now_us)


def _deny_answer(core: Core, seg: Segment, flow: Flow, reason: DropReason, now_us: int) -> Result:
    flow.state = State.DENIED
    flow.revision = core.revision
    flow.conn_state = ConnState.REJ
    core.recorder.denied(flow, reason, now_us)
    core.connecting.remove(flow)
    core.denials.add(seg.key, flow.isn, now_us)
    # The SYN-ACK itself becomes the RST that the local program is told with.
    return Result(Verdict.ACCEPT, as_reset(seg)) if core.config.reject else DROP


def in_reset(core: Core, seg: Segment, flow: Flow, now_us: int) -> Result:
    """A RST answers our SYN: the other enforcer's refusal if it says so and proves it."""
    if seg.ack != (flow.isn + 1) & 0xFFFFFFFF:
        return core.drop(DropReason.HANDSHAKE_FORGED)
    require_checksum(seg)
    if not has_handshake(seg):
        # The peer, or a router, refuses without an enforcer. It gives no access, so the program may know.
        flow.conn_state = ConnState.REJ
        if not flow.recorded:
            core.recorder.denied(flow, DropReason.NO_IDENTITY, now_us, Action.ERROR)
        core.connecting.remove(flow)
        return Result(Verdict.ACCEPT, rebuild(seg, without_ours(seg.options), b""))
    if is_unknown(seg.payload):
        return _hinted(core, seg, flow, now_us)
    try:
        answer = _read(core, flow, seg.payload, now_us)
    except HandshakeError as e:
        return core.drop(e.reason)
    if answer.decision is not Decision.REFUSE:
        return core.drop(DropReason.HANDSHAKE_MALFORMED)
    if not flow.recorded:
        flow.auth_result, flow.peer = AuthResult.PROVEN, answer.peer
        flow.decider, flow.peer_reason, flow.peer_rule = Decider.PEER, answer.reason, answer.rule
        flow.conn_state = ConnState.REJ
        flow.revision = core.revision
        core.recorder.denied(flow, DropReason.PEER_DENIED, now_us)
    if not core.config.reject:
        # The SYN will be retransmitted, and may be let in by then, but not with a handshake seen over there before.
        _greet(core, flow, now_us)
        return DROP
    core.connecting.remove(flow)
    return Result(Verdict.ACCEPT, rebuild(seg, without_ours(seg.options), b""))


def _hinted(core: Core, seg: Segment, flow: Flow, now_us: int) -> Result:
    """The responder does not know the session. Whoever says so could as well have kept our SYN from it.

    So it may make us do no more than that would: a full handshake, a second earlier.
    """
    if flow.attempt is None or not flow.attempt.unknown(seg.payload):
        return core.drop(DropReason.SESSION_FORGED)
    core.sessions.forget(flow.attempt.session)
    syn = flow.syn
    _greet(core, flow, now_us)
    core.ports.repeat(syn)
    return core.drop(DropReason.SESSION_UNKNOWN)


def out_segment(core: Core, seg: Segment, flow: Flow, now_us: int) -> Result:
    """Anything but a SYN of a connection that is not released yet."""
    if flow.state is not State.PROVING:
        # The stack answers something odd with a RST; nothing else can leave before the peer is known.
        return ACCEPT if seg.flags & RST and not seg.payload else core.drop(DropReason.PROOF_MISSING)
    # What follows the proving ACK at once need not wait for the responder: two segments have the proof then. Should
    # both be lost, the responder's next SYN-ACK makes us prove again (_again).
    first, carrying = flow.proofs == 0, carries(seg)
    enough = not first and carrying
    flow.proofs += 1
    if flow.records is not None and carrying:
        sealed = encrypted.outgoing(core, seg, flow, now_us)
        if not enough or sealed.verdict is Verdict.DROP:
            return sealed if sealed.verdict is Verdict.DROP else sealed._replace(verdict=Verdict.ACCEPT)
        _proven(core, flow, now_us)
        return sealed._replace(hold=seg.key)
    parts = [seg]
    if seg.payload and encrypted.too_large(core, seg, flow):
        cut = pieces(seg.data, seg.tcp_off, seg.data_off, seg.v6, flow.path_mtu)
        parts = [parse(part, outbound=True) for part in cut]
    for part in parts:
        options = with_option(part.options, flow.proof)
        if options is None:
            return core.drop(DropReason.PACKET_MALFORMED)
        proven = rebuild(part, options, part.payload)
        if part is not parts[-1]:
            core.ports.inject(proven)
    if not enough:
        # A program that writes at once shall not wait until the other side has judged an ACK: its data proves as well.
        bare = first and seg.flags == ACK and not carrying
        return Result(Verdict.YIELD, proven, seg.key) if bare else Result(Verdict.ACCEPT, proven)
    _proven(core, flow, now_us)
    return Result(carried(flow).verdict, proven, seg.key)


def in_segment(core: Core, seg: Segment, flow: Flow, now_us: int) -> Result:
    """The responder's first packet after the handshake says that it has seen the proof, if it comes before our data."""
    if seg.flags & RST and flow.state is State.SYN_SENT:
        return in_reset(core, seg, flow, now_us)
    if flow.state is State.SYN_SENT:
        # A bare ACK makes the stack reset an old connection of the peer's (RFC 9293 3.5.1); data never passes.
        return core.drop(DropReason.PROOF_MISSING) if seg.payload else ACCEPT
    if seg.flags & RST:
        return encrypted.incoming(
            core, seg, flow, now_us
        )  # says nothing about the proof; the stack checks its place
    # From the byte before its first one (a keepalive's) on, and not so far that a blind guess has a chance.
    behind = (seg.seq - flow.peer_isn) & 0xFFFFFFFF
    acked = (seg.ack - flow.isn - 1) & 0xFFFFFFFF
    if behind >= PLAUSIBLE or acked >= PLAUSIBLE:
        return core.drop(DropReason.HANDSHAKE_FORGED)
    if flow.records is None:
        _proven(core, flow, now_us)
        return RELEASE
    result = encrypted.incoming(core, seg, flow, now_us)
    if result.verdict is not Verdict.DROP:
        _proven(core, flow, now_us)
    return result
