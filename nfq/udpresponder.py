"""The host that is called: Hello in, Answer out, proof in, Ack out. Cheap checks first, state last."""

from __future__ import annotations

import contextlib
import hmac
from hashlib import sha256

from nfq.core import DROP, Core, Result, Verdict, address, party, stranger
from nfq.datagram import Datagram, craft, rebuild, require_checksum
from nfq.flow import LocalWorkload, State
from nfq.handshake import Decision, Grant, Greeting, HandshakeError, Refusal, check_proof, open_refusal
from nfq.ip import UDP
from nfq.responder import must_encrypt
from nfq.session import Issued, lifetime_s
from nfq.suites import choose
from nfq.udpcontrol import UNKNOWN_SIZE, Control, Kind, ack, unknown, write
from nfq.udpcore import (
    deny,
    forget_early,
    plain,
    release,
    request,
    seal_with,
    sealed_in,
    seen_early,
    unproven,
    workload,
)
from nfq.udpflow import DENIED_US, Settled, UdpFlow
from sectool.events import Action, Auth, AuthResult, ConnState, Decider, DropReason, Point
from sectool.policy import Party

HALF_OPEN_US = 10_000_000  # outlasts all transmissions of an initiator
RIVALS = 4
EARLY_US = 10_000_000  # how long after RESUME its datagrams may come again behind a handshake
_HEADERS = {False: 28, True: 48}


def in_hello(core: Core, d: Datagram, body: bytes, now_us: int) -> Result:
    """Somebody presents a credential."""
    # By all of it: a copy that somebody has changed must not make the true one a repetition.
    digest = sha256(body).digest()
    for asked in rivals(core, d.key):
        if asked.syn == digest:
            core.ports.inject(craft(d.key, asked.answer_wire))  # its Answer was lost
            return DROP
    if core.denials.knows(digest, 0, now_us):
        return core.drop(DropReason.DENIED_BEFORE)
    live = core.udp.find(core.udp.live, d.key)
    if digest in core.seen and live is not None:
        return core.drop(DropReason.SYN_REPLAYED)
    flow = UdpFlow(d.key, d.v6, Point.RESPONDER, State.SYN_RECEIVED, now_us)
    flow.syn = digest
    for other in (*rivals(core, d.key), live):
        if other is not None and other.early_digests and now_us - other.start_us < EARLY_US:
            flow.early_digests = other.early_digests
    if not core.syn_limit.take(d.source, now_us):
        core.recorder.denied(flow, DropReason.RATE_LIMITED, now_us)
        return DROP
    flow.auth, flow.auth_result = Auth.NOISE_IX, AuthResult.FAILED
    try:
        greeting = Greeting(body, now_us, protocol=UDP)
        if digest in core.seen:
            raise HandshakeError(DropReason.SYN_REPLAYED, "handshake seen before")
        flow.peer = greeting.peer(core.verifier, now_us)
    except HandshakeError as e:
        return _deny(core, flow, e.reason, now_us)
    flow.auth_result = AuthResult.CLAIMED
    local = workload(core, d, flow, now_us, receiver=True)
    if isinstance(local, Result):
        return local
    core.seen.add(digest, now_us)
    if isinstance(local, DropReason):
        return _deny(core, flow, local, now_us)
    suite = choose(greeting.suites, core.config.suites)
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
            _answer(core, flow, greeting, local, Decision.REFUSE, now_us)
            flow.conn_state = ConnState.REJ
        return _deny(core, flow, decision.reason, now_us)
    flow.greeting = greeting
    wanted = Decision.ENCRYPT if must_encrypt(flow) else Decision.PLAIN
    if not _answer(core, flow, greeting, local, wanted, now_us):
        return _deny(core, flow, DropReason.HANDSHAKE_FORGED, now_us)
    half_open(core, flow, now_us)
    return DROP


def half_open(core: Core, flow: UdpFlow, now_us: int) -> None:
    """Wait for the proof. Nobody knows yet which of several flows of a key is the true one."""
    if core.udp.accepting.full:
        core.udp.accepting.evict()
        core.recorder.count(DropReason.TABLE_FULL)
    flow.rivals = rivals(core, flow.key)[: RIVALS - 1]
    for other in flow.rivals:
        other.rivals = ()
    core.udp.accepting.add(flow)
    core.udp.accepting.expire_after(flow, now_us, HALF_OPEN_US)


def displace_own(core: Core, flow: UdpFlow) -> None:
    """Both sides began at once, and theirs goes on: what we held, or sent behind our RESUME, goes under theirs."""
    mine = core.udp.find(core.udp.connecting, flow.key)
    if mine is not None:
        core.udp.connecting.remove(mine)
        core.udp.arm(mine, 0)
        core.udp.settled.append(Settled(flow.key, anew=True))
        for packet in forget_early(core, mine):
            core.ports.repeat(packet)


def rivals(core: Core, key: bytes) -> list[UdpFlow]:
    """Half-open flows of a key, the latest first."""
    latest = core.udp.find(core.udp.accepting, key)
    return [] if latest is None else [latest, *latest.rivals]


def _answer(
    core: Core, flow: UdpFlow, greeting: Greeting, local: LocalWorkload, decision: Decision, now_us: int
) -> bool:
    """Send message 2; False when the Hello's keys are of a kind that gives no secret."""
    assert flow.decision is not None
    rule = flow.decision.rule
    refused = decision is Decision.REFUSE
    mine, peer = local.identity, flow.peer
    assert peer is not None
    life = 0 if refused else lifetime_s(now_us, mine.not_after_us, peer.not_after_us)
    try:
        body, keys = greeting.answer(
            local.static,
            local.blob,
            decision,
            suite=0 if refused else flow.suite,
            reason=flow.decision.reason if refused else DropReason.NONE,
            revision=core.revision,
            rule=rule.id if rule is not None else 0,
            grant=Grant(life, core.config.worker, core.config.workers),
            ephemeral=None if refused else core.ephemerals.take(),
        )
    except HandshakeError:
        return False
    flow.answer_wire = write(Kind.ANSWER, body)
    if not refused:
        flow.keys = keys
        flow.issued = Issued(mine.id, peer, keys, life, now_us) if life else None
    core.ports.inject(craft(flow.key, flow.answer_wire))
    return True


def _deny(core: Core, flow: UdpFlow, reason: DropReason, now_us: int) -> Result:
    """Its repetitions make no second event."""
    flow.state, flow.revision = State.DENIED, core.revision
    # While observing the datagrams themselves will come without identity, and pass.
    core.recorder.denied(flow, reason, now_us, Action.ERROR if core.observing else Action.DENY)
    core.denials.add(flow.syn, 0, now_us)
    return DROP


def in_proof(core: Core, d: Datagram, control: Control, now_us: int) -> Result | None:
    """A proof, perhaps with a datagram behind it. None: of no flow known here."""
    live = core.udp.find(core.udp.live, d.key)
    if live is not None and live.point is not Point.RESPONDER:
        live = None  # a proof of ours that somebody sends back
    if live is not None and live.proof and hmac.compare_digest(live.proof, control.body):
        if core.hint_limit.take(d.source, now_us):
            core.ports.inject(craft(live.key, live.ack))  # ours was lost, or this is late
        return _behind_proof(core, d, live, control, now_us)
    unproven = rivals(core, d.key)
    if not unproven:
        return None
    flow, suite = _proven_by(unproven, control.body)
    if flow is None or suite not in (0, flow.suite) or (not suite and must_encrypt(flow)):
        return _unproven(core, flow or unproven[0], now_us)
    if flow.resume is not None and flow.resume.session.ended:
        return core.drop(DropReason.SESSION_UNKNOWN)  # revoked since RESUME
    require_checksum(d)
    if core.udp.live.full:
        return core.drop(DropReason.TABLE_FULL)
    flow.suite, flow.proof = suite, control.body
    proven(core, flow, now_us)
    return _behind_proof(core, d, flow, control, now_us)


def _proven_by(unproven: list[UdpFlow], option: bytes) -> tuple[UdpFlow | None, int]:
    """The flow whose keys a proof shows, and the suite it names; None: no flow's."""
    for flow in unproven:
        suite = check_proof(flow.keys, option) if flow.keys is not None else None
        if suite is not None:
            return flow, suite
    return None, 0


def _behind_proof(core: Core, d: Datagram, flow: UdpFlow, control: Control, now_us: int) -> Result:
    """What a program sent, without what was put in front."""
    if control.kind is Kind.PROOF:
        return DROP
    if flow.sealed is not None:
        return core.drop(DropReason.RECORD_MISSING)  # proves who, but not what
    require_checksum(d)
    if seen_early(flow, control.rest):
        return core.drop(DropReason.RECORD_REPLAYED)
    return plain(core, d, flow, now_us)._replace(packet=rebuild(d, control.rest))


def _unproven(core: Core, flow: UdpFlow, now_us: int) -> Result:
    if flow.recorded:
        return core.drop(DropReason.PROOF_INVALID)
    flow.auth_result = AuthResult.FAILED
    core.recorder.denied(flow, DropReason.PROOF_INVALID, now_us, Action.ERROR)
    return DROP


def proven(core: Core, flow: UdpFlow, now_us: int) -> None:
    """The initiator has shown that it holds its key."""
    assert flow.decision is not None
    assert flow.keys is not None
    flow.auth_result = AuthResult.PROVEN
    core.enforcers.add(flow.remote_address)
    core.ports.proven(flow.remote_address, now_us)
    flow.reason = flow.decision.reason
    flow.ack = ack(flow.keys)
    if flow.suite and flow.sealed is None:
        flow.sealed = seal_with(flow)
    if flow.resume is None:  # one under a session was recorded when its first datagram was let in
        flow.event_id = b""
        core.recorder.allowed(flow, now_us)
    displace_own(core, flow)
    if flow.issued is not None:
        core.sessions.issue(flow.issued)
    release(core, flow, now_us)
    flow.answer_wire = b""
    core.ports.inject(craft(flow.key, flow.ack))


def in_sealed(core: Core, d: Datagram, now_us: int) -> Result:
    """A datagram in a half-open flow: one that opens under its keys proves as well."""
    if core.udp.live.full:
        return core.drop(DropReason.TABLE_FULL)
    result = DROP
    for flow in rivals(core, d.key):
        if flow.suite and flow.keys is not None:
            flow.sealed = flow.sealed or seal_with(flow)
            result = sealed_in(core, d, flow, now_us)
            if result.verdict is not Verdict.DROP:
                proven(core, flow, now_us)
                return result
    if result is DROP:
        waiting = rivals(core, d.key)
        if core.observing and waiting and not any(flow.suite for flow in waiting):
            unproven(core, waiting[0], DropReason.PROOF_MISSING, now_us)
            return plain(core, d, waiting[0], now_us)
        core.recorder.count(DropReason.PROOF_MISSING)
    if core.udp.live.get(d.key) is None:
        tell_unknown(core, d, now_us)  # an initiator that was restarted takes its proof as seen
    return result


def in_refusal(core: Core, d: Datagram, body: bytes, now_us: int) -> Result | None:
    """The initiator's policy denies."""
    for flow in rivals(core, d.key):
        if flow.keys is not None:
            with contextlib.suppress(HandshakeError):
                return _refused(core, flow, open_refusal(flow.keys, body), now_us)
    return None


def _refused(core: Core, flow: UdpFlow, refusal: Refusal, now_us: int) -> Result:
    flow.auth_result = AuthResult.PROVEN
    flow.decider, flow.peer_reason, flow.peer_rule = Decider.PEER, refusal.reason, refusal.rule
    flow.conn_state = ConnState.REJ
    core.recorder.denied(flow, DropReason.PEER_DENIED, now_us)
    latest = core.udp.accepting.get(flow.key)
    if latest is not None:
        core.udp.accepting.remove(latest)
    return DROP


def in_new(core: Core, d: Datagram, flow: UdpFlow, now_us: int) -> Result:
    """A bare datagram of no flow known here."""
    if core.enforced(d.source):
        if core.observing:
            local = workload(core, d, flow, now_us, receiver=True)
            return local if isinstance(local, Result) else deny(core, d, flow, DropReason.NO_IDENTITY, now_us)
        core.recorder.denied(flow, DropReason.NO_IDENTITY, now_us)
        core.udp.denied.add(False, d.key, now_us + DENIED_US)
        tell_unknown(core, d, now_us)
        return DROP
    if not core.syn_limit.take(d.source, now_us):
        return _limited(core, flow, now_us)
    local = workload(core, d, flow, now_us, receiver=True)
    if isinstance(local, Result):
        return local
    if isinstance(local, DropReason):
        return deny(core, d, flow, local, now_us)
    flow.request = request(
        stranger(core, flow.remote_address, now_us), party(local, flow.local_address), flow.local_port
    )
    decision = core.decide(flow, now_us)
    if not core.permitted(decision):
        return deny(core, d, flow, decision.reason, now_us)
    if core.udp.live.full:
        return core.turn_away(DropReason.TABLE_FULL)
    core.recorder.allowed(flow, now_us)
    release(core, flow, now_us)
    return plain(core, d, flow, now_us)


def _limited(core: Core, flow: UdpFlow, now_us: int) -> Result:
    if core.observing:
        return core.turn_away(DropReason.RATE_LIMITED)
    core.recorder.denied(flow, DropReason.RATE_LIMITED, now_us)
    return DROP


def tell_unknown(core: Core, d: Datagram, now_us: int) -> None:
    """Say that the flow is not known here, once what came of it is as large as the answer."""
    received = core.udp.denied.received(d.key, len(d.data))
    if received < _HEADERS[d.v6] + UNKNOWN_SIZE or not core.hint_limit.take(d.source, now_us):
        return
    core.udp.denied.answered(d.key)
    core.ports.inject(craft(d.key, unknown(d.payload)))
