"""The host whose program sends first: datagrams held, Hello out, Answer in, proof out, Ack in."""

from __future__ import annotations

import hmac

from nfq.core import ACCEPT, DROP, Core, Result, Verdict, address, party, stranger
from nfq.datagram import MIN_MTU, Datagram, craft, rebuild
from nfq.flow import LocalWorkload, State
from nfq.handshake import (
    Answer,
    Decision,
    Grant,
    HandshakeError,
    Hello,
    Refusal,
    proof_option,
    seal_refusal,
)
from nfq.ip import UDP
from nfq.recorder import Counts
from nfq.session import Held, lifetime_s
from nfq.udpcontrol import PROOF_SIZE, Kind, ack, write
from nfq.udpcore import (
    cut,
    deny,
    finish,
    journal,
    plain,
    release,
    request,
    seal_with,
    settle,
    unproven,
    wait,
    workload,
)
from nfq.udpflow import DENIED_US, Settled, UdpFlow
from sectool.events import Action, Auth, AuthResult, ConnState, Decider, DropReason, Point
from sectool.policy import Party

# Between a message's transmissions; after the last the attempt is given up.
WAITS_US = (250_000, 500_000, 1_000_000, 1_250_000)
REFUSED_US = 3_000_000  # how long a peer's refusal is believed
FAILED_US = 1_000_000  # how long after an attempt that led to nothing the next may begin
DOUBT_US = 1_000_000  # how often a peer may say that it does not know a flow
DOUBT_PLAIN_US = 5_000_000  # the same where it cannot show that it has seen any of its datagrams


def sender(core: Core, d: Datagram, flow: UdpFlow, now_us: int) -> LocalWorkload | Result:
    """Whose program sends the first datagram of a flow to an enforced network; anything else has its verdict."""
    local = workload(core, d, flow, now_us, receiver=False)
    if isinstance(local, Result):
        return local
    if isinstance(local, DropReason):
        return deny(core, d, flow, local, now_us)
    if not core.enforced(d.destination):
        return _outside(core, d, flow, now_us)
    if core.observing and d.destination not in core.enforcers:
        # A program over there shall not be sent what it does not understand, nor one here wait for nothing.
        return deny(core, d, flow, DropReason.NO_IDENTITY, now_us)
    return local


def begin(core: Core, flow: UdpFlow, now_us: int) -> Result:
    """A full handshake; the datagram waits for it."""
    if core.udp.connecting.full:
        return core.turn_away(DropReason.TABLE_FULL)
    core.udp.connecting.add(flow)
    begin_full(core, flow, now_us)
    return wait(flow)


def begin_full(core: Core, flow: UdpFlow, now_us: int) -> None:
    """Send the first Hello of a flow that is connecting."""
    local = flow.local
    assert local is not None
    flow.hello = Hello(local.static, local.blob, now_us, core.suites, core.ephemerals.take(), protocol=UDP)
    flow.tries = 0
    _greet(core, flow)
    core.udp.arm(flow, now_us + WAITS_US[0])


def where(flow: UdpFlow) -> tuple[int, bytes, bytes]:
    """What a session leads to: protocol, address, port."""
    return UDP, flow.remote_address, flow.key[-2:]


def _greet(core: Core, flow: UdpFlow) -> None:
    assert flow.hello is not None
    core.ports.inject(craft(flow.key, write(Kind.HELLO, flow.hello.payload)))


def _outside(core: Core, d: Datagram, flow: UdpFlow, now_us: int) -> Result:
    """Towards a network that is not enforced: only network rules can allow it, and no identity leaves."""
    flow.request = request(
        party(flow.local, flow.local_address), stranger(core, flow.remote_address, now_us), flow.remote_port
    )
    decision = core.decide(flow, now_us)
    if not core.permitted(decision):
        return deny(core, d, flow, decision.reason, now_us)
    if core.udp.live.full:
        return core.turn_away(DropReason.TABLE_FULL)
    core.recorder.allowed(flow, now_us)
    release(core, flow, now_us)
    return plain(core, d, flow, now_us)


def proving(core: Core, d: Datagram, flow: UdpFlow) -> Result:
    """A datagram of a plain flow before the responder has said that it has seen the proof."""
    if len(d.data) + PROOF_SIZE <= MIN_MTU:
        return Result(Verdict.ACCEPT, rebuild(d, write(Kind.PROOF_DATA, flow.proof, d.payload)))
    if not flow.proved:
        _prove(core, flow)
    return wait(flow)


def _prove(core: Core, flow: UdpFlow) -> None:
    """The proof alone."""
    flow.proved = True
    core.ports.inject(craft(flow.key, write(Kind.PROOF, flow.proof)))


def timer(core: Core, flow: UdpFlow, now_us: int) -> None:
    """Nobody has answered in time."""
    flow.tries += 1
    if flow.tries < len(WAITS_US):
        (_greet if flow.state is State.SYN_SENT else _prove)(core, flow)
        core.udp.arm(flow, now_us + WAITS_US[flow.tries])
        return
    if flow.state is State.PROVING:
        flow.conn_state = ConnState.SH
        finish(core, flow, Counts(), now_us)
    elif core.observing:
        without_identity(core, flow, DropReason.NO_IDENTITY, now_us)
        return
    else:
        core.udp.connecting.remove(flow)
        if not flow.recorded:
            flow.revision = core.revision
            core.recorder.denied(flow, DropReason.HANDSHAKE_TIMEOUT, now_us, Action.ERROR)
        live = core.udp.find(core.udp.live, flow.key)
        if live is None:
            core.udp.denied.add(True, flow.key, now_us + FAILED_US)
        else:
            live.doubted = False  # whoever said that it is unknown has not answered since
    core.udp.settled.append(Settled(flow.key))


def without_identity(core: Core, flow: UdpFlow, reason: DropReason, now_us: int) -> None:
    """Nothing is enforced: what waits for a handshake that leads to nothing goes without."""
    core.udp.connecting.remove(flow)
    core.udp.arm(flow, 0)
    flow.hello = flow.attempt = None
    unproven(core, flow, reason, now_us)
    core.udp.settled.append(Settled(flow.key))


def in_answer(core: Core, d: Datagram, body: bytes, now_us: int) -> Result | None:
    """Message 2. None: this is no answer to anything."""
    flow = core.udp.find(core.udp.connecting, d.key)
    if flow is None or flow.hello is None:
        live = core.udp.find(core.udp.live, d.key)
        repeated = live is not None and body[:34] == live.answer_wire
        return DROP if repeated else None
    assert flow.hello is not None
    flow.auth = Auth.NOISE_IX
    try:
        answer = flow.hello.read(body, core.verifier, now_us)
    except HandshakeError as e:
        return bad_answer(core, flow, e.reason, now_us)
    flow.auth_result, flow.peer, flow.peer_rule = AuthResult.PROVEN, answer.peer, answer.rule
    if answer.decision is Decision.REFUSE:
        return refused(core, flow, answer, now_us)
    flow.request = request(
        party(flow.local, flow.local_address),
        Party(answer.peer.labels, answer.peer.spiffe_id, address(flow.remote_address)),
        flow.remote_port,
        can_encrypt=answer.suite != 0,
    )
    decision = core.decide(flow, now_us)
    flow.suite = answer.suite if decision.encrypt or answer.decision is Decision.ENCRYPT else 0
    if core.udp.live.full:
        return core.drop(DropReason.TABLE_FULL)
    if not core.permitted(decision):
        refusal = Refusal(decision.reason, core.revision, decision.rule.id if decision.rule else 0)
        core.ports.inject(craft(flow.key, write(Kind.REFUSAL, seal_refusal(answer.keys, refusal))))
        return over(core, flow, decision.reason, now_us)
    flow.keys, flow.answer_wire = answer.keys, body[:34]
    flow.held = _granted(flow, answer, now_us)
    _answered(core, flow, now_us)
    return DROP


def _granted(flow: UdpFlow, answer: Answer, now_us: int) -> tuple[Held, Grant] | None:
    """The session that a full handshake leaves, to be used once the responder is known to have seen our proof."""
    assert flow.local is not None
    mine = flow.local.identity
    life = min(answer.grant.lifetime_s, lifetime_s(now_us, mine.not_after_us))
    return (Held(mine.id, answer.peer, answer.keys, life, now_us), answer.grant) if life else None


def _answered(core: Core, flow: UdpFlow, now_us: int) -> None:
    """The responder has proven itself and both policies allow: what was held may go, with the proof."""
    prove(core, flow, now_us)
    if not flow.waited:
        _prove(core, flow)


def prove(core: Core, flow: UdpFlow, now_us: int) -> None:
    """The flow is live; its datagrams carry the proof until the Ack is there, or it goes alone after a while."""
    assert flow.keys is not None
    flow.proof = proof_option(flow.keys, flow.suite)
    flow.ack = ack(flow.keys)
    flow.state, flow.hello, flow.tries = State.PROVING, None, 0
    flow.event_id, flow.decider, flow.peer_reason = b"", Decider.LOCAL, DropReason.NONE
    core.recorder.allowed(flow, now_us)
    if flow.suite:
        flow.sealed = seal_with(flow)
    settle(core, flow, now_us)
    journal(core, flow)
    core.udp.arm(flow, now_us + WAITS_US[0])
    core.udp.settled.append(Settled(flow.key))


def bad_answer(core: Core, flow: UdpFlow, reason: DropReason, now_us: int) -> Result:
    """An answer that does not authenticate may be anybody's, the true one still come. A credential's fault is final."""
    flow.auth_result = AuthResult.FAILED
    if core.observing and reason not in (DropReason.HANDSHAKE_FORGED, DropReason.SESSION_FORGED):
        without_identity(core, flow, reason, now_us)
        return DROP
    if reason in (
        DropReason.HANDSHAKE_FORGED,
        DropReason.HANDSHAKE_MALFORMED,
        DropReason.SESSION_FORGED,
        DropReason.VERSION_UNSUPPORTED,
    ):
        if flow.recorded:
            return core.drop(reason)
        flow.revision = core.revision
        core.recorder.denied(flow, reason, now_us, Action.ERROR)
        return DROP
    return over(core, flow, reason, now_us)


def refused(core: Core, flow: UdpFlow, answer: Answer, now_us: int) -> Result:
    flow.decider, flow.peer_reason = Decider.PEER, answer.reason
    return over(core, flow, DropReason.PEER_DENIED, now_us, REFUSED_US)


def over(core: Core, flow: UdpFlow, reason: DropReason, now_us: int, memory_us: int = DENIED_US) -> Result:
    """The attempt is denied; what was held is judged again, and dropped by the memory of it."""
    flow.state, flow.conn_state, flow.revision = State.DENIED, ConnState.REJ, core.revision
    core.recorder.denied(flow, reason, now_us)
    core.udp.connecting.remove(flow)
    core.udp.arm(flow, 0)
    before = core.udp.find(core.udp.live, flow.key)
    if before is not None:
        finish(core, before, cut(core, before), now_us)
    core.udp.denied.add(True, flow.key, now_us + memory_us)
    core.udp.settled.append(Settled(flow.key))
    return DROP


def in_ack(core: Core, d: Datagram, now_us: int) -> Result | None:
    """The responder says that it has seen the proof. None: nobody who knows the keys says so."""
    flow = core.udp.find(core.udp.live, d.key)
    if flow is None or flow.point is not Point.INITIATOR or not hmac.compare_digest(d.payload, flow.ack):
        return None
    if flow.state is State.PROVING:
        heard(core, flow, now_us)
    return DROP


def heard(core: Core, flow: UdpFlow, now_us: int) -> None:
    """The responder has seen the proof."""
    core.enforcers.add(flow.remote_address)
    core.ports.proven(flow.remote_address, now_us)
    if flow.held is not None:
        session, grant = flow.held
        core.sessions.learn(session, where(flow), grant, core.lane(flow.key))
    release(core, flow, now_us)
    core.udp.settled.append(Settled(flow.key))


def in_bare(core: Core, flow: UdpFlow, now_us: int) -> Result:
    """No enforcer answers over there, or somebody wants it to look so: the true Answer may still come."""
    if flow.attempt is not None:
        return wait(flow)  # under a session it may have overtaken the answer, or that was lost
    if core.observing:
        without_identity(core, flow, DropReason.NO_IDENTITY, now_us)
        return ACCEPT
    if flow.recorded:
        return core.drop(DropReason.NO_IDENTITY)
    flow.revision = core.revision
    core.recorder.denied(flow, DropReason.NO_IDENTITY, now_us)
    return DROP


def in_unknown(core: Core, d: Datagram, body: bytes, now_us: int) -> Result | None:
    """The peer says that it does not know this flow: the next datagram makes a new handshake."""
    flow = core.udp.find(core.udp.live, d.key)
    if flow is None or flow.point is not Point.INITIATOR or len(body) != 8:
        return None
    if flow.auth is Auth.NONE and not (core.observing and flow.let_in):
        return None
    if flow.doubted or now_us - flow.told_us < (DOUBT_US if flow.sealed is not None else DOUBT_PLAIN_US):
        return core.drop(DropReason.RATE_LIMITED)
    if flow.sealed is not None and body not in (flow.tails or ()):
        return core.drop(DropReason.HANDSHAKE_FORGED)
    flow.told_us, flow.doubted = now_us, True
    core.enforcers.add(flow.remote_address)
    if flow.sealed is None:
        cut(core, flow)  # so that its next datagram comes here
    return DROP
