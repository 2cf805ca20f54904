"""Connection tracking of this network namespace: entries, marks, deletion, and the end of connections.

Straight over netlink (nfq.ctnetlink): pyroute2's decoder takes hundreds of microseconds an event.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Final

from nfq.ctnetlink import (
    ASSURED,
    BE_LIBERAL,
    CONFIRMED,
    DELETE,
    GET,
    MARK,
    MARK_MASK,
    NEW,
    ORIG,
    PROTOINFO,
    PROTOINFO_TCP,
    REPLY,
    SACK_PERM,
    SEEN_REPLY,
    STATUS,
    TCP,
    TCP_FLAGS_ORIG,
    TCP_FLAGS_REPLY,
    TCP_STATE,
    TCP_STATES,
    TIMEOUT,
    Entry,
    FlowTuple,
    Parsed,
    attr,
    nest,
    parse,
    tuple_attr,
    u32,
)
from sectool.errors import PrivilegeError, SectoolError

__all__ = ["ConntrackControl", "DestroyListener", "Ended", "Entry", "FlowTuple", "load_tracking"]

Ended = Entry  # what DestroyListener gives: the entry as it was when it ended

_NETLINK_NETFILTER, _SOL_NETLINK = 12, 270
_ADD_MEMBERSHIP: Final = 1
_SO_RCVBUFFORCE: Final = 33
_GROUP_DESTROY: Final = 3  # NFNLGRP_CONNTRACK_DESTROY
_REQUEST, _ACK, _DUMP, _CREATE, _EXCL = 1, 4, 0x300, 0x400, 0x200
_message = struct.Struct("=IHHIIBBH")  # nlmsghdr, nfgenmsg
_BUFFER: Final = 1 << 17


def _netlink() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
    sock.bind((0, 0))
    return sock


def load_tracking() -> None:
    """Have the kernel load connection tracking where it is a module: nobody has asked for it on a host just started.

    A question about any connection does that (nfnetlink.c, request_module), and needs no right to load modules: a unit
    with ProtectKernelModules= may ask it.
    """
    with contextlib.suppress(SectoolError), contextlib.closing(ConntrackControl()) as control:
        control.get(FlowTuple(b"\x7f\0\0\1", b"\x7f\0\0\1", 1, 1))


def _refused(code: int) -> SectoolError:
    if code == errno.EPERM:
        return PrivilegeError("connection tracking may not be asked", "run as root (CAP_NET_ADMIN)")
    return SectoolError(
        f"connection tracking answers: {os.strerror(code)}",
        "the kernel needs nf_conntrack_netlink (`modprobe nf_conntrack_netlink`)",
    )


class ConntrackControl:
    """Questions and orders about single entries of the present network namespace. Not for several threads.

    A tuple may be given in either direction, and as either side of an address translation sees it.
    """

    def __init__(self) -> None:
        self._sock = _netlink()
        # Answers are there when send returns; this is against waiting for ever. (A timeout of Python polls first.)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 1, 0))
        self._seq = 0
        self.malformed = 0

    def close(self) -> None:
        """Close the netlink socket."""
        self._sock.close()

    def _ask(self, kind: int, flags: int, family: int, attributes: bytes) -> Parsed:
        self._seq = seq = (self._seq + 1) & 0xFFFFFFFF
        try:
            self._sock.send(
                _message.pack(20 + len(attributes), kind, _REQUEST | flags, seq, 0, family, 0, 0) + attributes
            )
            data = self._sock.recv(_BUFFER)
            while len(data) < 16 or int.from_bytes(data[8:12], sys.byteorder) != seq:
                data = self._sock.recv(_BUFFER)  # that was the answer to a question given up before
        except OSError as e:
            raise SectoolError(f"connection tracking does not answer: {e.strerror or e}") from None
        answer = parse(data)
        self.malformed += answer.malformed
        return answer

    def _either_way(self, t: FlowTuple, kind: int, flags: int, rest: bytes = b"") -> Parsed | None:
        """Ask about a tuple, then about its reverse; None when neither is known."""
        family = socket.AF_INET if len(t.src) == 4 else socket.AF_INET6
        for direction in (t, t.reversed()):
            answer = self._ask(kind, flags, family, tuple_attr(ORIG, direction) + rest)
            if answer.error in (None, 0):
                return answer
            if answer.error != errno.ENOENT:
                raise _refused(answer.error or 0)
        return None

    def get(self, t: FlowTuple) -> Entry | None:
        """The TCP entry of a tuple with its counters; None when there is none."""
        answer = self._either_way(t, GET, 0)
        return answer.entries[0] if answer is not None and answer.entries else None

    def set_mark(self, t: FlowTuple, value: int, mask: int) -> bool:
        """Change the bits of `mask` in the connection's mark to those of `value`. False when there is no such entry."""
        rest = attr(MARK, u32(value)) + attr(MARK_MASK, u32(mask))
        return self._either_way(t, NEW, _ACK, rest) is not None

    def delete(self, t: FlowTuple) -> bool:
        """Forget the entry: its next packet is one of an unknown connection. False when there is none."""
        return self._either_way(t, DELETE, _ACK) is not None

    def create(self, t: FlowTuple, mark: int, timeout_s: int = 432_000) -> bool:
        """Make an entry for an established TCP connection that is not tracked yet. False when there is one.

        As for connections the kernel itself picks up in the middle, windows are not enforced: the scale was told in
        the SYNs, which nobody saw (nf_conntrack_proto_tcp.c, tcp_new).
        """
        flags = bytes((SACK_PERM | BE_LIBERAL, SACK_PERM | BE_LIBERAL))  # value, mask
        tcp = (
            attr(TCP_STATE, bytes((TCP_STATES.index("ESTABLISHED"),))),
            attr(TCP_FLAGS_ORIG, flags),
            attr(TCP_FLAGS_REPLY, flags),
        )
        state = nest(PROTOINFO, nest(PROTOINFO_TCP, *tcp))
        attributes = (
            tuple_attr(ORIG, t)
            + tuple_attr(REPLY, t.reversed())
            + attr(STATUS, u32(SEEN_REPLY | ASSURED | CONFIRMED))
            + attr(TIMEOUT, u32(timeout_s))
            + attr(MARK, u32(mark))
            + state
        )
        family = socket.AF_INET if len(t.src) == 4 else socket.AF_INET6
        answer = self._ask(NEW, _ACK | _CREATE | _EXCL, family, attributes)
        if answer.error in (None, 0):
            return True
        if answer.error == errno.EEXIST:
            return False
        raise _refused(answer.error or 0)

    def dump(self, *, mark: int = 0, mask: int = 0, proto: int = TCP) -> Iterator[Entry]:
        """Entries of a protocol (0: all), both families, whose mark is `mark` in the bits of `mask`; read bit by bit.

        Has a socket of its own, so other questions may be asked meanwhile. Raises SectoolError.
        """
        attributes = attr(MARK, u32(mark)) + attr(MARK_MASK, u32(mask)) if mask else b""
        with _netlink() as sock:
            sock.settimeout(5.0)
            sock.send(
                _message.pack(20 + len(attributes), GET, _REQUEST | _DUMP, 1, 0, socket.AF_UNSPEC, 0, 0)
                + attributes
            )
            while True:
                try:
                    answer = parse(sock.recv(_BUFFER))
                except OSError as e:
                    raise SectoolError(f"connection tracking does not answer: {e.strerror or e}") from None
                self.malformed += answer.malformed
                for entry in answer.entries:
                    # Kernels before 3.17 do not filter.
                    if entry.mark & mask == mark & mask and proto in (0, entry.proto):
                        yield entry
                if answer.error:
                    raise _refused(answer.error)
                if answer.done:
                    return


class DestroyListener:
    """Non-blocking subscription to the end of tracked connections; `fd` is for epoll.

    `missed` counts times the kernel had to drop events because our buffer was full, `malformed` unreadable ones.
    """

    def __init__(self, buffer_bytes: int = 16 << 20) -> None:
        self._sock = _netlink()
        self._sock.setblocking(False)
        with contextlib.suppress(PermissionError):
            self._sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, buffer_bytes)
        try:
            self._sock.setsockopt(_SOL_NETLINK, _ADD_MEMBERSHIP, _GROUP_DESTROY)
        except OSError as e:
            self._sock.close()
            raise _refused(e.errno or errno.EINVAL) from None
        self.missed = 0
        self.malformed = 0

    @property
    def fd(self) -> int:
        """Readable when connections have ended."""
        return self._sock.fileno()

    def drain(self, limit: int = 256) -> list[Ended]:
        """Connections that ended since, from at most `limit` datagrams."""
        ended: list[Ended] = []
        for _ in range(limit):
            try:
                data = self._sock.recv(_BUFFER)
            except BlockingIOError:
                break
            except OSError as e:
                if e.errno != errno.ENOBUFS:
                    raise
                self.missed += 1
                continue
            found = parse(data, DELETE)
            self.malformed += found.malformed
            ended += found.entries
        return ended

    def close(self) -> None:
        """Unsubscribe."""
        self._sock.close()
