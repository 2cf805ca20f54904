"""Datagrams that wait for their flow's handshake. The kernel keeps them, so each goes on where it stopped:
tracked, marked and in order, which bytes kept here and sent anew would not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

from nfq.burst import Packet

TIMEOUT_US = 3_500_000  # a handshake is given up after 3 s
FLOW_LIMIT = 16
FLOW_BYTES = 65_536
LIMIT = 1024
LIMIT_BYTES = 8 << 20


class _Line:
    __slots__ = ("packets", "since_us", "size")

    def __init__(self, since_us: int) -> None:
        self.since_us = since_us
        self.packets: list[Packet] = []
        self.size = 0


class Waiting:
    """Datagrams by flow, bounded in number, bytes and time."""

    def __init__(self, give_up: Callable[[Packet], None] = Packet.drop) -> None:
        """`give_up` gives a datagram its verdict that there is no room for, or that has waited in vain."""
        self._give_up = give_up
        self._lines: OrderedDict[Hashable, _Line] = OrderedDict()  # the oldest first
        self.count = 0
        self.size = 0
        self.refused = 0  # for want of room

    def hold(self, packet: Packet, key: Hashable, now_us: int) -> None:
        """Keep a datagram until `take`; what there is no room for is dropped."""
        size = len(packet.data)
        line = self._lines.get(key)
        full = self.count >= LIMIT or self.size + size > LIMIT_BYTES
        if full or (
            line is not None
            and line.packets
            and (len(line.packets) >= FLOW_LIMIT or line.size + size > FLOW_BYTES)
        ):
            self.refused += 1
            self._give_up(packet)
            return
        if line is None:
            line = self._lines[key] = _Line(now_us)
        line.packets.append(packet)
        line.size += size
        self.count += 1
        self.size += size

    def take(self, key: Hashable) -> list[Packet]:
        """What waited for `key`, in order."""
        line = self._lines.pop(key, None)
        if line is None:
            return []
        self.count -= len(line.packets)
        self.size -= line.size
        return line.packets

    def expire(self, now_us: int) -> None:
        """Give up what has waited too long."""
        while self._lines:
            key, line = next(iter(self._lines.items()))
            if now_us - line.since_us < TIMEOUT_US:
                return
            for packet in self.take(key):
                self._give_up(packet)
