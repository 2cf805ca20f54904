"""Fragments, extension headers, options and source routes from a peer without an enforcer, on real packets."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import pytest
from scapy.layers.inet import ICMP, IP, UDP, IPOption_LSRR, IPOption_RR, IPOption_SSRR, fragment
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
    fragment6,
)
from scapy.packet import Packet, Raw

from sectool.events import Action, DropReason
from tests.kernel.conftest import wait_until
from tests.kernel.datagrams import bound
from tests.kernel.hosts import SHORT_S, Lan, port_of
from tests.kernel.wire import OUTSIDE

pytestmark = pytest.mark.kernel

POLICY = """
kind: Policy
name: shop
owner: team-shop
rules:
  - allow net:partner to call app=db
  - allow net:partner to call app=kernel on icmp,icmp6
---
kind: Network
name: partner
cidrs: [192.0.2.0/24, "2001:db8::/64"]
except: [192.0.2.128/25, "2001:db8::8000/113"]
"""
EXCEPTED = {False: "192.0.2.200", True: "2001:db8::8888"}
FAMILIES = pytest.mark.parametrize("v6", [False, True], ids=["v4", "v6"])


@pytest.fixture
def net(lan: Lan) -> Lan:
    """The lan; b has source routes switched on, so that it is not the stack that refuses them."""
    host = lan.b
    host.known[0] = host.credential(app="kernel")
    for scope in ("all", "eth0"):
        host.space.run("sysctl", "-qw", f"net.ipv4.conf.{scope}.accept_source_route=1")
        host.space.run("sysctl", "-qw", f"net.ipv6.conf.{scope}.accept_source_route=1")
    host.policy(POLICY)
    return lan


def head(net: Lan, v6: bool, source: str = "") -> Packet:
    source = source or OUTSIDE[v6]
    return IPv6(src=source, dst=net.b.space.v6) if v6 else IP(src=source, dst=net.b.space.v4, id=777)


def listening(net: Lan, v6: bool) -> socket.socket:
    return bound(net.b, v6=v6)


def nothing(sock: socket.socket) -> bool:
    sock.settimeout(SHORT_S)
    try:
        sock.recv(1 << 16)
    except TimeoutError:
        return True
    return False


@FAMILIES
def test_fragments_are_judged_as_the_datagram_they_make(net: Lan, v6: bool) -> None:
    sock, data = listening(net, v6), os.urandom(4000)
    packet = head(net, v6) / UDP(sport=1000, dport=port_of(sock)) / Raw(data)
    whole = head(net, v6) / IPv6ExtHdrFragment(id=9) / packet[UDP] if v6 else packet
    cut: Callable[[Packet, int], list[Packet]] = fragment6 if v6 else fragment
    parts = cut(whole, 1280)
    assert len(parts) > 2
    for part in parts[::-1]:
        net.wire.send("b", part)
    assert sock.recv(1 << 16) == data
    other = port_of(sock) ^ 1
    assert net.b.event(port_of(sock), action=Action.ALLOW)["transport"] == 17
    assert net.b.records(other) == []


@FAMILIES
def test_fragments_that_overlap_make_nothing(net: Lan, v6: bool) -> None:
    """The second would write over the end of the first: what a filter saw is not what would be delivered."""
    sock = listening(net, v6)
    datagram = bytes(UDP(sport=1000, dport=port_of(sock), len=8 + 2000, chksum=0)) + bytes(2000)
    for at, part, more in ((0, datagram[:1200], 1), (1192, b"evil" * 204, 0)):
        if v6:
            piece = head(net, v6) / IPv6ExtHdrFragment(nh=17, id=5, m=more, offset=at // 8) / Raw(part)
        else:
            piece = IP(src=OUTSIDE[v6], dst=net.b.space.v4, id=5, flags=more, frag=at // 8, proto=17) / Raw(
                part
            )
        net.wire.send("b", piece)
    assert nothing(sock)
    assert net.b.records(port_of(sock)) == []


def test_a_first_fragment_alone_opens_nothing(net: Lan) -> None:
    sock = listening(net, False)
    part = UDP(sport=1000, dport=port_of(sock), len=2008, chksum=0) / Raw(bytes(1192))
    net.wire.send("b", IP(src=OUTSIDE[False], dst=net.b.space.v4, id=6, flags="MF") / part)
    assert nothing(sock)
    assert net.b.records(port_of(sock)) == []


@pytest.mark.parametrize(
    "extension",
    [
        IPv6ExtHdrHopByHop(),
        IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(4))]),
        IPv6ExtHdrRouting(type=0, segleft=0),
    ],
    ids=["hop-by-hop", "destination", "routed"],
)
def test_harmless_extension_headers(net: Lan, extension: Packet) -> None:
    sock = listening(net, True)
    net.wire.send("b", head(net, True) / extension / UDP(sport=1000, dport=port_of(sock)) / b"hello")
    assert sock.recv(100) == b"hello"


def test_harmless_options(net: Lan) -> None:
    sock = listening(net, False)
    packet = IP(src=OUTSIDE[False], dst=net.b.space.v4, options=[IPOption_RR(routers=["0.0.0.0"])])
    net.wire.send("b", packet / UDP(sport=1000, dport=port_of(sock)) / b"hello")
    assert sock.recv(100) == b"hello"


@pytest.mark.parametrize("option", [IPOption_LSRR, IPOption_SSRR], ids=["loose", "strict"])
def test_source_routes(net: Lan, option: type[Packet]) -> None:
    """Completed ones: the pointer is past the end, so the stack itself would take them."""
    sock = listening(net, False)
    route = option(routers=["192.0.2.77"], pointer=8)
    packet = IP(src=OUTSIDE[False], dst=net.b.space.v4, options=[route])
    before = net.b.count(DropReason.PACKET_MALFORMED)
    net.wire.send("b", packet / UDP(sport=1000, dport=port_of(sock)) / b"hello")
    net.wire.send("b", packet / ICMP(id=3) / b"hello")
    wait_until(lambda: net.b.count(DropReason.PACKET_MALFORMED) == before + 2, "two packets to be refused")
    assert nothing(sock)


def test_source_routes_in_extension_headers(net: Lan) -> None:
    sock = listening(net, True)
    route = IPv6ExtHdrRouting(type=0, segleft=1, addresses=["2001:db8::77"])
    net.wire.send("b", head(net, True) / route / UDP(sport=1000, dport=port_of(sock)) / b"hello")
    assert nothing(sock)


@FAMILIES
def test_an_exception_of_a_network_is_outside_it(net: Lan, v6: bool) -> None:
    sock = listening(net, v6)
    port = port_of(sock)
    net.wire.send("b", head(net, v6, EXCEPTED[v6]) / UDP(sport=1000, dport=port) / b"hello")
    assert net.b.denial(port, DropReason.DEFAULT_DENY)["action"] == Action.DENY
    net.wire.send("b", head(net, v6) / UDP(sport=1001, dport=port) / b"hello")
    assert sock.recv(100) == b"hello"
    ping = ICMPv6EchoRequest(id=8) if v6 else ICMP(id=8)
    net.wire.send("b", head(net, v6, EXCEPTED[v6]) / ping)
    kind = 128 if v6 else 8
    wait_until(
        lambda: [r for r in net.b.records(0) if r["source_port"] == kind and r["action"] == Action.DENY],
        "the ping's denial",
    )
