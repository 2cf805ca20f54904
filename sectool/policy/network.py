"""CIDRs and the table that tells which networks an address lies in."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")


def parse_cidr(text: str) -> IPNetwork:
    """A strict CIDR. Raises ValueError with a message 'problem; suggestion'."""
    address, slash, length = text.partition("/")
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        raise ValueError(f"{text!r} is not an IP network; write e.g. 10.0.0.0/8 or fd00::/8") from None
    if not slash:
        raise ValueError(f"{text!r} has no prefix length; for this one address write {ip}/{ip.max_prefixlen}")
    if not (length.isascii() and length.isdigit() and len(length) <= 3 and int(length) <= ip.max_prefixlen):
        raise ValueError(
            f"prefix length {length!r} of {text!r} is not valid; it is a number from 0 to {ip.max_prefixlen}"
        )
    if isinstance(ip, ipaddress.IPv6Address) and ip.scope_id:
        raise ValueError(f"{text!r} has a zone; networks have none")
    network = ipaddress.ip_network((str(ip), int(length)), strict=False)
    if network.network_address != ip:
        raise ValueError(
            f"{text!r} has bits set beyond its prefix length; "
            f"for the network write {network}, for the one address {ip}/{ip.max_prefixlen}"
        )
    if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(_MAPPED):
        plain = ipaddress.IPv4Network((int(network.network_address) & 0xFFFF_FFFF, network.prefixlen - 96))
        raise ValueError(f"{text!r} holds IPv4 addresses in IPv6 clothes; write {plain}")
    return network


@dataclass(frozen=True, slots=True)
class NetworkSpec:
    """Addresses inside one of `cidrs` and inside none of `excepts`."""

    cidrs: tuple[IPNetwork, ...]
    excepts: tuple[IPNetwork, ...] = ()

    def contains(self, address: IPAddress) -> bool:
        """The plain reading, one CIDR after the other."""
        return any(address in net for net in self.cidrs) and not any(address in net for net in self.excepts)


@dataclass(slots=True)
class _Family:
    """One IP version: for each prefix length in use, masked address -> (networks it puts in, takes out)."""

    bits: int
    by_length: dict[int, dict[int, tuple[list[int], list[int]]]] = field(default_factory=dict)

    def add(self, network: IPNetwork, number: int, excluded: bool) -> None:
        row = self.by_length.setdefault(network.prefixlen, {})
        row.setdefault(int(network.network_address) >> (self.bits - network.prefixlen), ([], []))[
            excluded
        ].append(number)

    def find(self, address: int) -> frozenset[int]:
        inside: set[int] = set()
        outside: set[int] = set()
        for length, row in self.by_length.items():
            hit = row.get(address >> (self.bits - length))
            if hit:
                inside.update(hit[0])
                outside.update(hit[1])
        return frozenset(inside - outside)


class NetworkTable:
    """Which of the given networks hold an address, in one dictionary look-up per prefix length in use.

    Answers are kept per address in a bounded memory, and equal answers are one object, so that they make
    cheap cache keys.
    """

    def __init__(self, specs: Sequence[NetworkSpec], memory: int = 65_536) -> None:
        self._four = _Family(32)
        self._six = _Family(128)
        self._memory = memory
        self._seen: dict[int, frozenset[int]] = {}
        self._interned: dict[frozenset[int], frozenset[int]] = {}
        for number, spec in enumerate(specs):
            for excluded, networks in enumerate((spec.cidrs, spec.excepts)):
                for network in networks:
                    family = self._four if network.version == 4 else self._six
                    family.add(network, number, bool(excluded))

    def find(self, address: IPAddress) -> frozenset[int]:
        """Numbers (positions in `specs`) of the networks that hold `address`.

        An IPv4 address mapped into IPv6 counts as the IPv4 address it is.
        """
        value = int(address)
        # IPv6 addresses get a bit of their own above 128, so that ::1 is not 0.0.0.1.
        key = value if type(address) is ipaddress.IPv4Address else value | 1 << 128
        found = self._seen.get(key)
        if found is None:
            if key == value:
                found = self._four.find(value)
            elif value >> 32 == 0xFFFF:
                found = self._four.find(value & 0xFFFF_FFFF)
            else:
                found = self._six.find(value)
            found = self._interned.setdefault(found, found)
            if len(self._seen) >= self._memory:
                self._seen.clear()
            self._seen[key] = found
        return found
