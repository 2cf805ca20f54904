"""IP and TCP headers: `nfq.packet.parse`, `nfq.ip.header`, and everything that rewrites a segment.

Any bytes either raise PacketError or are a segment whose parts lie within the packet and are the packet: put together
again unchanged, only checksums differ from what came, and those hold. Resets made of it parse, too.
"""

from __future__ import annotations

from contextlib import suppress

from nfq.ip import header
from nfq.packet import (
    RST,
    PacketError,
    as_reset,
    parse,
    rebuild,
    reply_reset,
    require_checksum,
)
from tests.fuzz.packets import segments


def one(data: bytes) -> None:
    """A direction in the first byte, then the packet."""
    outbound, packet = bool(data[:1] > b"\x7f"), data[1:]
    try:
        seg = parse(packet, outbound)
    except PacketError:
        with suppress(PacketError):
            header(packet)
        return
    assert 20 <= seg.tcp_off <= seg.tcp_off + 20 <= seg.data_off <= len(packet)
    assert len(seg.options) <= 40
    assert len(seg.options) + len(seg.payload) + 20 + seg.tcp_off == len(packet)
    n = 16 if seg.v6 else 4
    assert len(seg.key) == 2 * n + 4
    at = 8 if seg.v6 else 12
    assert (seg.source, seg.destination) == (packet[at : at + n], packet[at + n : at + 2 * n])
    try:
        found = header(packet)
    except PacketError:
        assert seg.v6, "both readers of IPv4 headers let the same through"
    else:
        assert (found.off, found.source, found.destination) == (seg.tcp_off, seg.source, seg.destination)

    again = rebuild(seg, seg.options, seg.payload)
    assert _without_sums(again, seg.tcp_off, seg.v6) == _without_sums(packet, seg.tcp_off, seg.v6)
    second = parse(again, outbound)
    require_checksum(second)
    assert second.key == seg.key
    assert rebuild(second, second.options, second.payload) == again

    reset = parse(as_reset(seg), outbound)
    assert reset.flags & RST
    assert not reset.payload
    assert reset.key == seg.key
    answer = parse(reply_reset(seg), not outbound)
    require_checksum(answer)
    assert answer.key == seg.key


def _without_sums(packet: bytes, tcp: int, v6: bool) -> bytes:
    blank = packet if v6 else packet[:10] + bytes(2) + packet[12:]
    return blank[: tcp + 16] + bytes(2) + blank[tcp + 18 :]


def seeds() -> dict[str, bytes]:
    """Segments of a connection's life, of both IP versions."""
    return {name: bytes((0x80 * ("answer" in name),)) + packet for name, packet in segments().items()}
