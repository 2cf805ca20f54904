"""Copies of packets for evidence: `shape_of` on whatever crosses the wire.

Any bytes have a shape or none; its headers lie within the packet, and the packet turned round belongs to the same flow.
"""

from __future__ import annotations

from nfq.capture import shape_of


def one(data: bytes) -> None:
    """The bytes are an IP packet, or not."""
    shape = shape_of(data)
    if shape is None:
        return
    assert 20 <= shape.headers <= len(data)
    protocol, low, low_port, high, high_port = shape.key
    assert 0 <= protocol <= 255
    assert len(low) == len(high) == (4 if data[0] >> 4 == 4 else 16)
    assert (low, low_port) <= (high, high_port)


def seeds() -> dict[str, bytes]:
    """Both families, with ports, with extension headers, and a fragment."""
    v4 = bytes.fromhex("4500002800010000400600000a0000010a000002")
    v6 = bytes.fromhex("6000000000140640") + bytes(15) + b"\1" + bytes(15) + b"\2"
    tcp = bytes.fromhex("0005 01bb 00000000 00000000 5002 2000 0000 0000".replace(" ", ""))
    options = bytes([6, 0, 1, 4, 0, 0, 0, 0])
    return {
        "v4-tcp": v4 + tcp,
        "v4-fragment": v4[:6] + b"\x00\x03" + v4[8:] + tcp,
        "v6-tcp": v6 + tcp,
        "v6-options": v6[:6] + b"\0" + v6[7:] + options + tcp,
        "v6-fragment": v6[:6] + b"\x2c" + v6[7:] + bytes([6, 0, 0, 25, 0, 0, 0, 1]) + tcp,
        "short": v4[:12],
    }
