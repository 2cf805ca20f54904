"""Datagram flows over the death of workers, with their journal and without, and of the programs they belong to."""

from __future__ import annotations

import contextlib
import socket

import pytest

from nfq.udpcontrol import Kind, read
from sectool.events import DropReason, Phase
from tests.kernel.conftest import wait_until
from tests.kernel.datagrams import Echo, ask, body, connected, tapped, unbound
from tests.kernel.datagrams import udp as udp
from tests.kernel.hosts import POLICY, Host, Lan, port_of

pytestmark = pytest.mark.kernel

FAMILIES = pytest.mark.parametrize("v6", [False, True], ids=["v4", "v6"])
MODES = pytest.mark.parametrize("encrypted", [False, True], ids=["plain", "encrypted"])
SIDES = pytest.mark.parametrize("side", ["initiator", "responder", "both"])
ENCRYPTED = POLICY.replace("allow app=web to call app=db", "allow app=web to call app=db encrypted")


def die(host: Host, *, forgetting: bool = False) -> None:
    """The worker is killed; `forgetting`: and its journal is lost, and what connection tracking knows."""
    text = host._text
    host.kill()
    if forgetting:
        for left in host.run.glob("flows*"):
            left.unlink()
        for family in ("ipv4", "ipv6"):
            with contextlib.suppress(AssertionError):  # there may be none
                host.space.run("conntrack", "-D", "-f", family, "-p", "udp")
    host.restart(text)


def chosen(lan: Lan, side: str) -> list[Host]:
    """Hosts by role."""
    return {"initiator": [lan.a], "responder": [lan.b], "both": [lan.a, lan.b]}[side]


@FAMILIES
@MODES
@SIDES
def test_flows_outlive_their_worker(udp: Lan, v6: bool, encrypted: bool, side: str) -> None:
    udp.policy(ENCRYPTED if encrypted else POLICY)
    server = Echo(udp.b, v6=v6)
    with tapped(udp, "a", server.port) as tap:
        client = connected(udp.a, udp.b.address(v6), server.port)
        for i in range(3):
            assert ask(client, b"before %d" % i) == b"before %d" % i
        tap.all()
        for host in chosen(udp, side):
            die(host)
        for i in range(3):
            assert ask(client, b"after %d" % i) == b"after %d" % i
        assert len(tap.bodies(Kind.HELLO)) == 1, "no second handshake"
        if encrypted:
            # Never the same counter twice in one direction: it is the nonce.
            for port in (server.port, port_of(client)):
                sent = [body(p)[:8] for p in tap.packets if p.dport == port and read(body(p)) is None]
                assert len(set(sent)) == len(sent)
    client.close()
    assert udp.a.event(server.port, phase=Phase.END)["source_packets"] == 6


@MODES
@SIDES
def test_hosts_that_have_forgotten_a_flow_make_it_anew(udp: Lan, encrypted: bool, side: str) -> None:
    udp.policy(ENCRYPTED if encrypted else POLICY)
    server = Echo(udp.b)
    with tapped(udp, "a", server.port) as tap:
        client = connected(udp.a, udp.b.address(), server.port)
        data = b"long enough to be answered if it is not known"
        assert ask(client, data) == data
        for host in chosen(udp, side):
            die(host, forgetting=True)
        client.settimeout(0.5)

        def answered() -> bool:
            try:
                return ask(client, data) == data
            except TimeoutError:
                return False

        wait_until(answered, "the flow to go on", 15)
        assert len(tap.bodies(Kind.HELLO)) >= 2
        client.settimeout(5)
        for i in range(3):
            client.send(b"%d" % i)
            while (answer := client.recv(100)) == data:  # to a question that was asked again too soon
                pass
            assert answer == b"%d" % i


@MODES
def test_a_server_that_is_started_again_is_found_at_once(udp: Lan, encrypted: bool) -> None:
    udp.policy(ENCRYPTED if encrypted else POLICY)
    server = Echo(udp.b)
    port = server.port
    client = connected(udp.a, udp.b.address(), port)
    data = b"long enough to be answered if it is not known"
    assert ask(client, data) == data
    server.close()
    udp.b.event(port, phase=Phase.END)
    again = bound_to(udp.b, port)
    client.send(data)  # meets no flow: the other host says so
    wait_until(lambda: udp.b.count(DropReason.DENIED_BEFORE) > 0, "it to be told")
    client.send(data)
    assert again.recv(100) == data


def bound_to(host: Host, port: int) -> socket.socket:
    """A socket on a port that somebody else had."""
    sock = unbound(host)
    sock.bind(("", port))
    return sock


def test_a_socket_that_was_closed_while_nobody_looked_has_no_flow_left(udp: Lan) -> None:
    server = Echo(udp.b)
    client = connected(udp.a, udp.b.address(), server.port)
    assert ask(client, b"by web") == b"by web"
    port = port_of(client)
    udp.a.kill()
    client.close()
    udp.a.restart()
    udp.a.event(server.port, phase=Phase.END)
    other = unbound(udp.a, uid=udp.a.user(app="evil"))
    other.bind(("", port))
    other.sendto(b"by evil", (udp.b.address(), server.port))
    udp.a.denial(server.port, DropReason.PEER_DENIED)
    assert server.got == [b"by web"]


def test_a_handshake_under_way_when_the_worker_dies_is_begun_again(udp: Lan) -> None:
    server = Echo(udp.b)
    with udp.wire.losing(f"udp sport {server.port}"):
        client = connected(udp.a, udp.b.address(), server.port)
        client.send(b"lost with its worker")
        wait_until(lambda: udp.b.status()["half_open"] == 1, "the Hello")
        die(udp.a)
    assert ask(client, b"again") == b"again"
    assert server.got == [b"again"]


@MODES
def test_a_flow_that_is_silent_ends_and_is_made_again_when_it_speaks(udp: Lan, encrypted: bool) -> None:
    udp.policy(ENCRYPTED if encrypted else POLICY)
    names = [f"net.netfilter.nf_conntrack_udp_timeout{rest}" for rest in ("", "_stream")]
    before = [udp.a.space.run("sysctl", "-n", name).strip() for name in names]
    for host in udp.hosts:
        host.space.run("sysctl", "-qw", *(f"{name}=1" for name in names))
    try:
        server = Echo(udp.b)
        client = connected(udp.a, udp.b.address(), server.port)
        assert ask(client, b"one") == b"one"
        for host in udp.hosts:
            # By itself the kernel looks for what has timed out within a minute; a listing throws it out.
            wait_until(
                lambda h=host: f"dport={server.port} " not in h.space.run("conntrack", "-L", "-p", "udp"),  # type: ignore[misc]
                f"{host.name}'s entry to time out",
            )
        first = [host.event(server.port, phase=Phase.END) for host in udp.hosts]
        assert [record["source_packets"] for record in first] == [1, 1]
        assert [host.status()["live"] for host in udp.hosts] == [0, 0]
        assert ask(client, b"two") == b"two"
        verdicts = [r for r in udp.a.records(server.port) if r["phase"] == Phase.VERDICT]
        assert len(verdicts) == 2
    finally:
        for host in udp.hosts:
            host.space.run("sysctl", "-qw", *(f"{n}={value}" for n, value in zip(names, before, strict=True)))
