"""When local TCP sockets end: the kernel's socket-destroy notifications (sock_diag, group SKNLGRP_INET_TCP_DESTROY).

conntrack keeps an entry for two minutes after the last FIN, so its DESTROY event is far too late for "what is open
now". The socket's own end is known at once; the worker then asks conntrack for the flow's counters.
Sources: net/core/sock_diag.c (sock_diag_broadcast_destroy), include/uapi/linux/inet_diag.h.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from typing import Final

_NETLINK_SOCK_DIAG: Final = 4
_SOL_NETLINK: Final = 270
_NETLINK_ADD_MEMBERSHIP: Final = 1
TCP_GROUPS: Final = (1, 3)  # SKNLGRP_INET_TCP_DESTROY, SKNLGRP_INET6_TCP_DESTROY
UDP_GROUPS: Final = (2, 4)  # SKNLGRP_INET_UDP_DESTROY, SKNLGRP_INET6_UDP_DESTROY
_SO_RCVBUFFORCE: Final = 33
_NLMSG: Final = struct.Struct("=IHHII")
_MAPPED: Final = bytes(10) + b"\xff\xff"
_MESSAGE_MIN: Final = 16 + 4 + 48  # nlmsghdr, first four bytes of inet_diag_msg, inet_diag_sockid


def parse(data: bytes) -> list[bytes]:
    """Flow keys (local address, remote address, local port, remote port) of destroyed connected sockets.

    IPv4 connections of dual-stack sockets come as IPv4. Anything that does not hold is passed over.
    """
    keys: list[bytes] = []
    off, size = 0, len(data)
    while off + _MESSAGE_MIN <= size:
        length = int.from_bytes(data[off : off + 4], "little")
        if length < 16 or off + length > size:
            break
        if length >= _MESSAGE_MIN:
            family = data[off + 16]
            ports = data[off + 20 : off + 24]
            source, destination = data[off + 24 : off + 40], data[off + 40 : off + 56]
            if family == socket.AF_INET:
                source, destination = source[:4], destination[:4]
            elif source[:12] == _MAPPED and destination[:12] == _MAPPED:
                source, destination = source[12:], destination[12:]
            if ports[2:] != b"\0\0":  # listeners and unconnected sockets have no peer
                keys.append(source + destination + ports)
        off += (length + 3) & ~3
    return keys


def subscribe(groups: tuple[int, ...]) -> socket.socket:
    """A non-blocking socket that gets the notifications of these groups."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)
    sock.bind((0, 0))
    sock.setblocking(False)
    with contextlib.suppress(PermissionError):  # without CAP_NET_ADMIN the default buffer must do
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 8 << 20)
    for group in groups:
        sock.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, group)
    return sock


class SocketEndings:
    """A non-blocking subscription; `fd` becomes readable when sockets have ended."""

    def __init__(self) -> None:
        self.missed = 0
        self._sock = subscribe(TCP_GROUPS)

    @property
    def fd(self) -> int:
        """For epoll."""
        return self._sock.fileno()

    def drain(self, limit: int = 256) -> list[bytes]:
        """Keys of sockets that ended since, at most `limit` messages of them."""
        keys: list[bytes] = []
        for _ in range(limit):
            try:
                data = self._sock.recv(65_536)
            except BlockingIOError:
                break
            except OSError as e:
                if e.errno != errno.ENOBUFS:
                    raise
                self.missed += 1
                continue
            keys += parse(data)
        return keys

    def close(self) -> None:
        """Unsubscribe."""
        self._sock.close()
