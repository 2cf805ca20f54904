"""nfq.ip and nfq.icmpmessage: headers and quotes of any shape are understood or refused, never more."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_LSRR, IPOption_RR, IPOption_SSRR
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6PacketTooBig,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.packet import Packet, Raw

from nfq import icmpmessage, ip
from nfq.ip import header
from nfq.packet import PacketError, checksum, parse

A4, B4, R4 = "10.0.0.1", "10.0.0.2", "10.0.0.254"
A6, B6, R6 = "fd00::1", "fd00::2", "fd00::fe"


@pytest.mark.parametrize(
    "packet, protocol, off",
    [
        (IP(src=A4, dst=B4) / UDP() / b"x", 17, 20),
        (IP(src=A4, dst=B4, options=[IPOption_RR()]) / ICMP(), 1, 24),
        (IPv6(src=A6, dst=B6) / UDP() / b"x", 17, 40),
        (IPv6(src=A6, dst=B6) / IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / UDP(), 17, 56),
        (IPv6(src=A6, dst=B6) / IPv6ExtHdrRouting(type=4, segleft=0, addresses=[]) / TCP(), 6, 48),
        (IPv6(src=A6, dst=B6, nh=59), 59, 40),
    ],
)
def test_let_through(packet: Packet, protocol: int, off: int) -> None:
    found = header(bytes(packet))
    assert (found.protocol, found.off) == (protocol, off)
    assert (found.source[-1], found.destination[-1]) == (1, 2)


@pytest.mark.parametrize(
    "packet",
    [
        IP(src=A4, dst=B4, options=[IPOption_LSRR(routers=[R4])]) / UDP(),
        IP(src=A4, dst=B4, options=[IPOption_SSRR(routers=[R4])]) / TCP(),
        IP(src=A4, dst=B4, flags="MF") / UDP(),
        IP(src=A4, dst=B4, frag=3) / UDP(),
        IP(src=A4, dst=B4, len=200) / UDP(),
        IPv6(src=A6, dst=B6) / IPv6ExtHdrRouting(type=0, segleft=1, addresses=[R6]) / UDP(),
        IPv6(src=A6, dst=B6) / IPv6ExtHdrFragment(m=1) / UDP(),
        IPv6(src=A6, dst=B6) / IPv6ExtHdrDestOpt() / IPv6ExtHdrHopByHop() / UDP(),
        IPv6(src=A6, dst=B6, nh=51) / Raw(bytes(24)),
        IPv6(src=A6, dst=B6, plen=100) / UDP(),
        Raw(b"\x60" + bytes(30)),
        Raw(b"\x10" + bytes(60)),
    ],
)
def test_refused(packet: Packet) -> None:
    with pytest.raises(PacketError):
        header(bytes(packet))


@pytest.mark.parametrize(
    "packet",
    [
        IP(src=A4, dst=B4, options=[IPOption_LSRR(routers=[R4])]) / TCP(),
        IPv6(src=A6, dst=B6) / IPv6ExtHdrRouting(type=0, segleft=1, addresses=[R6]) / TCP(),
    ],
)
def test_a_segment_with_a_source_route_is_refused_too(packet: Packet) -> None:
    with pytest.raises(PacketError):
        parse(bytes(packet), True)


def test_too_many_extension_headers() -> None:
    packet = IPv6(src=A6, dst=B6)
    for _ in range(9):
        packet /= IPv6ExtHdrDestOpt()
    with pytest.raises(PacketError):
        header(bytes(packet / UDP()))


def error(v6: bool, inner: Packet, mtu: int = 0, cut: int = 1000) -> bytes:
    """An error from the router to A about `inner`, of which it quotes so many octets."""
    quoted = Raw(bytes(inner)[:cut])
    if v6:
        head = IPv6(src=R6, dst=A6)
        return bytes(head / (ICMPv6PacketTooBig(mtu=mtu) if mtu else ICMPv6DestUnreach(code=4)) / quoted)
    return bytes(IP(src=R4, dst=A4) / ICMP(type=3, code=4 if mtu else 3, nexthopmtu=mtu) / quoted)


def sent(v6: bool, upper: Packet) -> Packet:
    return (IPv6(src=A6, dst=B6) if v6 else IP(src=A4, dst=B4)) / upper


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("cut", [28, 48, 600])
def test_quotes(v6: bool, cut: int) -> None:
    data = error(v6, sent(v6, TCP(sport=4000, dport=443, seq=77) / Raw(bytes(1200))), 1280, cut + 20 * v6)
    head = header(data)
    icmpmessage.require_checksum(data, head)
    message = icmpmessage.message(data, head)
    about = icmpmessage.quote(message)
    assert (message.mtu, about.protocol, about.number) == (1280, 6, 77)
    assert about.length == 1220 + (40 if v6 else 20)
    assert about.key(outbound=True)[-4:] == b"\x0f\xa0\x01\xbb"
    assert about.key(outbound=False)[-4:] == b"\x01\xbb\x0f\xa0"
    short = icmpmessage.with_short_quote(data, head, message, about)
    again = header(short)
    icmpmessage.require_checksum(short, again)
    assert icmpmessage.quote(icmpmessage.message(short, again))._replace(data=b"") == about._replace(data=b"")
    assert len(short) - again.off == 8 + (40 if v6 else 20) + 8
    if not v6:
        assert checksum(short[:20]) == 0


@pytest.mark.parametrize("v6", [False, True])
def test_quotes_that_say_too_little(v6: bool) -> None:
    whole = error(v6, sent(v6, UDP(sport=1, dport=2) / b"data"))
    least = 20 + 8 + 20 + 8 + 40 * v6
    for size in range(20 + 20 * v6, least):
        data = bytearray(whole[:size])
        if v6:
            data[4:6] = (size - 40).to_bytes(2, "big")
        else:
            data[2:4] = size.to_bytes(2, "big")
        with pytest.raises(PacketError):
            icmpmessage.quote(icmpmessage.message(bytes(data), header(bytes(data))))


@given(st.binary(max_size=200), st.integers(0, 255), st.booleans(), st.integers(0, 255))
def test_nothing_but_packet_errors(rest: bytes, kind: int, v6: bool, first: int) -> None:
    """Invariant: any message and any quote is understood or a PacketError, and a shortened error is well formed."""
    quoted = bytes((0x60 if v6 else 0x40 | first & 0x0F,)) + rest
    head = IPv6(src=R6, dst=A6, nh=58) if v6 else IP(src=R4, dst=A4, proto=1)
    data = bytes(head / Raw(bytes((kind, 0, 0, 0, 0, 0, 0, 0)) + quoted))
    with contextlib.suppress(PacketError):
        found = header(data)
        message = icmpmessage.message(data, found)
        about = icmpmessage.quote(message)
        short = icmpmessage.with_short_quote(data, found, message, about)
        assert len(short) <= len(data)
        icmpmessage.quote(icmpmessage.message(short, header(short)))


@given(st.binary(max_size=120), st.sampled_from([b"", b"\x45", b"\x4f", b"\x60"]))
def test_no_header_raises_anything_else(data: bytes, start: bytes) -> None:
    """Invariant: any octets have a header within them, or raise PacketError."""
    with contextlib.suppress(PacketError):
        assert 20 <= ip.header(start + data).off <= len(start + data)
