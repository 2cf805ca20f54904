"""Which sockets do datagrams belong to: sock_diag for UDP (net/ipv4/udp_diag.c).

Unlike a TCP connection, one local port may be several sockets' (SO_REUSEADDR, SO_REUSEPORT, different addresses), and a
sender chooses the source address of each datagram (IP_PKTINFO): whatever has the port may have sent it. Going through
all sockets of a port takes the kernel no longer than a single lookup takes us (28 and 24 microseconds, measured).
"""

from __future__ import annotations

import socket

from nfq.sockdiag import SockDiag, Socket

_ALL_STATES = 0xFFF


class DatagramDiag(SockDiag):
    """Questions about UDP sockets. Like SockDiag, for one thread."""

    def __init__(self) -> None:
        super().__init__(socket.IPPROTO_UDP)

    def receiver(
        self, local: bytes, local_port: int, remote: bytes, remote_port: int, ifindex: int = 0
    ) -> Socket | None:
        """The socket that a datagram from remote to local is given to, by the kernel's own lookup. Never raises.

        None: there is none, or the kernel did not answer (counted in `unavailable`).
        """
        # udp_dump_one takes the two ends the other way round than its TCP counterpart.
        return self.lookup(remote, remote_port, local, local_port, ifindex)

    def on_port(self, v6: bool, port: int) -> list[Socket]:
        """All sockets of a local port that send and receive in this IP version. Raises UnavailableError."""
        found = list(self.dump(True, _ALL_STATES, port))
        if v6:
            return found
        return [*self.dump(False, _ALL_STATES, port), *(one for one in found if not one.v6only)]


def sender_first(sockets: list[Socket], local: bytes, remote: bytes, remote_port: int) -> list[Socket]:
    """The sockets that can have sent a datagram, the likeliest first: connected there, bound to its address, others.

    Addresses of IPv4 have 4 bytes, those of dual-stack sockets may have 16 zeros.
    """

    def unlikely(one: Socket) -> tuple[bool, bool]:
        connected = one.remote_port == remote_port and one.remote == remote
        return not connected, one.local != local

    return sorted(sockets, key=unlikely)


def members(sockets: list[Socket], group: bytes, ifindex: int) -> list[Socket]:
    """Those that get what arrives for a group by a device: bound to it or to no address, not to another device."""
    return [
        one for one in sockets if (one.local == group or not any(one.local)) and one.ifindex in (0, ifindex)
    ]
