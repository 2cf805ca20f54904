"""ICMP under enforcement, on real packets: pings by whose socket it is, errors by what they are about."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct

import pytest
from scapy.layers.inet import ICMP, IP, TCP
from scapy.layers.inet6 import ICMPv6DestUnreach, IPv6
from scapy.packet import Packet, Raw

from nfq.packet import checksum
from sectool.events import Action, DropReason, Phase, Point
from tests.kernel.conftest import DEADLINE_S
from tests.kernel.hosts import SHORT_S, Host, Lan, as_user
from tests.kernel.wire import OUTSIDE, STRANGER

pytestmark = pytest.mark.kernel

POLICY = """
kind: Policy
name: shop
owner: team-shop
rules:
  - allow app=web to call app=db
  - allow net:outside to call app=db
  - allow app=web to call net:outside
  - allow app=web to call net:10.77.0.0/16 on icmp/echo-request
  - allow app=web to call net:fd77::/64 on icmp6/echo-request
  - allow app=web to call app=kernel on icmp,icmp6
  - allow net:10.77.0.1/32 to call app=kernel on icmp/echo-request
  - allow net:fd77::1/128 to call app=kernel on icmp6/echo-request
---
kind: Network
name: outside
cidrs: [192.0.2.0/24, "2001:db8::/64"]
"""
FAMILIES = pytest.mark.parametrize("v6", [False, True], ids=["v4", "v6"])


@pytest.fixture
def net(lan: Lan) -> Lan:
    """The lan with kernels that have a name."""
    for host in lan.hosts:
        host.known[0] = host.credential(app="kernel")
        host.space.run("sysctl", "-qw", "net.ipv4.ping_group_range=0 2147483647")
        host.policy(POLICY)
    return lan


class Pinger:
    """A ping socket (or raw socket) of a user's."""

    def __init__(self, host: Host, v6: bool, *, uid: int = 0, raw: bool = False) -> None:
        self.v6, self.raw = v6, raw
        family = socket.AF_INET6 if v6 else socket.AF_INET
        protocol = socket.IPPROTO_ICMPV6 if v6 else socket.IPPROTO_ICMP
        kind = socket.SOCK_RAW if raw else socket.SOCK_DGRAM
        with host.space.enter(), as_user(uid or host.own):
            self.sock = socket.socket(family, kind, protocol)
        host.space.opened.append(self.sock)
        self.number = 0

    def send(self, address: str, data: bytes = b"ping") -> None:
        self.number += 1
        head = struct.pack(">BBHHH", 128 if self.v6 else 8, 0, 0, 4242, self.number)
        if self.raw and not self.v6:
            head = head[:2] + struct.pack(">H", checksum(head + data)) + head[4:]
        self.sock.sendto(head + data, (address, 0))

    def answered(self, timeout_s: float = DEADLINE_S) -> bool:
        """Whether an echo reply comes in time."""
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        while poll.poll(timeout_s * 1000):
            data, _ = self.sock.recvfrom(2048)
            if self.raw and not self.v6:
                data = data[20:]
            if data[0] == (129 if self.v6 else 0):
                return True
        return False

    def ping(self, address: str, timeout_s: float = DEADLINE_S) -> bool:
        self.send(address)
        return self.answered(timeout_s)


@FAMILIES
@pytest.mark.parametrize("raw", [False, True], ids=["ping", "raw"])
def test_a_ping_is_its_senders(net: Lan, v6: bool, raw: bool) -> None:
    pinger = Pinger(net.a, v6, raw=raw)
    for _ in range(3):
        assert pinger.ping(net.b.address(v6))
    kind = 128 if v6 else 8
    (sent,) = [r for r in net.a.records(0) if r["source_port"] == kind]
    (got,) = [r for r in net.b.records(0) if r["source_port"] == kind]
    assert (sent["point"], sent["uid"], sent["action"]) == (Point.INITIATOR, net.a.own, Action.ALLOW)
    assert sent["source_identity"] == net.a.identity().peer.id
    assert (got["point"], got["action"]) == (Point.RESPONDER, Action.ALLOW)
    assert bytes(sent["community"]) == bytes(got["community"])


@FAMILIES
def test_others_may_not(net: Lan, v6: bool) -> None:
    guest = net.a.user(app="guest")
    assert not Pinger(net.a, v6, uid=guest).ping(net.b.address(v6), SHORT_S)
    (denied,) = [r for r in net.a.records(0) if r["action"] == Action.DENY]
    assert (denied["drop_reason"], denied["uid"]) == (DropReason.DEFAULT_DENY, guest)


@FAMILIES
def test_the_answering_host_has_its_say(net: Lan, v6: bool) -> None:
    """b pings a: its own policy lets no workload of its do so, nor lets a's anybody in but a."""
    uid = net.b.user(app="web")
    assert not Pinger(net.b, v6, uid=uid).ping(net.a.address(v6), SHORT_S)
    (denied,) = [r for r in net.a.records(0) if r["action"] == Action.DENY]
    assert (denied["point"], denied["drop_reason"]) == (Point.RESPONDER, DropReason.DEFAULT_DENY)


@FAMILIES
def test_pinging_oneself(net: Lan, v6: bool) -> None:
    assert Pinger(net.a, v6).ping("::1" if v6 else "127.0.0.1")
    assert Pinger(net.a, v6).ping(net.a.address(v6))
    guest = net.a.user(app="guest")
    assert not Pinger(net.a, v6, uid=guest).ping("::1" if v6 else "127.0.0.1", SHORT_S)


@FAMILIES
def test_a_large_ping_comes_in_fragments(net: Lan, v6: bool) -> None:
    pinger = Pinger(net.a, v6)
    pinger.send(net.b.address(v6), os.urandom(9000))
    assert pinger.answered()
    assert net.b.count(DropReason.PACKET_MALFORMED) == 0


def test_neighbours_are_found_whatever_policy_says(net: Lan) -> None:
    for host in net.hosts:
        host.policy(POLICY.replace("allow net:10.77.0.1/32 to call", "allow net:10.99.0.0/16 to call"))
        host.space.run("ip", "neigh", "flush", "dev", "eth0")
    for v6 in (True, False):
        net.establish(v6=v6)
    listed = net.a.space.run("ip", "-6", "neigh", "show", "dev", "eth0")
    assert "lladdr" in listed


@FAMILIES
def test_a_port_that_nobody_listens_on_outside(net: Lan, v6: bool) -> None:
    """The error about our datagram comes back to the socket that sent it."""
    with net.a.space.enter(), as_user(net.a.own):
        sock = socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_DGRAM)
    with contextlib.closing(sock):
        sock.settimeout(DEADLINE_S)
        sock.connect((OUTSIDE[v6], 9))
        sock.send(b"anybody there?")
        with pytest.raises(ConnectionRefusedError):
            sock.recv(10)


def unreachable(v6: bool, about: Packet) -> Packet:
    """The router's word that there is no way to a packet's destination."""
    head: Packet
    if v6:
        head = IPv6(src=STRANGER[True], dst=about[IPv6].src) / ICMPv6DestUnreach(code=0)
        return head / Raw(bytes(about)[:1200])
    head = IP(src=STRANGER[False], dst=about[IP].src) / ICMP(type=3, code=1)
    return head / Raw(bytes(about)[:548])


@FAMILIES
def test_an_error_ends_an_attempt_only_if_it_is_about_it(net: Lan, v6: bool) -> None:
    """A router (or anybody) says that there is no way: believed if the sequence number is right."""
    before = net.a.count(DropReason.UNKNOWN_FLOW)
    tap = net.wire.tap("a", 4433)
    sock = net.a.dial(STRANGER[v6], 4433)
    syn = tap.flags("S")
    forged = syn.copy()
    forged[TCP].seq += 1
    net.wire.send("a", unreachable(v6, forged))
    other = syn.copy()
    other[TCP].sport ^= 1
    net.wire.send("a", unreachable(v6, other))
    assert net.a.count(DropReason.UNKNOWN_FLOW) == before + 2
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    sock.setsockopt(
        *((socket.IPPROTO_IPV6, 25, 1) if v6 else (socket.IPPROTO_IP, 11, 1))
    )  # IP_RECVERR: at once
    net.wire.send("a", unreachable(v6, syn))
    poll = select.poll()
    poll.register(sock, select.POLLERR)
    assert poll.poll(DEADLINE_S * 1000)
    found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    assert found in (errno.EHOSTUNREACH, errno.ENETUNREACH)


def test_answers_and_redirects_nobody_asked_for(net: Lan) -> None:
    before = net.a.count(DropReason.UNKNOWN_FLOW)
    reply = IP(src=STRANGER[False], dst=net.a.space.v4) / ICMP(type=0, id=1, seq=1) / b"boo"
    net.wire.send("a", reply)
    assert net.a.count(DropReason.UNKNOWN_FLOW) == before + 1
    redirect = IP(src="10.77.0.3", dst=net.a.space.v4) / ICMP(type=5, code=1, gw=STRANGER[False])
    net.wire.send("a", redirect / Raw(bytes(IP(src=net.a.space.v4, dst="192.0.2.3") / TCP())))
    record = net.a.denial(1, DropReason.DEFAULT_DENY)
    assert (record["source_port"], record["transport"]) == (5, 1)
    assert record["phase"] == Phase.VERDICT
