"""Which sockets have a port, who gets a datagram, and what the kernel says of routes: asked of a real kernel."""

from __future__ import annotations

import socket
import struct

import pytest

from nfq.endings import UDP_GROUPS, subscribe
from nfq.routes import CAUTIOUS, Routes
from nfq.udpdiag import DatagramDiag, members, sender_first
from nfq.udpends import cookies
from tests.kernel.conftest import Namespace, Pair, wait_until

pytestmark = pytest.mark.kernel

V4, V6 = socket.AF_INET, socket.AF_INET6


def sock(
    space: Namespace, family: int, address: str = "", port: int = 0, *, shared: bool = False
) -> socket.socket:
    made = space.new_socket(family, socket.SOCK_DGRAM)
    if shared:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind((address, port))
    return made


def packed(text: str) -> bytes:
    return socket.inet_pton(V6 if ":" in text else V4, text)


def cookie(one: socket.socket) -> int:
    return struct.unpack("=Q", one.getsockopt(socket.SOL_SOCKET, 57, 8))[0]  # type: ignore[no-any-return]


@pytest.fixture
def diag(pair: Pair) -> DatagramDiag:
    with pair.a.enter():
        return DatagramDiag()


def test_the_kernel_names_the_socket_that_gets_a_datagram(pair: Pair, diag: DatagramDiag) -> None:
    wildcard = sock(pair.a, V4)
    port = wildcard.getsockname()[1]
    here, there = packed(pair.a.v4), packed(pair.b.v4)
    found = diag.receiver(here, port, there, 9)
    assert found is not None
    assert found.cookie == cookie(wildcard)
    wildcard.connect((pair.b.v4, 9))
    found = diag.receiver(here, port, there, 9)
    assert found is not None
    assert found.remote_port == 9
    assert diag.receiver(here, port, there, 10) is None, "connected elsewhere"
    dual = pair.a.new_socket(V6, socket.SOCK_DGRAM)
    dual.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    dual.bind(("::", 0))
    for local, remote in ((here, there), (packed(pair.a.v6), packed(pair.b.v6))):
        found = diag.receiver(local, dual.getsockname()[1], remote, 9)
        assert found is not None
        assert found.cookie == cookie(dual)
    diag.close()


def test_all_sockets_of_a_port_are_found_by_ip_version(pair: Pair, diag: DatagramDiag) -> None:
    first = sock(pair.a, V4, shared=True)
    port = first.getsockname()[1]
    specific = sock(pair.a, V4, pair.a.v4, port, shared=True)
    six = pair.a.new_socket(V6, socket.SOCK_DGRAM)
    six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    six.bind(("::", port))
    assert {one.cookie for one in diag.on_port(False, port)} == {cookie(first), cookie(specific)}
    assert [one.cookie for one in diag.on_port(True, port)] == [cookie(six)]
    assert diag.on_port(False, 1) == []
    likely = sender_first(diag.on_port(False, port), packed(pair.a.v4), packed(pair.b.v4), 9)
    assert likely[0].cookie == cookie(specific)
    first.connect((pair.b.v4, 9))
    likely = sender_first(diag.on_port(False, port), packed(pair.a.v4), packed(pair.b.v4), 9)
    assert likely[0].cookie == cookie(first)
    diag.close()


def test_members_of_a_group_are_those_bound_to_it_or_to_nothing(pair: Pair, diag: DatagramDiag) -> None:
    group = "239.1.2.3"
    to_group = sock(pair.a, V4, group, shared=True)
    port = to_group.getsockname()[1]
    to_any = sock(pair.a, V4, "", port, shared=True)
    sock(pair.a, V4, pair.a.v4, port, shared=True)
    elsewhere = pair.a.new_socket(V4, socket.SOCK_DGRAM)
    elsewhere.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with pair.a.enter():
        elsewhere.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo")
        device = socket.if_nametoindex("eth0")
    elsewhere.bind(("", port))
    found = members(diag.on_port(False, port), packed(group), device)
    assert {one.cookie for one in found} == {cookie(to_group), cookie(to_any)}
    diag.close()


def test_closed_sockets_are_told_by_their_cookie(pair: Pair) -> None:
    with pair.a.enter():
        told = subscribe(UDP_GROUPS)
    expected = set()
    for family, connect in ((V4, False), (V4, True), (V6, False)):
        one = sock(pair.a, family)
        if connect:
            one.connect((pair.b.v4, 9))
        expected.add(cookie(one))
        one.close()
    heard: set[int] = set()

    def listen() -> bool:
        try:
            heard.update(cookies(told.recv(65_536)))
        except BlockingIOError:
            return False
        return heard >= expected

    wait_until(listen, "all three")
    told.close()


def test_routes_know_broadcast_addresses_and_widths(pair: Pair) -> None:
    with pair.a.enter():
        routes = Routes()
        device = socket.if_nametoindex("eth0")
    assert routes.is_broadcast(packed("10.77.0.255"))
    assert not routes.is_broadcast(packed(pair.b.v4))
    assert not routes.is_broadcast(packed("203.0.113.255")), "no route: nobody's broadcast"
    for remote in (pair.b.v4, pair.b.v6):
        assert routes.mtu(packed(remote)) == routes.mtu(packed(remote), device) == 1500
    pair.a.run("ip", "link", "set", "eth0", "mtu", "1400")
    assert routes.mtu(packed(pair.b.v4)) == 1400
    pair.a.run("ip", "route", "add", "10.99.0.0/16", "via", pair.b.v4, "mtu", "1300")
    assert routes.mtu(packed("10.99.1.1")) == 1300
    assert routes.mtu(packed("203.0.113.1"), 4711) == CAUTIOUS
    routes.close()
    assert routes.mtu(packed(pair.b.v4)) == CAUTIOUS, "nobody to ask"
