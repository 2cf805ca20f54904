"""Connections that end as soon as they have begun, encrypted and plain: all that was said arrives, all is recorded."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

import pytest

from sectool.events import Encryption, Phase
from tests.kernel.conftest import wait_until
from tests.kernel.hosts import POLICY, Host, Lan, accept, echo, port_of, read_exactly

pytestmark = pytest.mark.kernel

FAMILIES = pytest.mark.parametrize("v6", [False, True], ids=["v4", "v6"])
KINDS = pytest.mark.parametrize("encrypted", [True, False], ids=["encrypted", "plain"])
ENCRYPTED = POLICY.replace("app=web to call app=db", "app=web to call app=db encrypted")


@pytest.fixture
def begun(lan: Lan, encrypted: bool) -> Iterator[Lan]:
    """Hosts with or without a demand for encryption."""
    text = ENCRYPTED if encrypted else POLICY
    for host in lan.hosts:
        host.policy(text)
    yield lan


@pytest.fixture
def tracked(begun: Lan) -> Iterator[Lan]:
    """These; connection tracking finds nothing odd."""
    invalid = [host.invalid() for host in begun.hosts]
    yield begun
    assert [host.invalid() for host in begun.hosts] == invalid


def abort(sock: socket.socket) -> None:
    """Close with a RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def recorded(lan: Lan, port: int, encrypted: bool) -> None:
    """Both hosts have the connection's beginning and end, once each."""
    wanted = Encryption.ENCRYPTED if encrypted else Encryption.PLAIN
    for host in lan.hosts:
        assert host.event(port, phase=Phase.END)["encryption"] == wanted
        phases = [r["phase"] for r in host.records(port)]
        assert phases == [Phase.VERDICT, Phase.END]


def another(lan: Lan, client: tuple[str, int], listener: socket.socket, v6: bool) -> None:
    """The same ports serve a new connection at once."""
    sock = lan.a.new_socket(socket.AF_INET6 if v6 else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(client)
    sock.connect((lan.b.address(v6), port_of(listener)))
    server = accept(listener)
    echo(sock, server, b"the next one")


@KINDS
@FAMILIES
def test_the_client_says_all_it_has_and_closes(tracked: Lan, encrypted: bool, v6: bool) -> None:
    lan = tracked
    listener = lan.b.listen(v6=v6)
    client = lan.a.connect(lan.b.address(v6), port_of(listener))
    client.sendall(b"all there is")
    client.close()
    server = accept(listener)
    assert read_exactly(server, 12) == b"all there is"
    assert server.recv(1) == b""
    server.close()
    recorded(lan, port_of(listener), encrypted)


@KINDS
@FAMILIES
@pytest.mark.parametrize("first", ["client", "server"])
def test_closed_without_a_word(tracked: Lan, encrypted: bool, v6: bool, first: str) -> None:
    lan = tracked
    listener = lan.b.listen(v6=v6)
    client = lan.a.connect(lan.b.address(v6), port_of(listener))
    if first == "client":
        client.close()  # its FIN is the first thing that proves who it is
        server = accept(listener)
        assert server.recv(1) == b""
        server.close()
    else:
        server = accept(listener)
        server.close()
        assert client.recv(1) == b""
        client.close()
    recorded(lan, port_of(listener), encrypted)


@KINDS
@FAMILIES
def test_the_server_speaks_and_closes_before_it_heard_anything(
    tracked: Lan, encrypted: bool, v6: bool
) -> None:
    lan = tracked
    listener = lan.b.listen(v6=v6)
    client = lan.a.connect(lan.b.address(v6), port_of(listener))
    server = accept(listener)
    server.sendall(b"banner" * 1000)
    server.close()
    assert read_exactly(client, 6000) == b"banner" * 1000
    assert client.recv(1) == b""
    client.close()
    recorded(lan, port_of(listener), encrypted)


@KINDS
@FAMILIES
def test_both_close_at_once(tracked: Lan, encrypted: bool, v6: bool) -> None:
    lan = tracked
    listener = lan.b.listen(v6=v6)
    ends = []
    for _ in range(8):
        client = lan.a.connect(lan.b.address(v6), port_of(listener))
        ends.append((client, accept(listener)))
        echo(*ends[-1])
    for pair in ends:
        for sock in pair:
            sock.close()
    for host in lan.hosts:
        host.event(port_of(listener), phase=Phase.END)
    again = lan.establish(v6=v6)
    echo(*again, b"and life goes on")


@KINDS
def test_a_program_that_is_killed_while_much_is_on_its_way(tracked: Lan, encrypted: bool) -> None:
    """The kernel sends what the program had said, or a RST; nobody hangs, and nothing else is delivered."""
    lan = tracked
    listener = lan.b.listen()
    client = lan.a.connect(lan.b.address(), port_of(listener))
    server = accept(listener)
    client.setblocking(False)
    block = bytes(range(256)) * 4096
    sent = client.send(block)
    client.close()
    got = b""
    while part := server.recv(1 << 20):
        got += part
    assert got == block[:sent]
    server.close()
    recorded(lan, port_of(listener), encrypted)


@KINDS
@FAMILIES
@pytest.mark.parametrize("by", ["client", "server"])
@pytest.mark.parametrize("when", ["at once", "after a line"])
def test_aborted(begun: Lan, encrypted: bool, v6: bool, by: str, when: str) -> None:
    """Their ends are on record when connection tracking has forgotten them (docs/decisions/0003).

    After a server's RST it goes on with the old entry, and finds what the next connection says invalid: so this is the
    last test here, for some of that is counted after its end.
    """
    lan = begun
    listener = lan.b.listen(v6=v6)
    client = lan.a.connect(lan.b.address(v6), port_of(listener))
    own = client.getsockname()[:2]
    if by == "server" or when == "after a line":
        server = accept(listener)
        if when == "after a line":
            echo(client, server, b"a line")
        abort(client if by == "client" else server)
        other = server if by == "client" else client
        with pytest.raises(ConnectionResetError):
            other.recv(1)
        other.close()
    else:
        abort(client)
        listener.settimeout(0.3)
        with contextlib.suppress(TimeoutError):  # whether it came so far depends on who was faster
            accept(listener).close()
        listener.settimeout(10)
    another(lan, own, listener, v6)
    for host in lan.hosts:
        _two_verdicts(host, port_of(listener))


def _two_verdicts(host: Host, port: int) -> None:
    wait_until(
        lambda: [r["phase"] for r in host.records(port)].count(Phase.VERDICT) == 2, "two verdicts on record"
    )
