"""UDP datagrams and the control datagrams of this protocol: `nfq.datagram`, `nfq.udpcontrol`.

Any packet raises PacketError or is a datagram that is put together again with the same bytes but checksums, which
hold; what is a control datagram is written again with the same bytes.
"""

from __future__ import annotations

from contextlib import suppress

from nfq import udpcontrol
from nfq.datagram import HEADER, craft, parse, rebuild, require_checksum, unreachable
from nfq.icmpmessage import message, quote
from nfq.icmpmessage import require_checksum as require_icmp_checksum
from nfq.ip import header
from nfq.packet import PacketError
from nfq.udpcontrol import Kind
from tests.fuzz.packets import datagrams
from tests.fuzz.world import shaken


def one(data: bytes) -> None:
    """A direction in the first byte, then the packet."""
    outbound, packet = bool(data[:1] > b"\x7f"), data[1:]
    _control(packet)
    try:
        d = parse(packet, outbound)
    except PacketError:
        return
    assert d.udp_off + HEADER <= len(packet)
    assert len(d.payload) == len(packet) - d.udp_off - HEADER
    with suppress(PacketError):
        require_checksum(d)
    again = rebuild(d, d.payload)
    second = parse(again, outbound)
    require_checksum(second)
    assert (second.key, second.payload) == (d.key, d.payload)
    assert rebuild(second, second.payload) == again
    if d.key[-2:] != b"\0\0":  # source port 0: nobody to answer
        made = parse(craft(d.key, d.payload), True)
        require_checksum(made)
        assert (made.key, made.payload) == (d.key, d.payload)
    answer = unreachable(d)
    head = header(answer)
    require_icmp_checksum(answer, head)
    assert quote(message(answer, head)).key(d.outbound) == d.key
    _control(d.payload)


def _control(payload: bytes) -> None:
    found = udpcontrol.read(payload)
    if found is None:
        return
    assert udpcontrol.is_candidate(payload)
    assert udpcontrol.write(found.kind, found.body, found.rest) == payload


def seeds() -> dict[str, bytes]:
    """Datagrams of both IP versions, and control datagrams of every kind."""
    out = {
        name: b"\x80" + packet
        for name, packet in datagrams().items()
        if packet[9 if packet[0] >> 4 == 4 else 6] == 17
    }
    shake = shaken(17)
    bodies = {
        Kind.HELLO: shake.syn,
        Kind.ANSWER: shake.answer,
        Kind.PROOF: bytes(28),
        Kind.PROOF_DATA: bytes(28),
    }
    key = bytes((10, 0, 0, 1, 10, 0, 0, 2, 1, 2, 3, 4))
    for kind in Kind:
        rest = b"hello" if kind is Kind.PROOF_DATA else b""
        payload = udpcontrol.write(kind, bodies.get(kind, bytes(8)), rest)
        out[f"control-{kind.name.lower()}"] = b"\0" + payload
        out[f"carried-{kind.name.lower()}"] = b"\x80" + craft(key, payload)
    out["ack"] = b"\0" + udpcontrol.ack(shake.keys)
    return out
