"""Datagram flows under a session: the first datagram carries the handshake in front, and nothing waits for an answer.

    initiator                                                    responder
    ---------                                                    ---------
    egress judged by the session's peer
    RESUME, first datagram sealed under keys of this RESUME ───► ingress judged, datagram delivered, flow is live
    flow is live ◄── RESUMED: nonce, decision ──────────────────
    FALL BACK    ◄── UNKNOWN SESSION: a hint, proves nothing ─── (no such session, or another workload has the port)

RESUME is authentic by its tag. What follows in an encrypted flow is so too, so there is neither proof nor Ack; a plain
one goes on with a proof, as after a full handshake, before anything else is let in. Encryption is decided by the
responder, who is told whether the initiator's policy asks for it. Without an answer RESUME is sent again once, then a
full handshake begins.
"""

from __future__ import annotations

from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from nfq.core import DROP, Core, Result, Verdict, address, party
from nfq.datagram import MIN_MTU, Datagram, craft, rebuild
from nfq.flow import LocalWorkload, State
from nfq.handshake import Decision, HandshakeError
from nfq.ip import UDP
from nfq.responder import must_encrypt
from nfq.session import is_unknown, unknown
from nfq.suites import choose
from nfq.udpcontrol import HEADER, Control, Kind, write
from nfq.udpcore import deny, forget_early, note_early, release, request, seal_with, wait, workload
from nfq.udpflow import Settled, UdpFlow
from nfq.udpinitiator import WAITS_US, bad_answer, begin_full, over, prove, refused, where
from nfq.udpresponder import displace_own, half_open, rivals
from sectool.events import Auth, AuthResult, ConnState, DropReason, Point
from sectool.policy import Party

EARLY_LIMIT: Final = 16  # datagrams of a flow that go before the answer
EARLY_BYTES: Final = 8 << 20  # of all flows: kept to be sent again should the session be unknown
_OVERHEAD: Final = 1 + 16  # number, tag
_RESUME_SIZE: Final = HEADER + 52


def _sealed(key: bytes, number: int, payload: bytes) -> bytes:
    """An early datagram: its number, which is its nonce under a key of this RESUME alone, and the ciphertext."""
    head = bytes((number,))
    return head + AESGCM(key).encrypt(bytes(11) + head, payload, None)


def _opened(key: bytes, data: bytes) -> bytes | None:
    if len(data) < _OVERHEAD or data[0] >= EARLY_LIMIT:
        return None
    try:
        return AESGCM(key).decrypt(bytes(11) + data[:1], data[1:], None)
    except InvalidTag:
        return None


# -- initiator -------------------------------------------------------------------------------------------------------


def begin(core: Core, d: Datagram, flow: UdpFlow, local: LocalWorkload, now_us: int) -> Result | None:
    """Begin a flow under a session. None: there is none, or by what it tells the flow would be denied."""
    session = core.sessions.choose(local.identity.id, where(flow), now_us, core.lane(flow.key))
    if session is None or core.udp.connecting.full:
        return None
    flow.peer = session.peer
    if not _permitted(core, flow, now_us, core.suites != 0):
        flow.peer, flow.request, flow.decision = None, None, None
        return None  # somebody else may have the port by now: a full handshake will show who
    assert flow.decision is not None
    flow.attempt = session.attempt(core.suites, UDP, required=flow.decision.encrypt)
    core.udp.connecting.add(flow)
    core.udp.arm(flow, now_us + WAITS_US[0])
    return early(core, d, flow)


def _permitted(core: Core, flow: UdpFlow, now_us: int, can_encrypt: bool) -> bool:
    assert flow.peer is not None
    flow.request = request(
        party(flow.local, flow.local_address),
        Party(flow.peer.labels, flow.peer.spiffe_id, address(flow.remote_address)),
        flow.remote_port,
        can_encrypt=can_encrypt,
    )
    return core.permitted(core.decide(flow, now_us))


def early(core: Core, d: Datagram, flow: UdpFlow) -> Result:
    """A datagram before the answer: behind RESUME, or held where it does not fit."""
    assert flow.attempt is not None
    number, size = len(flow.early), len(d.data)
    if (
        number >= EARLY_LIMIT
        or size + _RESUME_SIZE + _OVERHEAD > MIN_MTU
        or core.udp.early_bytes + size > EARLY_BYTES
    ):
        if not number and not flow.waited:
            _ask(core, flow)
        return wait(flow)
    flow.early = (*flow.early, d.data)
    core.udp.early_bytes += size
    return Result(Verdict.ACCEPT, rebuild(d, _resume(flow, number, d.payload)))


def _resume(flow: UdpFlow, number: int, payload: bytes) -> bytes:
    assert flow.attempt is not None
    keys, _ = flow.attempt.session.keys(flow.attempt.payload, b"")
    return write(Kind.RESUME, flow.attempt.payload, _sealed(keys.initiator_to_responder, number, payload))


def _ask(core: Core, flow: UdpFlow) -> None:
    """RESUME alone."""
    assert flow.attempt is not None
    core.ports.inject(craft(flow.key, write(Kind.RESUME, flow.attempt.payload)))


def timer(core: Core, flow: UdpFlow, now_us: int) -> None:
    """No answer: RESUME once more (the responder takes each datagram once), then a full handshake."""
    flow.tries += 1
    if flow.tries == 1:
        _ask(core, flow)
        core.udp.arm(flow, now_us + WAITS_US[1])
        return
    # What was sent may have been delivered. A datagram of UDP may be lost, but should not come twice.
    forget_early(core, flow)
    _fall_back(core, flow, now_us)


def _fall_back(core: Core, flow: UdpFlow, now_us: int) -> None:
    assert flow.attempt is not None
    core.sessions.forget(flow.attempt.session)
    flow.attempt, flow.peer, flow.request, flow.decision = None, None, None, None
    flow.auth, flow.auth_result = Auth.NONE, AuthResult.NONE
    begin_full(core, flow, now_us)


def in_unknown_session(core: Core, d: Datagram, body: bytes, now_us: int) -> Result | None:
    """The responder does not know the session. Whoever says so has seen RESUME, and can make us do only this."""
    flow = core.udp.find(core.udp.connecting, d.key)
    if flow is None or flow.attempt is None or not is_unknown(body) or not flow.attempt.unknown(body):
        return None
    sent = forget_early(core, flow)
    _fall_back(core, flow, now_us)
    for packet in sent:  # nobody has got these: they wait for the new handshake
        core.ports.repeat(packet)
    return core.drop(DropReason.SESSION_UNKNOWN)


def in_resumed(core: Core, d: Datagram, body: bytes, now_us: int) -> Result | None:
    """The responder's answer."""
    flow = core.udp.find(core.udp.connecting, d.key)
    if flow is None or flow.attempt is None:
        live = core.udp.find(core.udp.live, d.key)
        return DROP if live is not None and body[:34] == live.answer_wire else None
    flow.auth = Auth.SESSION
    try:
        answer = flow.attempt.read(body, now_us)
    except HandshakeError as e:
        if e.reason is DropReason.SESSION_UNKNOWN:
            return core.drop(e.reason)  # ended meanwhile: the timer goes on with a full handshake
        return bad_answer(core, flow, e.reason, now_us)
    flow.auth_result, flow.peer, flow.peer_rule = AuthResult.PROVEN, answer.peer, answer.rule
    if answer.decision is Decision.REFUSE:
        forget_early(core, flow)
        return refused(core, flow, answer, now_us)
    if not _permitted(core, flow, now_us, answer.suite != 0):
        assert flow.decision is not None
        forget_early(core, flow)
        return over(core, flow, flow.decision.reason, now_us)
    assert flow.decision is not None
    flow.suite = answer.suite if answer.decision is Decision.ENCRYPT else 0
    if flow.decision.encrypt and not flow.suite:  # policy has changed since RESUME asked: ask again
        forget_early(core, flow)
        _fall_back(core, flow, now_us)
        return DROP
    if core.udp.live.full:
        return core.drop(DropReason.TABLE_FULL)
    forget_early(core, flow)
    flow.attempt, flow.keys, flow.answer_wire = None, answer.keys, body[:34]
    flow.event_id = b""
    core.ports.proven(flow.remote_address, now_us)
    if not flow.suite:
        prove(core, flow, now_us)  # what is said in the clear, and when it suits: most flows are over by then
        return DROP
    flow.sealed = seal_with(flow)
    core.recorder.allowed(flow, now_us)
    release(core, flow, now_us)
    core.udp.settled.append(Settled(flow.key))
    return DROP


# -- responder -------------------------------------------------------------------------------------------------------


def in_resume(core: Core, d: Datagram, control: Control, now_us: int) -> Result:
    """A flow under a session, with its first datagram. A tag is cheap: nothing is limited by rate."""
    live = core.udp.find(core.udp.live, d.key)
    for known in (*rivals(core, d.key), live):
        if known is not None and known.resume is not None and known.resume.payload == control.body:
            return _again(core, d, known, control.rest, now_us)
    try:
        resume = core.sessions.open(control.body, now_us, UDP)
    except HandshakeError as e:
        if e.reason is DropReason.SESSION_UNKNOWN:
            return _hint(core, d, control.body, now_us)
        if live is not None:
            return core.drop(e.reason)
        flow = UdpFlow(d.key, d.v6, Point.RESPONDER, State.DENIED, now_us)
        flow.auth, flow.auth_result = Auth.SESSION, AuthResult.FAILED
        core.recorder.denied(flow, e.reason, now_us)
        return DROP
    flow = UdpFlow(d.key, d.v6, Point.RESPONDER, State.AUTHORISED, now_us)
    flow.auth, flow.auth_result, flow.peer = Auth.SESSION, AuthResult.PROVEN, resume.session.peer
    local = workload(core, d, flow, now_us, receiver=True)
    if isinstance(local, Result):
        return local
    if isinstance(local, DropReason):
        resume.take()
        return deny(core, d, flow, local, now_us)
    if local.identity.id != resume.session.local:
        return _hint(
            core, d, control.body, now_us
        )  # another workload has the port, or its credential was renewed
    resume.take()
    flow.resume = resume
    suite = choose(resume.suites, core.config.suites)
    flow.request = request(
        Party(flow.peer.labels, flow.peer.spiffe_id, address(flow.remote_address)),
        party(local, flow.local_address),
        flow.local_port,
        can_encrypt=suite is not None,
    )
    decision = core.decide(flow, now_us)
    flow.suite = suite.cipher if suite is not None else 0
    if not core.permitted(decision):
        if core.refusal_limit.take(d.source, now_us):
            _answer(core, flow, Decision.REFUSE)
            flow.conn_state = ConnState.REJ
        core.recorder.denied(flow, decision.reason, now_us)
        return DROP
    if core.udp.live.full:
        return core.drop(DropReason.TABLE_FULL)
    encrypted = must_encrypt(flow)
    _answer(core, flow, Decision.ENCRYPT if encrypted else Decision.PLAIN)
    if not encrypted:
        flow.suite = 0
    displace_own(core, flow)
    core.recorder.allowed(flow, now_us)
    if encrypted:
        flow.sealed = seal_with(flow)
        core.ports.proven(flow.remote_address, now_us)
        release(core, flow, now_us)
    else:
        # RESUME is bound to no address. Whoever withholds one, and sends it from elsewhere, must not go on from there
        # in the clear: until a proof is seen nothing more is let in, and what the kernel carries is another flow.
        half_open(core, flow, now_us)
    return _deliver(core, d, flow, control.rest)


def _answer(core: Core, flow: UdpFlow, decision: Decision) -> None:
    assert flow.resume is not None
    assert flow.decision is not None
    is_refusal = decision is Decision.REFUSE
    rule = flow.decision.rule
    body, flow.keys = flow.resume.answer(
        decision,
        suite=0 if is_refusal else flow.suite,
        reason=flow.decision.reason if is_refusal else DropReason.NONE,
        revision=core.revision,
        rule=rule.id if rule is not None else 0,
    )
    flow.answer_wire = write(Kind.RESUMED, body)
    core.ports.inject(craft(flow.key, flow.answer_wire))


def _again(core: Core, d: Datagram, flow: UdpFlow, rest: bytes, now_us: int) -> Result:
    """RESUME of a flow that is live: with another datagram, or because our answer was lost."""
    if not rest or flow.early_seen >> rest[0] & 1:
        if core.hint_limit.take(d.source, now_us):
            core.ports.inject(craft(flow.key, flow.answer_wire))
        return DROP
    return _deliver(core, d, flow, rest)


def _deliver(core: Core, d: Datagram, flow: UdpFlow, rest: bytes) -> Result:
    """The datagram behind RESUME, once."""
    if not rest:
        return DROP
    assert flow.resume is not None
    keys, _ = flow.resume.session.keys(flow.resume.payload, b"")
    payload = _opened(keys.initiator_to_responder, rest)
    if payload is None:
        return core.drop(DropReason.RECORD_INVALID)
    flow.early_seen |= 1 << rest[0]
    note_early(flow, payload)
    verdict = Verdict.ACCEPT if flow.sealed is None else Verdict.ENCRYPT
    return Result(verdict, rebuild(d, payload, deliver=True))


def _hint(core: Core, d: Datagram, body: bytes, now_us: int) -> Result:
    """Spare the initiator the wait. It proves nothing, and may be lost or limited."""
    if core.hint_limit.take(d.source, now_us):
        core.ports.inject(craft(d.key, write(Kind.UNKNOWN_SESSION, unknown(body))))
    return core.drop(DropReason.SESSION_UNKNOWN)
