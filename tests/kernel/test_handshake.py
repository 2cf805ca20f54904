"""Connections through two real packet workers: real sockets, real rules, a wire that loses what it is told to."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Callable

import pytest
from scapy.layers.inet import IP, TCP

from sectool.events import Action, Auth, AuthResult, ConnState, Decider, DropReason, Phase, Point
from tests.kernel.conftest import wait_until
from tests.kernel.hosts import (
    POLICY,
    SHORT_S,
    Host,
    Lan,
    accept,
    echo,
    finish,
    nothing_arrives,
    port_of,
    read_exactly,
)
from tests.kernel.wire import OUTSIDE, Tap, body, flags, our_options

pytestmark = pytest.mark.kernel

FAMILIES = pytest.mark.parametrize("v6", [False, True], ids=["v4", "v6"])
SYN_ONLY = "tcp flags & (syn | ack) == syn"
SYN_ACK_ONLY = "tcp flags & (syn | ack) == (syn | ack)"
NO_SYN = "tcp flags & (syn | rst) == 0"

DENY_DB = POLICY + "  - deny any to call app=db\n"
KEEP = POLICY.replace("allow app=web to call app=db", "allow env=kept to call app=db")


# -- making a connection ----------------------------------------------------------------------------------------


@FAMILIES
def test_a_connection_carries_data_both_ways_and_is_recorded_on_both_ends(lan: Lan, v6: bool) -> None:
    before = [host.invalid() for host in lan.hosts]
    client, server = lan.establish(v6=v6)
    payload = bytes(range(256)) * 4000
    done = threading.Thread(target=client.sendall, args=(payload,))
    done.start()
    assert read_exactly(server, len(payload)) == payload
    done.join()
    port, own = port_of(server), port_of(client)
    verdicts = [host.event(port, phase=Phase.VERDICT) for host in lan.hosts]
    for record, point in zip(verdicts, (Point.INITIATOR, Point.RESPONDER), strict=True):
        assert record["action"] == Action.ALLOW
        assert record["point"] == point
        assert record["auth_method"] == Auth.NOISE_IX
        assert record["auth_result"] == AuthResult.PROVEN
        assert record["source_port"] == own
        assert record["ip_version"] == (6 if v6 else 4)
        assert record["source_identity"] == lan.a.identity().peer.id
        assert record["destination_identity"] == lan.b.identity().peer.id
        assert record["rule"] != 0
        assert record["policy_revision"] == (lan.a, lan.b)[point - 1].revision
    assert verdicts[0]["uid"] == lan.a.own
    assert verdicts[1]["uid"] == lan.b.own
    assert bytes(verdicts[0]["community"]) == bytes(verdicts[1]["community"])
    client.close()
    server.close()
    for host, verdict in zip(lan.hosts, verdicts, strict=True):
        end = host.event(port, phase=Phase.END)
        assert bytes(end["event_id"]) == bytes(verdict["event_id"])
        assert end["conn_state"] == ConnState.SF
        assert end["source_bytes"] > len(payload)
        assert end["end"] > end["start"]
    assert [host.invalid() for host in lan.hosts] == before, "connection tracking follows every segment"
    for host in lan.hosts:
        assert host.space.run("sysctl", "-n", "net.netfilter.nf_conntrack_tcp_be_liberal").strip() == "0"


@FAMILIES
def test_identity_travels_in_syn_and_synack_only(lan: Lan, v6: bool) -> None:
    listener = lan.b.listen(v6=v6)
    tap = lan.wire.tap("a", port_of(listener))
    client = lan.a.connect(lan.b.address(v6), port_of(listener))
    server = accept(listener)
    echo(client, server, b"first")
    echo(client, server, b"after")
    tap.next("the last answer", lambda p: body(p) == b"after" and p[TCP].sport == tap.port)
    syn, synack, *rest = tap.all()
    ours, theirs = (host.identity() for host in lan.hosts)
    assert flags(syn) == "S"
    assert ours.blob in body(syn)
    assert flags(synack) == "SA"
    assert len(body(synack)) > 500
    for handshake in (syn, synack):
        assert our_options(handshake) == [b"\x5e\xc7"]
        assert dict(handshake[TCP].options)["MSS"] == (1440 if v6 else 1460) - 28
    everything = b"".join(body(p) for p in tap.packets)
    assert theirs.blob[:64] not in everything, "the responder's credential is encrypted"
    assert b"".join(body(p) for p in rest) == b"first" * 2 + b"after" * 2
    proofs = [p for p in rest if our_options(p)]
    assert all(p[TCP].dport == tap.port for p in proofs), "only the initiator proves"
    assert len({our_options(p)[0] for p in proofs}) == 1, "the same proof on every segment"
    assert [p for p in rest if body(p) == b"after" and our_options(p)] == [], (
        "released segments are left alone"
    )


def _lost_syn(port: int) -> str:
    return f"tcp dport {port} {SYN_ONLY}"


def _lost_synack(port: int) -> str:
    return f"tcp sport {port} {SYN_ACK_ONLY}"


def _lost_from_client(port: int) -> str:
    return f"tcp dport {port} {NO_SYN}"


def _lost_from_server(port: int) -> str:
    return f"tcp sport {port} {NO_SYN}"


@pytest.mark.parametrize(
    ("match", "first"),
    [
        (_lost_syn, 1),
        (_lost_synack, 1),
        (_lost_from_client, 1),  # the proving ACK
        (_lost_from_client, 2),  # and the first data
        (_lost_from_server, 1),
    ],
    ids=["syn", "syn-ack", "ack", "ack-and-first-data", "first-answer"],
)
def test_lost_segments_are_made_up_for(lan: Lan, match: Callable[[int], str], first: int) -> None:
    listener = lan.b.listen()
    port = port_of(listener)
    invalid = [host.invalid() for host in lan.hosts]
    with lan.wire.losing(match(port), first=first):
        client = lan.a.connect(lan.b.address(), port)
        client.sendall(b"question")
        server = accept(listener)
        assert read_exactly(server, 8) == b"question"
        server.sendall(b"answer")
        assert read_exactly(client, 6) == b"answer"
    for host in lan.hosts:
        host.event(port, action=Action.ALLOW)
        assert len(host.told(port)) == 1, "retransmissions are not connections"
    assert [host.invalid() for host in lan.hosts] == invalid


def test_with_the_ack_lost_a_silent_client_is_still_let_in(lan: Lan) -> None:
    listener = lan.b.listen()
    with lan.wire.losing(_lost_from_client(port_of(listener)), first=1):
        client = lan.a.connect(lan.b.address(), port_of(listener))
        server = accept(listener)  # after the SYN-ACK came again, and with it the ACK
        server.sendall(b"banner")
        assert read_exactly(client, 6) == b"banner"


def test_responder_that_never_speaks(lan: Lan) -> None:
    listener = lan.b.listen()
    client = lan.a.connect(lan.b.address(), port_of(listener))
    server = accept(listener)
    packets = 0
    for _ in range(20):
        client.sendall(b"y" * 10_000)
        assert read_exactly(server, 10_000) == b"y" * 10_000
        packets = packets or lan.a.status()["packets"]
    assert lan.a.status()["packets"] - packets < 10, "its first bare ACK releases the connection"


def test_initiator_that_never_speaks(lan: Lan) -> None:
    listener = lan.b.listen()
    client = lan.a.connect(lan.b.address(), port_of(listener))
    server = accept(listener)
    server.sendall(b"z" * 500_000)
    assert read_exactly(client, 500_000) == b"z" * 500_000


def test_half_close_leaves_the_other_direction_open(lan: Lan) -> None:
    client, server = lan.establish()
    client.shutdown(socket.SHUT_WR)
    assert server.recv(1) == b""
    server.sendall(b"still here" * 1000)
    assert read_exactly(client, 10_000) == b"still here" * 1000
    server.close()
    assert client.recv(1) == b""


def test_server_closes_before_the_client_said_anything(lan: Lan) -> None:
    listener = lan.b.listen()
    client = lan.a.connect(lan.b.address(), port_of(listener))
    accept(listener).close()
    assert client.recv(1) == b""
    client.close()
    for host in lan.hosts:
        host.event(port_of(listener), phase=Phase.END)


def test_many_connections_at_once(lan: Lan) -> None:
    listener = lan.b.listen()
    port = port_of(listener)
    dialled = [lan.a.dial(lan.b.address(), port) for _ in range(200)]
    accepted = [accept(listener) for _ in dialled]
    clients = {port_of(finish(sock)): sock for sock in dialled}
    servers = {sock.getpeername()[1]: sock for sock in accepted}
    assert clients.keys() == servers.keys()
    for number, sock in clients.items():
        echo(sock, servers[number], number.to_bytes(2, "big"))
    for host in lan.hosts:
        wait_until(lambda h=host: len(h.records(port)) == 200, "200 records")  # type: ignore[misc]
        assert {int(r["action"]) for r in host.records(port)} == {Action.ALLOW}


def test_data_right_behind_the_proof_does_not_confuse_the_account(lan: Lan) -> None:
    """ACK and data arrive together: the kernel may make two sockets and destroy one. The connection lives on."""
    listener = lan.b.listen()
    port = port_of(listener)
    clients = []
    for number in range(60):
        clients.append(lan.a.connect(lan.b.address(), port))
        clients[-1].sendall(bytes([number]))
    servers = [accept(listener) for _ in clients]
    assert sorted(read_exactly(server, 1)[0] for server in servers) == list(range(60))
    assert lan.b.status()["live"] >= 60
    assert [told for told in lan.b.told(port) if "END" in told] == []
    lan.b.policy(DENY_DB)
    for server in servers:
        _is_cut(server)


def test_a_big_transfer_is_intact_and_never_visits_the_queue(lan: Lan) -> None:
    client, server = lan.establish()
    blocks, block = 100, hashlib.shake_256(b"block").digest(1 << 20)
    before = [host.status()["queue"]["seen"] for host in lan.hosts]

    def send() -> None:
        for _ in range(blocks):
            client.sendall(block)
        client.shutdown(socket.SHUT_WR)

    sender = threading.Thread(target=send)
    sender.start()
    digest, size = hashlib.sha256(), 0
    while part := server.recv(1 << 20):
        digest.update(part)
        size += len(part)
    sender.join()
    assert size == blocks * len(block)
    assert digest.digest() == hashlib.sha256(block * blocks).digest()
    for host, seen in zip(lan.hosts, before, strict=True):
        assert host.status()["queue"]["seen"] - seen < 10
        assert host.status()["queue"]["dropped"] == 0


@pytest.mark.parametrize("client_v6", [False, True], ids=["v4-socket", "mapped-socket"])
def test_dual_stack_listener(lan: Lan, client_v6: bool) -> None:
    listener = lan.b.listen(v6=True, dual=True)
    address = f"::ffff:{lan.b.address()}" if client_v6 else lan.b.address()
    client = lan.a.connect(address, port_of(listener))
    server = accept(listener)
    assert server.getpeername()[0] == f"::ffff:{lan.a.address()}"
    echo(client, server)
    for host in lan.hosts:
        assert host.event(port_of(listener), action=Action.ALLOW)["ip_version"] == 4
    client.close()
    server.close()
    for host in lan.hosts:
        host.event(port_of(listener), phase=Phase.END)


def test_fast_open_data_arrives_once(lan: Lan) -> None:
    """A program that sends data with its SYN: the data waits for the proof, and is not lost or doubled."""
    listener = lan.b.listen()
    with lan.b.space.enter():
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
    client = lan.a.new_socket()
    client.setsockopt(socket.IPPROTO_TCP, 34, 1)  # TCP_FASTOPEN_NO_COOKIE
    client.sendto(b"early", socket.MSG_FASTOPEN, (lan.b.address(), port_of(listener)))
    server = accept(listener)
    client.sendall(b" and late")
    assert read_exactly(server, 14) == b"early and late"
    server.sendall(b"ok")
    assert read_exactly(client, 2) == b"ok"


# -- refusals -----------------------------------------------------------------------------------------------------


def test_default_deny_is_recorded_on_both_ends(lan: Lan) -> None:
    listener = lan.b.listen()
    port, stranger = port_of(listener), lan.a.user(app="other")
    with pytest.raises(TimeoutError):
        lan.a.connect(lan.b.address(), port, uid=stranger, timeout_s=SHORT_S)
    there = lan.b.denial(port, DropReason.DEFAULT_DENY)
    assert there["action"] == Action.DENY
    assert there["decider"] == Decider.LOCAL
    assert there["source_identity"] == lan.a.identity(stranger).peer.id
    here = lan.a.denial(port, DropReason.PEER_DENIED)
    assert here["decider"] == Decider.PEER
    assert here["peer_reason"] == DropReason.DEFAULT_DENY
    nothing_arrives(listener)


def test_guardrail_names_its_rule_on_both_ends(lan: Lan) -> None:
    dev, prod = lan.a.user(app="web", env="dev"), lan.b.user(app="db", env="prod")
    listener = lan.b.listen(uid=prod)
    port = port_of(listener)
    with pytest.raises(TimeoutError):
        lan.a.connect(lan.b.address(), port, uid=dev, timeout_s=SHORT_S)
    there = lan.b.denial(port, DropReason.GUARDRAIL_DENY)
    here = lan.a.denial(port, DropReason.PEER_DENIED)
    assert there["rule"] != 0
    assert here["peer_rule"] == there["rule"]
    assert here["peer_reason"] == DropReason.GUARDRAIL_DENY
    nothing_arrives(listener)


def test_the_initiators_policy_counts_too(lan: Lan) -> None:
    lan.a.policy(DENY_DB)
    listener = lan.b.listen()
    port = port_of(listener)
    with pytest.raises(TimeoutError):
        lan.a.connect(lan.b.address(), port, timeout_s=SHORT_S)
    here = lan.a.denial(port, DropReason.GUARDRAIL_DENY)
    there = lan.b.denial(port, DropReason.PEER_DENIED)
    assert here["rule"] != 0
    assert there["peer_rule"] == here["rule"]
    assert there["auth_result"] == AuthResult.PROVEN
    nothing_arrives(listener)


def test_audit_lets_in_and_marks(lan: Lan) -> None:
    lan.establish(uid=lan.a.user(app="batch"))
    port = port_of(lan.b.space.opened[0])
    for host in lan.hosts:
        assert host.event(port, action=Action.AUDIT)["rule"] != 0


@FAMILIES
def test_nobody_listens(lan: Lan, v6: bool) -> None:
    listener = lan.b.listen(v6=v6)
    port = port_of(listener)
    listener.close()
    with pytest.raises(TimeoutError):
        lan.a.connect(lan.b.address(v6), port, timeout_s=SHORT_S)
    lan.b.denial(port, DropReason.NO_LISTENER)


@pytest.mark.parametrize("side", ["client", "server"])
def test_a_workload_that_cannot_be_identified_gets_nothing(lan: Lan, side: str) -> None:
    host = lan.a if side == "client" else lan.b
    nobody = host.user("no such workload")
    listener = lan.b.listen(uid=nobody if side == "server" else 0)
    port = port_of(listener)
    with pytest.raises(TimeoutError):
        lan.a.connect(lan.b.address(), port, uid=nobody if side == "client" else 0, timeout_s=SHORT_S)
    host.denial(port, DropReason.NO_LOCAL_IDENTITY)
    nothing_arrives(listener)


# -- peers without an enforcer ----------------------------------------------------------------------------------


@FAMILIES
def test_a_peer_inside_the_enforced_networks_needs_an_identity(lan: Lan, v6: bool) -> None:
    listener = lan.b.listen(v6=v6)
    plain = lan.wire.new_socket(v6, outside=False)
    plain.settimeout(SHORT_S)
    with pytest.raises(TimeoutError):
        plain.connect((lan.b.address(v6), port_of(listener)))
    record = lan.b.denial(port_of(listener), DropReason.NO_IDENTITY)
    assert record["auth_method"] == Auth.NONE
    nothing_arrives(listener)


@FAMILIES
def test_no_connection_to_a_peer_that_shows_no_identity(lan: Lan, v6: bool) -> None:
    plain = lan.wire.new_socket(v6, outside=False)
    plain.listen()
    with pytest.raises(TimeoutError):
        lan.a.connect(lan.wire.address(v6), port_of(plain), timeout_s=SHORT_S)
    lan.a.denial(port_of(plain), DropReason.NO_IDENTITY)
    nothing_arrives(plain)


@FAMILIES
def test_from_outside_by_network_rule(lan: Lan, v6: bool) -> None:
    listener = lan.b.listen(v6=v6)
    tap = lan.wire.tap("b", port_of(listener))
    plain = lan.wire.new_socket(v6)
    plain.connect((lan.b.address(v6), port_of(listener)))
    echo(plain, accept(listener))
    record = lan.b.event(port_of(listener), action=Action.ALLOW)
    assert record["auth_method"] == Auth.NONE
    assert record["source_identity"] == 0
    _no_trace_of_us(tap)


@FAMILIES
def test_to_outside_by_network_rule(lan: Lan, v6: bool) -> None:
    plain = lan.wire.new_socket(v6)
    plain.listen()
    tap = lan.wire.tap("a", port_of(plain))
    client = lan.a.connect(OUTSIDE[v6], port_of(plain))
    echo(client, accept(plain))
    lan.a.event(port_of(plain), action=Action.ALLOW, auth_method=Auth.NONE)
    _no_trace_of_us(tap)
    client.close()
    lan.a.event(port_of(plain), phase=Phase.END)


def _no_trace_of_us(tap: Tap) -> None:
    for packet in tap.all():
        assert our_options(packet) == []
        assert not (body(packet) and "S" in flags(packet)), "a SYN with a payload"
    assert dict(tap.packets[0][TCP].options)["MSS"] == (1460 if IP in tap.packets[0] else 1440)


def test_outside_without_a_rule_is_denied(lan: Lan) -> None:
    other_here, other_there = lan.a.user(app="other"), lan.b.user(app="other")
    plain = lan.wire.new_socket()
    plain.listen()
    with pytest.raises(TimeoutError):
        lan.a.connect(OUTSIDE[False], port_of(plain), uid=other_here, timeout_s=SHORT_S)
    lan.a.denial(port_of(plain), DropReason.DEFAULT_DENY)
    nothing_arrives(plain)
    listener = lan.b.listen(uid=other_there)
    caller = lan.wire.new_socket()
    caller.settimeout(SHORT_S)
    with pytest.raises(TimeoutError):
        caller.connect((lan.b.address(), port_of(listener)))
    lan.b.denial(port_of(listener), DropReason.DEFAULT_DENY)
    nothing_arrives(listener)


# -- within a host -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "10.77.0.1", "fd77::1"])
def test_loopback_is_judged_by_both_workloads(lan: Lan, address: str) -> None:
    cache, other = lan.a.user(app="cache"), lan.a.user(app="other")
    listener = lan.a.listen(address, v6=":" in address, uid=cache)
    port = port_of(listener)
    client = lan.a.connect(address, port)
    server = accept(listener)
    echo(client, server)
    record = lan.a.event(port, action=Action.ALLOW)
    assert record["point"] == Point.LOCAL
    assert record["auth_method"] == Auth.KERNEL
    assert record["source_identity"] == lan.a.identity().peer.id
    assert record["destination_identity"] == lan.a.identity(cache).peer.id
    client.close()
    server.close()
    lan.a.event(port, phase=Phase.END)
    with pytest.raises(TimeoutError):
        lan.a.connect(address, port, uid=other, timeout_s=SHORT_S)
    lan.a.denial(port, DropReason.DEFAULT_DENY)
    nothing_arrives(listener)


def test_loopback_without_a_listener_is_refused_by_the_kernel(lan: Lan) -> None:
    listener = lan.a.listen("127.0.0.1")
    port = port_of(listener)
    listener.close()
    with pytest.raises(ConnectionRefusedError):
        lan.a.connect("127.0.0.1", port)


def test_loopback_is_cut_by_policy_too(lan: Lan) -> None:
    listener = lan.a.listen("127.0.0.1", uid=lan.a.user(app="cache"))
    client = lan.a.connect("127.0.0.1", port_of(listener))
    server = accept(listener)
    echo(client, server)
    assert (
        lan.a.policy(POLICY.replace("allow app=web to call app=cache", "deny app=web to call app=cache")) == 1
    )
    for sock in (client, server):
        _is_cut(sock)
    lan.a.event(port_of(listener), phase=Phase.END, drop_reason=DropReason.POLICY_CHANGED)


# -- policy switches ----------------------------------------------------------------------------------------------


def _is_cut(sock: socket.socket) -> None:
    with pytest.raises((ConnectionResetError, ConnectionAbortedError, BrokenPipeError)):
        while True:
            assert sock.recv(1 << 16), "an orderly end is no cut"


@FAMILIES
@pytest.mark.parametrize("at", ["a", "b", "both"])
def test_a_policy_switch_cuts_idle_flows_within_a_second(lan: Lan, v6: bool, at: str) -> None:
    client, server = lan.establish(v6=v6)
    kept_client, kept_server = lan.establish(v6=v6, uid=lan.a.user(app="web", env="kept"))
    hosts = [host for host in lan.hosts if at in (host.name, "both")]
    started = time.monotonic()
    for host in hosts:
        assert host.policy(KEEP) >= 1
    for sock in (client, server):
        _is_cut(sock)
    assert time.monotonic() - started < 1
    for host in hosts:
        end = host.event(port_of(server), phase=Phase.END)
        assert end["action"] == Action.DENY
        assert end["drop_reason"] == DropReason.POLICY_CHANGED
        assert end["policy_revision"] == host.revision
        assert end["source_bytes"] > 0
        verdict = host.event(port_of(server), phase=Phase.VERDICT)
        assert bytes(verdict["event_id"]) == bytes(end["event_id"])
        assert [told for told in host.told(port_of(kept_server)) if "END" in told] == []
    echo(kept_client, kept_server, b"still here")


def test_a_policy_switch_cuts_a_busy_flow_within_a_second(lan: Lan) -> None:
    client, server = lan.establish()
    ended: list[BaseException] = []
    moved = threading.Event()

    def pump(sock: socket.socket, step: Callable[[socket.socket], object]) -> None:
        try:
            while step(sock):
                moved.set()
        except OSError as error:
            ended.append(error)

    block = bytes(1 << 16)
    threads = [
        threading.Thread(target=pump, args=(client, lambda s: s.sendall(block) is None)),
        threading.Thread(target=pump, args=(server, lambda s: s.recv(1 << 16))),
    ]
    for thread in threads:
        thread.start()
    assert moved.wait(5)
    started = time.monotonic()
    assert lan.policy(DENY_DB) >= 2
    for thread in threads:
        thread.join(5)
    assert time.monotonic() - started < 1
    assert {type(error) for error in ended} <= {ConnectionResetError, ConnectionAbortedError, BrokenPipeError}
    assert len(ended) == 2


def test_denied_flow_is_allowed_again_after_a_switch(lan: Lan) -> None:
    lan.policy(DENY_DB)
    listener = lan.b.listen()
    dialled = lan.a.dial(lan.b.address(), port_of(listener))
    lan.b.denial(port_of(listener), DropReason.GUARDRAIL_DENY)
    lan.policy(POLICY)
    client = finish(dialled)  # its next SYN is judged anew
    echo(client, accept(listener))
    for host in lan.hosts:
        record = host.event(port_of(listener), action=Action.ALLOW)
        assert record["decider"] == Decider.LOCAL
        assert record["peer_reason"] == DropReason.NONE
        assert record["drop_reason"] == DropReason.NONE
        assert [told for told in host.told(port_of(listener)) if "REPLAYED" in told] == []


# -- telling programs at once -------------------------------------------------------------------------------------


class TestReject:
    """`reject: true`: a denied program gets ECONNREFUSED instead of waiting."""

    @pytest.fixture(autouse=True)
    def rejecting(self, lan: Lan) -> None:
        """Both workers with the setting, until the module's end."""
        for host in lan.hosts:
            if not host.settings.get("reject"):
                host.stop()
                host.restart(reject=True)

    def refused(self, host: Host, address: str, port: int, uid: int = 0) -> None:
        started = time.monotonic()
        with pytest.raises(ConnectionRefusedError):
            host.connect(address, port, uid=uid)
        assert time.monotonic() - started < 0.9, "a retransmission had to help"

    @FAMILIES
    def test_by_the_peers_policy(self, lan: Lan, v6: bool) -> None:
        listener = lan.b.listen(v6=v6)
        self.refused(lan.a, lan.b.address(v6), port_of(listener), lan.a.user(app="other"))
        lan.a.denial(port_of(listener), DropReason.PEER_DENIED)
        nothing_arrives(listener)

    @FAMILIES
    def test_by_our_own_policy(self, lan: Lan, v6: bool) -> None:
        lan.a.policy(DENY_DB)
        listener = lan.b.listen(v6=v6)
        self.refused(lan.a, lan.b.address(v6), port_of(listener))
        lan.a.denial(port_of(listener), DropReason.GUARDRAIL_DENY)
        lan.b.denial(port_of(listener), DropReason.PEER_DENIED)
        nothing_arrives(listener)

    @FAMILIES
    def test_for_want_of_a_local_identity(self, lan: Lan, v6: bool) -> None:
        listener = lan.b.listen(v6=v6)
        self.refused(lan.a, lan.b.address(v6), port_of(listener), lan.a.user("no such workload"))

    @FAMILIES
    def test_to_outside(self, lan: Lan, v6: bool) -> None:
        plain = lan.wire.new_socket(v6)
        plain.listen()
        self.refused(lan.a, OUTSIDE[v6], port_of(plain), lan.a.user(app="other"))
        nothing_arrives(plain)

    @FAMILIES
    def test_a_peer_without_identity(self, lan: Lan, v6: bool) -> None:
        plain = lan.wire.new_socket(v6, outside=False)
        plain.listen()
        self.refused(lan.a, lan.wire.address(v6), port_of(plain))
        caller = lan.wire.new_socket(v6, outside=False)
        listener = lan.b.listen(v6=v6)
        with pytest.raises(ConnectionRefusedError):
            caller.connect((lan.b.address(v6), port_of(listener)))
        nothing_arrives(listener)

    @pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
    def test_within_the_host(self, lan: Lan, address: str) -> None:
        listener = lan.a.listen(address, v6=":" in address, uid=lan.a.user(app="cache"))
        self.refused(lan.a, address, port_of(listener), lan.a.user(app="other"))
        nothing_arrives(listener)

    def test_what_is_allowed_still_is(self, lan: Lan) -> None:
        lan.establish()
