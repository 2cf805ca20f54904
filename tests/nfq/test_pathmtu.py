"""nfq.pathmtu: pieces say together what the segment said, and none is larger than the path lets through."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt
from scapy.packet import Raw

from nfq.packet import FIN, PSH, RECORD_OPTION_LEN, URG, PacketError, checksum, parse
from nfq.pathmtu import LIFE_US, Paths, pieces

TIMES = [("NOP", None), ("NOP", None), ("Timestamp", (3, 2))]


@given(
    st.integers(1, 9000),
    st.integers(552, 1500),
    st.integers(0, 0xFFFFFFFF),
    st.booleans(),
    st.sampled_from(["A", "PA", "FA", "FPA", "PAC"]),
    st.sampled_from([[], TIMES]),
    st.booleans(),
)
def test_pieces(
    size: int, mtu: int, seq: int, v6: bool, flags: str, options: list[object], extended: bool
) -> None:
    """Invariant: payload, sequence space and flags add up to the segment's; every piece fits and parses."""
    head = (
        IPv6(src="fd00::1", dst="fd00::2")
        if v6
        else IP(src="10.0.0.1", dst="10.0.0.2", flags="DF", id=65_530)
    )
    if v6 and extended:
        head /= IPv6ExtHdrDestOpt()
    data = bytes(i * 31 & 0xFF for i in range(size))
    whole = parse(
        bytes(head / TCP(sport=1, dport=2, seq=seq, flags=flags, options=options) / Raw(data)), True
    )
    parts = [parse(part, True) for part in pieces(whole.data, whole.tcp_off, whole.data_off, v6, mtu)]
    assert b"".join(part.payload for part in parts) == data
    assert all(len(part.data) + RECORD_OPTION_LEN <= mtu for part in parts)
    at = seq
    for part in parts:
        last = part is parts[-1]
        assert (part.seq, part.ack, part.options, part.key) == (at, whole.ack, whole.options, whole.key)
        assert part.flags == (whole.flags if last else whole.flags & ~(FIN | PSH))
        assert bool(part.data[part.tcp_off + 13] & 0x80) == ("C" in flags and part is parts[0])
        assert v6 or checksum(bytes(part.data[:20])) == 0
        assert v6 or part.data[6] & 0x40
        at = (at + len(part.payload)) & 0xFFFFFFFF


def test_a_path_too_narrow_for_anything() -> None:
    whole = parse(bytes(IP(src="10.0.0.1", dst="10.0.0.2") / TCP(flags="PA") / Raw(bytes(2000))), True)
    with pytest.raises(PacketError):
        pieces(whole.data, whole.tcp_off, whole.data_off, False, 60)


@given(st.integers(1, 4000), st.integers(1, 5000))
def test_the_urgent_octet_stays_where_it_is(size: int, pointer: int) -> None:
    """Invariant: in every piece that says so, the pointer names the same place of the stream; some piece does."""
    head = IP(src="10.0.0.1", dst="10.0.0.2") / TCP(flags="PAU", seq=1000, urgptr=pointer)
    whole = parse(bytes(head / Raw(bytes(size))), True)
    parts = [parse(part, True) for part in pieces(whole.data, whole.tcp_off, whole.data_off, False, 600)]
    named = {p.seq + int.from_bytes(p.data[38:40], "big") for p in parts if p.data[33] & URG}
    assert named == {1000 + pointer}
    assert all(p.data[38:40] == b"\0\0" for p in parts if not p.data[33] & URG)


def test_paths_are_bounded_in_number_time_and_value() -> None:
    paths = Paths()
    for n in range(5000):
        paths.learn(n.to_bytes(4, "big"), 1400, n)
    assert sum(bool(paths.mtu(n.to_bytes(4, "big"))) for n in range(5000)) == 4096
    four, six = b"\xff" * 4, b"\xff" * 16
    paths.learn(four, 68, 5000)
    paths.learn(six, 68, 5000)
    assert (paths.mtu(four), paths.mtu(six), paths.mtu(bytes(16))) == (552, 1280, 0)
    version = paths.version
    paths.learn(four, 552, 6000)
    assert paths.version == version
    paths.expire(LIFE_US + 5500)
    assert (paths.mtu(four), paths.mtu(six)) == (552, 0)
    assert paths.version > version
