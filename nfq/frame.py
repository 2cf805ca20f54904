"""The buffer in which packets of encrypted flows are built, and what makes them whole: lengths, checksums, options.

One buffer a process, so that a 64 KiB packet costs no allocation: a packet in it is valid until the next is built.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np

from nfq.packet import MAX_OPTIONS, OPT_EXP, RECORD_OPTION_LEN, TCP, PacketError, iter_options

MAX_PACKET: Final = 0xFFFF - 4  # what a netlink attribute can hold, so what a verdict can carry
RECORD_HEAD: Final = 0xFD1C5EC7  # kind 253, length 28, ExID: packet.OPT_EXP, RECORD_OPTION_LEN, EXID

CWR: Final = 0x80
CE: Final = 0x03  # both ECN bits: congestion experienced

OUT: Final = memoryview(bytearray(MAX_PACKET + 5 + 16))  # a packet, and behind it room for a tag and padding
_WORDS: Final = np.frombuffer(OUT, dtype=np.uint32)
_ONES: Final = np.ones(len(_WORDS))
_PAD: Final = bytes(4)
# Bytes from which on which way to sum is the fastest, by measurement.
_DOT, _REDUCE = 256, 4096

_head_bytes = RECORD_HEAD.to_bytes(4, "big")
_u16 = struct.Struct(">H")
_ip4 = struct.Struct(">HIHH")  # from offset 2: total length; id, fragment; TTL, protocol; checksum
_ip4_all = struct.Struct(">HHIHH")  # the same from offset 0
_reduce = np.add.reduce
_u64 = np.uint64


def _sum(begin: int, end: int) -> int:
    """Number congruent to the ones' complement sum of OUT[begin:end], little-endian; `begin` on a word of 4 bytes.

    Writes zeros behind `end`. The sum of at most 2^14 words of 32 bits is exact in a float as well.
    """
    size = end - begin
    if size < _DOT:
        return int.from_bytes(OUT[begin:end], "little")
    OUT[end : end + 4] = _PAD
    words = _WORDS[begin >> 2 : end + 3 >> 2]
    if size < _REDUCE:
        return int(words.dot(_ONES[: len(words)]))
    return int(_reduce(words, dtype=_u64))


def set_checksum(tcp: int, end: int, v6: bool, plain: bool, old: int) -> None:
    """Write the TCP checksum. `tcp`: where its header is in OUT; `old`: what its checksum field holds now.

    `plain`: the IP header has no options or extension headers, so the addresses stand right before it.
    """
    if plain:
        total = _sum(tcp - 32 if v6 else tcp - 8, end)
    else:
        begin, size = (8, 32) if v6 else (12, 8)
        total = _sum(begin, begin + size) + _sum(tcp, end)
    total %= 0xFFFF
    total = (total >> 8) + ((total & 0xFF) << 8) + TCP + (end - tcp) + (0xFFFF - old)
    _u16.pack_into(OUT, tcp + 16, -total % 0xFFFF)


def set_length(total: int, v6: bool) -> None:
    """Write the packet's length, and change an IPv4 header's checksum by as much (RFC 1624)."""
    if v6:
        _u16.pack_into(OUT, 4, total - 40)
        return
    old, fragment, hop, check = _ip4.unpack_from(OUT, 2)
    # ~(~check + ~old + total); the sum is not 0, so it is kept within 1 to 0xffff, and a checksum is never 0xffff
    check = 0xFFFE - (0x1FFFD - check - old + total) % 0xFFFF
    _ip4.pack_into(OUT, 2, total, fragment, hop, check)


def set_congestion(v6: bool) -> None:
    """Mark the packet as having met congestion."""
    if v6:
        OUT[1] |= CE << 4
        return
    first, total, fragment, hop, check = _ip4_all.unpack_from(OUT, 0)
    check = 0xFFFE - (0x1FFFD - check - first + (first | CE)) % 0xFFFF
    _ip4_all.pack_into(OUT, 0, first | CE, total, fragment, hop, check)


def kept_options(options: bytes, room: int = MAX_OPTIONS) -> bytes:
    """Timestamps, and SACK blocks where `room` bytes hold them too; padded. Raises PacketError on any other option."""
    timestamps = sack = b""
    for kind, opt in iter_options(options):
        if kind == 8 and len(opt) == 10 and not timestamps:
            timestamps = b"\x01\x01" + opt
        elif kind == 5 and len(opt) % 8 == 2 and not sack:
            sack = b"\x01\x01" + opt
        else:
            raise PacketError(f"TCP option {kind} on a segment of an encrypted flow")
    kept = timestamps + sack
    return kept if len(kept) <= room else timestamps


def split_options(options: bytes) -> tuple[bytes | None, bytes]:
    """(record option or None, the others). Raises PacketError on what does not belong on a segment of a record."""
    record: bytes | None = None
    others = b""
    for kind, opt in iter_options(options):
        if kind == OPT_EXP and opt[:4] == _head_bytes:
            if record is not None:
                raise PacketError("two record options")
            record = opt
        else:
            others += opt
    return record, kept_options(others)


assert len(_head_bytes) + 24 == RECORD_OPTION_LEN
