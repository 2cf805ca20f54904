"""How flows are named: the event id that one host gives a flow, and the community id that every tool gives it.

The event id is a UUIDv7 (RFC 9562, 5.7) that follows from when the flow began, but for its last eight bytes: those are
a number for the process and a count, so that they take little room where many are kept.
The community id (v1, https://github.com/corelight/community-id-spec) follows from the 5-tuple alone.
"""

from __future__ import annotations

import itertools
import os
import struct
from hashlib import sha1

# Types of ICMP messages that ask and answer each other, by protocol; the others go one way.
ICMP_ANSWERS = {
    1: {8: 0, 0: 8, 13: 14, 14: 13, 15: 16, 16: 15, 17: 18, 18: 17, 9: 10, 10: 9},
    58: {128: 129, 129: 128, 133: 134, 134: 133, 135: 136, 136: 135, 130: 131, 131: 130, 144: 145, 145: 144},
}
_VARIANT = 0x8000_0000_0000_0000


class _Numbers:
    """The last eight bytes of ids: the variant, 30 random bits drawn once, 32 bits that count from a random start."""

    def __init__(self) -> None:
        self.draw()

    def draw(self) -> None:
        """Begin anew, as a process does."""
        drawn = int.from_bytes(os.urandom(8), "big")
        self._prefix = _VARIANT | (drawn >> 34) << 32
        self._count = itertools.count(drawn & 0x0FFF_FFFF)

    def next(self) -> int:
        """A number that this process has not given out for the last 2**32."""
        return self._prefix | next(self._count) & 0xFFFF_FFFF


_numbers = _Numbers()
os.register_at_fork(after_in_child=_numbers.draw)


def event_id_head(start_us: int) -> int:
    """The first eight bytes, as a number, of the event id of a flow begun at `start_us` (UTC microseconds)."""
    ms, us = divmod(start_us, 1000)
    return (ms << 16) | 0x7000 | (us * 4096 // 1000)


def new_event_id(start_us: int) -> bytes:
    """A new event id (16 bytes) for a flow begun at `start_us` (UTC microseconds)."""
    return struct.pack(">QQ", event_id_head(start_us), _numbers.next())


def community_id(source: bytes, destination: bytes, sport: int, dport: int, proto: int = 6) -> bytes:
    """SHA-1 part (20 bytes) of the community id v1 with seed 0, the same seen from either end.

    For ICMP `sport` is the type and `dport` the code, as in flow records.
    """
    one_way = False
    if proto in ICMP_ANSWERS:
        answer = ICMP_ANSWERS[proto].get(sport)
        one_way, dport = answer is None, dport if answer is None else answer
    a = source + sport.to_bytes(2, "big")
    b = destination + dport.to_bytes(2, "big")
    n = len(source)
    low, high = (a, b) if one_way or a <= b else (b, a)
    data = b"\0\0" + low[:n] + high[:n] + bytes((proto, 0)) + low[n:] + high[n:]
    return sha1(data, usedforsecurity=False).digest()
