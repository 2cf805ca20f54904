"""What all parts of the packet path share: configuration, tables, policy, and the small steps both sides take.

The packet path (this module, `initiator`, `responder`, `loopback`, `datapath`) is sans-I/O: packets and `now` come
in, verdicts and effects go out through the `Ports` given to it. Nothing here waits, logs or talks to the kernel.
"""

from __future__ import annotations

import heapq
import ipaddress
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple, Protocol

from nfq.flow import Flow, FlowTable, LocalWorkload, Owner, State
from nfq.handshake import CLOCK_WINDOW_S, Verifier
from nfq.limits import SeenHandshakes, TokenBuckets
from nfq.noise import EphemeralPool
from nfq.packet import Segment
from nfq.recorder import Counts, Recorder
from sectool.events import Action, DropReason
from sectool.policy import Decision, Engine, Party, Request

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

SYN_SENT_TIMEOUT_US = 130_000_000  # outlasts Linux's six SYN retransmissions (127 s)
SYN_RECEIVED_TIMEOUT_US = 75_000_000  # outlasts its five SYN-ACK retransmissions (63 s)
DENIAL_MEMORY_US = 130_000_000
CUT_MEMORY_US = 130_000_000  # how long packets of a cut flow are answered with a RST

DEFAULT_ENFORCED = ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "fc00::/7")


class Verdict(IntEnum):
    """What becomes of a queued packet."""

    ACCEPT = 1  # this packet, once
    RELEASE = 2  # this packet, and the connection's further ones without asking
    DROP = 3
    HOLD = 4  # ask again when the workload named by `hold` is known


class Result(NamedTuple):
    """A verdict; `packet` replaces the queued one if given."""

    verdict: Verdict
    packet: bytes | None = None
    hold: Hashable = None


ACCEPT = Result(Verdict.ACCEPT)
RELEASE = Result(Verdict.RELEASE)
DROP = Result(Verdict.DROP)


class Attribution(NamedTuple):
    """A local socket's workload key (stable while its facts are) and the process to record."""

    key: Hashable
    owner: Owner


class Ports(Protocol):
    """The packet path's way to the world."""

    def attribute(self, seg: Segment, *, listener: bool) -> Attribution | None:
        """The local socket of a SYN: the connecting one, or the listener it is meant for. None: there is none."""

    def inject(self, packet: bytes) -> None:
        """Send a crafted packet to a remote peer, past our own queue. Best effort."""

    def reset_local(self, seg: Segment) -> None:
        """Make the local socket that sent `seg` fail at once. Best effort."""

    def cut(self, flow: Flow) -> Counts:
        """Take a released connection back into the queue; its counters so far."""

    def journal(self, flow: Flow) -> None:
        """Remember an authorised flow across a restart of the worker."""

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
    half_open_limit: int = 65_536
    live_limit: int = 1_048_576


class Credentials:
    """Local workloads by attribution key. What the agent could not identify is kept as a refusal with its reason."""

    def __init__(self) -> None:
        self._known: dict[Hashable, LocalWorkload | str] = {}

    def get(self, key: Hashable, now_us: int) -> LocalWorkload | str | None:
        """The workload; text when identification failed; None when unknown or its credential has expired."""
        found = self._known.get(key)
        if isinstance(found, LocalWorkload) and found.identity.not_after_us <= now_us:
            return None
        return found

    def put(self, key: Hashable, workload: LocalWorkload | str) -> None:
        """Learn or renew."""
        self._known[key] = workload

    def clear(self) -> None:
        """Forget all: the rules that map facts to workloads have changed."""
        self._known.clear()


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
        self, config: Config, engine: Engine, verifier: Verifier, recorder: Recorder, ports: Ports
    ) -> None:
        self.config = config
        self.engine = engine
        self.revision = 0
        self.verifier = verifier
        self.recorder = recorder
        self.ports = ports
        self.credentials = Credentials()
        self.half_open = FlowTable(config.half_open_limit)
        self.live = FlowTable(config.live_limit)
        self.denials = DenialMemory()
        self.ephemerals = EphemeralPool()
        self.seen = SeenHandshakes(2 * CLOCK_WINDOW_S * 1_000_000)
        self.syn_limit = TokenBuckets(config.syn_rate, config.syn_burst)
        self.refusal_limit = TokenBuckets(config.refusal_rate, 2 * config.refusal_rate)
        self.expiring: list[tuple[int, int, Flow]] = []  # heap of live flows whose decision has an end
        self._enforced = [(n.version == 6, int(n.netmask), int(n.network_address)) for n in config.enforced]

    def enforced(self, raw: bytes) -> bool:
        """Whether an address (4 or 16 bytes) lies in an enforced network."""
        value, v6 = int.from_bytes(raw, "big"), len(raw) == 16
        return any(six == v6 and value & mask == net for six, mask, net in self._enforced)

    def drop(self, reason: DropReason) -> Result:
        """Drop and count a packet that makes no event of its own."""
        self.recorder.count(reason)
        return DROP

    def decide(self, flow: Flow, now_us: int) -> Decision:
        """Judge `flow.request` under the current revision and note the outcome in the flow."""
        assert flow.request is not None
        decision = self.engine.decide(flow.request, now_us)
        flow.decision = decision
        flow.revision = self.revision
        flow.reason = decision.reason
        return decision

    def permitted(self, decision: Decision) -> bool:
        """Allowed, with or without an audit mark."""
        return decision.action in (Action.ALLOW, Action.AUDIT)

    def pending(self, key: bytes) -> Flow | None:
        """The flow of that key whose handshake is still under way: half-open, or live but still proving."""
        flow = self.half_open.get(key)
        if flow is None:
            flow = self.live.get(key)
            if flow is not None and flow.state is not State.PROVING:
                return None
        return flow

    def settle(self, flow: Flow, now_us: int) -> None:
        """A flow takes its place among the live ones. One that held the same 5-tuple before has ended."""
        before = self.live.get(flow.key)
        if before is not None and before is not flow:
            self.finish(before, Counts(), now_us)
        self.half_open.remove(flow)
        self.live.add(flow)
        until = flow.decision.valid_until_us if flow.decision is not None else None
        if until is not None:
            heapq.heappush(self.expiring, (until, id(flow), flow))

    def release(self, flow: Flow, now_us: int) -> None:
        """Both ends are proven and policy allows: from here on the kernel carries the flow."""
        self.settle(flow, now_us)
        flow.state = State.AUTHORISED
        flow.forget_handshake()
        self.ports.journal(flow)

    def finish(self, flow: Flow, counts: Counts, now_us: int) -> None:
        """A live flow has ended: write END and forget it."""
        self.live.remove(flow)
        self.ports.unjournal(flow)
        action = flow.decision.action if flow.decision is not None else Action.ALLOW
        self.recorder.ended(flow, action, counts, now_us)


def party(labels_of: LocalWorkload | None, raw: bytes) -> Party:
    """A local party as policy sees it."""
    if labels_of is None:
        return Party(None, None, address(raw))
    identity = labels_of.identity
    return Party(identity.labels, identity.spiffe_id, address(raw))


def request(source: Party, destination: Party, port: int) -> Request:
    """A TCP request for the engine."""
    return Request(source, destination, 6, port)
