"""Which socket does a TCP 4-tuple belong to: the kernel's exact lookup (sock_diag(7), NETLINK_SOCK_DIAG).

The request is answered within the send, from the hash tables the stack itself uses, and an unknown 4-tuple falls back
to the listener that would take its SYN (net/ipv4/inet_diag.c, inet_diag_find_one_icsk): IPv4, IPv6, dual-stack,
bound or wildcard, and the very member of a SO_REUSEPORT group that the hash picks. (A group steered by a BPF program
that reads the packet is asked without one, and may pick another member.)

A socket bound to a device (SO_BINDTODEVICE, a link-local address, a VRF) is found only when that device is asked for;
asked so, unbound sockets are found as well, as for a packet on that device.
Source: include/uapi/linux/inet_diag.h
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator
from enum import IntEnum
from typing import Final, NamedTuple

from sectool.errors import PrivilegeError, SectoolError

_NETLINK_SOCK_DIAG: Final = 4
_BY_FAMILY: Final = 20
_DESTROY: Final = 21
_REQUEST, _ACK, _DUMP = 1, 4, 0x300
_ERROR, _DONE = 2, 3
_V6ONLY: Final = 11
_CGROUP_ID: Final = 21
_MAPPED: Final = bytes(10) + b"\xff\xff"
_ZERO12: Final = bytes(12)

# nlmsghdr, then inet_diag_req_v2: family, protocol, extensions, pad, states, sport, dport, src, dst, if, cookie
_REQ: Final = struct.Struct("=IHHIIBBBBI2s2s16s16sI8s")
_NO_COOKIE: Final = b"\xff" * 8
# inet_diag_msg behind the nlmsghdr: family, state, (timer, retrans), sport, dport, src, dst, if, cookie,
# expires, rqueue, wqueue, uid, inode
_MSG: Final = struct.Struct("=BBxxHH16s16sIQIIIII")
_BODY: Final = 16 + _MSG.size
_ATTRIBUTE: Final = struct.Struct("=HH")
_BUFFER: Final = 32_768
_TRANSIENT: Final = (errno.ENOBUFS, errno.ENOMEM, errno.EBUSY, errno.EAGAIN, errno.EINTR)


class TcpState(IntEnum):
    """include/net/tcp_states.h"""

    ESTABLISHED = 1
    SYN_SENT = 2
    SYN_RECV = 3
    FIN_WAIT1 = 4
    FIN_WAIT2 = 5
    TIME_WAIT = 6
    CLOSE = 7
    CLOSE_WAIT = 8
    LAST_ACK = 9
    LISTEN = 10
    CLOSING = 11
    NEW_SYN_RECV = 12


class Socket(NamedTuple):
    """What the kernel says of a socket. Addresses are 4 or 16 bytes as in its packets; cgroup_id 0: not told.

    Half-open and TIME_WAIT connections are no full sockets: their inode and cgroup_id are 0.
    """

    uid: int
    inode: int
    cgroup_id: int
    cookie: int
    state: int
    local: bytes
    local_port: int
    remote: bytes
    remote_port: int
    ifindex: int = 0  # of the device it is bound to
    v6only: bool = False  # an IPv6 socket that takes no IPv4


class UnavailableError(SectoolError):
    """The kernel did not answer the question, twice. Says nothing about the socket."""


class Destroyed(IntEnum):
    """Outcome of SockDiag.destroy."""

    DONE = 1
    NO_SUCH_SOCKET = 2
    NOT_SUPPORTED = 3  # kernel without CONFIG_INET_DIAG_DESTROY
    UNAVAILABLE = 4  # the kernel did not answer


class SockDiag:
    """One netlink socket of the present network namespace. Not for several threads."""

    def __init__(self, protocol: int = socket.IPPROTO_TCP) -> None:
        self._protocol = protocol
        self._sock = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG
        )
        self._sock.bind((0, 0))
        # Answers are there when send returns; this is against waiting for ever. (A timeout of Python polls first.)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, 250_000))
        self._seq = 0
        self.unavailable = 0  # questions without an answer

    def close(self) -> None:
        """Close the netlink socket."""
        self._sock.close()

    def _ask(
        self,
        kind: int,
        flags: int,
        local: bytes,
        lport: int,
        remote: bytes,
        rport: int,
        states: int,
        ifindex: int = 0,
        cookie: bytes = _NO_COOKIE,
    ) -> int:
        self._seq = seq = (self._seq + 1) & 0xFFFFFFFF
        if len(local) == 4:
            family, local, remote = socket.AF_INET, local + _ZERO12, remote + _ZERO12
        else:
            family = socket.AF_INET6
        self._sock.send(
            _REQ.pack(
                _REQ.size, kind, flags, seq, 0, family, self._protocol, 0, 0, states,
                lport.to_bytes(2, "big"), rport.to_bytes(2, "big"), local, remote, ifindex, cookie,
            )
        )  # fmt: skip
        return seq

    def _answer(self, seq: int) -> bytes:
        while True:
            data = self._sock.recv(_BUFFER)
            # Answers to requests given up before (a timeout) may still lie here.
            if len(data) >= 20 and int.from_bytes(data[8:12], sys.byteorder) == seq:
                return data

    def _empty(self) -> None:
        """Take away answers nobody waits for, which may be what keeps the next one out, and errors noted meanwhile."""
        for _ in range(1024):
            try:
                self._sock.recv(_BUFFER, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as e:
                if e.errno != errno.ENOBUFS:
                    return

    def _find(
        self, local: bytes, local_port: int, remote: bytes, remote_port: int, ifindex: int
    ) -> Socket | None:
        seq = self._ask(_BY_FAMILY, _REQUEST, local, local_port, remote, remote_port, 0xFFF, ifindex)
        data = self._answer(seq)
        if int.from_bytes(data[4:6], sys.byteorder) == _BY_FAMILY:
            return parse(data, 0, len(data))
        code = _code(data)
        if code in (errno.ENOENT, errno.EINVAL, errno.ESTALE):
            return None
        raise OSError(code, os.strerror(code))

    def find(
        self, local: bytes, local_port: int, remote: bytes, remote_port: int, ifindex: int = 0
    ) -> Socket | None:
        """The socket that a packet from remote to local belongs to: connected, or the listener; None: there is none.

        Addresses have 4 or 16 bytes; `ifindex` is the packet's device (0: only sockets bound to none are found).
        Raises UnavailableError, after a second attempt, when the kernel does not answer.
        """
        try:
            return self._find(local, local_port, remote, remote_port, ifindex)
        except OSError:
            self._empty()  # no memory, an answer lost, a signal: all may be over by now
        try:
            return self._find(local, local_port, remote, remote_port, ifindex)
        except OSError as e:
            self.unavailable += 1
            raise UnavailableError(
                f"cannot ask the kernel for a socket: {e.strerror or e}",
                "the kernel needs inet_diag and tcp_diag (`modprobe tcp_diag`)",
            ) from None

    def lookup(
        self, local: bytes, local_port: int, remote: bytes, remote_port: int, ifindex: int = 0
    ) -> Socket | None:
        """As `find`, but None when the kernel does not answer, too (counted in `unavailable`): never raises."""
        try:
            return self.find(local, local_port, remote, remote_port, ifindex)
        except UnavailableError:
            return None

    def listener(self, local: bytes, local_port: int, ifindex: int = 0) -> Socket | None:
        """A listener for an address and port, when no particular peer is asked for. As `lookup`, never raises."""
        found = self.lookup(local, local_port, bytes(len(local)), 0, ifindex)
        return found if found is not None and found.state == TcpState.LISTEN else None

    def destroy(
        self, local: bytes, local_port: int, remote: bytes, remote_port: int, ifindex: int = 0
    ) -> Destroyed:
        """Abort a connected (or connecting) socket: its program gets ECONNABORTED, its peer a RST if connected.

        Never touches a listener. Raises PrivilegeError without CAP_NET_ADMIN; UNAVAILABLE: it may still live.
        """
        try:
            found = self.find(local, local_port, remote, remote_port, ifindex)
            if found is None or found.state in (TcpState.LISTEN, TcpState.TIME_WAIT):
                return Destroyed.NO_SUCH_SOCKET
            code = self._destroy(found, ifindex)
            if code in _TRANSIENT:
                code = self._destroy(found, ifindex)
        except UnavailableError:
            return Destroyed.UNAVAILABLE
        except OSError:
            self.unavailable += 1
            return Destroyed.UNAVAILABLE
        if code == 0:
            return Destroyed.DONE
        if code in (errno.EOPNOTSUPP, errno.EINVAL):
            return Destroyed.NOT_SUPPORTED
        if code == errno.EPERM:
            raise PrivilegeError("closing a socket is not permitted", "run as root (CAP_NET_ADMIN)")
        if code in _TRANSIENT:
            self.unavailable += 1
            return Destroyed.UNAVAILABLE
        return Destroyed.NO_SUCH_SOCKET

    def _destroy(self, found: Socket, ifindex: int) -> int:
        """Error code of the order. The cookie makes it this very socket, not one that has taken its place."""
        cookie = found.cookie.to_bytes(8, sys.byteorder)
        seq = self._ask(
            _DESTROY,
            _REQUEST | _ACK,
            found.local,
            found.local_port,
            found.remote,
            found.remote_port,
            0xFFF,
            ifindex,
            cookie,
        )
        return _code(self._answer(seq))

    def bound_elsewhere(
        self, local: bytes, local_port: int, remote: bytes, remote_port: int, state: TcpState
    ) -> Socket | None:
        """A socket of these addresses that is bound to some device, if there is exactly one. Never raises.

        A packet to an address of this host leaves by the loopback device, but belongs to the sockets of the device that
        it would have left by. Goes through all sockets: for what `lookup` does not find on that device.
        """
        if state == TcpState.LISTEN:
            remote_port, remote = 0, bytes(len(remote))
        try:
            found = [
                sock
                for sock in self.dump(len(local) == 16, 1 << state, local_port, remote_port)
                if sock.ifindex and sock.remote == remote and sock.local in (local, bytes(len(local)))
            ]
        except UnavailableError:
            return None
        return found[0] if len(found) == 1 else None

    def dump(self, v6: bool, states: int, local_port: int = 0, remote_port: int = 0) -> Iterator[Socket]:
        """All sockets of one family (and port) whose state is in the bit set `states` (1 << TcpState).

        Raises UnavailableError when the kernel does not tell them all.
        """
        nothing = bytes(16 if v6 else 4)
        try:
            seq = self._ask(_BY_FAMILY, _REQUEST | _DUMP, nothing, local_port, nothing, remote_port, states)
            while True:
                data = self._answer(seq)
                off, size = 0, len(data)
                while off + 16 <= size:
                    length, kind = struct.unpack_from("=IH", data, off)
                    if length < 16 or off + length > size:
                        break
                    if kind in (_DONE, _ERROR):
                        if length >= 20 and (code := _code(data, off)):
                            raise OSError(code, os.strerror(code))
                        return
                    found = parse(data, off, off + length)
                    if found is not None:
                        yield found
                    off += (length + 3) & ~3
        except OSError as e:
            self.unavailable += 1
            raise UnavailableError(f"cannot ask the kernel for its sockets: {e.strerror or e}") from None


def _code(data: bytes, off: int = 0) -> int:
    """Positive error code of an NLMSG_ERROR or NLMSG_DONE."""
    return -int.from_bytes(data[off + 16 : off + 20], sys.byteorder, signed=True)


def parse(data: bytes, off: int, end: int) -> Socket | None:
    """One sock_diag answer between `off` and `end`; None when it is too short to be one."""
    if end - off < _BODY:
        return None
    family, state, sport, dport, src, dst, ifindex, cookie, _, _, _, uid, inode = _MSG.unpack_from(
        data, off + 16
    )
    cgroup, v6only = 0, False
    at = off + _BODY
    while at + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < 4 or at + length > end:
            break
        if kind == _CGROUP_ID and length == 12:
            cgroup = int.from_bytes(data[at + 4 : at + 12], sys.byteorder)
        elif kind == _V6ONLY and length == 5:
            v6only = data[at + 4] != 0
        at += (length + 3) & ~3
    if family == socket.AF_INET:
        src, dst = src[:4], dst[:4]
    elif src[:12] == _MAPPED and dst[:12] == _MAPPED:
        src, dst = src[12:], dst[12:]
    return Socket(
        uid, inode, cgroup, cookie, state, src, socket.ntohs(sport), dst, socket.ntohs(dport), ifindex, v6only
    )
