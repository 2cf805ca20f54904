"""TCP segments for tests of records, made and taken apart with struct alone: nothing of the code under test is used."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

TIMESTAMPS = b"\x01\x01\x08\x0a\x00\x01\x02\x03\x04\x05\x06\x07"
SOURCE, DESTINATION = bytes((10, 9, 0, 1)), bytes((10, 9, 0, 2))
SOURCE6, DESTINATION6 = bytes(range(0x20, 0x30)), bytes(range(0x40, 0x50))


def internet_sum(data: bytes) -> int:
    """Ones' complement sum of big-endian 16-bit words (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@dataclass(frozen=True, slots=True)
class Wire:
    """A packet and its fields."""

    data: bytes
    v6: bool
    tcp_off: int
    data_off: int
    seq: int
    ack: int
    flags: int
    urgent: int
    options: bytes
    payload: bytes
    tos: int
    ident: int

    @classmethod
    def of(cls, data: bytes) -> Wire:
        """Taken apart; AssertionError when a length or checksum in it does not hold."""
        wire = cls.unchecked(data)
        tcp = data[wire.tcp_off :]
        addresses = data[8:40] if wire.v6 else data[12:20]
        assert internet_sum(addresses + struct.pack(">II", len(tcp), 6) + tcp) == 0xFFFF
        return wire

    @classmethod
    def unchecked(cls, data: bytes) -> Wire:
        """Taken apart, as a packet whose checksum the kernel has still to make."""
        v6 = data[0] >> 4 == 6
        if v6:
            assert struct.unpack_from(">H", data, 4)[0] == len(data) - 40
            off, tos, ident = 40, struct.unpack_from(">H", data)[0] >> 4 & 0xFF, 0
            following = data[6]
            while following != 6:
                following, off = data[off], off + (data[off + 1] + 1) * 8
        else:
            off = (data[0] & 15) * 4
            assert internet_sum(data[:off]) == 0xFFFF
            assert struct.unpack_from(">H", data, 2)[0] == len(data)
            tos, ident = data[1], struct.unpack_from(">H", data, 4)[0]
        seq, ack, doff, flags, _, _, urgent = struct.unpack_from(">IIBBHHH", data, off + 4)
        start = off + (doff >> 4) * 4
        return cls(
            data, v6, off, start, seq, ack, flags, urgent, data[off + 20 : start], data[start:], tos, ident
        )

    def changed(
        self,
        *,
        seq: int | None = None,
        flags: int | None = None,
        options: bytes | None = None,
        payload: bytes | None = None,
        tos: int | None = None,
        ack: int | None = None,
    ) -> Wire:
        """The same packet with other fields, its checksums made right again."""
        return segment(
            self.seq if seq is None else seq,
            self.payload if payload is None else payload,
            self.flags if flags is None else flags,
            v6=self.v6,
            options=self.options if options is None else options,
            ack=self.ack if ack is None else ack,
            tos=self.tos if tos is None else tos,
            urgent=self.urgent,
            ident=self.ident,
        )


def segment(
    seq: int,
    payload: bytes,
    flags: int,
    *,
    v6: bool = False,
    options: bytes = TIMESTAMPS,
    ack: int = 7,
    tos: int = 0,
    urgent: int = 0,
    ident: int = 0x1234,
    extension: bytes = b"",
) -> Wire:
    """A packet with right checksums. `extension`: IPv4 options, or a whole IPv6 destination-options header."""
    seq &= 0xFFFFFFFF
    doff = (20 + len(options)) << 2
    tcp = struct.pack(">HHIIBBHHH", 40001, 443, seq, ack, doff, flags, 501, 0, urgent) + options + payload
    if v6:
        first = 6 << 28 | tos << 20 | 0xABCDE
        ip = struct.pack(">IHBB", first, len(extension) + len(tcp), 60 if extension else 6, 63)
        ip += SOURCE6 + DESTINATION6
        addresses = ip[8:40]
        ip += extension
    else:
        words = 5 + len(extension) // 4
        total = words * 4 + len(tcp)
        ip = (
            struct.pack(">BBHHHBBH", 0x40 | words, tos, total, ident, 0x4000, 63, 6, 0) + SOURCE + DESTINATION
        )
        ip += extension
        ip = ip[:10] + struct.pack(">H", 0xFFFF - internet_sum(ip)) + ip[12:]
        addresses = ip[12:20]
    check = 0xFFFF - internet_sum(addresses + struct.pack(">II", len(tcp), 6) + tcp)
    data = ip + tcp[:16] + struct.pack(">H", check) + tcp[18:]
    off = len(ip)
    return Wire(
        data,
        v6,
        off,
        off + (doff >> 4) * 4,
        seq,
        ack,
        flags,
        urgent,
        options,
        payload,
        tos,
        0 if v6 else ident,
    )


def split(wire: Wire, size: int) -> list[Wire]:
    """What GSO makes of a super-packet: segments of `size` bytes."""
    return cut(wire, range(size, len(wire.payload), size))


def cut(wire: Wire, places: Iterable[int]) -> list[Wire]:
    """The segment cut at these places of its payload: options copied, FIN and PSH on the last, CWR on the first."""
    end = len(wire.payload)
    inside = sorted(place for place in set(places) if 0 < place < end)
    out = []
    for i, (begin, stop) in enumerate(pairwise([0, *inside, end])):
        flags = wire.flags
        if stop != end:
            flags &= ~0x09
        if begin:
            flags &= ~0x80
        piece = wire.changed(seq=wire.seq + begin, flags=flags, payload=wire.payload[begin:stop])
        out.append(replace(piece, ident=piece.ident + i))
    return out
