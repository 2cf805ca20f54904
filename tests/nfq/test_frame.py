"""Building packets: checksums and lengths against RFC arithmetic done slowly, options kept and refused."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nfq import frame
from nfq.frame import MAX_PACKET, OUT, kept_options, set_checksum, set_congestion, set_length, split_options
from nfq.packet import PacketError
from tests.nfq.segments import TIMESTAMPS, Wire, segment

SIZES = sorted({0, 1, 2, 3, 17, 1400, 1448, *range(180, 230), *range(4000, 4050), 20_001, 65_000, 65_479})
SACK = b"\x05\x0a" + bytes(8)


def summed(wire: Wire, old: int) -> Wire:
    """The packet with the checksum that the code under test makes, from whatever stood there before."""
    OUT[: len(wire.data)] = wire.data
    struct.pack_into(">H", OUT, wire.tcp_off + 16, old)
    begins = wire.tcp_off == (40 if wire.v6 else 20)
    set_checksum(wire.tcp_off, len(wire.data), wire.v6, begins, old)
    return Wire.of(bytes(OUT[: len(wire.data)]))


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("fill", ["random", "zeros", "ones"])
def test_the_checksum_of_every_size_holds(v6: bool, fill: str) -> None:
    rng = random.Random(1)
    for size in SIZES:
        payload = {"random": rng.randbytes(size), "zeros": bytes(size), "ones": b"\xff" * size}[fill]
        if size + 72 > MAX_PACKET:
            continue
        OUT[:] = b"\xaa" * len(OUT)  # nothing behind the packet may count
        wire = segment(1, payload, 0x10, v6=v6)
        assert summed(wire, rng.randrange(0x10000)) == wire


@pytest.mark.parametrize(
    ("v6", "extension"),
    [
        (False, b"\x94\x04\0\0"),
        (False, b"\1" * 40),
        (True, b"\x06\0\x01\x04\0\0\0\0"),
        (True, b"\x06\x01" + bytes(14)),
    ],
)
@pytest.mark.parametrize("size", [0, 9, 1448, 30_000])
def test_options_and_extension_headers_stay_out_of_the_checksum(
    v6: bool, extension: bytes, size: int
) -> None:
    wire = segment(1, bytes(range(256)) * 118, 0x10, v6=v6, extension=extension)
    wire = segment(1, wire.payload[:size], 0x10, v6=v6, extension=extension)
    assert summed(wire, 0x1234) == wire


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.integers(40, MAX_PACKET), st.integers(0, 255))
def test_length_and_congestion_keep_the_header_checksum_right(
    ident: int, bits: int, total: int, tos: int
) -> None:
    wire = segment(1, bytes(bits % 999), 0x10, tos=tos, ident=ident)
    OUT[: len(wire.data)] = wire.data
    set_length(total, False)
    set_congestion(False)
    header = struct.unpack(">10H", OUT[:20])
    assert header[1] == total
    assert header[0] & 0xFF == tos | 3
    assert sum(header) % 0xFFFF == 0
    assert header[5] != 0xFFFF


@given(st.binary(min_size=20, max_size=20), st.integers(40, MAX_PACKET))
def test_a_wrong_header_checksum_stays_wrong(header: bytes, total: int) -> None:
    OUT[:20] = header
    before = sum(struct.unpack(">10H", header)) % 0xFFFF == 0
    set_length(total, False)
    assert (sum(struct.unpack(">10H", OUT[:20])) % 0xFFFF == 0) is before


def test_ipv6_length_and_congestion() -> None:
    wire = segment(1, b"x", 0x10, v6=True, tos=0x02)
    OUT[: len(wire.data)] = wire.data
    set_length(len(wire.data), True)
    set_congestion(True)
    assert Wire.of(bytes(OUT[: len(wire.data)])).tos == 0x03


def test_timestamps_stay_and_sack_gives_way() -> None:
    assert kept_options(b"", 12) == b""
    assert kept_options(TIMESTAMPS, 12) == TIMESTAMPS
    assert kept_options(TIMESTAMPS + b"\1\1" + SACK, 12) == TIMESTAMPS
    assert kept_options(b"\1\1" + SACK, 12) == b"\1\1" + SACK
    assert kept_options(b"\1\1" + SACK + TIMESTAMPS, 40) == TIMESTAMPS + b"\1\1" + SACK


@pytest.mark.parametrize(
    "options",
    [
        TIMESTAMPS + TIMESTAMPS,
        SACK + SACK,
        b"\x05\x09" + bytes(7),
        b"\x08\x0b" + bytes(9),
        b"\x1e\x04\0\0",  # MPTCP
        b"\x13\x12" + bytes(16),  # MD5
        b"\xfd\x04\x12\x34",
        b"\x08\x0a\0",
        b"\x08",
        b"\x08\x00",
    ],
)
def test_other_and_doubled_options_are_refused(options: bytes) -> None:
    with pytest.raises(PacketError):
        kept_options(options)


def test_the_record_option_is_found_anywhere_but_once() -> None:
    record = frame.RECORD_HEAD.to_bytes(4, "big") + bytes(24)
    assert split_options(record + TIMESTAMPS) == (record, TIMESTAMPS)
    assert split_options(TIMESTAMPS + record) == (record, TIMESTAMPS)
    assert split_options(b"\1" + record + b"\0" * 11) == (record, b"")
    assert split_options(TIMESTAMPS) == (None, TIMESTAMPS)
    with pytest.raises(PacketError):
        split_options(record + record)


@given(st.binary(max_size=40))
def test_any_option_bytes_are_parsed_or_refused(options: bytes) -> None:
    try:
        record, kept = split_options(options)
    except PacketError:
        return
    assert record is None or (len(record) == 28 and record in options)
    assert len(kept) % 4 == 0
