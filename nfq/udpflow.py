"""A UDP flow as the enforcer sees it, and the tables of one worker.

initiator:  datagram out ─► SYN_SENT (held) ─► Answer proven, egress allowed ─► PROVING ─► Ack ─► AUTHORISED
responder:  Hello in, ingress allowed ─► SYN_RECEIVED ─► proof, or a sealed datagram ─► AUTHORISED
both:       denied ─► a memory of it: further datagrams are dropped without an event
no peer enforcer, loopback, groups:  allowed ─► AUTHORISED at the first datagram
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Final, NamedTuple

from nfq.flow import Flow, FlowTable, State
from nfq.ip import UDP
from nfq.udprecord import Datagrams
from sectool.events import Auth, Point

DENIED_US: Final = 10_000_000  # how long the datagrams of a denied flow are dropped unasked
DENIED_LIMIT: Final = 65_536
ENDED_US: Final = 10_000_000  # how long after its end what still comes is no event
STRANGERS: Final = 65_536  # live flows from outside the enforced networks
TAILS: Final = 64  # ends of datagrams sent lately that a peer may say it does not know


class UdpFlow(Flow):
    """As a TCP flow, with what datagrams need."""

    __slots__ = (
        "ack",
        "doubted",
        "due_us",
        "early",
        "early_digests",
        "early_seen",
        "group",
        "judged_us",
        "mtu",
        "mtu_until_us",
        "peer_socket",
        "proved",
        "rivals",
        "sealed",
        "socket",
        "tails",
        "told_us",
        "tries",
        "waited",
    )

    def __init__(self, key: bytes, v6: bool, point: Point, state: State, now_us: int) -> None:
        super().__init__(key, v6, point, state, 0, now_us)
        self.protocol = UDP
        self.ack = b""  # what the responder says when it has seen the proof
        self.due_us = 0  # when the handshake's timer goes off; 0: never
        self.tries = 0
        self.waited = 0  # datagrams kept back so far
        self.early: Sequence[bytes] = ()  # initiator: packets whose datagrams were sent behind RESUME
        self.early_digests: set[bytes] | None = None  # responder: of them, see nfq.udpcore.seen_early
        self.early_seen = 0  # responder: which of these were delivered, a bit each
        self.rivals: Sequence[UdpFlow] = ()  # half open: other Hellos of the same key, the latest first
        self.proved = False  # a proof was sent alone
        self.group = False  # to a multicast or broadcast address
        self.judged_us = 0  # of a group: when it was judged last
        self.mtu = 0  # of the path, as of `mtu_until_us`
        self.mtu_until_us = 0
        self.sealed: Datagrams | None = None  # its datagrams are encrypted
        self.socket = 0  # the kernel's cookie of the local socket; 0: not known
        self.peer_socket = 0  # loopback: of the socket that is called
        self.tails: deque[bytes] | None = None  # initiator, sealed: ends of datagrams sent lately
        self.told_us = 0  # when the peer last said that it does not know the flow
        self.doubted = False  # it did: the next datagram makes a new handshake


class Settled(NamedTuple):
    """The handshake of the flow with this key has come to an end: its held datagrams are to be judged again.

    `anew`: as packets sent anew. Connection tracking began to track the held ones as a flow of our own, and knows the
    flow as the other side's by now; what clashes so it drops (measured, Linux 6.18).
    """

    key: bytes
    anew: bool = False


class _Denied:
    __slots__ = ("unanswered", "until_us")

    def __init__(self, until_us: int) -> None:
        self.until_us = until_us
        self.unanswered = 0  # bytes received since the last answer


class Denials:
    """Denied and ended flows by direction and key, bounded, so that their further datagrams are no events."""

    def __init__(self, limit: int = DENIED_LIMIT) -> None:
        self._known: OrderedDict[tuple[bool, bytes], _Denied] = OrderedDict()
        self.limit = limit

    def add(self, outbound: bool, key: bytes, until_us: int) -> None:
        """Remember until then."""
        known = self._known.get((outbound, key))
        if known is None:
            self._known[outbound, key] = _Denied(until_us)
            if len(self._known) > self.limit:
                self._known.popitem(last=False)
        else:
            known.until_us = until_us
            self._known.move_to_end((outbound, key))

    def knows(self, outbound: bool, key: bytes, now_us: int) -> bool:
        """Whether datagrams of that flow are dropped unasked."""
        known = self._known.get((outbound, key))
        return known is not None and now_us < known.until_us

    def received(self, key: bytes, size: int) -> int:
        """Count the bytes of an inbound datagram that nobody answered; all of them so far, since the last answer."""
        known = self._known.get((False, key))
        if known is None:
            return size
        known.unanswered += size
        return known.unanswered

    def answered(self, key: bytes) -> None:
        """An answer was sent."""
        known = self._known.get((False, key))
        if known is not None:
            known.unanswered = 0

    def forget(self, outbound: bool, key: bytes) -> None:
        """Its next datagram is judged."""
        self._known.pop((outbound, key), None)

    def clear(self) -> None:
        """Forget all: policy has changed."""
        self._known.clear()

    def __len__(self) -> int:
        return len(self._known)


class UdpTables:
    """All UDP flows of one worker, their timers, and what has become of held datagrams."""

    def __init__(self, half_open_limit: int, live_limit: int) -> None:
        self.connecting = FlowTable(half_open_limit)
        self.accepting = FlowTable(half_open_limit)
        self.live = FlowTable(live_limit)
        self.denied = Denials()
        self.settled: deque[Settled] = deque()
        self.by_socket: dict[int, dict[bytes, UdpFlow]] = {}
        self.strangers: OrderedDict[bytes, UdpFlow] = OrderedDict()  # let in from outside, the oldest first
        self.timers: list[tuple[int, int, UdpFlow]] = []  # heap: when, id, flow
        self.expiring: list[tuple[int, int, UdpFlow]] = []  # heap of flows whose decision has an end
        self.ending: deque[bytes] = deque()  # live flows whose socket is closed
        self.early_bytes = 0  # of all `UdpFlow.early`
        self.uncut: list[UdpFlow] = []  # cut, but the kernel has not taken note yet

    def arm(self, flow: UdpFlow, due_us: int) -> None:
        """Set the flow's timer; 0 stops it."""
        flow.due_us = due_us
        if due_us:
            heapq.heappush(self.timers, (due_us, id(flow), flow))

    def due(self, now_us: int) -> list[UdpFlow]:
        """Flows whose timer has gone off."""
        out = []
        while self.timers and self.timers[0][0] <= now_us:
            when, _, flow = heapq.heappop(self.timers)
            if flow.due_us == when:
                flow.due_us = 0
                out.append(flow)
        return out

    def next_us(self) -> int | None:
        """When the next timer goes off; None: there is none."""
        while self.timers and self.timers[0][2].due_us != self.timers[0][0]:
            heapq.heappop(self.timers)
        return self.timers[0][0] if self.timers else None

    def find(self, table: FlowTable, key: bytes) -> UdpFlow | None:
        """A flow of one of these tables."""
        flow = table.get(key)
        assert flow is None or isinstance(flow, UdpFlow)
        return flow

    def enter(self, flow: UdpFlow) -> None:
        """A flow is live: no longer half open, and found by its socket."""
        for half_open in (self.connecting, self.accepting):
            before = half_open.get(flow.key)
            if before is not None:
                half_open.remove(before)
        flow.rivals = ()
        self.live.add(flow)
        if flow.point is Point.RESPONDER and flow.auth is Auth.NONE:
            self.strangers[flow.key] = flow
            self.strangers.move_to_end(flow.key)
            if len(self.strangers) > STRANGERS:
                # Source addresses out there can be made up. Whoever is still there is judged anew.
                self.ending.append(self.strangers.popitem(last=False)[0])
        for cookie in (flow.socket, flow.peer_socket):
            if cookie:
                self.by_socket.setdefault(cookie, {})[flow.key] = flow

    def leave(self, flow: UdpFlow) -> None:
        """A live flow is over."""
        self.live.remove(flow)
        self.arm(flow, 0)
        if self.strangers.get(flow.key) is flow:
            del self.strangers[flow.key]
        for cookie in (flow.socket, flow.peer_socket):
            mine = self.by_socket.get(cookie)
            if mine is not None and mine.get(flow.key) is flow:
                del mine[flow.key]
                if not mine:
                    del self.by_socket[cookie]
