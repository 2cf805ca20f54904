"""What becomes of ICMP and ICMPv6 messages.

    question (echo request, ...) ─► judged by policy, its type as the service: icmp/echo-request
    answer                       ─► passes if the question was let through
    error                        ─► passes if it is about a packet of a flow that is known; read for path MTUs
    neighbourhood (ND, MLD)      ─► passes; the kernel rules do not even queue it
    anything else                ─► judged by policy, each way on its own

No identity travels with a message. So of a remote peer only `any`, `net:` and `fqdn:` rules can speak, wherever it is;
this end is the workload whose socket asks or, where none does (the kernel answers), the host itself: user root,
no executable, in the root cgroup.
"""

from __future__ import annotations

from nfq import icmpmessage
from nfq.core import ACCEPT, Attribution, Core, Result, Verdict, party, stranger
from nfq.exchanges import Exchange
from nfq.flow import Flow, LocalWorkload, State
from nfq.icmpmessage import ANSWERS, ERRORS, NEIGHBOURHOOD, REQUESTS, Message, Quote
from nfq.ip import ICMP, ICMP6, TCP, UDP, Header, header
from nfq.observing import note, over
from nfq.packet import PacketError
from sectool.events import Action, Auth, AuthResult, ConnState, DropReason, Phase, Point
from sectool.policy import Request

LOOPBACK = 1  # index of the loopback device, in every network namespace
PLAUSIBLE = 1 << 26  # octets that can be on their way in one encrypted flow
_FOREVER = 1 << 63


def handle(
    core: Core, data: bytes | memoryview, outbound: bool, local: bool, now_us: int, device: int = 0
) -> Result:
    """Judge one ICMP or ICMPv6 packet. As nfq.datapath.handle."""
    try:
        packet = bytes(data)
        head = header(packet)
        if head.protocol != (ICMP6 if head.v6 else ICMP):
            raise PacketError("not ICMP of its IP version")
        message = icmpmessage.message(packet, head)
        if message.kind in ERRORS[head.protocol]:
            if local or device == LOOPBACK:
                return _own_error(core, message, now_us)
            return _error(core, packet, head, message, outbound, now_us)
        if head.v6 and message.kind in NEIGHBOURHOOD:
            return ACCEPT
        if message.kind in ANSWERS[head.protocol]:
            return _answer(core, head, message, outbound, local, now_us)
        return _question(core, head, message, outbound, local, now_us)
    except PacketError:
        return core.turn_away(DropReason.PACKET_MALFORMED)


# -- errors ----------------------------------------------------------------------------------------------------------


def _error(core: Core, data: bytes, head: Header, message: Message, outbound: bool, now_us: int) -> Result:
    """An error from a router or a peer about what we sent, or from us about what came."""
    icmpmessage.require_checksum(data, head)
    about = icmpmessage.quote(message)
    # It goes to whoever sent the packet that it is about, and may come from any router on the way.
    if about.source != head.destination:
        return core.turn_away(DropReason.UNKNOWN_FLOW)
    if about.protocol in (ICMP, ICMP6):
        return ACCEPT if _exchange(core, about, outbound) else core.turn_away(DropReason.UNKNOWN_FLOW)
    if about.protocol not in (TCP, UDP):
        return ACCEPT  # a protocol that is not judged: the rules let it pass, or it was never sent
    flow = (
        _connection(core, about, not outbound)
        if about.protocol == TCP
        else _datagrams(core, about, not outbound)
    )
    if flow is None:
        return core.turn_away(DropReason.UNKNOWN_FLOW)
    if outbound:
        return (
            Result(Verdict.ACCEPT, icmpmessage.with_short_quote(data, head, message, about))
            if flow.suite
            else ACCEPT
        )
    _learn(core, flow, message, about, now_us)
    return ACCEPT


def _own_error(core: Core, message: Message, now_us: int) -> Result:
    """What this host's stack tells itself, such as that a record does not fit a path it knows to be narrow."""
    about = icmpmessage.quote(message)
    if about.protocol == TCP:
        flow = _connection(core, about, True)
        if flow is not None:
            _learn(core, flow, message, about, now_us)
    return ACCEPT


def _learn(core: Core, flow: Flow, message: Message, about: Quote, now_us: int) -> None:
    """What we make longer is cut to what the path lets through (nfq.pathmtu); the rest is the stack's business."""
    ours = flow.suite != 0 or flow.state is State.PROVING
    if ours and 0 < message.mtu < about.length:
        core.paths.learn(flow.remote_address, message.mtu, now_us)


def _connection(core: Core, about: Quote, sent: bool) -> Flow | None:
    """The TCP connection that a quoted packet belongs to, if its sequence number can be of this connection.

    Of a plain one that is released nothing more is known here; the stack looks at its window.
    """
    key = about.key(sent)
    flow = core.connecting.get(key)
    if flow is not None and (not sent or about.number == flow.isn):
        return flow
    flow = core.live.get(key)
    if flow is not None:
        if not sent or (flow.records is None and flow.state is not State.PROVING):
            return flow
        first = flow.isn if flow.point is Point.INITIATOR else flow.peer_isn
        end = flow.records.end if flow.records is not None else PLAUSIBLE >> 1
        behind = (first + 1 + end - about.number) & 0xFFFFFFFF
        return flow if behind < PLAUSIBLE else None
    return core.accepting.get(key)


def _datagrams(core: Core, about: Quote, sent: bool) -> Flow | None:
    """The UDP flow that a quoted packet belongs to."""
    key = about.key(sent)
    return core.udp.connecting.get(key) or core.udp.live.get(key) or core.udp.accepting.get(key)


def _exchange(core: Core, about: Quote, outbound: bool) -> bool:
    """Whether the quoted message belongs to a question that was let through, or to the answer to one."""
    kind, identifier = about.ports[0], about.ports[2:]
    question = ANSWERS[about.protocol].get(kind)
    answered = question is not None
    own, other = (about.destination, about.source) if outbound else (about.source, about.destination)
    asked_out = outbound == answered
    key = _key(asked_out, False, question if question is not None else kind, identifier, own, other)
    return core.exchanges.get(key) is not None


# -- questions and answers -------------------------------------------------------------------------------------------


def _key(out: bool, local: bool, kind: int, identifier: bytes, own: bytes, other: bytes) -> bytes:
    """What names an exchange: who asks (`out`: this host; `local`: both ends are it), what, and between whom."""
    return bytes((local << 1 | out, kind)) + identifier + own + other


def _multicast(address: bytes) -> bool:
    """Whether anybody may answer what is sent there."""
    return (
        address[0] == 0xFF
        if len(address) == 16
        else 224 <= address[0] < 240 or address == b"\xff\xff\xff\xff"
    )


def _answer(core: Core, head: Header, message: Message, outbound: bool, local: bool, now_us: int) -> Result:
    own, other = (head.source, head.destination) if outbound else (head.destination, head.source)
    if local:
        own, other = other, own  # the question went the other way through the same device
    question = ANSWERS[head.protocol][message.kind]
    key = _key(local or not outbound, local, question, message.identifier, own, other)
    exchange = core.exchanges.get(key)
    if exchange is None and not outbound:
        key = _key(True, False, question, message.identifier, own, bytes(len(other)))
        exchange = core.exchanges.get(key)
    if exchange is None:
        return core.turn_away(DropReason.UNKNOWN_FLOW)
    exchange.count(len(message.body) + head.off, answer=True)
    core.exchanges.touch(key, exchange, now_us)
    return ACCEPT


def _question(core: Core, head: Header, message: Message, outbound: bool, local: bool, now_us: int) -> Result:
    own, other = (head.source, head.destination) if outbound else (head.destination, head.source)
    asks = message.kind in REQUESTS[head.protocol]
    identifier = message.identifier if asks else bytes((0, message.code))
    anybody = outbound and _multicast(other)
    key = _key(outbound, local, message.kind, identifier, own, bytes(len(other)) if anybody else other)
    exchange = core.exchanges.get(key)
    if exchange is not None and not _still(core, key, exchange, now_us):
        exchange = None
    if exchange is None:
        judged = _judge(core, head, message, outbound, local, key, own + other, now_us)
        if isinstance(judged, Result):
            return judged
        exchange = judged
    exchange.count(len(message.body) + head.off, answer=False)
    core.exchanges.touch(key, exchange, now_us)
    return ACCEPT


def _still(core: Core, key: bytes, exchange: Exchange, now_us: int) -> bool:
    """Whether policy still allows an exchange: asked again when there is another revision, or its decision ends."""
    flow = exchange.flow
    if flow.let_in and not over(core, flow):
        return True
    if (
        not flow.let_in
        and exchange.observed == core.observing
        and flow.revision == core.revision
        and now_us < exchange.until_us
    ):
        return True
    decision = None if flow.let_in else core.decide(flow, now_us)
    exchange.observed = core.observing
    if decision is not None and core.permitted(decision):
        exchange.until_us = decision.valid_until_us or _FOREVER
        return True
    core.exchanges.remove(key)
    flow.reason = DropReason.POLICY_CHANGED
    core.recorder.count(DropReason.POLICY_CHANGED)
    core.recorder.flow(flow, Phase.END, Action.DENY, now_us, counts=exchange.counts)
    return False


def _judge(
    core: Core,
    head: Header,
    message: Message,
    outbound: bool,
    local: bool,
    key: bytes,
    addresses: bytes,
    now_us: int,
) -> Exchange | Result:
    """Let policy decide on the first message of an exchange."""
    if core.denials.knows(key, 0, now_us):
        return core.turn_away(DropReason.DENIED_BEFORE)
    kind, code = message.kind.to_bytes(2, "big"), message.code.to_bytes(2, "big")
    point = Point.LOCAL if local else Point.INITIATOR if outbound else Point.RESPONDER
    # In records type and code stand in place of the ports, seen from who asks.
    flow = Flow(
        addresses + (kind + code if outbound else code + kind), head.v6, point, State.AUTHORISED, 0, now_us
    )
    flow.protocol = head.protocol
    if not outbound and not core.message_limit.take(head.source, now_us):
        if core.observing:
            return core.turn_away(DropReason.RATE_LIMITED)
        return _deny(core, flow, DropReason.RATE_LIMITED, now_us)
    peer = _workload(core, core.ports.host(), flow, now_us) if local else None
    mine = core.ports.sender(head.v6, message.identifier) if outbound else core.ports.host()
    found = _workload(core, mine, flow, now_us)
    for end in (peer, found):
        if isinstance(end, Result):
            return end
        if isinstance(end, DropReason) and core.observing:
            note(core, flow, end, now_us)
            return _begun(core, key, Exchange(flow, _FOREVER, now_us), now_us)
        if isinstance(end, DropReason):
            core.denials.add(key, 0, now_us)
            return _deny(core, flow, end, now_us)
    if isinstance(peer, LocalWorkload):
        flow.peer_local, flow.auth, flow.auth_result = peer, Auth.KERNEL, AuthResult.PROVEN
    here = party(flow.local, flow.local_address)
    there = party(peer, flow.remote_address) if isinstance(peer, LocalWorkload) else None
    remote = there or stranger(core, flow.remote_address, now_us)
    source, destination = (here, remote) if outbound else (remote, here)
    flow.request = Request(source, destination, head.protocol, message.kind, message.code)
    decision = core.decide(flow, now_us)
    if not core.permitted(decision):
        core.denials.add(key, 0, now_us)
        return _deny(core, flow, decision.reason, now_us)
    core.recorder.allowed(flow, now_us)
    return _begun(core, key, Exchange(flow, decision.valid_until_us or _FOREVER, now_us), now_us)


def _begun(core: Core, key: bytes, exchange: Exchange, now_us: int) -> Exchange:
    exchange.observed = core.observing
    before = core.exchanges.add(key, exchange)
    if before is not None:
        _end(core, before, now_us)
    return exchange


def _workload(
    core: Core, found: Attribution | None, flow: Flow, now_us: int
) -> LocalWorkload | Result | DropReason:
    return DropReason.NO_LOCAL_IDENTITY if found is None else core.workload(found, flow, now_us)


def _deny(core: Core, flow: Flow, reason: DropReason, now_us: int) -> Result:
    flow.state, flow.revision = State.DENIED, core.revision
    core.recorder.denied(flow, reason, now_us)
    return Result(Verdict.DROP)


def tick(core: Core, now_us: int) -> None:
    """Once a second: exchanges that have fallen silent are over, and old news of paths is no news."""
    for exchange in core.exchanges.silent(now_us):
        _end(core, exchange, now_us)
    core.paths.expire(now_us)


def _end(core: Core, exchange: Exchange, now_us: int) -> None:
    flow = exchange.flow
    flow.conn_state = ConnState.SF if exchange.answered[1] else ConnState.S0
    action = flow.decision.action if flow.decision is not None else Action.ALLOW
    core.recorder.ended(flow, action, exchange.counts, now_us)
