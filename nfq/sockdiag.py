"""Asks the kernel about one TCP socket by its addresses (INET_DIAG exact lookup), and aborts one.

For a connected pair the lookup finds the connected socket; for the addresses of an incoming SYN it falls back to the
listener that would get it (net/ipv4/inet_diag.c: inet_diag_find_one_icsk -> __inet_lookup).
"""

from __future__ import annotations

import errno
import socket
import struct
from dataclasses import dataclass
from typing import Final

from sectool.errors import SectoolError

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_SOCK_DESTROY: Final = 21
_NLMSG_ERROR: Final = 2
_NLM_F_REQUEST: Final = 1
_NLM_F_ACK: Final = 4
_INET_DIAG_CGROUP_ID: Final = 21
_ALL_STATES: Final = 0xFFFFFFFF
_NO_COOKIE: Final = b"\xff" * 8
_HEADER = struct.Struct("=IHHII")
# family, protocol, extensions, pad, states, then inet_diag_sockid: ports, addresses, interface, cookie
_REQUEST = struct.Struct("=BBBBI4s16s16sI8s")
_MAPPED: Final = bytes(10) + b"\xff\xff"
LISTEN: Final = 10  # TCP_LISTEN


@dataclass(frozen=True, slots=True)
class Socket:
    """What the kernel says of a socket."""

    uid: int
    inode: int
    cgroup_id: int
    cookie: bytes
    state: int


class SockDiag:
    """A netlink socket for lookups in this network namespace."""

    def __init__(self) -> None:
        self._sock = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG
        )
        self._sock.bind((0, 0))
        self._sock.settimeout(1.0)
        self._sequence = 0

    def lookup(self, src: bytes, sport: int, dst: bytes, dport: int) -> Socket | None:
        """The socket whose local end is `src`:`sport` (4- or 16-byte address) and whose peer is `dst`:`dport`.

        None if there is none. A dual-stack (IPv6) socket that speaks IPv4 is found under the IPv4 addresses.
        """
        if len(src) == 4:
            found = self._ask(socket.AF_INET, src, sport, dst, dport)
            return found or self._ask(socket.AF_INET6, _MAPPED + src, sport, _MAPPED + dst, dport)
        return self._ask(socket.AF_INET6, src, sport, dst, dport)

    def _ask(self, family: int, src: bytes, sport: int, dst: bytes, dport: int) -> Socket | None:
        reply = self._exchange(_SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, family, src, sport, dst, dport)
        if reply is None:
            return None
        return _parse(reply)

    def destroy(self, src: bytes, sport: int, dst: bytes, dport: int) -> bool:
        """Abort a connected or connecting socket: its program gets ECONNABORTED at once, its peer a RST.

        False when there is no such socket or this kernel cannot (CONFIG_INET_DIAG_DESTROY).
        """
        family = socket.AF_INET if len(src) == 4 else socket.AF_INET6
        flags = _NLM_F_REQUEST | _NLM_F_ACK
        if self._exchange(_SOCK_DESTROY, flags, family, src, sport, dst, dport) is not None:
            return True
        if len(src) == 4:
            reply = self._exchange(
                _SOCK_DESTROY, flags, socket.AF_INET6, _MAPPED + src, sport, _MAPPED + dst, dport
            )
            return reply is not None
        return False

    def _exchange(
        self, kind: int, flags: int, family: int, src: bytes, sport: int, dst: bytes, dport: int
    ) -> bytes | None:
        """One request and its answer; None when the kernel answers with an error."""
        self._sequence = (self._sequence + 1) & 0x7FFFFFFF
        body = _REQUEST.pack(
            family,
            socket.IPPROTO_TCP,
            0,
            0,
            _ALL_STATES,
            sport.to_bytes(2, "big") + dport.to_bytes(2, "big"),
            src,
            dst,
            0,
            _NO_COOKIE,
        )
        self._sock.send(_HEADER.pack(16 + len(body), kind, flags, self._sequence, 0) + body)
        while True:
            try:
                data = self._sock.recv(8192)
            except TimeoutError as e:
                raise SectoolError("the kernel does not answer sock_diag requests") from e
            except OSError as e:
                if e.errno == errno.ENOBUFS:
                    continue
                raise
            if len(data) < 20 or int.from_bytes(data[8:12], "little") != self._sequence:
                continue  # an answer to a request given up before
            if int.from_bytes(data[4:6], "little") == _NLMSG_ERROR:
                return data if int.from_bytes(data[16:20], "little", signed=True) == 0 else None
            return data

    def close(self) -> None:
        """Close the netlink socket."""
        self._sock.close()


def _parse(data: bytes) -> Socket | None:
    # nlmsghdr 16, inet_diag_msg: family state timer retrans, sockid 48, expires rqueue wqueue uid inode (4 each)
    if len(data) < 88:
        return None
    uid, inode = struct.unpack_from("=II", data, 16 + 4 + 48 + 12)
    cookie = data[16 + 4 + 40 : 16 + 4 + 48]
    size = min(int.from_bytes(data[:4], "little"), len(data))
    cgroup, off = 0, 88
    while off + 4 <= size:
        length, kind = struct.unpack_from("=HH", data, off)
        if length < 4:
            break
        if kind == _INET_DIAG_CGROUP_ID and length >= 12:
            cgroup = int.from_bytes(data[off + 4 : off + 12], "little")
        off += (length + 3) & ~3
    return Socket(uid, inode, cgroup, cookie, data[17])
