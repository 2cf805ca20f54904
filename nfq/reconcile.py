"""Keeps the table of live flows and the kernel's connection tracking in step, a little at a time.

Socket-end notifications can be lost (a full netlink buffer, a worker that was down), and flows that outlive a
minute deserve their counters in the store. So a dump of conntrack is walked through every PERIOD_US: long flows get
an UPDATE record, and live flows the kernel no longer knows get their END.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from nfq import udp
from nfq.conntrack import ConntrackControl, Entry, FlowTuple
from nfq.core import Core
from nfq.flow import Flow, State, reverse_key
from nfq.ip import TCP, UDP
from nfq.recorder import Counts
from sectool.events import Action, ConnState, Phase, Point

PERIOD_US = 30_000_000
UPDATE_AFTER_US = 60_000_000
_OVER = frozenset(("TIME_WAIT", "CLOSE", "LAST_ACK"))
CHUNK = 256  # entries between two looks at the packet queue


_Name = tuple[int, bytes]  # IP protocol and key of a flow


class Reconciler:
    """One walk at a time; `step` does a bounded piece of it."""

    def __init__(
        self, core: Core, conntrack: ConntrackControl, mask: int, mine: Callable[[bytes], bool]
    ) -> None:
        """`mine`: whether a flow of that key is this worker's, so that it may take its mark back."""
        self._core = core
        self._mine = mine
        self._strange: set[_Name] = set()  # marked but unknown, as of the walk before
        self._strange_now: set[_Name] = set()
        self._conntrack = conntrack
        self._mask = mask
        self._walk: Iterator[Entry] | None = None
        self._seen: set[_Name] = set()
        self._started_us = 0
        self.next_us = 0  # when `step` begins another walk

    @property
    def busy(self) -> bool:
        """A walk is under way: call `step` again soon."""
        return self._walk is not None

    def start(self, now_us: int) -> None:
        """Begin a walk now."""
        self._walk = self._conntrack.dump(proto=0)
        self._seen.clear()
        self._strange, self._strange_now = self._strange_now, set()
        self._started_us = now_us
        self.next_us = now_us + PERIOD_US

    def step(self, now_us: int) -> None:
        """Do a piece of the walk, or begin one when it is time."""
        if self._walk is None:
            if now_us >= self.next_us:
                self.start(now_us)
            return
        for _ in range(CHUNK):
            entry = next(self._walk, None)
            if entry is None:
                self._walk = None
                self._finish(now_us)
                return
            self._look(entry, now_us)

    def _look(self, entry: Entry, now_us: int) -> None:
        live = {TCP: self._core.live, UDP: self._core.udp.live}.get(entry.proto)
        if live is None:
            return
        key = entry.src + entry.dst + entry.sport.to_bytes(2, "big") + entry.dport.to_bytes(2, "big")
        flow = live.get(key) or live.get(reverse_key(key))
        if not entry.mark & self._mask and (flow is None or entry.proto == TCP):
            return
        if flow is None:
            self._unknown(entry, key)
            return
        self._seen.add((entry.proto, flow.key))
        if flow.state is State.AUTHORISED and now_us - flow.start_us >= UPDATE_AFTER_US:
            action = flow.decision.action if flow.decision is not None else Action.ALLOW
            counts = Counts(entry.orig_bytes, entry.orig_packets, entry.reply_bytes, entry.reply_packets)
            self._core.recorder.flow(flow, Phase.UPDATE, action, now_us, counts=counts)

    def _unknown(self, entry: Entry, key: bytes) -> None:
        """A released connection nobody answers for (its flow did not outlive a restart): policy could not cut it.

        Seen so in two walks it loses its mark; what it still sends is then dropped like any unknown flow.
        """
        if not self._mine(key) or entry.tcp_state in _OVER:
            return
        self._strange_now.add((entry.proto, key))
        if (entry.proto, key) in self._strange:
            self._conntrack.set_mark(entry.tuple, 0, self._mask)

    def _finish(self, now_us: int) -> None:
        for flow in (*self._core.live, *self._core.udp.live):
            known = (flow.protocol, flow.key) in self._seen
            if known or flow.state in (State.CUT, State.ENDED) or not self._settled(flow):
                continue
            entry = self._conntrack.get(FlowTuple(*_tuple(flow)))
            if entry is not None and entry.tcp_state not in _OVER:
                continue  # the dump passed it over, or it has not been released yet
            if flow.protocol == UDP:
                udp.ended(self._core, flow.key, Counts(), now_us)
                continue
            flow.conn_state = ConnState.OTH if flow.point is not Point.LOCAL else ConnState.SF
            self._core.finish(flow, Counts(), now_us)

    def _settled(self, flow: Flow) -> bool:
        """Old enough that its connection tracking entry carried the mark before the walk began."""
        return flow.start_us < self._started_us - 5_000_000


def _tuple(flow: Flow) -> tuple[bytes, bytes, int, int, int]:
    return flow.local_address, flow.remote_address, flow.local_port, flow.remote_port, flow.protocol
