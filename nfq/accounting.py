"""When released flows end, and with which counters: docs/decisions/0003 says why there are three sources.

A socket's end is heard at once; conntrack's own end of an entry tells of the rest (aborts, which leave no addresses
behind); a walk through conntrack (nfq.reconcile) catches what both missed.
"""

from __future__ import annotations

from collections import deque

from nfq import datapath
from nfq.conntrack import DestroyListener
from nfq.core import Core
from nfq.endings import SocketEndings
from nfq.flow import Flow, reverse_key
from nfq.ip import UDP
from nfq.ports import KernelPorts
from nfq.recorder import Counts
from nfq.sockdiag import TcpState, UnavailableError
from nfq.udpends import DatagramEnds
from sectool.events import ConnState

DELAY_US = 20_000  # lets the last ACK be counted before the counters are read
ROUND_US = (
    100_000  # ends are accounted for in rounds: one after the other they cost half as much as one by one
)
SETTLED_AT_ONCE = 16
_OPEN = (
    TcpState.ESTABLISHED,
    TcpState.FIN_WAIT1,
    TcpState.CLOSE_WAIT,
    TcpState.LAST_ACK,
    TcpState.CLOSING,
)


class Accounting:
    """Netlink subscriptions and a short queue of ends to account for. Datagrams have `datagrams`."""

    def __init__(self, core: Core, ports: KernelPorts) -> None:
        self._core = core
        self._ports = ports
        self._endings = SocketEndings()
        self._destroyed = DestroyListener()
        self.datagrams = DatagramEnds(core, ports)
        self.due: deque[tuple[int, bytes]] = deque()  # when `settle` looks at which connection

    @property
    def missed(self) -> int:
        """How often the kernel had to drop notifications."""
        return self._endings.missed + self._destroyed.missed + self.datagrams.missed

    @property
    def sockets_fd(self) -> int:
        """Readable when sockets have ended: call `sockets_ended`."""
        return self._endings.fd

    @property
    def connections_fd(self) -> int:
        """Readable when conntrack has forgotten connections: call `connections_ended`."""
        return self._destroyed.fd

    def sockets_ended(self, now_us: int) -> None:
        """Take note of sockets' ends."""
        for key in self._endings.drain():
            if self._live(key) is not None:
                self.due.append((now_us + DELAY_US - now_us % ROUND_US + ROUND_US, key))
            elif not self._connects(key):
                datapath.abandoned(self._core, key, now_us)

    def connections_ended(self, now_us: int) -> None:
        """conntrack has forgotten connections: the end of those whose socket's end nobody told."""
        for entry in self._destroyed.drain():
            if entry.proto == UDP:
                self.datagrams.forgotten(entry, now_us)
                continue
            key = entry.src + entry.dst + entry.sport.to_bytes(2, "big") + entry.dport.to_bytes(2, "big")
            flow = self._live(key)
            # Events lag: the ports may belong to a younger connection by now.
            if flow is not None and not self.is_open(flow.key):
                counts = Counts(entry.orig_bytes, entry.orig_packets, entry.reply_bytes, entry.reply_packets)
                datapath.ended(self._core, flow.key, counts, ConnState.SF, now_us)

    def check(self, flow: Flow, now_us: int) -> None:
        """A flow restored from before: did it end while nobody listened?"""
        if not self.is_open(flow.key):
            self.due.append((now_us, flow.key))

    def settle(self, now_us: int) -> None:
        """Write the END of flows whose sockets ended a moment ago: of a few, since packets are waiting."""
        for _ in range(SETTLED_AT_ONCE):
            if not self.due or self.due[0][0] > now_us:
                return
            _, key = self.due.popleft()
            flow = self._live(key)
            if flow is None:
                continue
            counts, state, over = self._ports.counters(flow)
            # Connection tracking knows of most ends; asked is the socket only where it does not.
            if over or not self.is_open(key):
                datapath.ended(self._core, flow.key, counts or Counts(), state or ConnState.SF, now_us)

    def _live(self, key: bytes) -> Flow | None:
        return self._core.live.get(key) or self._core.live.get(reverse_key(key))

    def _state(self, key: bytes) -> tuple[int, bool] | None:
        """State of the socket with these addresses and whether a process owns it; None when there is none.

        Raises UnavailableError when the kernel does not answer.
        """
        n = (len(key) - 4) // 2
        ports = int.from_bytes(key[-4:-2], "big"), int.from_bytes(key[-2:], "big")
        found = self._ports.sockdiag.find(key[:n], ports[0], key[n : 2 * n], ports[1])
        return None if found is None else (found.state, found.inode != 0)

    def _connects(self, key: bytes) -> bool:
        """Whether a new attempt has taken the ports of the one that ended (if in doubt, yes)."""
        try:
            return self._state(key) == (TcpState.SYN_SENT, True)
        except UnavailableError:
            return True

    def is_open(self, key: bytes) -> bool:
        """Whether the connection has a socket (all the same).

        When the proving ACK and the first data are taken in on two CPUs at once, the kernel makes two sockets and
        destroys one of them (inet_csk_complete_hashdance). A FIN_WAIT2 that belongs to nobody is what TIME_WAIT
        begins as. If in doubt it is open: a flow forgotten too early could not be cut any more, and the walk
        through conntrack finds what really ended.
        """
        try:
            state = self._state(key)
        except UnavailableError:
            return True
        return state is not None and (state[0] in _OPEN or state == (TcpState.FIN_WAIT2, True))

    def close(self) -> None:
        """Unsubscribe."""
        self._endings.close()
        self._destroyed.close()
        self.datagrams.close()
