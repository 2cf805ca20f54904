"""The parts of the address space that some rules can tell apart.

Rules look at an address only through the networks they name. So all addresses fall into few *places*: two addresses
of one place lie in the same networks, and one of them can stand for all.
"""

from __future__ import annotations

import ipaddress
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Final

from sectool.policy.network import IPAddress, NetworkSpec, NetworkTable

FOUR_FIRST: Final = 0xFFFF << 32  # IPv4 within the 128 bits of an address, as ::ffff:a.b.c.d
FOUR_LAST: Final = FOUR_FIRST | 0xFFFF_FFFF


def number_of(address: IPAddress) -> int:
    """An address as one 128-bit number, IPv4 mapped into IPv6."""
    return int(address) | (FOUR_FIRST if address.version == 4 else 0)


def address_of(number: int) -> IPAddress:
    """The address of a 128-bit number."""
    if FOUR_FIRST <= number <= FOUR_LAST:
        return ipaddress.IPv4Address(number & 0xFFFF_FFFF)
    return ipaddress.IPv6Address(number)


class Places:
    """Places of some networks, numbered from 0. `samples` has one address of each."""

    def __init__(self, specs: Iterable[NetworkSpec]) -> None:
        specs = list(specs)
        table = NetworkTable(specs)
        edges = {0, FOUR_FIRST, FOUR_LAST + 1}
        for spec in specs:
            for net in (*spec.cidrs, *spec.excepts):
                edges.update((number_of(net.network_address), number_of(net.broadcast_address) + 1))
        edges.discard(1 << 128)
        known: dict[frozenset[int], int] = {}
        self.samples: list[IPAddress] = []
        self.starts: list[int] = []  # of the intervals, in order; each reaches to the next one's start
        self.numbers: list[int] = []  # the place of each interval
        for start in sorted(edges):
            address = address_of(start)
            inside = table.find(address)
            if inside not in known:
                known[inside] = len(known)
                self.samples.append(address)
            number = known[inside]
            family = start in (FOUR_FIRST, FOUR_LAST + 1)
            if not self.numbers or self.numbers[-1] != number or family:
                self.starts.append(start)
                self.numbers.append(number)

    def __len__(self) -> int:
        return len(self.samples)

    def find(self, address: IPAddress) -> int:
        """The place of an address."""
        return self.numbers[bisect_right(self.starts, number_of(address)) - 1]

    def intervals(self, first: int, last: int) -> tuple[Sequence[int], Sequence[int]]:
        """Starts and places of the intervals from number `first` to number `last`, both edges of intervals."""
        low = bisect_right(self.starts, first) - 1
        high = bisect_right(self.starts, last)
        return self.starts[low:high], self.numbers[low:high]
