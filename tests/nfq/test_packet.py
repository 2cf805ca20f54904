"""Headers and options: what stacks usually send takes a short way, which must come to the same as the long one."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6

from nfq import packet
from nfq.packet import HANDSHAKE_OPTION, MAX_OPTIONS, MSS_RESERVE, PacketError

RECORD = bytes((253, 28)) + packet.EXID

OPTIONS = st.one_of(
    st.just(b"\x01"),
    st.just(b"\x04\x02"),
    st.binary(min_size=2, max_size=2).map(lambda b: b"\x02\x04" + b),
    st.binary(min_size=1, max_size=1).map(lambda b: b"\x03\x03" + b),
    st.binary(min_size=8, max_size=8).map(lambda b: b"\x08\x0a" + b),
    st.just(HANDSHAKE_OPTION),
    st.binary(min_size=24, max_size=24).map(lambda b: RECORD + b),
    st.binary(min_size=8, max_size=8).map(lambda b: b"\x05\x0a" + b),
    st.just(b"\x22\x02"),
    st.just(b"\x1e\x04\x00\x00"),
    st.just(b"\x08\x0a" + HANDSHAKE_OPTION + HANDSHAKE_OPTION),  # looks like ours, and is a timestamp
)
LISTS = st.lists(OPTIONS, max_size=6).map(b"".join).filter(lambda o: len(o) <= MAX_OPTIONS)


def segment(options: bytes, payload: bytes = b"", *, v6: bool = False, flags: str = "S") -> packet.Segment:
    """A parsed segment with these options, built by scapy."""
    options += b"\0" * (-len(options) % 4)
    ip = IPv6(src="fd00::1", dst="fd00::2") if v6 else IP(src="10.0.0.1", dst="10.0.0.2")
    head = bytearray(bytes(TCP(sport=1, dport=2, seq=3, ack=4, flags=flags)))
    head[12] = (5 + len(options) // 4) << 4
    tcp = TCP(bytes(head) + options + payload)
    del tcp.chksum
    return packet.parse(bytes(ip / tcp), True)


def holds(data: bytes) -> bool:
    """Whether scapy computes the same checksums and lengths."""
    cls = IPv6 if data[0] >> 4 == 6 else IP
    again = cls(data)
    if cls is IP:
        del again.chksum, again.len
    else:
        del again.plen
    del again[TCP].chksum
    return bytes(again) == data


def kinds(options: bytes) -> list[tuple[int, bytes]]:
    return packet.iter_options(options)


@settings(deadline=None)
@given(options=LISTS)
def test_what_is_found_does_not_depend_on_the_way(options: bytes) -> None:
    found = kinds(options)
    assert packet.has_handshake(segment(options)) == any(o == HANDSHAKE_OPTION for _, o in found)
    records = [o for _, o in found if o[:4] == RECORD]
    if len(records) > 1:
        with pytest.raises(PacketError):
            packet.record_option(segment(options))
    else:
        assert packet.record_option(segment(options)) == (records[0] if records else None)


@settings(deadline=None)
@given(options=LISTS, lower=st.booleans(), most=st.sampled_from((0, 100, 1300)), add=st.booleans())
def test_syn_options_come_to_the_same_either_way(options: bytes, lower: bool, most: int, add: bool) -> None:
    more = HANDSHAKE_OPTION if add else b""
    try:
        expected = packet._unusual_syn_options(options, lower, most, more)
    except PacketError:
        expected = b""
    try:
        made = packet.syn_options(options, lower_mss=lower, most=most, add=more)
    except PacketError:
        assert not expected
        return
    assert len(made) <= MAX_OPTIONS
    if expected:
        assert kinds(made) == kinds(expected)
    else:  # only its padding made it too long
        assert len(b"".join(o for _, o in kinds(made))) <= MAX_OPTIONS


@settings(deadline=None)
@given(mss=st.integers(0, 65535))
def test_mss_is_lowered_and_never_too_far(mss: int) -> None:
    option = b"\x02\x04" + mss.to_bytes(2, "big")
    lowered = packet.mss_of(packet.syn_options(option, lower_mss=True))
    assert lowered == max(mss - MSS_RESERVE, min(mss, 88))
    assert packet.mss_of(packet.syn_options(option, lower_mss=False)) == mss


@settings(deadline=None)
@given(options=LISTS)
def test_an_option_is_added_and_taken_away(options: bytes) -> None:
    add = RECORD + bytes(24)
    foreign = [o for _, o in kinds(options) if not packet.is_ours(o)]
    made = packet.with_option(options, add)
    if made is None:
        assert len(b"".join(foreign)) + len(add) + 2 * options.count(b"\x08\x0a") > MAX_OPTIONS
    else:
        assert len(made) <= MAX_OPTIONS
        assert kinds(made)[-1][1] == add
        assert [o for _, o in kinds(made)[:-1] if o[0] != 5] == [o for o in foreign if o[0] != 5]
    assert [o for _, o in kinds(packet.without_ours(options))] == foreign


# The checksum can be 0 or 0xffff then: they mean the same, and 0 is what is written.
SUMS_TO_ZERO = b'\x08\n\x08\x0bPj\x8e\x93\xce\x9b\xfd\x04^\xc7"\x02\x1e\x04\x00\x00\x02\x04r/\x03\x03U'


@settings(deadline=None)
@example(options=b"", payload=b"", v6=True, new=SUMS_TO_ZERO, body=b"")
@given(
    options=LISTS, payload=st.binary(max_size=60), v6=st.booleans(), new=LISTS, body=st.binary(max_size=60)
)
def test_rebuilt_packets_are_whole(options: bytes, payload: bytes, v6: bool, new: bytes, body: bytes) -> None:
    seg = segment(options, payload, v6=v6)
    assert (seg.source, seg.destination) == (seg.key[: len(seg.source)], seg.key[len(seg.source) : -4])
    packet.require_checksum(seg)
    made = packet.rebuild(seg, new, body)
    assert holds(made)
    back = packet.parse(made, False)
    assert (back.payload, back.seq, back.ack, back.flags) == (body, 3, 4, packet.SYN)
    assert (back.source, back.destination) == (seg.source, seg.destination)
    assert back.key == seg.destination + seg.source + seg.key[-2:] + seg.key[-4:-2]
    packet.require_checksum(back)
    assert holds(packet.reply_reset(seg, options=HANDSHAKE_OPTION, payload=body))
    assert holds(packet.as_reset(seg))


@settings(deadline=None)
@given(payload=st.binary(min_size=1, max_size=40), where=st.integers(0, 10_000), v6=st.booleans())
def test_a_flipped_bit_is_noticed(payload: bytes, where: int, v6: bool) -> None:
    seg = segment(b"", payload, v6=v6)
    data = bytearray(seg.data)
    bit = where % ((len(data) - seg.tcp_off) * 8)
    data[seg.tcp_off + bit // 8] ^= 1 << bit % 8
    try:
        damaged = packet.parse(bytes(data), True)
    except PacketError:
        return
    with pytest.raises(PacketError):
        packet.require_checksum(damaged)


@settings(deadline=None)
@given(data=st.binary(max_size=90), first=st.sampled_from((0x45, 0x46, 0x60, 0x00)), outbound=st.booleans())
def test_any_bytes_parse_or_are_refused(data: bytes, first: int, outbound: bool) -> None:
    data = bytes((first,)) + data
    try:
        seg = packet.parse(data, outbound)
    except PacketError:
        return
    assert seg.tcp_off + 20 <= seg.data_off <= len(data)
    assert len(seg.key) == (36 if seg.v6 else 12)
    assert packet.parse(memoryview(data), outbound).key == seg.key


@given(LISTS)
def test_without_timestamps_nothing_else_goes(options: bytes) -> None:
    """Invariant: apart from timestamps the same options remain, in the same order."""
    try:
        kept = packet.iter_options(packet.syn_options(options, lower_mss=True))
    except PacketError:
        return
    without = packet.iter_options(packet.syn_options(options, lower_mss=True, timestamps=False))
    assert without == [option for option in kept if option[0] != 8]
