"""The bytes of ctnetlink: connection tracking entries read from messages, and the attributes of requests.

What the kernel sends is walked attribute by attribute; anything that does not hold is passed over and counted.
Source: include/uapi/linux/netfilter/nfnetlink_conntrack.h, net/netfilter/nf_conntrack_netlink.c
"""

from __future__ import annotations

import errno
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Final, NamedTuple

TCP: Final = 6

NEW, GET, DELETE = 0x0100, 0x0101, 0x0102  # subsystem 1, IPCTNL_MSG_CT_*
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NESTED = 0x8000

# CTA_*
ORIG, REPLY, STATUS, PROTOINFO, TIMEOUT, MARK = 1, 2, 3, 4, 7, 8
_COUNTERS_ORIG, _COUNTERS_REPLY, _TIMESTAMP, MARK_MASK = 9, 10, 20, 21
# CTA_TUPLE_*, CTA_IP_*, CTA_PROTO_*
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_V4_SRC, _V4_DST, _V6_SRC, _V6_DST = 1, 2, 3, 4
_PROTO_NUM, _SPORT, _DPORT = 1, 2, 3
PROTOINFO_TCP, TCP_STATE, TCP_FLAGS_ORIG, TCP_FLAGS_REPLY = 1, 1, 4, 5
SACK_PERM, BE_LIBERAL = 2, 8  # IP_CT_TCP_FLAG_*

_header = struct.Struct("=HH")

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
# The same for asking: a tuple with all its headers.
_V4_ATTR = struct.Struct("=HHHHHH4sHH4sHHHHB3xHH2s2xHH2s2x")
_V6_ATTR = struct.Struct("=HHHHHH16sHH16sHHHHB3xHH2s2xHH2s2x")

# enum tcp_conntrack; index is the kernel's number
TCP_STATES: Final = (
    "NONE", "SYN_SENT", "SYN_RECV", "ESTABLISHED", "FIN_WAIT", "CLOSE_WAIT", "LAST_ACK", "TIME_WAIT", "CLOSE",
    "SYN_SENT2",
)  # fmt: skip

# enum ip_conntrack_status
SEEN_REPLY, ASSURED, CONFIRMED = 2, 4, 8


class FlowTuple(NamedTuple):
    """One direction of a connection: addresses of 4 or 16 bytes, ports, IP protocol."""

    src: bytes
    dst: bytes
    sport: int
    dport: int
    proto: int = TCP

    def reversed(self) -> FlowTuple:
        """The other direction."""
        return FlowTuple(self.dst, self.src, self.dport, self.sport, self.proto)


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
        return FlowTuple(self.src, self.dst, self.sport, self.dport, self.proto)

    @property
    def reply(self) -> FlowTuple:
        """The reply direction."""
        return FlowTuple(self.reply_src, self.reply_dst, self.reply_sport, self.reply_dport, self.proto)

    def __repr__(self) -> str:
        return f"Entry({', '.join(f'{name}={getattr(self, name)!r}' for name in self.__slots__)})"


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
        if kind == ORIG:
            e.src, e.dst, e.proto, e.sport, e.dport = _tuple(data, at, stop)
        elif kind == REPLY:
            e.reply_src, e.reply_dst, _, e.reply_sport, e.reply_dport = _tuple(data, at, stop)
        elif kind == _COUNTERS_ORIG:
            e.orig_packets, e.orig_bytes = _pair(data, at, stop)
        elif kind == _COUNTERS_REPLY:
            e.reply_packets, e.reply_bytes = _pair(data, at, stop)
        elif kind == MARK and length == 8:
            e.mark = int.from_bytes(data[at:stop], "big")
        elif kind == STATUS and length == 8:
            e.status = int.from_bytes(data[at:stop], "big")
        elif kind == PROTOINFO:
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
        if kind == PROTOINFO_TCP:
            for inner, c, d in _walk(data, a, b):
                if inner == TCP_STATE and d - c == 1 and data[c] < len(TCP_STATES):
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
                -int.from_bytes(data[off + 16 : off + 20], sys.byteorder, signed=True)
                if length >= 20
                else errno.EBADMSG
            )
        elif kind == _NLMSG_DONE:
            done = True
        elif (kind in (NEW, DELETE) if only is None else kind == only) and length >= 20:
            try:
                entries.append(_entry(data, off + 20, off + length))
            except _MalformedError:
                malformed += 1
        off += (length + 3) & ~3
    return Parsed(entries, malformed, error, done)


def attr(kind: int, content: bytes) -> bytes:
    """An attribute, padded to 4 bytes."""
    return _header.pack(4 + len(content), kind) + content + b"\0" * (-len(content) % 4)


def nest(kind: int, *contents: bytes) -> bytes:
    """An attribute of attributes."""
    return attr(kind | _NESTED, b"".join(contents))


def tuple_attr(kind: int, t: FlowTuple) -> bytes:
    """CTA_TUPLE_ORIG or CTA_TUPLE_REPLY."""
    if len(t.src) == 4:
        shape, length, src, dst = _V4_ATTR, 8, _V4_SRC, _V4_DST
    else:
        shape, length, src, dst = _V6_ATTR, 20, _V6_SRC, _V6_DST
    addresses = 4 + 2 * length
    return shape.pack(
        *(4 + addresses + 28, kind | _NESTED),
        *(addresses, _TUPLE_IP | _NESTED, length, src, t.src, length, dst, t.dst),
        *(28, _TUPLE_PROTO | _NESTED, 5, _PROTO_NUM, t.proto),
        *(6, _SPORT, t.sport.to_bytes(2, "big"), 6, _DPORT, t.dport.to_bytes(2, "big")),
    )


def u32(value: int) -> bytes:
    """A number as ctnetlink has them, big endian."""
    return value.to_bytes(4, "big")
