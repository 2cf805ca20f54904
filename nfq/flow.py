"""One TCP connection as the enforcer sees it, and the table of them.

    initiator:  SYN out ─► SYN_SENT ─► SYN-ACK proven, egress allowed ─► PROVING ─► peer's first packet ─► AUTHORISED
    responder:  SYN in, ingress allowed ─► SYN_RECEIVED ─► proof ─► AUTHORISED
    both:       denied ─► DENIED (a memory of the denial: retransmissions are dropped without a new event)
                AUTHORISED ─► later policy denies ─► CUT (every further packet becomes a RST)
                AUTHORISED, encrypted ─► local socket closed ─► ENDED (recorded; its last FINs still pass for a while)
    no peer enforcer, loopback:  allowed ─► AUTHORISED at the SYN

AUTHORISED and plain means released: the kernel carries the packets by connmark and the table only remembers, for policy
changes and for the END record. AUTHORISED with `records`: every segment with payload or FIN passes through them.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from nfq.handshake import Grant, Greeting, Hello
from nfq.noise import KeyPair, TransportKeys
from nfq.record import Records
from nfq.session import Attempt, Held, Issued, Resume
from sectool.events import Auth, AuthResult, ConnState, Decider, DropReason, Point
from sectool.identity.verify import PeerIdentity
from sectool.policy import Decision, Request


class State(IntEnum):
    """See the diagram at the top of this module."""

    SYN_SENT = 1
    PROVING = 2
    SYN_RECEIVED = 3
    AUTHORISED = 4
    DENIED = 5
    CUT = 6
    ENDED = 7


@dataclass(frozen=True, slots=True)
class LocalWorkload:
    """A workload of this host with what the packet path needs to speak for it."""

    id: int
    name: str
    static: KeyPair
    blob: bytes
    identity: PeerIdentity


class Owner(NamedTuple):
    """The process the kernel names for a local socket, as recorded in events."""

    pid: int
    uid: int
    cgroup: int


_PORTS = struct.Struct(">HH")

NOBODY = Owner(0, 0xFFFFFFFF, 0)


class Flow:
    """Mutable state of one connection; a plain record, changed only by the packet path of its worker."""

    __slots__ = (
        "adopted",
        "answer_wire",
        "attempt",
        "auth",
        "auth_result",
        "community",
        "conn_state",
        "deadline_us",
        "decider",
        "decision",
        "event_id",
        "fins",
        "former",
        "greeting",
        "held",
        "hello",
        "history",
        "isn",
        "issued",
        "journal_slot",
        "key",
        "keys",
        "let_in",
        "local",
        "local_address",
        "local_port",
        "mss",
        "owner",
        "path_mtu",
        "path_seen",
        "peer",
        "peer_isn",
        "peer_local",
        "peer_reason",
        "peer_rule",
        "point",
        "proof",
        "proofs",
        "protocol",
        "reason",
        "recorded",
        "records",
        "remote_address",
        "remote_port",
        "request",
        "resume",
        "revision",
        "small_until_us",
        "start_us",
        "state",
        "suite",
        "syn",
        "timeout_us",
        "until_us",
        "v6",
    )

    def __init__(self, key: bytes, v6: bool, point: Point, state: State, isn: int, now_us: int) -> None:
        n = 16 if v6 else 4
        self.key = key
        # Of the key: this host's and the other's address (4 or 16 bytes) and port
        self.local_address, self.remote_address = key[:n], key[n : 2 * n]
        self.local_port, self.remote_port = _PORTS.unpack_from(key, 2 * n)
        self.v6 = v6
        self.point = point
        self.protocol = 6  # IP protocol number
        self.state = state
        self.isn = isn  # initiator's initial sequence number
        self.start_us = now_us
        self.deadline_us = 0
        self.timeout_us = 0
        self.until_us = 0  # when its decision is to be made anew, as noted in Core.expiring
        self.adopted = False  # it was there before the first start: never judged
        self.event_id = b""
        self.community = b""  # community id, once it has been recorded
        self.local: LocalWorkload | None = None
        self.peer_local: LocalWorkload | None = None  # loopback: the accepting workload
        self.owner: Owner = NOBODY
        self.peer: PeerIdentity | None = None
        self.peer_isn = 0  # responder's initial sequence number
        self.suite = 0  # of its records (nfq.suites); 0: plain
        self.records: Records | None = None
        self.mss = 0  # the peer's, as our stack was told it; 0: unknown
        self.path_mtu = (
            0  # to which its packets are cut (nfq.pathmtu), as of version `path_seen` of Core.paths; 0: not
        )
        self.path_seen = 0
        self.fins = 0  # 1: ours has left in a record, 2: the peer's has come
        self.small_until_us = 0  # until then one record a segment: packets were lost
        self.request: Request | None = None
        self.decision: Decision | None = None
        self.revision = 0
        self.hello: Hello | None = None
        self.attempt: Attempt | None = None  # instead of `hello`, under a session
        self.held: tuple[Held, Grant] | None = None  # the session that this handshake leaves
        self.syn = b""  # as the local stack sent it, to send it again
        self.greeting: Greeting | None = None
        self.resume: Resume | None = None  # instead of `greeting`, under a session
        self.former: Flow | None = (
            None  # half open: another claim to the same SYN; the proof decides between them
        )
        self.issued: Issued | None = None  # the session that this handshake makes
        self.answer_wire = b""  # message 2, kept for retransmitted SYN-ACKs
        self.keys: TransportKeys | None = None
        self.proof = b""  # the initiator's, as it goes over the wire
        self.proofs = 0  # segments that have carried it; before, how often the SYN was sent again
        self.auth = Auth.NONE
        self.auth_result = AuthResult.NONE
        self.conn_state = ConnState.NONE
        self.decider = Decider.LOCAL
        self.reason = DropReason.NONE
        self.peer_reason = DropReason.NONE
        self.let_in = (
            DropReason.NONE
        )  # why it lives only as long as nothing is enforced, whatever policy says
        self.peer_rule = 0
        self.history = b""
        self.recorded = False
        self.journal_slot = -1

    @property
    def identities(self) -> list[PeerIdentity]:
        """Whose flow it is, as far as that is known: our workload's identity, and the other end's."""
        ends = [end.identity for end in (self.local, self.peer_local) if end is not None]
        return ends if self.peer is None else [*ends, self.peer]

    def forget_handshake(self) -> None:
        """Drop what only the handshake needed: keys must not outlive their use."""
        self.hello = self.attempt = self.held = None
        self.syn = b""
        self.greeting = self.resume = self.issued = self.former = None
        self.keys = None
        self.answer_wire = b""

    def forget_keys(self) -> None:
        """Drop the records' keys, and their state in the journal."""
        if self.records is not None:
            self.records.close()
            self.records = None


def reverse_key(key: bytes) -> bytes:
    """The key under which the other end of a loopback flow is seen."""
    n = (len(key) - 4) // 2
    return key[n : 2 * n] + key[:n] + key[-2:] + key[-4:-2]


class FlowTable:
    """Flows by key, bounded; those with a deadline expire in order.

    All timeouts handed in are one of a few constants, so one queue per constant keeps deadlines in order. A flow that
    leaves the table leaves its queue too.
    """

    def __init__(self, limit: int = 262_144) -> None:
        self._flows: dict[bytes, Flow] = {}
        self.get = self._flows.get  # the flow of a key; asked for several times a packet
        self._expiry: dict[int, OrderedDict[bytes, Flow]] = {}
        self.limit = limit

    def __len__(self) -> int:
        return len(self._flows)

    def __iter__(self) -> Iterator[Flow]:
        return iter(list(self._flows.values()))

    @property
    def full(self) -> bool:
        """No room for another flow."""
        return len(self._flows) >= self.limit

    def add(self, flow: Flow) -> None:
        """Insert or replace."""
        before = self._flows.get(flow.key)
        if before is not None and before is not flow:
            self._disarm(before)
        self._flows[flow.key] = flow

    def remove(self, flow: Flow) -> None:
        """Forget, unless another flow has taken the key."""
        if self._flows.get(flow.key) is flow:
            del self._flows[flow.key]
            if flow.timeout_us:
                self._disarm(flow)

    def evict(self) -> Flow | None:
        """Forget the flow that has been here longest."""
        oldest = next(iter(self._flows.values()), None)
        if oldest is not None:
            self.remove(oldest)
        return oldest

    def expire_after(self, flow: Flow, now_us: int, timeout_us: int) -> None:
        """(Re)arm the deadline of a flow of this table."""
        if flow.timeout_us:
            self._disarm(flow)
        flow.deadline_us, flow.timeout_us = now_us + timeout_us, timeout_us
        queue = self._expiry.get(timeout_us)
        if queue is None:
            queue = self._expiry[timeout_us] = OrderedDict()
        queue[flow.key] = flow

    def _disarm(self, flow: Flow) -> None:
        queue = self._expiry.get(flow.timeout_us)
        if queue is not None and queue.get(flow.key) is flow:
            del queue[flow.key]
        flow.deadline_us = flow.timeout_us = 0

    def expired(self, now_us: int) -> list[Flow]:
        """Flows whose deadline has passed, taken off the clock but not out of the table."""
        out: list[Flow] = []
        for queue in self._expiry.values():
            while queue:
                flow = next(iter(queue.values()))
                if flow.deadline_us > now_us:
                    break
                self._disarm(flow)
                out.append(flow)
        return out
