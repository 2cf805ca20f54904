"""ICMP and ICMPv6 messages and the packets that errors quote: `nfq.icmpmessage`.

Any packet raises PacketError or is a message; a quote lies within the error, and an error whose quote was shortened is
a message about the same packet whose checksum holds.
"""

from __future__ import annotations

from nfq import icmpmessage
from nfq.icmpmessage import ERRORS, HEAD
from nfq.ip import ICMP, ICMP6, header
from nfq.packet import PacketError
from tests.fuzz.packets import datagrams


def one(data: bytes) -> None:
    """The packet."""
    try:
        head = header(data)
        if head.protocol not in (ICMP, ICMP6):
            return
        message = icmpmessage.message(data, head)
        assert len(message.body) >= HEAD
        assert len(message.identifier) == 2
        assert 0 <= message.mtu < 1 << 32
        if message.kind not in ERRORS[head.protocol]:
            return
        about = icmpmessage.quote(message)
    except PacketError:
        return
    assert about.off + 8 <= len(about.data) == len(message.body) - HEAD
    assert len(about.source) == len(about.destination) == (4 if head.protocol == ICMP else 16)
    assert len(about.ports) == 4
    assert about.key(True) != about.key(False) or about.source == about.destination
    if head.v6 != (head.protocol == ICMP6):
        return  # not let through
    short = icmpmessage.with_short_quote(data, head, message, about)
    again = header(short)
    said = icmpmessage.message(short, again)
    if len(short) != len(data):
        icmpmessage.require_checksum(short, again)
    quoted = icmpmessage.quote(said)
    assert quoted.key(True) == about.key(True)
    assert quoted.number == about.number
    assert said.mtu == message.mtu


def seeds() -> dict[str, bytes]:
    """Questions and errors of both kinds."""
    return {
        name: packet for name, packet in datagrams().items() if packet[9 if packet[0] >> 4 == 4 else 6] != 17
    }
