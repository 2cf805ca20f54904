"""Datagrams through two real packet workers: real sockets, real rules, a wire that loses what it is told to."""

from __future__ import annotations

import secrets
import socket

import pytest

from nfq.udpcontrol import Kind
from sectool.events import Action, Auth, AuthResult, DropReason, Encryption, Phase, Point
from tests.kernel.conftest import wait_until
from tests.kernel.datagrams import Echo, ask, connected, tapped
from tests.kernel.datagrams import udp as udp
from tests.kernel.hosts import POLICY, Lan, port_of

pytestmark = pytest.mark.kernel

FAMILIES = pytest.mark.parametrize("v6", [False, True], ids=["v4", "v6"])


@FAMILIES
def test_a_question_is_answered_and_recorded_on_both_ends(udp: Lan, v6: bool) -> None:
    server = Echo(udp.b, v6=v6)
    with tapped(udp, "a", server.port) as tap:
        client = connected(udp.a, udp.b.address(v6), server.port)
        for i in range(5):
            assert ask(client, b"question %d" % i) == b"question %d" % i
        assert tap.kinds()[:2] == [Kind.HELLO, Kind.ANSWER]
        assert Kind.PROOF_DATA in tap.kinds()
        assert Kind.ACK in tap.kinds()
    assert server.got == [b"question %d" % i for i in range(5)]
    for host, point in zip(udp.hosts, (Point.INITIATOR, Point.RESPONDER), strict=True):
        record = host.event(server.port, phase=Phase.VERDICT)
        assert record["action"] == Action.ALLOW
        assert record["transport"] == 17
        assert record["point"] == point
        assert record["auth_method"] == Auth.NOISE_IX
        assert record["auth_result"] == AuthResult.PROVEN
        assert record["source_port"] == port_of(client)
    client.close()
    ended = udp.a.event(server.port, phase=Phase.END)
    assert ended["source_packets"] == 5
    assert ended["destination_packets"] - 5 in (0, 1), "the Ack may be counted"
    server.close()
    ended = udp.b.event(server.port, phase=Phase.END)
    assert ended["source_packets"] == 5
    assert ended["destination_packets"] == 5


@FAMILIES
def test_a_flow_that_is_released_leaves_the_queue(udp: Lan, v6: bool) -> None:
    server = Echo(udp.b, v6=v6)
    client = connected(udp.a, udp.b.address(v6), server.port)
    for _ in range(3):
        ask(client, b"x")
    before = [host.status()["packets"] for host in udp.hosts]
    for _ in range(50):
        ask(client, b"x")
    assert [host.status()["packets"] for host in udp.hosts] == before


ENCRYPTED = POLICY.replace("allow app=web to call app=db", "allow app=web to call app=db encrypted")
# Payloads around what fits a packet, and the ends of what there can be.
EDGES = [0, 1, 15, 16, 1231, 1232, 1424, 1428, 1447, 1448, 1449, 1452, 1472, 1473, 2048, 9000, 65_000]


@FAMILIES
def test_plain_datagrams_of_all_sizes_arrive(udp: Lan, v6: bool) -> None:
    server = Echo(udp.b, v6=v6)
    for first in (0, 1473, 65_507):
        client = connected(udp.a, udp.b.address(v6), server.port)
        for size in (first, *EDGES, 65_500, 65_507):
            data = secrets.token_bytes(size)
            assert ask(client, data) == data, size


@FAMILIES
def test_encrypted_datagrams_of_all_sizes_arrive_and_show_nothing(udp: Lan, v6: bool) -> None:
    udp.policy(ENCRYPTED)
    server = Echo(udp.b, v6=v6)
    marker = b"MARKER" * 3
    largest = 65_459 if v6 else 65_479
    with tapped(udp, "a", server.port) as tap:
        client = connected(udp.a, udp.b.address(v6), server.port)
        for size in (*EDGES, largest):
            data = (marker + secrets.token_bytes(size))[:size]
            assert ask(client, data) == data, size
        client.send(bytes(largest + 1))
        wait_until(lambda: udp.a.count(DropReason.DATAGRAM_OVERSIZED), "it to be dropped")
        assert ask(client, b"goes on") == b"goes on"
        tap.all()
        assert tap.raw
        assert not any(marker in frame for frame in tap.raw)
    for host in udp.hosts:
        record = host.event(server.port, phase=Phase.VERDICT)
        assert record["encryption"] == Encryption.ENCRYPTED
        assert record["cipher"] in (1, 2)


IP_MTU_DISCOVER, IP_PMTUDISC_DO, IPV6_MTU_DISCOVER = 10, 2, 23


@FAMILIES
@pytest.mark.parametrize("mtu", [1500, 1400, 1280])
def test_programs_that_ask_for_no_fragments_get_through_encrypted(udp: Lan, v6: bool, mtu: int) -> None:
    udp.policy(ENCRYPTED)
    for host in udp.hosts:
        host.space.run("ip", "link", "set", "eth0", "mtu", str(mtu))
    try:
        server = Echo(udp.b, v6=v6)
        client = connected(udp.a, udp.b.address(v6), server.port)
        for sock in (client, server.sock):
            level, option = (
                (socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER) if v6 else (socket.IPPROTO_IP, IP_MTU_DISCOVER)
            )
            sock.setsockopt(level, option, IP_PMTUDISC_DO)
        largest = mtu - (48 if v6 else 28)
        for size in (100, largest - 25, largest - 24, largest - 23, largest - 1, largest):
            data = secrets.token_bytes(size)
            assert ask(client, data) == data, size
        with pytest.raises(OSError, match="long"):
            client.send(bytes(largest + 1))
    finally:
        for host in udp.hosts:
            host.space.run("ip", "link", "set", "eth0", "mtu", "1500")
