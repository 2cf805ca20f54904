"""A router between two enforced hosts whose far side is narrower: nothing stalls, whatever the flow carries.

a ──[1500]── router ──[1500, then 1400 or 1280]── b
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from sectool.clock import DAY
from sectool.events import Encryption, Phase, now_us
from sectool.identity.authority import RootAuthority
from tests.kernel.conftest import DEADLINE_S, Namespace, make_namespace
from tests.kernel.hosts import DOMAIN, Host, accept, own_cgroup, port_of

pytestmark = pytest.mark.kernel

PLAIN = """
kind: Policy
name: shop
owner: team-shop
rules:
  - allow app=web to call app=db
"""
ENCRYPTED = PLAIN.replace("app=db", "app=db encrypted")
# In which nothing arrives. A black hole lasts for ever; on a busy machine a second is nobody's fault.
PAUSE_S = 4.0
SIZE = 1_000_000  # several windows


class Routed:
    """Host a, host b, and a router beside each, named after it."""

    def __init__(self, a: Host, b: Host, routers: dict[str, Namespace]) -> None:
        self.a, self.b, self.routers = a, b, routers
        self.encrypted = False

    def narrow(self, mtu: int) -> None:
        """Set the MTU of the link between the routers; no host is told."""
        for router in self.routers.values():
            router.run("ip", "link", "set", "mid", "mtu", str(mtu))

    def forget(self) -> None:
        """As wide as at the beginning, and no stack remembers otherwise."""
        self.narrow(1500)
        for space in (self.a.space, self.b.space, *self.routers.values()):
            for family in ("-4", "-6"):
                space.run("ip", family, "route", "flush", "cache")


def _configure(space: Namespace, *lines: str) -> None:
    space.run("ip", "-batch", "-", stdin="\n".join(lines) + "\n")


def _wire(router: Namespace, space: Namespace, number: int) -> None:
    """A host and its router; `number` is the host's, and of the network between them."""
    router.run("sysctl", "-qw", "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
    # Link-local addresses too are there at once: a router asks for its neighbours with them.
    router.run("sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0", "net.ipv6.conf.mid.accept_dad=0")
    space.run("sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0")
    router.run("ip", "link", "add", "leg", "type", "veth", "peer", "name", "eth0", "netns", space.name)
    # The usual default loses its pace with the packets of a whole window; that is not what is looked at here.
    space.run("sysctl", "-qw", "net.ipv4.tcp_congestion_control=reno")
    space.v4, space.v6 = f"10.78.{number}.2", f"fd78:{number}::2"
    _configure(
        router,
        f"addr add 10.78.{number}.1/24 dev leg",
        f"addr add fd78:{number}::1/64 dev leg nodad",
        "link set leg up",
        f"addr add 10.78.9.{number}/24 dev mid",
        f"addr add fd78:9::{number}/64 dev mid nodad",
        "link set mid up",
        f"route add default via 10.78.9.{3 - number}",
        f"route add default via fd78:9::{3 - number}",
    )
    _configure(
        space,
        f"addr add {space.v4}/24 dev eth0",
        f"addr add {space.v6}/64 dev eth0 nodad",
        "link set eth0 up",
        f"route add default via 10.78.{number}.1",
        f"route add default via fd78:{number}::1",
    )


@contextlib.contextmanager
def make_routed(folder: Path) -> Iterator[Routed]:
    token = secrets.token_hex(4)
    with own_cgroup(token), contextlib.ExitStack() as stack:
        a, b, near, far = (
            stack.enter_context(make_namespace(role, token)) for role in ("a", "b", "ra", "rb")
        )
        near.run("ip", "link", "add", "mid", "type", "veth", "peer", "name", "mid", "netns", far.name)
        _wire(near, a, 1)
        _wire(far, b, 2)
        root = RootAuthority.create(folder / "ca", DOMAIN, now_us() - DAY)
        hosts = []
        for name, space, labels in (("a", a, {"app": "web"}), ("b", b, {"app": "db"})):
            host = Host(space, name, root, labels)
            host.start(PLAIN)
            stack.callback(host.close)
            hosts.append(host)
        for host in hosts:
            host.ready()
        yield Routed(hosts[0], hosts[1], {"a": near, "b": far})


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Routed]:
    with make_routed(tmp_path_factory.mktemp("routed")) as routed:
        yield routed


@pytest.fixture(params=[PLAIN, ENCRYPTED], ids=["plain", "encrypted"])
def routed(running: Routed, request: pytest.FixtureRequest) -> Iterator[Routed]:
    for host in (running.a, running.b):
        host.policy(request.param)
    running.encrypted = request.param is ENCRYPTED
    yield running
    running.forget()
    # What the enforcers have learnt lasts ten minutes; other workers know nothing of it.
    hosts = (running.a, running.b)
    for host in hosts:
        host.stop()
        host.restart(None)
    for host in hosts:
        host.policy(PLAIN)
        host.reset(PLAIN)


def transfer(sender: socket.socket, receiver: socket.socket, size: int = SIZE) -> None:
    """So many random octets arrive, unchanged and without a pause."""
    data = secrets.token_bytes(size)
    thread = threading.Thread(target=sender.sendall, args=(data,), daemon=True)
    thread.start()
    receiver.settimeout(PAUSE_S)
    got = bytearray()
    while len(got) < size:
        try:
            got += receiver.recv(1 << 16)
        except TimeoutError:
            pytest.fail(f"nothing came for {PAUSE_S} s after {len(got)} octets")
    thread.join(DEADLINE_S)
    assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()


def connected(routed: Routed, v6: bool) -> tuple[socket.socket, socket.socket]:
    listener = routed.b.listen(v6=v6)
    client = routed.a.connect(routed.b.address(v6), port_of(listener))
    return client, accept(listener)


FAMILIES = pytest.mark.parametrize("v6", [False, True], ids=["v4", "v6"])
WIDTHS = pytest.mark.parametrize("mtu", [1400, 1280])


@FAMILIES
@WIDTHS
def test_a_path_that_is_narrow_from_the_beginning(routed: Routed, v6: bool, mtu: int) -> None:
    routed.narrow(mtu)
    client, server = connected(routed, v6)
    transfer(client, server)
    transfer(server, client)
    (record,) = [r for r in routed.a.records(server.getsockname()[1]) if r["phase"] == Phase.VERDICT]
    assert record["encryption"] == (Encryption.ENCRYPTED if routed.encrypted else Encryption.PLAIN)
    assert (routed.a.status()["encrypted"] > 0) is routed.encrypted


@FAMILIES
@WIDTHS
def test_a_path_that_becomes_narrow(routed: Routed, v6: bool, mtu: int) -> None:
    client, server = connected(routed, v6)
    transfer(client, server)
    transfer(server, client)
    routed.narrow(mtu)
    transfer(client, server)
    transfer(server, client)
    # A second connection, made when both the stack and the enforcer know of it.
    again = connected(routed, v6)
    transfer(*again)
    transfer(*again[::-1])


@FAMILIES
def test_a_path_that_becomes_narrower_twice_and_wide_again(routed: Routed, v6: bool) -> None:
    client, server = connected(routed, v6)
    for mtu in (1400, 1280, 1500):
        routed.narrow(mtu)
        transfer(client, server)
        transfer(server, client)


@FAMILIES
def test_two_connections_share_what_is_learnt(routed: Routed, v6: bool) -> None:
    """The stack learns of the path by the first; what it makes for the second is too large once it is sealed."""
    first, second = connected(routed, v6), connected(routed, v6)
    routed.narrow(1280)
    transfer(*first)
    transfer(*second)
    transfer(*second[::-1])


@FAMILIES
def test_the_first_words_are_long(routed: Routed, v6: bool) -> None:
    """The client begins with full segments, before the server has said anything: they carry proofs."""
    routed.narrow(1280)
    for _ in range(2):
        client, server = connected(routed, v6)
        transfer(client, server)
