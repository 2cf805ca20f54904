"""Answers of the kernel about sockets, routes and counters: `nfq.sockdiag`, `nfq.endings`, `nfq.routes`, `nfq.shed`.

Any bytes give sockets or none and never raise; addresses have 4 or 16 bytes, keys of ended sockets are flow keys.
"""

from __future__ import annotations

import socket
import struct

from nfq import endings, routes, shed, sockdiag


def one(data: bytes) -> None:
    """A datagram of messages."""
    for end in (len(data), max(0, len(data) - 5)):
        found = sockdiag.parse(data, 0, end)
        if found is not None:
            assert len(found.local) in (4, 16)
            assert len(found.local) == len(found.remote)
            assert 0 <= found.local_port <= 0xFFFF
            assert 0 <= found.cgroup_id < 1 << 64
    for key in endings.parse(data):
        assert len(key) in (12, 36)
        assert key[-2:] != b"\0\0"
    assert 0 <= shed.packets_of(data) < 1 << 64
    for off in (0, 16, 28):
        for _, start, stop in routes._walk(data, off):
            assert off <= start <= stop <= len(data)


def _answer(family: int, source: bytes, destination: bytes, *attributes: bytes) -> bytes:
    ports = (40_000).to_bytes(2, "big") + (5432).to_bytes(2, "big")
    body = bytes((family, 1, 0, 0)) + ports + source.ljust(16, b"\0") + destination.ljust(16, b"\0")
    body += struct.pack("=IQIIIII", 2, 99, 0, 0, 0, 1000, 4711) + b"".join(attributes)
    return struct.pack("=IHHII", 16 + len(body), 20, 0, 1, 0) + body


def seeds() -> dict[str, bytes]:
    """Sockets of both families, a dual-stack one, one with a cgroup."""
    cgroup = struct.pack("=HHQ", 12, 21, 12345)
    only = struct.pack("=HHBxxx", 5, 11, 1)
    mapped = bytes(10) + b"\xff\xff"
    four = bytes((10, 0, 0, 1)), bytes((10, 0, 0, 2))
    return {
        "v4": _answer(socket.AF_INET, *four, cgroup),
        "v6": _answer(socket.AF_INET6, bytes(range(16)), bytes(range(16, 32)), only, cgroup),
        "mapped": _answer(socket.AF_INET6, mapped + four[0], mapped + four[1]),
        "several": _answer(socket.AF_INET, *four) + _answer(socket.AF_INET, *four),
        "counter": struct.pack("=IHHIIBBH", 44, 0x0702, 0, 1, 0, 0, 0, 0)
        + struct.pack("=HH8s", 12, 1, b"shed\0")
        + struct.pack("=HH", 12, 2)
        + bytes(7)
        + b"\7",
        "route": struct.pack("=IHHII", 44, 24, 0, 1, 0)
        + bytes(12)
        + struct.pack("=HHIHHHHI", 8, 4, 2, 12, 8, 8, 2, 1400),
    }
