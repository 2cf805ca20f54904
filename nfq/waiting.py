"""Datagrams that wait for their flow's handshake. The kernel keeps them (retained), so each goes on where it stopped:
tracked, marked and in order, which bytes kept here and sent anew would not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

from nfq.holding import Arrival

TIMEOUT_US = 3_500_000  # a handshake is given up after 3 s
FLOW_LIMIT = 16
FLOW_BYTES = 65_536
LIMIT = 1024
LIMIT_BYTES = 8 << 20


class _Line:
    __slots__ = ("arrivals", "since_us", "size")

    def __init__(self, since_us: int) -> None:
        self.since_us = since_us
        self.arrivals: list[Arrival] = []
        self.size = 0


class Waiting:
    """Datagrams by flow, bounded in number, bytes and time."""

    def __init__(self) -> None:
        self._lines: OrderedDict[Hashable, _Line] = OrderedDict()  # the oldest first
        self.count = 0
        self.size = 0
        self.refused = 0  # for want of room

    def hold(self, arrival: Arrival, key: Hashable, now_us: int) -> None:
        """Keep a datagram until `take`; what there is no room for is dropped."""
        size = len(arrival.data)
        line = self._lines.get(key)
        full = self.count >= LIMIT or self.size + size > LIMIT_BYTES
        if full or (
            line is not None
            and line.arrivals
            and (len(line.arrivals) >= FLOW_LIMIT or line.size + size > FLOW_BYTES)
        ):
            self.refused += 1
            arrival.packet.drop()
            return
        if line is None:
            line = self._lines[key] = _Line(now_us)
        arrival.packet.retain()
        line.arrivals.append(arrival)
        line.size += size
        self.count += 1
        self.size += size

    def take(self, key: Hashable) -> list[Arrival]:
        """What waited for `key`, in order."""
        line = self._lines.pop(key, None)
        if line is None:
            return []
        self.count -= len(line.arrivals)
        self.size -= line.size
        return line.arrivals

    def expire(self, now_us: int) -> None:
        """Give up what has waited too long."""
        while self._lines:
            key, line = next(iter(self._lines.items()))
            if now_us - line.since_us < TIMEOUT_US:
                return
            for arrival in self.take(key):
                arrival.packet.drop()
