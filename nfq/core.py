"""What all parts of the packet path share: configuration, tables, policy, and the small steps both sides take.

The packet path (this module, `initiator`, `responder`, `loopback`, `datapath`) is sans-I/O: packets and `now` come
in, verdicts and effects go out through the `Ports` given to it. Nothing here waits, logs or talks to the kernel.
"""

from __future__ import annotations

import heapq
import ipaddress
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import lru_cache, partial
from typing import NamedTuple, Protocol

from nfq.datagram import Datagram
from nfq.exchanges import Exchanges
from nfq.flow import Flow, FlowTable, LocalWorkload, Owner, State
from nfq.handshake import CLOCK_WINDOW_S, Verifier
from nfq.limits import Addresses, SeenHandshakes, TokenBuckets
from nfq.names import NameTable
from nfq.noise import EphemeralPool
from nfq.packet import URG, Segment, mss_of, rebuild, syn_options
from nfq.pathmtu import Paths, most
from nfq.reassembly import POOL
from nfq.record import Records
from nfq.recorder import Counts, Recorder
from nfq.sessions import Lane, Sessions
from nfq.steering import worker_of
from nfq.suites import Suite, by_number, mask
from nfq.udpflow import UdpTables
from sectool.events import Action, ConnState, DropReason, Point
from sectool.identity.verify import PeerIdentity
from sectool.labels import LabelSet
from sectool.policy import Decision, Engine, Party, Request

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

SYN_SENT_TIMEOUT_US = 130_000_000  # outlasts Linux's six SYN retransmissions (127 s)
SYN_RECEIVED_TIMEOUT_US = 35_000_000  # outlasts four SYN-ACK retransmissions (31 s)
DENIAL_MEMORY_US = 130_000_000
REFUSAL_MEMORY_US = 15_000_000  # how long the agent's "cannot identify" is believed
CLOSING_US = 60_000_000  # how long Linux waits for the peer's FIN when the program is gone (tcp_fin_timeout)
CLOSED_US = 7_000_000  # outlasts the first five repetitions of a FIN whose ACK was lost
ASKED_LIMIT = 16_384
CUT_MEMORY_US = 130_000_000  # how long packets of a cut flow are answered with a RST

DEFAULT_ENFORCED = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")


class Verdict(IntEnum):
    """What becomes of a queued packet."""

    ACCEPT = 1  # this packet, once
    RELEASE = 2  # this packet, and the connection's further ones without asking
    DROP = 3
    HOLD = 4  # ask again when the workload named by `hold` is known
    ENCRYPT = (
        5  # this packet; the connection's further ones carry records: whole super-packets to the bulk queue
    )
    SMALL = 6  # the same, but one record a segment for now: the flow loses packets
    REQUEUE = 7  # larger than the kernel copies to us: let it be split first
    YIELD = 9  # this packet, once, but behind the next one with the same `hold` if that is there already
    WAIT = 8  # a datagram: ask again when the handshake of the flow with the key `hold` is settled


class Result(NamedTuple):
    """A verdict; `packet` replaces the queued one if given (a view of it holds until the next packet is judged)."""

    verdict: Verdict
    packet: bytes | memoryview | None = None
    hold: Hashable = None


ACCEPT = Result(Verdict.ACCEPT)
RELEASE = Result(Verdict.RELEASE)
DROP = Result(Verdict.DROP)
REQUEUE = Result(Verdict.REQUEUE)
ENCRYPT = Result(Verdict.ENCRYPT)


def carried(flow: Flow) -> Result:
    """How a packet without payload of a live flow passes, so that the kernel knows how to treat the next ones."""
    return ENCRYPT if flow.suite else RELEASE


class Attribution(NamedTuple):
    """A local socket's workload key (stable while its facts are) and the process to record."""

    key: Hashable
    owner: Owner
    socket: int = 0  # the kernel's cookie of it; 0: not asked for


class Ports(Protocol):
    """The packet path's way to the world."""

    def attribute(self, seg: Segment, *, listener: bool) -> Attribution | None:
        """The local socket of a SYN: the connecting one, or the listener it is meant for. None: there is none."""

    def attribute_datagram(
        self, d: Datagram, *, receiver: bool, group: bool = False
    ) -> tuple[Attribution, ...]:
        """Local sockets of a datagram, of several only one a workload, the likeliest first. (): there is none.

        All that may have sent it; or (`receiver`) the one that will get it, of a `group` all that will.
        """

    def is_broadcast(self, raw: bytes) -> bool:
        """Whether an IPv4 address is a broadcast address of one of this host's networks."""

    def path_mtu(self, raw: bytes, device: int) -> int:
        """As far as the kernel knows, how large a packet to this remote address may be; at least 1,280 if in doubt."""

    def sender(self, v6: bool, identifier: bytes) -> Attribution:
        """Whose socket an outgoing ICMP question with this identifier is from; the host itself if nobody's."""

    def host(self) -> Attribution:
        """The host itself: who answers where no socket does."""

    def proven(self, raw: bytes, now_us: int) -> None:
        """Somebody at this remote address has proven an identity: it is no stranger for a while. Best effort."""

    def sealed(self, seg: Segment) -> bool:
        """Whether the kernel remembers that the connection's segments are records; in doubt they are."""

    def inject(self, packet: bytes) -> None:
        """Send a crafted packet to a remote peer, past our own queue. Best effort."""

    def inject_large(self, packet: bytes) -> None:
        """As `inject`, for a UDP packet without IPv6 extension headers that is to leave in fragments."""

    def repeat(self, packet: bytes) -> None:
        """Send a SYN of a local program once more, as its stack would: through the queue again. Best effort."""

    def reset_local(self, seg: Segment) -> None:
        """Make the local socket that sent `seg` fail at once. Best effort."""

    def cut(self, flow: Flow) -> Counts:
        """Take a released connection back into the queue; its counters so far."""

    def journal(self, flow: Flow) -> memoryview | None:
        """Remember a flow across a restart of the worker; one that is remembered, that it is PROVING no more.

        Gives the place where the state of its records is kept (nfq.record.STATE_SIZE bytes); None: there is none.
        """

    def unjournal(self, flow: Flow) -> None:
        """Forget it again."""


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of the packet path."""

    enforced: tuple[Network, ...] = tuple(ipaddress.ip_network(n) for n in DEFAULT_ENFORCED)
    reject: bool = False
    syn_rate: float = 2000.0  # handshakes a second and source prefix
    syn_burst: float = 4000.0
    refusal_rate: float = 200.0
    message_rate: float = 200.0  # ICMP questions to be judged a second and source prefix
    half_open_limit: int = 65_536
    live_limit: int = 1_048_576
    worker: int = 0  # number of this packet worker, and how many this host has
    workers: int = 1
    suites: tuple[Suite, ...] = ()  # for encrypted flows, best first; none: this host does not encrypt


class Credentials:
    """Local workloads by attribution key, bounded. A refusal by the agent is kept with its reason, for a while."""

    def __init__(self, limit: int = 16_384) -> None:
        self._known: OrderedDict[Hashable, LocalWorkload | str] = OrderedDict()
        self._refused_us: dict[Hashable, int] = {}
        self.limit = limit

    def get(self, key: Hashable, now_us: int) -> LocalWorkload | str | None:
        """The workload; text when identification failed; None when unknown or its credential has expired."""
        found = self._known.get(key)
        if isinstance(found, LocalWorkload):
            if found.identity.not_after_us > now_us:
                self._known.move_to_end(key)
                return found
        elif found is None or now_us - self._refused_us.get(key, 0) < REFUSAL_MEMORY_US:
            return found
        self._forget(key)
        return None

    def _forget(self, key: Hashable) -> None:
        self._known.pop(key, None)
        self._refused_us.pop(key, None)

    def put(self, key: Hashable, workload: LocalWorkload | str, now_us: int) -> None:
        """Learn or renew."""
        self._forget(key)
        self._known[key] = workload
        if isinstance(workload, str):
            self._refused_us[key] = now_us
        if len(self._known) > self.limit:
            self._forget(next(iter(self._known)))

    def discard(self, gone: Callable[[PeerIdentity], bool]) -> set[int]:
        """Forget workloads with such identities, so that the agent is asked again; the identities' ids."""
        found = {k: w for k, w in self._known.items() if isinstance(w, LocalWorkload) and gone(w.identity)}
        for key in found:
            self._forget(key)
        return {workload.identity.id for workload in found.values()}

    def clear(self) -> None:
        """Forget all: the rules that map facts to workloads have changed."""
        self._known.clear()
        self._refused_us.clear()


class DenialMemory:
    """Denied attempts by flow key and sequence number, so that retransmitted SYNs make no second event. Bounded."""

    def __init__(self, limit: int = 32_768) -> None:
        self._seen: OrderedDict[tuple[bytes, int], int] = OrderedDict()
        self.limit = limit

    def add(self, key: bytes, isn: int, now_us: int) -> None:
        """Remember a denied SYN."""
        self._seen[key, isn] = now_us
        if len(self._seen) > self.limit:
            self._seen.popitem(last=False)

    def knows(self, key: bytes, isn: int, now_us: int) -> bool:
        """Whether this very SYN was denied lately."""
        at = self._seen.get((key, isn))
        return at is not None and now_us - at < DENIAL_MEMORY_US

    def clear(self) -> None:
        """Forget all: policy has changed."""
        self._seen.clear()


@lru_cache(maxsize=65_536)
def address(raw: bytes) -> Address:
    """4 or 16 bytes as an address object."""
    return ipaddress.IPv4Address(raw) if len(raw) == 4 else ipaddress.IPv6Address(raw)


class Core:
    """State shared by the parts of one worker's packet path."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        verifier: Verifier,
        recorder: Recorder,
        ports: Ports,
        names: NameTable | None = None,
    ) -> None:
        self.config = config
        self.names = NameTable() if names is None else names
        self.names.watch(engine)
        self.engine = engine
        self.revision = 0
        self.verifier = verifier
        self.recorder = recorder
        self.ports = ports
        self.credentials = Credentials()
        # Half-open flows of either role: a flood of SYNs from outside must not keep this host from connecting.
        self.connecting = FlowTable(config.half_open_limit)
        self.accepting = FlowTable(config.half_open_limit)
        self.live = FlowTable(config.live_limit)
        self.udp = UdpTables(config.half_open_limit, config.live_limit)
        self.denials = DenialMemory()
        self.exchanges = Exchanges()
        self.message_limit = TokenBuckets(config.message_rate, 2 * config.message_rate)
        self.paths = Paths()
        self.ephemerals = EphemeralPool()
        self.seen = SeenHandshakes(2 * CLOCK_WINDOW_S * 1_000_000)
        self.syn_limit = TokenBuckets(config.syn_rate, config.syn_burst)
        self.refusal_limit = TokenBuckets(config.refusal_rate, 2 * config.refusal_rate)
        self.hint_limit = TokenBuckets(config.refusal_rate, 2 * config.refusal_rate)
        self.sessions = Sessions()
        self.expiring: list[tuple[int, int, Flow]] = []  # heap of live flows whose decision has an end
        self.uncut: list[Flow] = []  # cut, but the kernel has not taken note yet
        self.reassembly = POOL
        self.suites = mask(config.suites)  # as offered on the wire
        self.observing = False  # nothing is denied: what would be passes, and is recorded so (nfq.observing)
        self.enforcers = Addresses()  # where an identity was proven: an enforcer is there
        self._judge = engine  # whose decisions are in `_judged`, by the id of a request in `_made`
        self._judged: dict[int, Decision] = {}
        self._made: dict[int, Request] = {}
        self._asked: dict[tuple[int, int, bytes, int, int, bytes, int, bool], Request] = {}
        self._enforced = [(n.version == 6, int(n.netmask), int(n.network_address)) for n in config.enforced]
        self._inside: dict[bytes, bool] = {}

    def reconfigure(self, config: Config) -> None:
        """Take settings that have changed; flows that are there already go on."""
        self.config = config
        self.syn_limit = TokenBuckets(config.syn_rate, config.syn_burst)
        self.suites = mask(config.suites)
        self._enforced = [(n.version == 6, int(n.netmask), int(n.network_address)) for n in config.enforced]
        self._inside.clear()

    def enforced(self, raw: bytes) -> bool:
        """Whether an address (4 or 16 bytes) lies in an enforced network."""
        known = self._inside.get(raw)
        if known is None:
            value, v6 = int.from_bytes(raw, "big"), len(raw) == 16
            known = any(six == v6 and value & mask == net for six, mask, net in self._enforced)
            if len(self._inside) >= ASKED_LIMIT:
                self._inside.clear()
            self._inside[raw] = known
        return known

    def local_workload(
        self, seg: Segment, flow: Flow, now_us: int, *, listener: bool
    ) -> LocalWorkload | Result | DropReason:
        """Whose socket a SYN is from, or (`listener`) meant for; noted in `flow`.

        A Result says to hold the packet until the agent has told; a reason, that nobody can be named.
        """
        found = self.ports.attribute(seg, listener=listener)
        if found is None:
            return DropReason.NO_LISTENER if listener else DropReason.NO_LOCAL_IDENTITY
        return self.workload(found, flow, now_us)

    def workload(self, found: Attribution, flow: Flow, now_us: int) -> LocalWorkload | Result | DropReason:
        """As `local_workload`, for a socket that has been found."""
        local = self.credentials.get(found.key, now_us)
        if local is None:
            return Result(Verdict.HOLD, hold=found.key)
        flow.owner = found.owner
        if isinstance(local, str):
            return DropReason.NO_LOCAL_IDENTITY
        flow.local = local
        return local

    def lane(self, key: bytes) -> Lane:
        """Which of n packet workers of the other host gets a flow of this key."""
        return partial(worker_of, key)

    def ask(
        self,
        caller: tuple[PeerIdentity, bytes],
        called: tuple[PeerIdentity, bytes],
        port: int,
        can_encrypt: bool,
    ) -> Request:
        """The request of a TCP connection between two identities at their addresses: made once, and shared."""
        (one, at), (other, to) = caller, called
        key = one.id, one.labels.id, at, other.id, other.labels.id, to, port, can_encrypt
        known = self._asked.get(key)
        if known is None:
            if len(self._asked) >= ASKED_LIMIT:
                self._asked.clear()
                self._judged.clear()
                self._made.clear()
            source = Party(one.labels, one.spiffe_id, address(at))
            destination = Party(other.labels, other.spiffe_id, address(to))
            known = self._asked[key] = request(source, destination, port, can_encrypt=can_encrypt)
            self._made[id(known)] = known
        return known

    def drop(self, reason: DropReason) -> Result:
        """Drop and count a packet that makes no event of its own."""
        self.recorder.count(reason)
        return DROP

    def turn_away(self, reason: DropReason) -> Result:
        """As `drop`, for what is kept out by caution and not because it is broken: while observing it passes."""
        self.recorder.count(reason)
        return ACCEPT if self.observing else DROP

    def decide(self, flow: Flow, now_us: int) -> Decision:
        """Judge `flow.request` under the current revision and note the outcome in the flow.

        The engine's verdict is the same while nothing is enforced; what it denies then becomes an AUDIT with the
        reason of the denial.
        """
        request = flow.request
        assert request is not None
        if self._judge is not self.engine:
            self._judge = self.engine
            self._judged.clear()
        decision = self._judged.get(id(request))
        if decision is None:
            decision = self.engine.decide(request, now_us)
            # A request of `ask` is kept, so that its id is its own; a decision that time does not change as well.
            if decision.valid_until_us is None and request is self._made.get(id(request)):
                self._judged[id(request)] = decision
        if self.observing and decision.action is Action.DENY:
            decision = replace(decision, action=Action.AUDIT)
        flow.decision = decision
        flow.revision = self.revision
        flow.reason = decision.reason
        return decision

    def relabelled(self, flow: Flow, workload: int, labels: LabelSet) -> bool:
        """Whether a flow is of a workload of this host by that id; its request then speaks of these labels."""
        request = flow.request
        if request is None:
            return False
        mine = flow.local is not None and flow.local.id == workload
        theirs = flow.peer_local is not None and flow.peer_local.id == workload  # loopback: the called one
        source, destination = request.source, request.destination
        if mine and flow.point is Point.RESPONDER:
            destination = replace(destination, labels=labels)
        elif mine:
            source = replace(source, labels=labels)
        if theirs:
            destination = replace(destination, labels=labels)
        if mine or theirs:
            flow.request = replace(request, source=source, destination=destination)
        return mine or theirs

    def permitted(self, decision: Decision) -> bool:
        """Allowed, with or without an audit mark."""
        return decision.action is Action.ALLOW or decision.action is Action.AUDIT

    def still_permitted(self, flow: Flow, decision: Decision) -> bool:
        """Whether a live flow may go on: allowed, and encrypted if that is asked for now and it leaves the host."""
        if self.observing:
            return True
        kept = flow.suite != 0 or flow.point is Point.LOCAL or not decision.encrypt
        return kept and self.permitted(decision)

    def settle(self, flow: Flow, now_us: int) -> None:
        """A flow takes its place among the live ones. One that held the same 5-tuple before has ended."""
        before = self.live.get(flow.key)
        if before is not None and before is not flow:
            self.displace(before, now_us)
        if before is not flow:
            self.connecting.remove(flow)
            self.accepting.remove(flow)
            self.live.add(flow)
        if flow.decision is not None and flow.decision.valid_until_us is not None:
            self.watch(flow)

    def displace(self, before: Flow, now_us: int) -> None:
        """A live flow whose 5-tuple is another connection's now."""
        if before.state not in (State.CUT, State.ENDED):  # their END is written
            self.finish(before, Counts(), now_us)
        self.forget(before)

    def watch(self, flow: Flow) -> None:
        """Note when the flow's decision has to be made anew, if ever."""
        until = flow.decision.valid_until_us if flow.decision is not None else None
        if until is None or until == flow.until_us:
            return
        flow.until_us = until
        heapq.heappush(self.expiring, (until, id(flow), flow))
        if len(self.expiring) > 1024 + 2 * len(self.live):
            # Most of these have ended long before their rule does.
            self.expiring = [
                e for e in self.expiring if self.live.get(e[2].key) is e[2] and e[0] == e[2].until_us
            ]
            heapq.heapify(self.expiring)

    def release(self, flow: Flow, now_us: int) -> None:
        """Both ends are proven and policy allows: from here on the kernel carries the flow, or its records do."""
        if flow.suite and flow.records is None:
            flow.records = self.records(flow)
        self.settle(flow, now_us)
        flow.state = State.AUTHORISED
        flow.forget_handshake()
        if flow.journal_slot < 0:
            self.journal(flow)
        else:
            self.ports.journal(flow)

    def journal(self, flow: Flow) -> None:
        """Let a flow, and the state of its records, outlive this worker."""
        state = self.ports.journal(flow)
        if flow.records is not None and state is not None:
            flow.records.attach(state)

    def records(self, flow: Flow) -> Records:
        """What seals and opens the segments of a flow whose handshake is done, under its suite."""
        suite = by_number(flow.suite)
        assert flow.keys is not None
        assert suite is not None
        initiator = flow.point is Point.INITIATOR
        isn_out, isn_in = (flow.isn, flow.peer_isn) if initiator else (flow.peer_isn, flow.isn)
        return Records(
            suite,
            flow.keys.initiator_to_responder,
            flow.keys.responder_to_initiator,
            initiator=initiator,
            isn_out=isn_out,
            isn_in=isn_in,
        )

    def finish(self, flow: Flow, counts: Counts, now_us: int) -> None:
        """A live flow has ended: write END and forget it, an encrypted one as soon as its last segments have passed.

        A program that closes first is gone while the peer's FIN, and its repetitions, have still to be opened.
        """
        action = flow.decision.action if flow.decision is not None else Action.ALLOW
        self.recorder.ended(flow, action, counts, now_us)
        if flow.records is None or flow.conn_state in (ConnState.RSTO, ConnState.RSTR):
            self.forget(flow)
            return
        flow.state = State.ENDED
        self.live.expire_after(flow, now_us, CLOSED_US if flow.fins == 3 else CLOSING_US)

    def forget(self, flow: Flow) -> None:
        """A live flow is of no use any more, nor are its keys."""
        self.live.remove(flow)
        flow.forget_keys()  # before the slot that keeps their state goes to another flow
        self.ports.unjournal(flow)


def party(labels_of: LocalWorkload | None, raw: bytes) -> Party:
    """A local party as policy sees it."""
    if labels_of is None:
        return Party(None, None, address(raw))
    identity = labels_of.identity
    return Party(identity.labels, identity.spiffe_id, address(raw))


def stripped(core: Core, seg: Segment, flow: Flow, *, encrypted: bool) -> Result:
    """A peer's SYN or SYN-ACK for our stack: bare, and with an MSS that fits the path if that is known to be narrow.

    A stack whose flow is `encrypted` does without timestamps. Its pure ACKs overtake its records, so that a record's
    acknowledgement is often older than one seen already. From such a segment Linux takes no timestamp (tcp_ack,
    `old_ack`); it goes on echoing an old one, and its peer takes every loss for a delay (tcp_packet_delayed): one
    segment a timeout. What timestamps protect from, segments of long ago, records do not let pass.
    """
    options = syn_options(
        seg.options, lower_mss=False, most=most(core.paths, seg.source), timestamps=not encrypted
    )
    flow.mss = mss_of(options)
    # An urgent pointer on a SYN-ACK counts, too, and nobody has signed it.
    return Result(Verdict.ACCEPT, rebuild(seg, options, b"", flags=seg.data[seg.tcp_off + 13] & ~URG))


def stranger(core: Core, raw: bytes, now_us: int) -> Party:
    """A peer without identity as policy sees it: its address, and the names that this host was told for it."""
    return Party(None, None, address(raw), core.names.names_of(raw, now_us))


def reminded(core: Core, flow: Flow) -> None:
    """A restored flow of a peer without identity gets the names that it can have been judged by."""
    if flow.request is None or flow.peer is not None or flow.peer_local is not None:
        return
    names = core.names.remembered(flow.remote_address)
    source, destination = flow.request.source, flow.request.destination
    if flow.point is Point.RESPONDER:
        source = replace(source, names=source.names | names)
    else:
        destination = replace(destination, names=destination.names | names)
    flow.request = replace(flow.request, source=source, destination=destination)


def request(source: Party, destination: Party, port: int, *, can_encrypt: bool = False) -> Request:
    """A TCP request for the engine."""
    return Request(source, destination, 6, port, can_encrypt=can_encrypt)
