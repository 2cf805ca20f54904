"""When live UDP flows end: their socket is closed (sock_diag tells at once), or connection tracking forgets them.

A flow must not outlive its socket: the next one to get the port would send under its name. Closing is told by the
socket's cookie, since an unconnected socket has no peer; the flows are found by the cookie they were judged with.
"""

from __future__ import annotations

import contextlib
import errno
from typing import Final

from nfq import udp
from nfq.conntrack import Ended
from nfq.core import Core
from nfq.endings import UDP_GROUPS, subscribe
from nfq.flow import reverse_key
from nfq.ports import KernelPorts
from nfq.recorder import Counts
from nfq.sockdiag import UnavailableError
from nfq.udpflow import UdpFlow

_COOKIE: Final = slice(16 + 44, 16 + 52)  # of an inet_diag_msg behind its netlink header
_MESSAGE_MIN: Final = 16 + 52


def cookies(data: bytes) -> list[int]:
    """Cookies of the sockets in a datagram of destroy notifications. What does not hold is passed over."""
    out: list[int] = []
    off = 0
    while off + _MESSAGE_MIN <= len(data):
        length = int.from_bytes(data[off : off + 4], "little")
        if length < 16 or off + length > len(data):
            break
        if length >= _MESSAGE_MIN:
            out.append(int.from_bytes(data[off + _COOKIE.start : off + _COOKIE.stop], "little"))
        off += (length + 3) & ~3
    return out


class DatagramEnds:
    """One netlink subscription; for the packet worker's loop."""

    def __init__(self, core: Core, ports: KernelPorts) -> None:
        self._core = core
        self._ports = ports
        self._sock = subscribe(UDP_GROUPS)
        self.missed = 0

    @property
    def fd(self) -> int:
        """Readable when sockets were closed: call `sockets_closed`."""
        return self._sock.fileno()

    def sockets_closed(self, limit: int = 256) -> None:
        """Take note of closed sockets; `nfq.udp.timers` accounts for their flows."""
        for _ in range(limit):
            try:
                data = self._sock.recv(65_536)
            except BlockingIOError:
                return
            except OSError as e:
                if e.errno != errno.ENOBUFS:
                    raise
                self.missed += 1
                self._all_again()
                continue
            for cookie in cookies(data):
                udp.socket_ended(self._core, cookie)

    def _all_again(self) -> None:
        """Notifications were lost: look which sockets are still there."""
        with contextlib.suppress(UnavailableError):
            there = {one.cookie for v6 in (False, True) for one in self._ports.datagrams.dump(v6, 0xFFF)}
            for cookie in [c for c in self._core.udp.by_socket if c not in there]:
                udp.socket_ended(self._core, cookie)

    def forgotten(self, entry: Ended, now_us: int) -> None:
        """Connection tracking has forgotten a UDP entry."""
        key = entry.src + entry.dst + entry.sport.to_bytes(2, "big") + entry.dport.to_bytes(2, "big")
        live = self._core.udp.live
        flow = live.get(key) or live.get(reverse_key(key))
        # Events lag: by now there may be a younger entry of the same flow.
        if flow is not None and self._ports.counters(flow)[0] is None:
            counts = Counts(entry.orig_bytes, entry.orig_packets, entry.reply_bytes, entry.reply_packets)
            udp.ended(self._core, flow.key, counts, now_us)

    def restored(self, flow: UdpFlow) -> None:
        """A flow of a worker before: goes on if its socket is still there."""
        udp.restored(self._core, flow)
        with contextlib.suppress(UnavailableError):
            sockets = self._ports.datagrams.on_port(flow.v6, flow.local_port)
            if flow.socket and all(one.cookie != flow.socket for one in sockets):
                udp.socket_ended(self._core, flow.socket)

    def close(self) -> None:
        """Unsubscribe."""
        self._sock.close()
