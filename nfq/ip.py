"""IP headers of any protocol: where the upper layer begins, and what is not let through.

Fragments have been put together before they come here (connection tracking); one that comes all the same is refused,
and so is source routing, in either family: the destination that rules go by would not be where the packet goes.
IPv6 hop-by-hop and destination options are let through, and so are IPv4 options. Raises PacketError.
Sources: RFC 791, RFC 8200, RFC 5095 (routing headers), RFC 7126 (IPv4 options).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from nfq.packet import PacketError, refuse_source_route

ICMP: Final = 1
TCP: Final = 6
UDP: Final = 17
ICMP6: Final = 58

_HOP_BY_HOP, _ROUTING, _FRAGMENT, _DESTINATION = 0, 43, 44, 60
_EXTENSIONS: Final = frozenset((_HOP_BY_HOP, _ROUTING, _DESTINATION))
_REFUSED: Final = frozenset((_FRAGMENT, 51, 135, 139, 140, 253, 254))  # other extension headers (IANA)
_MAX_EXTENSIONS: Final = 8


class Header(NamedTuple):
    """The upper layer protocol begins at `off`; addresses have 4 or 16 bytes."""

    v6: bool
    protocol: int
    off: int
    source: bytes
    destination: bytes


def header(data: bytes) -> Header:
    """The IP header of a whole packet."""
    size = len(data)
    if size < 20:
        raise PacketError("shorter than an IP header")
    version = data[0] >> 4
    if version == 4:
        off = (data[0] & 0x0F) * 4
        if off < 20 or int.from_bytes(data[2:4], "big") != size or off > size:
            raise PacketError("IPv4 lengths do not hold")
        if data[6] & 0x3F or data[7]:
            raise PacketError("IPv4 fragment")
        if off > 20:
            refuse_source_route(data[20:off])
        return Header(False, data[9], off, bytes(data[12:16]), bytes(data[16:20]))
    if version != 6:
        raise PacketError("neither IPv4 nor IPv6")
    if size < 40 or int.from_bytes(data[4:6], "big") + 40 != size:
        raise PacketError("IPv6 payload length does not hold")
    protocol, off = upper_layer(data, size)
    if off > size:
        raise PacketError("IPv6 extension header that does not hold")
    return Header(True, protocol, off, bytes(data[8:24]), bytes(data[24:40]))


def upper_layer(data: bytes, size: int) -> tuple[int, int]:
    """Upper layer protocol and its offset behind a bounded chain of IPv6 extension headers."""
    protocol, off = data[6], 40
    for _ in range(_MAX_EXTENSIONS + 1):
        if protocol not in _EXTENSIONS:
            if protocol in _REFUSED:
                raise PacketError("IPv6 extension header that is not let through")
            return protocol, off
        if off + 8 > size or (protocol == _HOP_BY_HOP and off > 40):
            raise PacketError("IPv6 extension header that does not hold")
        if protocol == _ROUTING and data[off + 3]:  # segments left: it goes on from here
            raise PacketError("IPv6 source routing")
        protocol, off = data[off], off + (data[off + 1] + 1) * 8
    raise PacketError("too many IPv6 extension headers")
