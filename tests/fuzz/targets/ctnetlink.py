"""Connection tracking messages of the kernel: `nfq.ctnetlink.parse`.

Any bytes give entries and counts and never raise; an entry has addresses of one size and ports that are ports. What the
parser reads of a message the writers of this module made is what they were given.
"""

from __future__ import annotations

import struct

from nfq import ctnetlink
from nfq.ctnetlink import (
    DELETE,
    MARK,
    NEW,
    ORIG,
    PROTOINFO,
    PROTOINFO_TCP,
    REPLY,
    STATUS,
    TCP_STATE,
    TCP_STATES,
    FlowTuple,
    attr,
    nest,
    tuple_attr,
    u32,
)

V4 = FlowTuple(bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2)), 40_000, 5432)
V6 = FlowTuple(bytes(range(16)), bytes(range(16, 32)), 40_000, 5432)


def one(data: bytes) -> None:
    """A datagram of messages."""
    for only in (None, NEW, DELETE):
        parsed = ctnetlink.parse(data, only)
        assert len(parsed.entries) * 20 <= len(data)
        for entry in parsed.entries:
            assert len(entry.src) == len(entry.dst)
            assert len(entry.src) in (4, 16)
            assert 0 <= entry.sport <= 0xFFFF
            assert 0 <= entry.dport <= 0xFFFF
            assert 0 <= entry.mark < 1 << 32
            assert entry.tcp_state in ("", *TCP_STATES)
            repr(entry)


def _message(kind: int, body: bytes) -> bytes:
    return struct.pack("=IHHIIBBH", 20 + len(body), kind, 0, 1, 0, 2, 0, 0) + body


def seeds() -> dict[str, bytes]:
    """Entries of both IP versions, an error, an end, several in one."""
    counters = nest(9, attr(1, bytes(7) + b"\5"), attr(2, bytes(6) + b"\1\0"))
    state = nest(PROTOINFO, nest(PROTOINFO_TCP, attr(TCP_STATE, b"\3")))
    rest = attr(STATUS, u32(14)) + attr(MARK, u32(0x10000000)) + counters + state
    both = {
        name: tuple_attr(ORIG, t) + tuple_attr(REPLY, t.reversed()) + rest
        for name, t in (("v4", V4), ("v6", V6))
    }
    for name, t in (("v4", V4), ("v6", V6)):
        entry = ctnetlink.parse(_message(NEW, both[name])).entries[0]
        assert (entry.tuple, entry.mark, entry.tcp_state) == (t, 0x10000000, "ESTABLISHED")
    out = {f"new-{name}": _message(NEW, body) for name, body in both.items()}
    out["several"] = _message(DELETE, both["v4"]) + _message(DELETE, both["v6"])
    out["error"] = struct.pack("=IHHIIi", 36, 2, 0, 1, 0, -2) + bytes(16)
    out["done"] = struct.pack("=IHHIIi", 20, 3, 0, 1, 0, 0)
    odd = nest(ORIG, nest(2, attr(1, b"\1")), nest(1, attr(1, V4.src), attr(2, V4.dst)))
    out["other-order"] = _message(NEW, odd)
    return out
