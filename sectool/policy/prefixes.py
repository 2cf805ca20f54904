"""From addresses that were seen to the networks they were probably drawn from.

A network is taken where the addresses fill it evenly: divided into parts of which each should hold about four of
them, three quarters of the parts hold one. Where they do not, its halves are looked at by themselves, and what is left
are single addresses.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from typing import Final

from sectool.policy.network import IPAddress, IPNetwork

ENOUGH: Final = 8  # distinct addresses that make a network
_FILLED: Final = 0.75


def networks(addresses: Iterable[IPAddress]) -> list[IPNetwork]:
    """Networks that hold all of `addresses`, in order; single ones as /32 or /128."""
    distinct = set(addresses)
    out: list[IPNetwork] = []
    for version, bits in ((4, 32), (6, 128)):
        numbers = sorted(int(a) for a in distinct if a.version == version)
        kind = ipaddress.IPv4Network if version == 4 else ipaddress.IPv6Network
        out += [kind((start, length)) for start, length in _cluster(numbers, bits)]
    return out


def _cluster(numbers: Sequence[int], bits: int) -> list[tuple[int, int]]:
    if len(numbers) < ENOUGH:
        return [(number, bits) for number in numbers]
    length = bits - (numbers[0] ^ numbers[-1]).bit_length()  # what all have in common
    if _even(numbers, bits - length):
        return [(numbers[0] >> bits - length << bits - length, length)]
    middle = (numbers[-1] >> bits - length - 1) << bits - length - 1
    cut = next(n for n, number in enumerate(numbers) if number >= middle)
    return [*_cluster(numbers[:cut], bits), *_cluster(numbers[cut:], bits)]


def _even(numbers: Sequence[int], free: int) -> bool:
    """Whether the numbers are spread over all of their `free` last bits."""
    depth = min(free, max(1, (len(numbers) // 4).bit_length() - 1))
    parts = {number >> free - depth for number in numbers}
    return len(parts) >= _FILLED * (1 << depth)
