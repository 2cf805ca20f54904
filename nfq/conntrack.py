"""Connection tracking over raw ctnetlink: counters, marks, and a walk through all entries.

A general netlink library decodes an entry in some 200 µs; the packet path needs it in 10. Only what is needed is
read. Sources: include/uapi/linux/netfilter/nfnetlink_conntrack.h, net/netfilter/nf_conntrack_netlink.c.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from sectool.errors import SectoolError

_NETLINK_NETFILTER: Final = 12
_SUBSYS: Final = 1 << 8  # NFNL_SUBSYS_CTNETLINK
_NEW, _GET, _DELETE = 0, 1, 2
_REQUEST, _ACK, _DUMP = 1, 4, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NESTED: Final = 0x8000

_TUPLE_ORIG, _TUPLE_REPLY, _PROTOINFO, _MARK = 1, 2, 4, 8
_COUNTERS_ORIG, _COUNTERS_REPLY, _MARK_MASK = 9, 10, 21
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_V4_SRC, _V4_DST, _V6_SRC, _V6_DST = 1, 2, 3, 4
_PROTO_NUM, _SRC_PORT, _DST_PORT = 1, 2, 3
_PACKETS, _BYTES = 1, 2
_PROTOINFO_TCP, _TCP_STATE = 1, 1

TCP_STATES: Final = (
    "NONE",
    "SYN_SENT",
    "SYN_RECV",
    "ESTABLISHED",
    "FIN_WAIT",
    "CLOSE_WAIT",
    "LAST_ACK",
    "TIME_WAIT",
    "CLOSE",
    "SYN_SENT2",
)

_header = struct.Struct("=IHHII")


class FlowTuple(NamedTuple):
    """A TCP connection in the direction of its first packet; addresses of 4 or 16 bytes."""

    src: bytes
    dst: bytes
    sport: int
    dport: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One tracked connection with its counters (bytes include IP headers, as conntrack counts)."""

    src: bytes
    dst: bytes
    sport: int
    dport: int
    protocol: int
    mark: int
    tcp_state: str
    orig_bytes: int
    orig_packets: int
    reply_bytes: int
    reply_packets: int


def attributes(data: bytes | memoryview, off: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(type, start, end) of each netlink attribute of `data[off:end]`; stops at the first that does not hold."""
    while off + 4 <= end:
        length = int.from_bytes(data[off : off + 2], "little")
        if length < 4 or off + length > end:
            return
        yield int.from_bytes(data[off + 2 : off + 4], "little") & 0x3FFF, off + 4, off + length
        off += (length + 3) & ~3


def parse_entry(data: bytes, off: int, end: int) -> Entry | None:
    """The entry in a message's attributes (behind nlmsghdr and nfgenmsg); None when it is not a whole one."""
    src = dst = b""
    sport = dport = protocol = mark = state = 0
    counted = [0, 0, 0, 0]
    for kind, a, b in attributes(data, off, end):
        if kind == _TUPLE_ORIG:
            for part, c, d in attributes(data, a, b):
                for field, e, f in attributes(data, c, d):
                    if part == _TUPLE_IP:
                        if field in (_V4_SRC, _V6_SRC):
                            src = bytes(data[e:f])
                        elif field in (_V4_DST, _V6_DST):
                            dst = bytes(data[e:f])
                    elif part == _TUPLE_PROTO:
                        if field == _PROTO_NUM:
                            protocol = data[e]
                        elif field == _SRC_PORT:
                            sport = int.from_bytes(data[e:f], "big")
                        elif field == _DST_PORT:
                            dport = int.from_bytes(data[e:f], "big")
        elif kind == _MARK:
            mark = int.from_bytes(data[a:b], "big")
        elif kind in (_COUNTERS_ORIG, _COUNTERS_REPLY):
            base = 0 if kind == _COUNTERS_ORIG else 2
            for field, e, f in attributes(data, a, b):
                if field == _BYTES:
                    counted[base] = int.from_bytes(data[e:f], "big")
                elif field == _PACKETS:
                    counted[base + 1] = int.from_bytes(data[e:f], "big")
        elif kind == _PROTOINFO:
            for part, c, d in attributes(data, a, b):
                if part == _PROTOINFO_TCP:
                    for field, e, _f in attributes(data, c, d):
                        if field == _TCP_STATE and e < len(data):
                            state = data[e]
    if len(src) not in (4, 16) or len(dst) != len(src):
        return None
    name = TCP_STATES[state] if state < len(TCP_STATES) else "NONE"
    return Entry(src, dst, sport, dport, protocol, mark, name, *counted)


def _attr(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def _tuple(t: FlowTuple) -> bytes:
    v6 = len(t.src) == 16
    ip = _attr(_V6_SRC if v6 else _V4_SRC, t.src) + _attr(_V6_DST if v6 else _V4_DST, t.dst)
    proto = (
        _attr(_PROTO_NUM, bytes((socket.IPPROTO_TCP,)))
        + _attr(_SRC_PORT, t.sport.to_bytes(2, "big"))
        + _attr(_DST_PORT, t.dport.to_bytes(2, "big"))
    )
    return _attr(_TUPLE_ORIG | _NESTED, _attr(_TUPLE_IP | _NESTED, ip) + _attr(_TUPLE_PROTO | _NESTED, proto))


class ConntrackControl:
    """Requests about entries of this network namespace. Needs CAP_NET_ADMIN."""

    def __init__(self) -> None:
        self._sock = self._open()
        self._sequence = 0

    @staticmethod
    def _open() -> socket.socket:
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        sock.bind((0, 0))
        sock.settimeout(1.0)
        return sock

    def _send(self, sock: socket.socket, kind: int, flags: int, family: int, body: bytes) -> int:
        self._sequence = (self._sequence + 1) & 0x7FFFFFFF
        data = struct.pack("=BBH", family, 0, 0) + body
        sock.send(_header.pack(16 + len(data), _SUBSYS | kind, flags, self._sequence, 0) + data)
        return self._sequence

    def _answer(self, sequence: int) -> bytes | None:
        """The one message that answers; None when the kernel says that there is no such entry."""
        while True:
            try:
                data = self._sock.recv(8192)
            except TimeoutError as e:
                raise SectoolError("the kernel does not answer conntrack requests") from e
            if len(data) < 20 or int.from_bytes(data[8:12], "little") != sequence:
                continue
            if int.from_bytes(data[4:6], "little") != _NLMSG_ERROR:
                return data
            code = -int.from_bytes(data[16:20], "little", signed=True)
            if code == 0:
                return data
            if code in (errno.ENOENT, errno.ESRCH):
                return None
            raise SectoolError(
                f"the kernel refuses a conntrack request: {errno.errorcode.get(code, code)}",
                "conntrack needs CAP_NET_ADMIN and nf_conntrack_netlink in the kernel",
            )

    def get(self, t: FlowTuple) -> Entry | None:
        """The entry of a connection, named by the direction of its first packet."""
        family = socket.AF_INET if len(t.src) == 4 else socket.AF_INET6
        data = self._answer(self._send(self._sock, _GET, _REQUEST, family, _tuple(t)))
        return parse_entry(data, 20, len(data)) if data is not None else None

    def set_mark(self, t: FlowTuple, mark: int, mask: int) -> bool:
        """Change the bits `mask` of a connection's mark; False when it is not tracked."""
        family = socket.AF_INET if len(t.src) == 4 else socket.AF_INET6
        body = _tuple(t) + _attr(_MARK, struct.pack(">I", mark)) + _attr(_MARK_MASK, struct.pack(">I", mask))
        return self._answer(self._send(self._sock, _NEW, _REQUEST | _ACK, family, body)) is not None

    def delete(self, t: FlowTuple) -> bool:
        """Forget a connection; False when it is not tracked."""
        family = socket.AF_INET if len(t.src) == 4 else socket.AF_INET6
        return self._answer(self._send(self._sock, _DELETE, _REQUEST | _ACK, family, _tuple(t))) is not None

    def dump(self, *, mark: int | None = None, mask: int = 0) -> Iterator[Entry]:
        """All TCP entries, or those whose mark matches; read as the kernel gives them, on a socket of its own."""
        body = b""
        if mark is not None:
            body = _attr(_MARK, struct.pack(">I", mark)) + _attr(_MARK_MASK, struct.pack(">I", mask))
        sock = self._open()
        try:
            self._send(sock, _GET, _REQUEST | _DUMP, socket.AF_UNSPEC, body)
            while True:
                data = sock.recv(65_536)
                off = 0
                while off + 16 <= len(data):
                    length, kind = struct.unpack_from("=IH", data, off)
                    if length < 16 or kind in (_NLMSG_DONE, _NLMSG_ERROR):
                        return
                    entry = parse_entry(data, off + 20, min(off + length, len(data)))
                    if entry is not None and entry.protocol == socket.IPPROTO_TCP:
                        yield entry
                    off += (length + 3) & ~3
        finally:
            sock.close()

    def close(self) -> None:
        """Close the netlink socket."""
        self._sock.close()
