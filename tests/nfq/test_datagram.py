"""Datagrams parsed, rebuilt and crafted; scapy checks the results."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, UDP, IPOption_Router_Alert, UDPerror
from scapy.layers.inet6 import ICMPv6DestUnreach, IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrHopByHop
from scapy.packet import Packet, Raw

from nfq.datagram import COPIED, craft, parse, rebuild, require_checksum, unreachable
from nfq.packet import PacketError

HEADS: dict[str, Callable[[], Packet]] = {
    "v4": lambda: IP(src="10.0.0.1", dst="10.0.0.2", flags="DF"),
    "v4-options": lambda: IP(src="10.0.0.1", dst="10.0.0.2", options=[IPOption_Router_Alert()]),
    "v6": lambda: IPv6(src="fd00::1", dst="fd00::2"),
    "v6-extensions": lambda: IPv6(src="fd00::1", dst="fd00::2") / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt(),
}
heads = st.sampled_from(sorted(HEADS))
payloads = st.binary(max_size=200)


def packet(head: str, payload: bytes = b"data") -> bytes:
    return bytes(HEADS[head]() / UDP(sport=1234, dport=53) / Raw(payload))


def whole(data: bytes) -> Packet:
    """The packet as scapy reads it, after checking that it computes the same checksums."""
    cls = IPv6 if data[0] >> 4 == 6 else IP
    again = cls(data)
    del again[UDP].chksum, again[UDP].len
    if cls is IP:
        del again.chksum, again.len
    else:
        del again.plen
    assert bytes(again) == data
    return cls(data)


@pytest.mark.parametrize("head", sorted(HEADS))
def test_both_directions_have_one_key(head: str) -> None:
    data = packet(head)
    out = parse(data, True)
    back = HEADS[head]()
    back.src, back.dst = back.dst, back.src
    into = parse(bytes(back / UDP(sport=53, dport=1234) / Raw(b"x")), False)
    assert out.key == into.key
    assert out.key[-4:] == (1234).to_bytes(2, "big") + (53).to_bytes(2, "big")
    assert (out.source_port, out.destination_port, out.payload) == (1234, 53, b"data")
    require_checksum(out)


@given(head=heads, before=payloads, after=payloads)
def test_rebuilt_datagrams_are_as_a_stack_makes_them(head: str, before: bytes, after: bytes) -> None:
    made = rebuild(parse(packet(head, before), True), after)
    assert bytes(whole(made)[UDP].payload) == after
    require_checksum(parse(made, True))


def test_what_is_delivered_needs_no_checksum_over_ipv4_and_one_over_ipv6() -> None:
    four, six = (parse(rebuild(parse(packet(h), False), b"new", deliver=True), False) for h in ("v4", "v6"))
    assert four.data[26:28] == b"\0\0"
    assert six.data[46:48] != b"\0\0"
    require_checksum(four)
    require_checksum(six)


def test_df_is_cleared_only_when_asked() -> None:
    d = parse(packet("v4"), True)
    assert IP(rebuild(d, b"x")).flags.DF
    assert not IP(rebuild(d, b"x", may_fragment=True)).flags.DF


@given(data=st.binary(max_size=120), outbound=st.booleans())
def test_garbage_is_refused_or_understood(data: bytes, outbound: bool) -> None:
    try:
        d = parse(data, outbound)
    except PacketError:
        return
    assert len(d.payload) == len(data) - d.udp_off - 8


@given(head=heads, at=st.integers(0, 300), bit=st.integers(0, 7), payload=payloads)
def test_no_flipped_bit_passes_the_checksum_unseen(head: str, at: int, bit: int, payload: bytes) -> None:
    data = bytearray(packet(head, payload))
    off = parse(bytes(data), True).udp_off
    at = off + at % (len(data) - off)
    data[at] ^= 1 << bit
    with pytest.raises(PacketError):
        d = parse(bytes(data), True)
        if d.data[off + 6 : off + 8] == b"\0\0" and not d.v6:
            raise PacketError("the flip made it say that it has none")
        require_checksum(d)


def test_lengths_must_hold() -> None:
    data = packet("v4")
    for changed in (data[:-1], data + b"x", data[:20], data[:27]):
        with pytest.raises(PacketError):
            parse(changed, True)
    longer = bytearray(data)
    longer[25] += 1
    with pytest.raises(PacketError, match="UDP length"):
        parse(bytes(longer), True)
    with pytest.raises(PacketError, match="port 0"):
        parse(bytes(IP(src="1.1.1.1", dst="2.2.2.2") / UDP(sport=1, dport=0)), True)


@pytest.mark.parametrize("head", ["v4", "v6"])
def test_what_the_queue_cuts_off_is_judged_but_not_changed(head: str) -> None:
    largest = 65_507 if head == "v4" else 65_527
    data = bytes(HEADS[head]() / UDP(sport=1, dport=2) / Raw(bytes(largest)))
    d = parse(data[:COPIED], True)
    assert not d.whole
    assert len(d.payload) == largest
    with pytest.raises(PacketError, match="verdict"):
        rebuild(d, b"x")
    assert parse(packet(head), True).whole


@given(v6=st.booleans(), payload=payloads)
def test_crafted_datagrams_go_from_the_local_to_the_remote_end(v6: bool, payload: bytes) -> None:
    key = parse(packet("v6" if v6 else "v4"), False).key
    made = craft(key, payload)
    whole(made)
    d = parse(made, True)
    assert (d.key, d.payload) == (key, payload)


@pytest.mark.parametrize("head", sorted(HEADS))
def test_port_unreachable_quotes_the_datagram_to_its_sender(head: str) -> None:
    answer = unreachable(parse(packet(head), True))
    cls = IPv6 if head.startswith("v6") else IP
    read = cls(answer)
    assert (read.src, read.dst) == (("fd00::2", "fd00::1") if cls is IPv6 else ("10.0.0.2", "10.0.0.1"))
    layer = ICMPv6DestUnreach if cls is IPv6 else ICMP
    assert (read[layer].type, read[layer].code) == ((1, 4) if cls is IPv6 else (3, 3))
    assert (read[UDPerror].sport, read[UDPerror].dport) == (1234, 53)
    again = cls(answer)
    if cls is IPv6:
        del again[layer].cksum
    else:
        del again[layer].chksum
    assert bytes(again) == answer
