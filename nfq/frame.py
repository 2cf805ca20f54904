"""The buffer in which packets of encrypted flows are built, and what makes them whole: lengths, checksums, options.

One buffer a process, so that a 64 KiB packet costs no allocation: a packet in it is valid until the next is built. It
lies at V4 or V6, by its IP version, which puts what a TCP checksum covers (addresses, header, payload) on an 8-byte
boundary.
"""

from __future__ import annotations

import struct
from typing import Final

import numpy as np

from nfq.packet import MAX_OPTIONS, OPT_EXP, RECORD_OPTION_LEN, TCP, PacketError, iter_options

MAX_PACKET: Final = 0xFFFF - 4  # what a netlink attribute can hold, so what a verdict can carry
ROOM: Final = 24  # bytes behind a packet that are free: for a tag, and for padding
V4: Final = 4
V6: Final = 0
RECORD_HEAD: Final = 0xFD1C5EC7  # kind 253, length 28, ExID: packet.OPT_EXP, RECORD_OPTION_LEN, EXID

CWR: Final = 0x80
CE: Final = 0x03  # both ECN bits: congestion experienced

_SIZE = (V4 + MAX_PACKET + ROOM + 8) & ~7
OUT: Final = memoryview(bytearray(_SIZE))
_WORDS: Final = np.frombuffer(OUT, dtype=np.uint64)
_HIGH: Final = np.empty(len(_WORDS), dtype=np.uint64)
_PAD: Final = bytes(8)
_SMALL: Final = 2048  # bytes below which a big integer is faster than NumPy

_head_bytes = RECORD_HEAD.to_bytes(4, "big")
_u16 = struct.Struct(">H")
_ip4 = struct.Struct(">HIHH")  # from offset 2: total length; id, fragment; TTL, protocol; checksum
_ip4_all = struct.Struct(">HHIHH")  # the same from offset 0
_sum = np.add.reduce
_shift = np.right_shift
_32 = np.uint64(32)


def _ones(begin: int, end: int) -> int:
    """Number congruent to the ones' complement sum of OUT[begin:end] as little-endian 16-bit words; `begin` even."""
    if end - begin < _SMALL or begin & 7:
        return int.from_bytes(OUT[begin:end], "little")
    OUT[end : end + 8] = _PAD
    words = _WORDS[begin >> 3 : (end + 7) >> 3]
    high = _HIGH[: len(words)]
    # A sum of 64-bit words wraps; with the exact sum of their upper halves the lower halves' follows:
    # words = high * 2^32 + low, and the sum of low fits. Three passes without conversion beat one with.
    _shift(words, _32, high)
    upper = int(_sum(high))
    return (int(_sum(words)) - (upper << 32) & 0xFFFFFFFFFFFFFFFF) + upper


def set_checksum(tcp: int, end: int, v6: bool, plain: bool, old: int) -> None:
    """Write the TCP checksum. `tcp`: where its header is in OUT; `old`: what its checksum field holds now.

    `plain`: the IP header has no options or extension headers, so the addresses stand right before it.
    """
    if plain:
        total = _ones(tcp - 32 if v6 else tcp - 8, end)
    else:
        begin, size = (V6 + 8, 32) if v6 else (V4 + 12, 8)
        total = _ones(begin, begin + size) + _ones(tcp, end)
    total %= 0xFFFF
    total = (total >> 8) + ((total & 0xFF) << 8) + TCP + (end - tcp) + (0xFFFF - old)
    _u16.pack_into(OUT, tcp + 16, 0xFFFF - total % 0xFFFF)


def set_length(total: int, v6: bool) -> None:
    """Write the packet's length, and change an IPv4 header's checksum by as much (RFC 1624)."""
    if v6:
        _u16.pack_into(OUT, V6 + 4, total - 40)
        return
    old, fragment, hop, check = _ip4.unpack_from(OUT, V4 + 2)
    # ~(~check + ~old + total); the sum is not 0, so it is kept within 1 to 0xffff, and a checksum is never 0xffff
    check = 0xFFFE - (0x1FFFD - check - old + total) % 0xFFFF
    _ip4.pack_into(OUT, V4 + 2, total, fragment, hop, check)


def set_congestion(v6: bool) -> None:
    """Mark the packet as having met congestion."""
    if v6:
        OUT[V6 + 1] |= CE << 4
        return
    first, total, fragment, hop, check = _ip4_all.unpack_from(OUT, V4)
    check = 0xFFFE - (0x1FFFD - check - first + (first | CE)) % 0xFFFF
    _ip4_all.pack_into(OUT, V4, first | CE, total, fragment, hop, check)


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
