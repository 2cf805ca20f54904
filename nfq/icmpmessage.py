"""ICMP and ICMPv6 messages: type, code, and the packet that an error quotes. Pure; raises PacketError only.

Sources: RFC 792, RFC 1191 and 8201 (path MTU), RFC 4443, RFC 4884 (quotes are at the beginning), RFC 950.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from nfq.ip import ICMP, ICMP6, TCP, UDP, Header
from nfq.packet import PacketError, checksum

HEAD: Final = 8  # octets before the quote, and of an echo before its data
ECHO, ECHO_REPLY = 8, 0
ECHO6, ECHO_REPLY6 = 128, 129

ERRORS: Final = {ICMP: frozenset((3, 11, 12)), ICMP6: frozenset((1, 2, 3, 4))}
# Request type -> type of its answer; both carry an identifier in octets 4 and 5.
REQUESTS: Final = {ICMP: {8: 0, 13: 14, 15: 16, 17: 18}, ICMP6: {128: 129, 139: 140}}
ANSWERS: Final = {p: {answer: request for request, answer in kinds.items()} for p, kinds in REQUESTS.items()}
# Multicast listener, router and neighbour discovery: without them IPv6 does not work at all. The kernel rules let them
# pass; whichever of them comes here passes too. (A redirect is judged like any other message.)
NEIGHBOURHOOD: Final = frozenset((130, 131, 132, 133, 134, 135, 136, 143))

_EXTENSIONS: Final = frozenset((0, 43, 60))
_FRAGMENT: Final = 44
_MAX_EXTENSIONS: Final = 8


class Message(NamedTuple):
    """`body` is the message from its type on."""

    protocol: int
    kind: int
    code: int
    body: bytes

    @property
    def identifier(self) -> bytes:
        """Of a request or an answer; 2 octets."""
        return self.body[4:6]

    @property
    def number(self) -> int:
        """Sequence number of a request or an answer."""
        return int.from_bytes(self.body[6:8], "big")

    @property
    def mtu(self) -> int:
        """What a packet may have on the way, if that is what the message says; 0: it does not say."""
        if self.protocol == ICMP6 and self.kind == 2:
            return int.from_bytes(self.body[4:8], "big")
        if self.protocol == ICMP and (self.kind, self.code) == (3, 4):
            return int.from_bytes(self.body[6:8], "big")
        return 0


class Quote(NamedTuple):
    """The packet that an error is about. `ports`: of TCP and UDP, as in the packet; of an ICMP message, its first two
    octets and its identifier. `length` is what the packet says it has; `off` where its upper layer begins in `data`.
    """

    data: bytes
    protocol: int
    off: int
    source: bytes
    destination: bytes
    ports: bytes
    number: int
    length: int

    def key(self, outbound: bool) -> bytes:
        """The flow key of the quoted packet (local, remote, ports), which had left this host if `outbound`."""
        if outbound:
            return self.source + self.destination + self.ports
        return self.destination + self.source + self.ports[2:] + self.ports[:2]


def message(data: bytes, head: Header) -> Message:
    """The message in an IP packet."""
    if len(data) - head.off < HEAD:
        raise PacketError("truncated ICMP message")
    return Message(head.protocol, data[head.off], data[head.off + 1], bytes(data[head.off :]))


def require_checksum(data: bytes, head: Header) -> None:
    """Raise PacketError unless the message's checksum holds."""
    if _sum(bytes(data[head.off :]), head):
        raise PacketError("ICMP checksum does not hold")


def _sum(body: bytes, head: Header) -> int:
    pseudo = head.source + head.destination + struct.pack(">II", len(body), ICMP6) if head.v6 else b""
    return checksum(pseudo + body)


def quote(error: Message) -> Quote:
    """What an error message is about. The quote may be cut off behind its upper layer's first 8 octets."""
    data = error.body[HEAD:]
    if error.protocol == ICMP:
        if len(data) < 20 or data[0] >> 4 != 4:
            raise PacketError("an ICMP error without the packet it is about")
        off, protocol = (data[0] & 0x0F) * 4, data[9]
        length = int.from_bytes(data[2:4], "big")
        source, destination = data[12:16], data[16:20]
        if off < 20 or data[6] & 0x1F or data[7]:
            raise PacketError("an ICMP error about a later fragment")
    else:
        if len(data) < 40 or data[0] >> 4 != 6:
            raise PacketError("an ICMPv6 error without the packet it is about")
        protocol, off = _quoted_upper(data)
        length = int.from_bytes(data[4:6], "big") + 40
        source, destination = data[8:24], data[24:40]
    if off + 8 > len(data):
        raise PacketError("an ICMP error that quotes too little")
    upper = data[off : off + 8]
    if protocol in (TCP, UDP):
        ports, number = upper[:4], int.from_bytes(upper[4:], "big")
    elif protocol in (ICMP, ICMP6):
        ports, number = upper[:2] + upper[4:6], int.from_bytes(upper[6:], "big")
    else:
        ports, number = bytes(4), 0
    return Quote(data, protocol, off, source, destination, ports, number, length)


def _quoted_upper(data: bytes) -> tuple[int, int]:
    """As nfq.ip.upper_layer, but a first fragment is fine, and a packet that was refused for its options, too."""
    protocol, off = data[6], 40
    for _ in range(_MAX_EXTENSIONS):
        if protocol == _FRAGMENT and off + 8 <= len(data):
            if int.from_bytes(data[off + 2 : off + 4], "big") & 0xFFF8:
                raise PacketError("an ICMPv6 error about a later fragment")
            protocol, off = data[off], off + 8
        elif protocol in _EXTENSIONS and off + 8 <= len(data):
            protocol, off = data[off], off + (data[off + 1] + 1) * 8
        else:
            return protocol, off
    raise PacketError("too many IPv6 extension headers")


def with_short_quote(data: bytes, head: Header, error: Message, about: Quote) -> bytes:
    """An error whose quote ends 8 octets into the upper layer, whatever it quoted: enough for its receiver."""
    short = error.body[: HEAD + about.off + 8]
    if len(short) == len(error.body):
        return bytes(data)
    body = bytearray(short)
    body[2:4] = b"\0\0"
    if error.protocol == ICMP:
        body[5] = 0  # RFC 4884's length of a quote that extensions follow
    elif error.kind in (1, 3):
        body[4] = 0
    ip = bytearray(data[: head.off])
    if head.v6:
        ip[4:6] = (head.off - 40 + len(body)).to_bytes(2, "big")
    else:
        ip[2:4] = (head.off + len(body)).to_bytes(2, "big")
        ip[10:12] = b"\0\0"
        ip[10:12] = checksum(bytes(ip)).to_bytes(2, "big")
    body[2:4] = _sum(bytes(body), head).to_bytes(2, "big")
    return bytes(ip + body)
