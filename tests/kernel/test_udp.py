"""Datagrams through two real packet workers: real sockets, real rules, a wire that loses what it is told to."""

from __future__ import annotations

import contextlib
import secrets
import select
import socket
import struct
import time

import pytest

from nfq.udpcontrol import Kind
from sectool.events import Action, Auth, AuthResult, DropReason, Encryption, Phase, Point
from tests.kernel.conftest import DEADLINE_S, wait_until
from tests.kernel.datagrams import Echo, ask, bound, connected, tapped, unbound
from tests.kernel.datagrams import udp as udp
from tests.kernel.hosts import POLICY, SHORT_S, Lan, port_of
from tests.kernel.wire import OUTSIDE

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


IP_PKTINFO, IP_MTU_DISCOVER, IP_PMTUDISC_DO, IPV6_MTU_DISCOVER = 8, 10, 2, 23


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


# -- sockets of all kinds ----------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_unconnected_sockets_talk_to_several_peers(udp: Lan, v6: bool, encrypted: bool) -> None:
    if encrypted:
        udp.policy(ENCRYPTED)
    servers = [Echo(udp.b, v6=v6) for _ in range(3)]
    client = bound(udp.a, v6=v6)
    for turn in range(3):
        for server in servers:
            data = b"%d to %d" % (turn, server.port)
            client.sendto(data, (udp.b.address(v6), server.port))
            back, peer = client.recvfrom(2048)
            assert back == data
            assert peer[:2] == (udp.b.address(v6), server.port)


@pytest.mark.parametrize("v6", [False, True], ids=["called-by-v4", "called-by-v6"])
def test_a_dual_stack_server_answers_both_families(udp: Lan, v6: bool) -> None:
    server = Echo(udp.b, v6=True, dual=True)
    client = connected(udp.a, udp.b.address(v6), server.port)
    assert ask(client, b"hello") == b"hello"
    assert udp.b.event(server.port, phase=Phase.VERDICT)["ip_version"] == (6 if v6 else 4)


def test_a_dual_stack_client_calls_ipv4(udp: Lan) -> None:
    server = Echo(udp.b)
    client = bound(udp.a, v6=True, dual=True)
    client.sendto(b"mapped", (f"::ffff:{udp.b.address()}", server.port))
    assert client.recv(100) == b"mapped"
    assert udp.a.event(server.port, phase=Phase.VERDICT)["uid"] == udp.a.own


def test_members_of_a_group_of_servers_serve_their_own_flows(udp: Lan) -> None:
    first = bound(udp.b)
    port = port_of(first)
    first.close()
    got: list[bytes] = []
    group = []
    for _ in range(4):
        sock = unbound(udp.b)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("", port))
        group.append(sock)
    clients = [connected(udp.a, udp.b.address(), port) for _ in range(12)]
    for i, client in enumerate(clients):
        client.send(b"%d" % i)
    ready = select.poll()
    for sock in group:
        ready.register(sock, select.POLLIN)

    def all_there() -> bool:
        for fd, _ in ready.poll(0):
            got.append(next(s for s in group if s.fileno() == fd).recv(100))
        return len(got) == len(clients)

    wait_until(all_there, "all datagrams")
    assert sorted(got) == sorted(b"%d" % i for i in range(12))


def test_who_shares_a_port_with_another_workload_is_nobody(udp: Lan) -> None:
    server = Echo(udp.b)
    evil = udp.a.user(app="evil")
    for sock, uid in ((unbound(udp.a), udp.a.own), (unbound(udp.a, uid=evil), evil)):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if uid == udp.a.own:
            sock.bind((udp.a.address(), 0))
            port = port_of(sock)
        else:
            sock.bind(("127.0.0.1", port))
            forged = sock
    # The other program names the first one's address as its own source.
    ancillary = [
        (socket.IPPROTO_IP, IP_PKTINFO, struct.pack("=i4s4s", 0, socket.inet_aton(udp.a.address()), bytes(4)))
    ]
    forged.sendmsg([b"as web"], ancillary, 0, (udp.b.address(), server.port))
    udp.a.denial(server.port, DropReason.NO_LOCAL_IDENTITY)
    assert server.got == []


def test_a_flow_does_not_outlive_its_socket(udp: Lan) -> None:
    server = Echo(udp.b)
    client = connected(udp.a, udp.b.address(), server.port)
    assert ask(client, b"by web") == b"by web"
    port = port_of(client)
    client.close()
    udp.a.event(server.port, phase=Phase.END)
    evil = udp.a.user(app="evil")
    other = unbound(udp.a, uid=evil)
    other.bind(("", port))
    other.connect((udp.b.address(), server.port))
    other.send(b"by evil")
    record = udp.a.denial(server.port, DropReason.PEER_DENIED)
    assert record["uid"] == evil
    assert server.got == [b"by web"]


@FAMILIES
@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_further_flows_need_no_second_round_trip(udp: Lan, v6: bool, encrypted: bool) -> None:
    udp.policy(ENCRYPTED if encrypted else POLICY)
    server = Echo(udp.b, v6=v6)
    ask(connected(udp.a, udp.b.address(v6), server.port), b"first")
    with tapped(udp, "a", server.port) as tap:
        for size in (0, 1, 1000, 1400, 65_000):
            data = secrets.token_bytes(size)
            client = connected(udp.a, udp.b.address(v6), server.port)
            assert ask(client, data) == data
            assert ask(client, data) == data
        assert tap.kinds().count(Kind.RESUME) == tap.kinds().count(Kind.RESUMED) == 5
        assert Kind.HELLO not in tap.kinds()
    for host in udp.hosts:
        assert host.event(server.port, auth_method=Auth.SESSION)["auth_result"] == AuthResult.PROVEN


def test_a_lost_answer_under_a_session_is_sent_again(udp: Lan) -> None:
    server = Echo(udp.b)
    ask(connected(udp.a, udp.b.address(), server.port), b"first")
    client = connected(udp.a, udp.b.address(), server.port)
    with udp.wire.losing(f"udp sport {server.port}", first=1):
        client.send(b"once")
        assert client.recv(100) == b"once"
        wait_until(lambda: udp.a.status()["half_open"] == 0, "the answer")
    assert ask(client, b"more") == b"more"
    assert server.got == [b"first", b"once", b"more"]


# -- loss --------------------------------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
@pytest.mark.parametrize("direction", ["dport", "sport"])
def test_lost_handshake_datagrams_are_sent_again(udp: Lan, v6: bool, encrypted: bool, direction: str) -> None:
    if encrypted:
        udp.policy(ENCRYPTED)
    server = Echo(udp.b, v6=v6)
    client = connected(udp.a, udp.b.address(v6), server.port)
    with udp.wire.losing(f"udp {direction} {server.port}", first=1):
        started = time.monotonic()
        assert ask(client, b"patience") == b"patience"
        assert 0.2 < time.monotonic() - started < 0.8


def test_a_quarter_of_everything_lost_still_connects(udp: Lan) -> None:
    server = Echo(udp.b)
    reached = 0
    with udp.wire.losing(f"udp dport {server.port} numgen inc mod 4 < 1"):
        for _ in range(8):
            client = connected(udp.a, udp.b.address(), server.port)
            client.settimeout(0.3)
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                client.send(b"x")
                with contextlib.suppress(TimeoutError):
                    client.recv(10)
                    reached += 1
                    break
    assert reached == 8


# -- denied ------------------------------------------------------------------------------------------------------


@FAMILIES
def test_policy_denies_on_either_side(udp: Lan, v6: bool) -> None:
    server = Echo(udp.b, v6=v6)
    other = udp.a.user(app="other")
    connected(udp.a, udp.b.address(v6), server.port, uid=other).send(b"x")
    denied = udp.b.denial(server.port, DropReason.DEFAULT_DENY)
    assert denied["transport"] == 17
    told = udp.a.denial(server.port, DropReason.PEER_DENIED)
    assert told["peer_reason"] == DropReason.DEFAULT_DENY
    assert server.got == []


@FAMILIES
def test_reject_makes_a_program_fail_at_once(udp: Lan, v6: bool) -> None:
    udp.a.stop()
    udp.a.restart(reject=True)
    try:
        server = Echo(udp.b, v6=v6)
        client = connected(udp.a, udp.b.address(v6), server.port, uid=udp.a.user(app="other"))
        client.send(b"x")
        with pytest.raises(ConnectionRefusedError):
            client.recv(10)
    finally:
        udp.a.stop()
        udp.a.restart()


def test_no_enforcer_on_the_other_side_is_denied_and_leaks_nothing(udp: Lan) -> None:
    server = udp.wire.space.new_socket(kind=socket.SOCK_DGRAM)
    server.bind((udp.wire.address(), 0))
    client = connected(udp.a, udp.wire.address(), port_of(server))
    client.send(b"for whom?")
    data, peer = server.recvfrom(2048)
    assert b"for whom" not in data
    server.sendto(b"garbage", peer)
    udp.a.denial(port_of(server), DropReason.NO_IDENTITY)
    plain = udp.wire.space.new_socket(kind=socket.SOCK_DGRAM)
    plain.bind((udp.wire.address(), 0))
    target = Echo(udp.b)
    for _ in range(3):
        plain.sendto(b"bare", (udp.b.address(), target.port))
    udp.b.denial(target.port, DropReason.NO_IDENTITY)
    wait_until(lambda: udp.b.count(DropReason.DENIED_BEFORE) >= 2, "the others to be dropped")
    assert len(udp.b.records(target.port)) == 1, "one event"
    assert target.got == []


@FAMILIES
def test_networks_outside_are_judged_by_rules_and_get_no_identity(udp: Lan, v6: bool) -> None:
    outside = udp.wire.space.new_socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_DGRAM)
    outside.bind((OUTSIDE[v6], 0))
    with tapped(udp, "a", port_of(outside)) as tap:
        client = connected(udp.a, OUTSIDE[v6], port_of(outside))
        client.send(b"bare question")
        data, peer = outside.recvfrom(2048)
        assert data == b"bare question"
        outside.sendto(b"bare answer", peer)
        assert client.recv(100) == b"bare answer"
        assert tap.kinds() == [None, None]
    server = Echo(udp.b, v6=v6)
    outside.sendto(b"hello", (udp.b.address(v6), server.port))
    assert outside.recv(100) == b"hello"
    other = connected(udp.a, OUTSIDE[v6], port_of(outside), uid=udp.a.user(app="other"))
    other.send(b"x")
    udp.a.denial(port_of(outside), DropReason.DEFAULT_DENY)


@FAMILIES
@pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
def test_a_policy_change_cuts_live_flows(udp: Lan, v6: bool, encrypted: bool) -> None:
    before = ENCRYPTED if encrypted else POLICY
    udp.policy(before)
    server = Echo(udp.b, v6=v6)
    client = connected(udp.a, udp.b.address(v6), server.port)
    assert ask(client, b"before") == b"before"
    assert udp.policy(before + "  - deny any to call app=db\n") == 2
    client.settimeout(SHORT_S)
    for _ in range(3):
        client.send(b"after")
    with pytest.raises(TimeoutError):
        client.recv(100)
    assert server.got == [b"before"]
    for host in udp.hosts:
        assert host.event(server.port, phase=Phase.END)["drop_reason"] == DropReason.POLICY_CHANGED
    udp.policy(before)
    client.settimeout(DEADLINE_S)
    assert ask(client, b"again") == b"again"


def test_asking_for_encryption_cuts_plain_flows(udp: Lan) -> None:
    server = Echo(udp.b)
    client = connected(udp.a, udp.b.address(), server.port)
    assert ask(client, b"plain") == b"plain"
    udp.policy(ENCRYPTED)
    with tapped(udp, "a", server.port) as tap:
        assert ask(client, b"MARKED SECRET") == b"MARKED SECRET"
        tap.all()
        assert not any(b"MARKED" in frame for frame in tap.raw)
