"""Real programs over datagrams: dig and a resolver, iperf3, super-packets, groups, the loopback device."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfq.udpcontrol import Kind
from sectool.events import Auth, DropReason, Encryption, Phase, Point
from tests.kernel.conftest import wait_until
from tests.kernel.datagrams import Echo, ask, bound, connected, tapped, unbound
from tests.kernel.datagrams import udp as udp
from tests.kernel.hosts import POLICY, Host, Lan, port_of

pytestmark = pytest.mark.kernel

FAMILIES = pytest.mark.parametrize("v6", [False, True], ids=["v4", "v6"])
MODES = pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
ENCRYPTED = POLICY.replace("allow app=web to call app=db", "allow app=web to call app=db encrypted")
GROUPS = (
    POLICY.replace(
        "  - allow app=web to call net:outside\n",
        "  - allow app=web to call net:groups\n  - allow net:lan to call app=db\n",
    )
    + """---
kind: Network
name: groups
cidrs: [224.0.0.0/4, 10.77.0.255/32, 255.255.255.255/32, "ff00::/8"]
---
kind: Network
name: lan
cidrs: [10.77.0.0/24, "fd77::/64", "fe80::/10"]
"""
)
GROUP = {False: "239.7.7.7", True: "ff02::7777"}
UDP_SEGMENT, UDP_GRO, SO_RCVBUFFORCE = 103, 104, 33


def as_program(host: Host, uid: int, *argv: str) -> list[str]:
    """A command line that runs a program as one of the host's users."""
    return ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *argv]


# -- name service ------------------------------------------------------------------------------------------------


@pytest.fixture
def resolver(udp: Lan, tmp_path: Path) -> Iterator[Lan]:
    """dnsmasq on host b."""
    tmp_path.chmod(0o755)
    argv = [
        "dnsmasq",
        "--keep-in-foreground",
        "--no-resolv",
        "--no-hosts",
        "--conf-file=/dev/null",
        "--user=",
    ]
    argv += ["--pid-file=", "--port=53", "--address=/shop.example/192.0.2.80", "--log-facility=-"]
    argv += ["--host-record=six.example,2001:db8::80", f"--txt-record=large.example,{'y' * 250}"]
    argv += [f"--txt-record=huge.example,{','.join('z' * 250 for _ in range(12))}"]
    process = udp.b.space.popen(*argv, stderr=subprocess.DEVNULL)
    wait_until(lambda: ":53 " in udp.b.space.run("ss", "-Hlnu"), "the resolver")
    udp.b.known[0] = udp.b.known[udp.b.own]
    yield udp
    del udp.b.known[0]
    process.terminate()


def dig(lan: Lan, server: str, *question: str) -> str:
    """What dig prints for a question asked by a program of app=web."""
    argv = as_program(lan.a, lan.a.own, "dig", "+short", "+time=3", "+tries=1", f"@{server}", *question)
    return lan.a.space.run(*argv).strip()


@FAMILIES
@MODES
def test_dig_asks_a_resolver(resolver: Lan, v6: bool, encrypted: bool) -> None:
    if encrypted:
        resolver.policy(ENCRYPTED)
    server = resolver.b.address(v6)
    with tapped(resolver, "a", 53) as tap:
        assert dig(resolver, server, "www.shop.example") == "192.0.2.80"
        assert dig(resolver, server, "six.example", "AAAA") == "2001:db8::80"
        assert "y" * 250 in dig(resolver, server, "large.example", "TXT")
        assert dig(resolver, server, "+bufsize=4096", "huge.example", "TXT").count("z" * 250) == 12
        assert tap.kinds()[0] in (Kind.HELLO, Kind.RESUME)
        assert Kind.RESUMED in tap.kinds(), "under a session nothing waits"
        assert any(b"shop" in frame for frame in tap.raw) != encrypted
    record = resolver.a.event(53, phase=Phase.VERDICT)
    assert record["encryption"] == (Encryption.ENCRYPTED if encrypted else Encryption.PLAIN)
    ended = resolver.a.event(53, phase=Phase.END)
    assert ended["source_packets"] == 1
    assert ended["destination_packets"] in (1, 2)


def test_flows_to_name_servers_stay_in_sight(resolver: Lan) -> None:
    """Not released: each answer passes the worker, where the table of names learns from it."""
    client = connected(resolver.a, resolver.b.address(), 53)
    query = struct.pack(">HHHHHH", 7, 0x0100, 1, 0, 0, 0) + b"\4shop\7example\0\0\1\0\1"
    ask(client, query)
    before = resolver.a.status()["packets"]
    for _ in range(5):
        assert socket.inet_aton("192.0.2.80") in ask(client, query)
    assert resolver.a.status()["packets"] >= before + 10


# -- much data ---------------------------------------------------------------------------------------------------


@FAMILIES
@MODES
def test_iperf3_sends_a_stream_of_datagrams(udp: Lan, v6: bool, encrypted: bool) -> None:
    if encrypted:
        udp.policy(ENCRYPTED)
    udp.b.known[0] = udp.b.known[udp.b.own]
    try:
        server = udp.b.space.popen("iperf3", "-s", "-1", "-p", "5201", stdout=subprocess.DEVNULL)
        wait_until(lambda: ":5201 " in udp.b.space.run("ss", "-Hlnt"), "iperf3")
        argv = [
            "iperf3",
            "-c",
            udp.b.address(v6),
            "-p",
            "5201",
            "-u",
            "-b",
            "5M",
            "-t",
            "1",
            "-l",
            "1200",
            "-J",
        ]
        said = json.loads(udp.a.space.run(*as_program(udp.a, udp.a.own, *argv)))
        server.wait(10)
    finally:
        del udp.b.known[0]
    total = said["end"]["sum"]
    assert total["packets"] > 200
    assert total["lost_percent"] < 10
    flow = next(r for r in udp.b.records(5201) if r["transport"] == 17)
    assert flow["encryption"] == (Encryption.ENCRYPTED if encrypted else Encryption.PLAIN)


@FAMILIES
@MODES
def test_super_packets_of_a_program_are_split(udp: Lan, v6: bool, encrypted: bool) -> None:
    """As QUIC stacks send: one call, many datagrams (UDP_SEGMENT); and receive: many in one (UDP_GRO)."""
    if encrypted:
        udp.policy(ENCRYPTED)
    server = bound(udp.b, v6=v6)
    server.setsockopt(socket.SOL_UDP, UDP_GRO, 1)
    client = connected(udp.a, udp.b.address(v6), port_of(server))
    for turn in range(3):
        if turn:
            client.setsockopt(socket.SOL_UDP, UDP_SEGMENT, 1200)
        data = bytes(range(256)) * 75 if turn else b"first"
        client.send(data)
        got = b""
        while len(got) < len(data):
            got += server.recv(1 << 17)
        assert got == data


def test_a_long_flow_with_data_both_ways_at_once(udp: Lan) -> None:
    udp.policy(ENCRYPTED)
    server = bound(udp.b)
    client = connected(udp.a, udp.b.address(), port_of(server))
    client.send(b"begin")
    _, peer = server.recvfrom(100)
    server.connect(peer)
    got: dict[socket.socket, list[bytes]] = {client: [], server: []}
    for sock in got:
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)

    def receive() -> int:
        for sock, data in got.items():
            with contextlib.suppress(BlockingIOError):
                while True:
                    data.append(sock.recv(4096, socket.MSG_DONTWAIT))
        return sum(map(len, got.values()))

    for i in range(1000):
        for sock in (client, server):
            sock.send(b"%04d" % i + bytes(1100))
        receive()
    wait_until(lambda: receive() == 2000, "all of it")
    for data in got.values():
        assert len(set(data)) == len(data)
        assert all(len(one) == 1104 for one in data)


# -- groups ------------------------------------------------------------------------------------------------------


def join(sock: socket.socket, host: Host, v6: bool) -> None:
    """Become a member of the group on eth0."""
    with host.space.enter():
        index = socket.if_nametoindex("eth0")
        if v6:
            member = socket.inet_pton(socket.AF_INET6, GROUP[True]) + struct.pack("=i", index)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, member)
        else:
            member = struct.pack("=4s4si", socket.inet_aton(GROUP[False]), bytes(4), index)
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)


def outlet(host: Host, v6: bool, uid: int = 0) -> socket.socket:
    """A socket that sends to groups by eth0."""
    sock = bound(host, v6=v6, uid=uid)
    with host.space.enter():
        index = socket.if_nametoindex("eth0")
    if v6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
    else:
        sock.setsockopt(
            socket.IPPROTO_IP, socket.IP_MULTICAST_IF, struct.pack("=4s4si", bytes(4), bytes(4), index)
        )
    return sock


@FAMILIES
@pytest.mark.parametrize("wildcard", [False, True], ids=["bound-to-the-group", "bound-to-any"])
def test_multicast_by_rule(udp: Lan, v6: bool, wildcard: bool) -> None:
    udp.policy(GROUPS)
    member = unbound(udp.b, v6=v6)
    if wildcard:
        member.bind(("", 0))
    else:
        with udp.b.space.enter():
            index = socket.if_nametoindex("eth0")
        member.bind((GROUP[True], 0, 0, index) if v6 else (GROUP[False], 0))
    join(member, udp.b, v6)
    sender = outlet(udp.a, v6)
    for i in range(5):
        sender.sendto(b"%d" % i, (GROUP[v6], port_of(member)))
        assert member.recv(100) == b"%d" % i
    for host, point in zip(udp.hosts, (Point.INITIATOR, Point.RESPONDER), strict=True):
        record = host.event(port_of(member), phase=Phase.VERDICT)
        assert record["point"] == point
        assert record["auth_method"] == Auth.NONE


@FAMILIES
def test_multicast_is_denied_by_default_and_recorded_once(udp: Lan, v6: bool) -> None:
    member = bound(udp.b, v6=v6)
    join(member, udp.b, v6)
    sender = outlet(udp.a, v6)
    for _ in range(5):
        sender.sendto(b"x", (GROUP[v6], port_of(member)))
    udp.a.denial(port_of(member), DropReason.DEFAULT_DENY)
    wait_until(lambda: udp.a.count(DropReason.DENIED_BEFORE) >= 4, "the others to be dropped")
    assert len(udp.a.records(port_of(member))) == 1
    stranger = udp.wire.space.new_socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_DGRAM)
    with udp.wire.space.enter():
        index = socket.if_nametoindex("br0")
    if v6:
        stranger.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
    else:
        stranger.bind((udp.wire.address(), 0))
        interface = struct.pack("=4s4si", bytes(4), bytes(4), index)
        stranger.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, interface)
    stranger.sendto(b"x", (GROUP[v6], port_of(member)))
    udp.b.denial(port_of(member), DropReason.DEFAULT_DENY)


def test_what_arrives_for_a_group_must_be_allowed_for_all_its_members(udp: Lan) -> None:
    udp.policy(GROUPS)
    first, second = unbound(udp.b), unbound(udp.b, uid=udp.b.user(app="secretive"))
    for sock in (first, second):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("", port_of(first)))
        join(sock, udp.b, False)
    outlet(udp.a, False).sendto(b"x", (GROUP[False], port_of(first)))
    udp.b.denial(port_of(first), DropReason.DEFAULT_DENY)


@pytest.mark.parametrize("address", ["10.77.0.255", "255.255.255.255"])
def test_broadcast_by_rule(udp: Lan, address: str) -> None:
    listener = bound(udp.b)
    sender = bound(udp.a)
    sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    with udp.a.space.enter():
        sender.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    sender.sendto(b"denied", (address, port_of(listener)))
    udp.a.denial(port_of(listener), DropReason.DEFAULT_DENY)
    udp.policy(GROUPS)
    sender.sendto(b"allowed", (address, port_of(listener)))
    assert listener.recv(100) == b"allowed"


# -- loopback ----------------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("own", [False, True], ids=["lo", "own-address"])
def test_both_ends_on_one_host_are_attested_by_its_kernel(udp: Lan, v6: bool, own: bool) -> None:
    address = udp.a.address(v6) if own else ("::1" if v6 else "127.0.0.1")
    server = Echo(udp.a, v6=v6, uid=udp.a.user(app="db"))
    client = connected(udp.a, address, server.port)
    for _ in range(3):
        assert ask(client, b"local") == b"local"
    record = udp.a.event(server.port, phase=Phase.VERDICT)
    assert record["point"] == Point.LOCAL
    assert record["auth_method"] == Auth.KERNEL
    denied = connected(udp.a, address, server.port, uid=udp.a.user(app="other"))
    denied.send(b"x")
    udp.a.denial(server.port, DropReason.DEFAULT_DENY)
    client.close()
    assert udp.a.event(server.port, phase=Phase.END)["source_packets"] == 3


def test_a_server_on_this_host_that_is_replaced_is_judged_anew(udp: Lan) -> None:
    server = Echo(udp.a, uid=udp.a.user(app="db"))
    client = bound(udp.a)
    client.sendto(b"to db", ("127.0.0.1", server.port))
    assert client.recv(10) == b"to db"
    server.close()
    udp.a.event(server.port, phase=Phase.END)
    other = unbound(udp.a, uid=udp.a.user(app="other"))
    other.bind(("", server.port))
    client.sendto(b"to whom?", ("127.0.0.1", server.port))
    udp.a.denial(server.port, DropReason.DEFAULT_DENY)
