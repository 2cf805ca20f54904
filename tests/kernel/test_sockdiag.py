"""sock_diag on a real kernel: the right socket for every kind of address pair."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator

import pytest

from nfq import cgroup
from nfq.endings import SocketEndings
from nfq.sockdiag import Destroyed, SockDiag, TcpState, UnavailableError
from tests.kernel.conftest import Pair, wait_until

pytestmark = pytest.mark.kernel

FAMILIES = ("v4", "v6")


def packed(text: str) -> bytes:
    """An address as bytes."""
    return ipaddress.ip_address(text).packed


def inode(sock: socket.socket) -> int:
    """What the kernel calls the socket."""
    return os.fstat(sock.fileno()).st_ino


@pytest.fixture
def diag(pair: Pair) -> Iterator[SockDiag]:
    """Questions to namespace a."""
    with pair.a.enter():
        made = SockDiag()
    yield made
    made.close()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bound", ["wildcard", "bound", "dual"])
def test_the_listener_of_a_syn(pair: Pair, diag: SockDiag, family: str, bound: str) -> None:
    local, remote = (pair.a.v4, pair.b.v4) if family == "v4" else (pair.a.v6, pair.b.v6)
    v6 = family == "v6" or bound == "dual"
    server = pair.a.listen(local if bound == "bound" else "", v6=v6, dual=bound == "dual")
    port = server.getsockname()[1]
    found = diag.lookup(packed(local), port, packed(remote), 4321)
    assert found is not None
    assert (found.inode, found.state, found.uid) == (inode(server), TcpState.LISTEN, 0)
    assert found.cgroup_id == cgroup.Cgroups().id_of(cgroup.of_process() or "/")
    assert diag.lookup(packed(local), port + 1 if port < 65535 else port - 1, packed(remote), 4321) is None


def test_a_listener_of_one_family_is_not_found_for_the_other(pair: Pair, diag: SockDiag) -> None:
    only6, only4 = pair.a.listen(v6=True), pair.a.listen()
    assert diag.lookup(packed(pair.a.v4), only6.getsockname()[1], packed(pair.b.v4), 1) is None
    assert diag.lookup(packed(pair.a.v6), only4.getsockname()[1], packed(pair.b.v6), 1) is None


def test_the_bound_listener_wins_over_the_wildcard(pair: Pair, diag: SockDiag) -> None:
    wildcard = pair.a.new_socket()
    bound = pair.a.new_socket()
    for sock in (wildcard, bound):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    wildcard.bind(("0.0.0.0", 0))
    port = wildcard.getsockname()[1]
    bound.bind((pair.a.v4, port))
    wildcard.listen()
    bound.listen()
    first = diag.lookup(packed(pair.a.v4), port, packed(pair.b.v4), 1)
    assert first is not None
    assert first.inode == inode(bound)
    second = diag.lookup(packed("127.0.0.1"), port, packed("127.0.0.1"), 1)
    assert second is not None
    assert second.inode == inode(wildcard)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_member_of_a_reuseport_group_that_takes_the_connection(
    pair: Pair, diag: SockDiag, family: str
) -> None:
    v6 = family == "v6"
    local, remote = (pair.a.v6, pair.b.v6) if v6 else (pair.a.v4, pair.b.v4)
    port, group = 0, []
    for _ in range(4):
        sock = pair.a.new_socket(socket.AF_INET6 if v6 else socket.AF_INET)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind((local, port))
        port = sock.getsockname()[1]
        sock.listen()
        sock.setblocking(False)
        group.append(sock)
    taken: set[int] = set()
    for _ in range(16):
        client = pair.b.new_socket(socket.AF_INET6 if v6 else socket.AF_INET)
        client.bind((remote, 0))
        predicted = diag.lookup(packed(local), port, packed(remote), client.getsockname()[1])
        client.connect((local, port))
        actual = [sock for sock in group if _accepts(sock)]
        assert predicted is not None
        assert [inode(sock) for sock in actual] == [predicted.inode]
        taken.add(predicted.inode)
    assert len(taken) > 1, "the group shares the work, so the prediction was not trivial"


def _accepts(sock: socket.socket) -> bool:
    try:
        sock.accept()[0].close()
    except BlockingIOError:
        return False
    return True


@pytest.mark.parametrize("family", ["v4", "v6", "mapped"])
def test_a_connected_socket_and_a_connecting_one(pair: Pair, diag: SockDiag, family: str) -> None:
    v6 = family == "v6"
    local, remote = (pair.a.v6, pair.b.v6) if v6 else (pair.a.v4, pair.b.v4)
    server = pair.b.listen(v6=v6)
    port = server.getsockname()[1]
    client = pair.a.new_socket(socket.AF_INET if family == "v4" else socket.AF_INET6)
    client.connect((f"::ffff:{remote}" if family == "mapped" else remote, port))
    own = client.getsockname()[1]
    found = diag.lookup(packed(local), own, packed(remote), port)
    assert found is not None
    assert (found.inode, found.state) == (inode(client), TcpState.ESTABLISHED)
    assert (found.local, found.remote) == (packed(local), packed(remote)), "IPv4 is told as IPv4"
    pair.b.run("ip", "link", "set", "eth0", "down")
    connecting = pair.a.new_socket(socket.AF_INET if family == "v4" else socket.AF_INET6)
    connecting.setblocking(False)
    connecting.connect_ex((f"::ffff:{remote}" if family == "mapped" else remote, port))
    found = diag.lookup(packed(local), connecting.getsockname()[1], packed(remote), port)
    assert found is not None
    assert (found.inode, found.state) == (inode(connecting), TcpState.SYN_SENT)


@pytest.mark.parametrize("family", ["v4", "v6", "mapped"])
def test_destroying_tells_the_program_at_once(pair: Pair, diag: SockDiag, family: str) -> None:
    v6 = family == "v6"
    local, remote = (pair.a.v6, pair.b.v6) if v6 else (pair.a.v4, pair.b.v4)
    server = pair.b.listen(v6=v6)
    port = server.getsockname()[1]
    client = pair.a.new_socket(socket.AF_INET if family == "v4" else socket.AF_INET6)
    client.connect((f"::ffff:{remote}" if family == "mapped" else remote, port))
    own = client.getsockname()[1]
    with pair.a.enter():
        endings = SocketEndings()
    assert diag.destroy(packed(local), own, packed(remote), port) is Destroyed.DONE
    with pytest.raises(ConnectionAbortedError):
        client.send(b"x")
    assert diag.destroy(packed(local), own, packed(remote), port) is Destroyed.NO_SUCH_SOCKET
    client.close()
    wait_until(endings.drain, "the kernel to tell that the socket has ended")
    endings.close()


def test_destroying_never_hits_a_listener(pair: Pair, diag: SockDiag) -> None:
    server = pair.a.listen()
    port = server.getsockname()[1]
    assert diag.destroy(packed(pair.a.v4), port, packed(pair.b.v4), 4321) is Destroyed.NO_SUCH_SOCKET
    pair.b.connect(pair.a.v4, port)


def test_connecting_fails_at_once_when_its_socket_is_destroyed(pair: Pair, diag: SockDiag) -> None:
    pair.a.run("iptables", "-A", "OUTPUT", "-p", "tcp", "--syn", "-j", "DROP")
    client = pair.a.new_socket()
    client.setblocking(False)
    client.connect_ex((pair.b.v4, 7))
    local = client.getsockname()
    assert diag.destroy(packed(local[0]), local[1], packed(pair.b.v4), 7) is Destroyed.DONE
    assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 103  # ECONNABORTED


@pytest.mark.parametrize("family", FAMILIES)
def test_the_dump_has_all_and_only_what_is_asked_for(pair: Pair, diag: SockDiag, family: str) -> None:
    v6 = family == "v6"
    server = pair.a.listen(v6=v6)
    server.listen(256)
    port = server.getsockname()[1]
    clients = [pair.b.connect(pair.a.v6 if v6 else pair.a.v4, port) for _ in range(200)]
    found = list(diag.dump(v6, 1 << TcpState.ESTABLISHED))
    assert {s.remote_port for s in found} == {c.getsockname()[1] for c in clients}
    assert len(found) == 200
    assert [s.inode for s in diag.dump(v6, 1 << TcpState.LISTEN)] == [inode(server)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_socket_bound_to_a_device_is_found_on_it_only(pair: Pair, diag: SockDiag, family: str) -> None:
    v6 = family == "v6"
    local, remote = (pair.a.v6, pair.b.v6) if v6 else (pair.a.v4, pair.b.v4)
    with pair.a.enter():
        device = socket.if_nametoindex("eth0")
    server, client = (pair.a.new_socket(socket.AF_INET6 if v6 else socket.AF_INET) for _ in range(2))
    for sock in (server, client):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    server.bind(("::" if v6 else "0.0.0.0", 0))
    server.listen()
    port = server.getsockname()[1]
    target = pair.b.listen(v6=v6).getsockname()[1]
    client.connect((remote, target))
    own = client.getsockname()[1]
    cases: tuple[tuple[tuple[bytes, int, bytes, int], socket.socket], ...] = (
        ((packed(local), port, packed(remote), 9), server),
        ((packed(local), own, packed(remote), target), client),
    )
    for args, sock in cases:
        found = diag.lookup(*args, ifindex=device)
        assert found is not None
        assert (found.inode, found.ifindex) == (inode(sock), device)
        assert diag.lookup(*args) is None
        assert diag.lookup(*args, ifindex=1) is None, "on the loopback device"
    unbound = pair.a.listen(v6=v6)
    found = diag.lookup(packed(local), unbound.getsockname()[1], packed(remote), 9, device)
    assert found is not None
    assert (found.inode, found.ifindex) == (inode(unbound), 0)
    assert diag.destroy(packed(local), own, packed(remote), target) is Destroyed.NO_SUCH_SOCKET
    assert diag.destroy(packed(local), own, packed(remote), target, device) is Destroyed.DONE


def test_a_link_local_connection_is_found_on_its_device(pair: Pair, diag: SockDiag) -> None:
    for space, number in ((pair.a, 1), (pair.b, 2)):
        space.run("ip", "addr", "add", f"fe80::77:{number}/64", "dev", "eth0", "nodad")
    with pair.a.enter():
        device = socket.if_nametoindex("eth0")
    server = pair.b.listen(v6=True)
    port = server.getsockname()[1]
    client = pair.a.new_socket(socket.AF_INET6)
    client.bind(("fe80::77:1", 0, 0, device))
    client.connect(("fe80::77:2", port, 0, device))
    own = client.getsockname()[1]
    found = diag.lookup(packed("fe80::77:1"), own, packed("fe80::77:2"), port, device)
    assert found is not None
    assert found.inode == inode(client)


def test_a_lost_answer_is_asked_for_again(pair: Pair, diag: SockDiag) -> None:
    """The receive buffer is full of answers nobody took, so the kernel cannot give the next."""
    server = pair.a.listen()
    question = (packed(pair.a.v4), server.getsockname()[1], packed(pair.b.v4), 9)
    diag._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    for _ in range(50):
        try:
            diag._ask(20, 1, *question, 0xFFF)
        except OSError:
            break
    found = diag.lookup(*question)
    assert found is not None
    assert found.inode == inode(server)
    assert diag.unavailable == 0


def test_without_an_answer_there_is_none_and_it_is_counted(pair: Pair) -> None:
    with pair.a.enter():
        diag = SockDiag()
    diag.close()
    question = (packed(pair.a.v4), 1, packed(pair.b.v4), 9)
    assert diag.lookup(*question) is None
    assert diag.listener(*question[:2]) is None
    assert diag.destroy(*question) is Destroyed.UNAVAILABLE
    assert diag.unavailable == 3
    with pytest.raises(UnavailableError):
        diag.find(*question)
    with pytest.raises(UnavailableError):
        list(diag.dump(False, 0xFFF))
