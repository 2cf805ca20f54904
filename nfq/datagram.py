"""UDP datagrams as the packet path needs them: parse once, change the payload, craft new ones.

All functions take and give whole packets from the IP header on. Whatever cannot be understood completely raises
PacketError, and the caller drops it (fail closed).
Sources: RFC 768, RFC 8200 (8.1 checksums), RFC 792 and RFC 4443 (port unreachable).
"""

from __future__ import annotations

import struct
from typing import Final

from nfq.ip import UDP, header
from nfq.packet import PacketError, checksum

HEADER: Final = 8
COPIED: Final = 65_531  # as much of a packet as fits a netlink attribute, either way (nfnetlink_queue)
MIN_MTU: Final = 1280  # every IPv6 path carries as much (RFC 8200, 5)

_ports = struct.Struct(">HHHH")
_pseudo = struct.Struct(">HH")


class Datagram:
    """A parsed datagram. `key`: local, remote address, local, remote port, as nfq.packet.Segment.key."""

    __slots__ = ("data", "destination", "device", "key", "outbound", "source", "udp_off", "v6", "whole")

    data: bytes
    v6: bool
    outbound: bool
    udp_off: int
    source: bytes
    destination: bytes
    key: bytes
    device: int  # interface index, 0 unknown
    whole: bool  # False: its last bytes did not fit the queue's copy and are zeros here

    @property
    def payload(self) -> bytes:
        """What the program sent."""
        return self.data[self.udp_off + HEADER :]

    @property
    def source_port(self) -> int:
        """Source port."""
        return int.from_bytes(self.data[self.udp_off : self.udp_off + 2], "big")

    @property
    def destination_port(self) -> int:
        """Destination port."""
        return int.from_bytes(self.data[self.udp_off + 2 : self.udp_off + 4], "big")


def parse(data: bytes | memoryview, outbound: bool, device: int = 0) -> Datagram:
    """Parse an IPv4 or IPv6 packet that carries one whole UDP datagram. Raises PacketError."""
    data = bytes(data)
    whole = True
    if len(data) == COPIED:
        missing = _declared(data) - COPIED
        whole = missing <= 0
        data += bytes(max(0, missing))
    head = header(data)
    off = head.off
    if head.protocol != UDP:
        raise PacketError("not UDP")
    if off + HEADER > len(data):
        raise PacketError("truncated UDP header")
    ports = data[off : off + 4]
    if int.from_bytes(data[off + 4 : off + 6], "big") != len(data) - off:
        raise PacketError("UDP length does not hold")
    if ports[2:] == b"\0\0":
        raise PacketError("UDP port 0")
    d = Datagram()
    d.data, d.v6, d.outbound, d.udp_off, d.device = data, head.v6, outbound, off, device
    d.source, d.destination, d.whole = head.source, head.destination, whole
    if outbound:
        d.key = head.source + head.destination + ports
    else:
        d.key = head.destination + head.source + ports[2:] + ports[:2]
    return d


def _declared(data: bytes) -> int:
    """How long the packet says it is."""
    if data[0] >> 4 == 4:
        return int.from_bytes(data[2:4], "big")
    return int.from_bytes(data[4:6], "big") + 40


def require_checksum(d: Datagram) -> None:
    """Raise PacketError unless the UDP checksum holds: a datagram that is rebuilt would otherwise be made whole."""
    field = d.data[d.udp_off + 6 : d.udp_off + 8]
    if field == b"\0\0":
        if d.v6:
            raise PacketError("UDP over IPv6 without a checksum")
        return
    body = d.data[d.udp_off :]
    if checksum(d.source + d.destination + _pseudo.pack(UDP, len(body)) + body):
        raise PacketError("UDP checksum does not hold")


def _udp(addresses: bytes, ports: bytes, payload: bytes, sum_it: bool = True) -> bytes:
    """UDP header and payload; `addresses`: both, for the pseudo header."""
    size = HEADER + len(payload)
    length = size.to_bytes(2, "big")
    if not sum_it:
        return b"".join((ports, length, b"\0\0", payload))
    # The pseudo header's length and protocol and the header's ports and length, then data, whatever their order.
    value = checksum(b"".join((addresses, _pseudo.pack(UDP, size), ports, length, payload)))
    return b"".join((ports, length, (value or 0xFFFF).to_bytes(2, "big"), payload))


def rebuild(d: Datagram, payload: bytes, *, deliver: bool = False, may_fragment: bool = False) -> bytes:
    """The datagram with another payload, lengths and checksums made right.

    `deliver`: it goes to a local socket and was authenticated, so over IPv4 it needs no checksum of its own.
    `may_fragment` clears DF. Raises PacketError when a verdict cannot carry it (`COPIED` bytes), or it was not whole.
    """
    off = d.udp_off
    total = off + HEADER + len(payload)
    if total > COPIED or not d.whole:
        raise PacketError("larger than a verdict can carry")
    ip = bytearray(d.data[:off])
    body = _udp(d.source + d.destination, d.data[off : off + 4], payload, d.v6 or not deliver)
    if d.v6:
        ip[4:6] = (total - 40).to_bytes(2, "big")
    else:
        ip[2:4] = total.to_bytes(2, "big")
        if may_fragment:
            ip[6] &= 0xBF
        ip[10:12] = b"\0\0"
        ip[10:12] = checksum(bytes(ip)).to_bytes(2, "big")
    return bytes(ip) + body


def craft(key: bytes, payload: bytes) -> bytes:
    """A datagram from the local to the remote end of a flow; it may be fragmented on its way."""
    n = (len(key) - 4) // 2
    addresses = key[: 2 * n]
    return _ip(addresses[:n], addresses[n:], UDP, _udp(addresses, key[-4:], payload))


def _ip(source: bytes, destination: bytes, protocol: int, body: bytes) -> bytes:
    if len(source) == 16:
        head = b"\x60\0\0\0" + len(body).to_bytes(2, "big") + bytes((protocol, 64)) + source + destination
        return head + body
    head = b"\x45\0" + (20 + len(body)).to_bytes(2, "big") + bytes((0, 0, 0, 0, 64, protocol, 0, 0))
    head += source + destination
    return head[:10] + checksum(head).to_bytes(2, "big") + head[12:] + body


def unreachable(d: Datagram) -> bytes:
    """ICMP 'port unreachable' from the datagram's destination to its source: a connected socket fails at once.

    It quotes the datagram's headers and no more, which is what the source needs to find the socket.
    """
    quoted = d.data[: d.udp_off + HEADER]
    if d.v6:
        body = b"\x01\x04\0\0\0\0\0\0" + quoted
        pseudo = d.destination + d.source + struct.pack(">II", len(body), 58)
        value, protocol = checksum(pseudo + body), 58
    else:
        body = b"\x03\x03\0\0\0\0\0\0" + quoted
        value, protocol = checksum(body), 1
    body = body[:2] + value.to_bytes(2, "big") + body[4:]
    return _ip(d.destination, d.source, protocol, body)
