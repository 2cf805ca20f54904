"""Connection tracking over raw ctnetlink: entries with their counters, marks, deletion, and the end of connections.

Only what the packet path needs, straight from bytes: pyroute2's decoder takes hundreds of microseconds an event.
What the kernel sends is walked attribute by attribute; anything that does not hold is passed over and counted.
Source: include/uapi/linux/netfilter/nfnetlink_conntrack.h, net/netfilter/nf_conntrack_netlink.c
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

from sectool.errors import PrivilegeError, SectoolError

TCP: Final = 6

_NETLINK_NETFILTER, _SOL_NETLINK = 12, 270
_ADD_MEMBERSHIP, _NO_ENOBUFS = 1, 5
_SO_RCVBUFFORCE = 33
_GROUP_DESTROY = 3  # NFNLGRP_CONNTRACK_DESTROY
_NEW, _GET, _DELETE = 0x0100, 0x0101, 0x0102  # subsystem 1, IPCTNL_MSG_CT_*
_REQUEST, _ACK, _DUMP, _CREATE, _EXCL = 1, 4, 0x300, 0x400, 0x200
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NESTED = 0x8000

# CTA_*
_ORIG, _REPLY, _STATUS, _PROTOINFO, _TIMEOUT, _MARK = 1, 2, 3, 4, 7, 8
_COUNTERS_ORIG, _COUNTERS_REPLY, _TIMESTAMP, _MARK_MASK = 9, 10, 20, 21
# CTA_TUPLE_*, CTA_IP_*, CTA_PROTO_*
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_V4_SRC, _V4_DST, _V6_SRC, _V6_DST = 1, 2, 3, 4
_PROTO_NUM, _SPORT, _DPORT = 1, 2, 3
_ICMP_TYPES = (5, 6, 8, 9)  # stand where ports are
_PROTOINFO_TCP, _TCP_STATE, _TCP_FLAGS_ORIG, _TCP_FLAGS_REPLY = 1, 1, 4, 5
_SACK_PERM, _BE_LIBERAL = 2, 8  # IP_CT_TCP_FLAG_*

_header = struct.Struct("=HH")
_message = struct.Struct("=IHHIIBBH")  # nlmsghdr, nfgenmsg
_BUFFER = 1 << 17

# The shapes the kernel gives tuples with ports, counters and the TCP state. One unpack reads fields and attribute
# headers at once; where the headers are the expected ones, that is all. Anything else is walked.
_V4_TUPLE = struct.Struct("8s4s4s4s8sB3x4s2s2x4s2s")
_V6_TUPLE = struct.Struct("8s16s4s16s8sB3x4s2s2x4s2s")
_PORT_HEADERS = (_header.pack(6, 2), _header.pack(6, 3))
_PROTO_HEADER = _header.pack(28, 0x8002) + _header.pack(5, 1)
_V4_HEADERS = (_header.pack(20, 0x8001) + _header.pack(8, 1), _header.pack(8, 2))
_V6_HEADERS = (_header.pack(44, 0x8001) + _header.pack(20, 3), _header.pack(20, 4))
_PAIR = struct.Struct(">4sQ4sQ")
_PAIR_HEADERS = (_header.pack(12, 1), _header.pack(12, 2))
_STATE = struct.Struct("=HHHHB")

# enum tcp_conntrack; index is the kernel's number
TCP_STATES: Final = (
    "NONE", "SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT", "CLOSE_WAIT", "LAST_ACK", "TIME_WAIT", "CLOSE",
    "SYN_SENT2",
)  # fmt: skip

# enum ip_conntrack_status
_SEEN_REPLY, _ASSURED, _CONFIRMED = 2, 4, 8


class FlowTuple(NamedTuple):
    """One direction of a TCP connection: addresses of 4 or 16 bytes, ports."""

    src: bytes
    dst: bytes
    sport: int
    dport: int

    def reversed(self) -> FlowTuple:
        """The other direction."""
        return FlowTuple(self.dst, self.src, self.dport, self.sport)


class Entry:
    """A connection tracking entry, seen in the original direction. Counters are 0 without nf_conntrack_acct.

    `tcp_state` is one of TCP_STATES, '' for other protocols; `start_ns` and `stop_ns` are wall clock nanoseconds,
    0 without nf_conntrack_timestamp. `reply_src` and so on tell of address translation.
    """

    __slots__ = (
        "dport", "dst", "family", "mark", "orig_bytes", "orig_packets", "proto", "reply_bytes", "reply_dport",
        "reply_dst", "reply_packets", "reply_sport", "reply_src", "sport", "src", "start_ns", "status", "stop_ns",
        "tcp_state",
    )  # fmt: skip

    def __init__(self) -> None:
        self.family = 0
        self.proto = 0
        self.src = self.dst = self.reply_src = self.reply_dst = b""
        self.sport = self.dport = self.reply_sport = self.reply_dport = 0
        self.orig_bytes = self.orig_packets = self.reply_bytes = self.reply_packets = 0
        self.mark = 0
        self.status = 0
        self.tcp_state = ""
        self.start_ns = self.stop_ns = 0

    @property
    def tuple(self) -> FlowTuple:
        """The original direction."""
        return FlowTuple(self.src, self.dst, self.sport, self.dport)

    @property
    def reply(self) -> FlowTuple:
        """The reply direction."""
        return FlowTuple(self.reply_src, self.reply_dst, self.reply_sport, self.reply_dport)

    def __repr__(self) -> str:
        return f"Entry({', '.join(f'{name}={getattr(self, name)!r}' for name in self.__slots__)})"


Ended = Entry  # what DestroyListener gives: the entry as it was when it ended


class _MalformedError(ValueError):
    """An attribute does not fit its place."""


def _walk(data: bytes, off: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(type, start, end) of each attribute's content."""
    while off + 4 <= end:
        length, kind = _header.unpack_from(data, off)
        if length < 4 or off + length > end:
            raise _MalformedError
        yield kind & 0x3FFF, off + 4, off + length
        off += (length + 3) & ~3


def _tuple(data: bytes, off: int, end: int) -> tuple[bytes, bytes, int, int, int]:
    """Source, destination, protocol, source port, destination port of a nested CTA_TUPLE_*."""
    # Trailing attributes (a zone) do not matter.
    size = end - off
    if size >= 72 and data[off] == 44:
        shape, headers = _V6_TUPLE.unpack_from(data, off), _V6_HEADERS
    elif size >= 48:
        shape, headers = _V4_TUPLE.unpack_from(data, off), _V4_HEADERS
    else:
        return _any_tuple(data, off, end)
    ip, src, second, dst, inner, proto, first_port, sport, second_port, dport = shape
    if (ip, second) == headers and inner == _PROTO_HEADER and (first_port, second_port) == _PORT_HEADERS:
        return src, dst, proto, sport[0] << 8 | sport[1], dport[0] << 8 | dport[1]
    return _any_tuple(data, off, end)


def _any_tuple(data: bytes, off: int, end: int) -> tuple[bytes, bytes, int, int, int]:
    """As _tuple, for tuples of any shape and protocol."""
    src = dst = b""
    proto = sport = dport = 0
    for kind, start, stop in _walk(data, off, end):
        if kind == _TUPLE_IP:
            for inner, a, b in _walk(data, start, stop):
                if inner in (_V4_SRC, _V6_SRC):
                    src = data[a:b]
                elif inner in (_V4_DST, _V6_DST):
                    dst = data[a:b]
        elif kind == _TUPLE_PROTO:
            for inner, a, b in _walk(data, start, stop):
                if inner == _PROTO_NUM:
                    proto = data[a] if b > a else 0
                elif inner == _SPORT:
                    sport = int.from_bytes(data[a:b], "big")
                elif inner == _DPORT:
                    dport = int.from_bytes(data[a:b], "big")
    if len(src) != len(dst) or len(src) not in (4, 16) or sport > 0xFFFF or dport > 0xFFFF:
        raise _MalformedError
    return src, dst, proto, sport, dport


def _entry(data: bytes, off: int, end: int) -> Entry:
    """The entry whose attributes lie between `off` and `end`."""
    e = Entry()
    unpack = _header.unpack_from
    while off + 4 <= end:
        length, kind = unpack(data, off)
        stop = off + length
        if length < 4 or stop > end:
            raise _MalformedError
        kind &= 0x3FFF
        at = off + 4
        if kind == _ORIG:
            e.src, e.dst, e.proto, e.sport, e.dport = _tuple(data, at, stop)
        elif kind == _REPLY:
            e.reply_src, e.reply_dst, _, e.reply_sport, e.reply_dport = _tuple(data, at, stop)
        elif kind == _COUNTERS_ORIG:
            e.orig_packets, e.orig_bytes = _pair(data, at, stop)
        elif kind == _COUNTERS_REPLY:
            e.reply_packets, e.reply_bytes = _pair(data, at, stop)
        elif kind == _MARK and length == 8:
            e.mark = int.from_bytes(data[at:stop], "big")
        elif kind == _STATUS and length == 8:
            e.status = int.from_bytes(data[at:stop], "big")
        elif kind == _PROTOINFO:
            e.tcp_state = _tcp_state(data, at, stop)
        elif kind == _TIMESTAMP:
            e.start_ns, e.stop_ns = _pair(data, at, stop)
        off += (length + 3) & ~3
    if not e.src:
        raise _MalformedError
    e.family = socket.AF_INET if len(e.src) == 4 else socket.AF_INET6
    return e


def _pair(data: bytes, off: int, end: int) -> tuple[int, int]:
    """CTA_COUNTERS_PACKETS and _BYTES, CTA_TIMESTAMP_START and _STOP: two 64-bit numbers, types 1 and 2."""
    if end - off >= 24:
        one, first, two, second = _PAIR.unpack_from(data, off)
        if (one, two) == _PAIR_HEADERS:
            return first, second
    first = second = 0
    for kind, a, b in _walk(data, off, end):
        if b - a == 8:
            if kind == 1:
                first = int.from_bytes(data[a:b], "big")
            elif kind == 2:
                second = int.from_bytes(data[a:b], "big")
    return first, second


def _tcp_state(data: bytes, off: int, end: int) -> str:
    if end - off >= 9:
        _, outer, length, inner, state = _STATE.unpack_from(data, off)
        if outer == 0x8001 and length == 5 and inner == 1 and state < len(TCP_STATES):
            return TCP_STATES[state]
    for kind, a, b in _walk(data, off, end):
        if kind == _PROTOINFO_TCP:
            for inner, c, d in _walk(data, a, b):
                if inner == _TCP_STATE and d - c == 1 and data[c] < len(TCP_STATES):
                    return TCP_STATES[data[c]]
    return ""


class Parsed(NamedTuple):
    """What a netlink datagram held. `error` is the errno of an error message, or None; `done`: the end of a dump."""

    entries: list[Entry]
    malformed: int
    error: int | None
    done: bool


def parse(data: bytes, only: int | None = None) -> Parsed:
    """All conntrack entries in a netlink datagram (of one message type if `only` is given). Never raises."""
    entries: list[Entry] = []
    malformed, error, done = 0, None, False
    off, size = 0, len(data)
    while off + 16 <= size:
        length, kind = struct.unpack_from("=IH", data, off)
        if length < 16 or off + length > size:
            malformed += 1
            break
        if kind == _NLMSG_ERROR:
            error = (
                -int.from_bytes(data[off + 16 : off + 20], "little", signed=True)
                if length >= 20
                else errno.EBADMSG
            )
        elif kind == _NLMSG_DONE:
            done = True
        elif (kind in (_NEW, _DELETE) if only is None else kind == only) and length >= 20:
            try:
                entries.append(_entry(data, off + 20, off + length))
            except _MalformedError:
                malformed += 1
        off += (length + 3) & ~3
    return Parsed(entries, malformed, error, done)


# -- asking -----------------------------------------------------------------------------------------------------


def _attr(kind: int, content: bytes) -> bytes:
    return _header.pack(4 + len(content), kind) + content + b"\0" * (-len(content) % 4)


def _nest(kind: int, *contents: bytes) -> bytes:
    return _attr(kind | _NESTED, b"".join(contents))


def _tuple_attr(kind: int, t: FlowTuple, proto: int = TCP) -> bytes:
    v4 = len(t.src) == 4
    return _nest(
        kind,
        _nest(_TUPLE_IP, _attr(_V4_SRC if v4 else _V6_SRC, t.src), _attr(_V4_DST if v4 else _V6_DST, t.dst)),
        _nest(
            _TUPLE_PROTO,
            _attr(_PROTO_NUM, bytes((proto,))),
            _attr(_SPORT, t.sport.to_bytes(2, "big")),
            _attr(_DPORT, t.dport.to_bytes(2, "big")),
        ),
    )


def _u32(value: int) -> bytes:
    return value.to_bytes(4, "big")


def _netlink() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
    sock.bind((0, 0))
    return sock


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
        self._sock.settimeout(1.0)  # answers are there when send returns; this is against waiting for ever
        self._seq = 0
        self.malformed = 0

    def close(self) -> None:
        """Close the netlink socket."""
        self._sock.close()

    def _ask(self, kind: int, flags: int, family: int, attributes: bytes) -> Parsed:
        self._seq = seq = (self._seq + 1) & 0xFFFFFFFF
        self._sock.send(
            _message.pack(20 + len(attributes), kind, _REQUEST | flags, seq, 0, family, 0, 0) + attributes
        )
        while True:
            data = self._sock.recv(_BUFFER)
            if len(data) >= 16 and int.from_bytes(data[8:12], "little") == seq:
                answer = parse(data)
                self.malformed += answer.malformed
                return answer

    def _either_way(self, t: FlowTuple, kind: int, flags: int, rest: bytes = b"") -> Parsed | None:
        """Ask about a tuple, then about its reverse; None when neither is known."""
        family = socket.AF_INET if len(t.src) == 4 else socket.AF_INET6
        for direction in (t, t.reversed()):
            answer = self._ask(kind, flags, family, _tuple_attr(_ORIG, direction) + rest)
            if answer.error in (None, 0):
                return answer
            if answer.error != errno.ENOENT:
                raise _refused(answer.error or 0)
        return None

    def get(self, t: FlowTuple) -> Entry | None:
        """The TCP entry of a tuple with its counters; None when there is none."""
        answer = self._either_way(t, _GET, 0)
        return answer.entries[0] if answer is not None and answer.entries else None

    def set_mark(self, t: FlowTuple, value: int, mask: int) -> bool:
        """Change the bits of `mask` in the connection's mark to those of `value`. False when there is no such entry."""
        rest = _attr(_MARK, _u32(value)) + _attr(_MARK_MASK, _u32(mask))
        return self._either_way(t, _NEW, _ACK, rest) is not None

    def delete(self, t: FlowTuple) -> bool:
        """Forget the entry: its next packet is one of an unknown connection. False when there is none."""
        return self._either_way(t, _DELETE, _ACK) is not None

    def create(self, t: FlowTuple, mark: int, timeout_s: int = 432_000) -> bool:
        """Make an entry for an established TCP connection that is not tracked yet. False when there is one.

        As for connections the kernel itself picks up in the middle, windows are not enforced: the scale was told in
        the SYNs, which nobody saw (nf_conntrack_proto_tcp.c, tcp_new).
        """
        flags = bytes((_SACK_PERM | _BE_LIBERAL, _SACK_PERM | _BE_LIBERAL))  # value, mask
        tcp = (
            _attr(_TCP_STATE, bytes((TCP_STATES.index("ESTABLISHED"),))),
            _attr(_TCP_FLAGS_ORIG, flags),
            _attr(_TCP_FLAGS_REPLY, flags),
        )
        state = _nest(_PROTOINFO, _nest(_PROTOINFO_TCP, *tcp))
        attributes = (
            _tuple_attr(_ORIG, t)
            + _tuple_attr(_REPLY, t.reversed())
            + _attr(_STATUS, _u32(_SEEN_REPLY | _ASSURED | _CONFIRMED))
            + _attr(_TIMEOUT, _u32(timeout_s))
            + _attr(_MARK, _u32(mark))
            + state
        )
        family = socket.AF_INET if len(t.src) == 4 else socket.AF_INET6
        answer = self._ask(_NEW, _ACK | _CREATE | _EXCL, family, attributes)
        if answer.error in (None, 0):
            return True
        if answer.error == errno.EEXIST:
            return False
        raise _refused(answer.error or 0)

    def dump(self, *, mark: int = 0, mask: int = 0, proto: int = TCP) -> Iterator[Entry]:
        """Entries of a protocol (0: all), both families, whose mark is `mark` in the bits of `mask`; read bit by bit.

        Has a socket of its own, so other questions may be asked meanwhile. Raises SectoolError.
        """
        attributes = _attr(_MARK, _u32(mark)) + _attr(_MARK_MASK, _u32(mask)) if mask else b""
        with _netlink() as sock:
            sock.settimeout(5.0)
            sock.send(
                _message.pack(20 + len(attributes), _GET, _REQUEST | _DUMP, 1, 0, socket.AF_UNSPEC, 0, 0)
                + attributes
            )
            while True:
                answer = parse(sock.recv(_BUFFER))
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
            found = parse(data, _DELETE)
            self.malformed += found.malformed
            ended += found.entries
        return ended

    def close(self) -> None:
        """Unsubscribe."""
        self._sock.close()
