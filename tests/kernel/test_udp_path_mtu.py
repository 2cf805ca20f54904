"""Datagrams through a router whose far side is, or becomes, narrower: as with plain UDP, one is lost at most."""

from __future__ import annotations

import secrets
import socket

import pytest

from tests.kernel.datagrams import Echo, connected
from tests.kernel.test_path_mtu import Routed
from tests.kernel.test_path_mtu import routed as routed
from tests.kernel.test_path_mtu import running as running

pytestmark = pytest.mark.kernel

FAMILIES = pytest.mark.parametrize("v6", [False, True], ids=["v4", "v6"])
IP_MTU_DISCOVER, IPV6_MTU_DISCOVER, PMTUDISC_DO = 10, 23, 2
WAIT_S = 1.5


def no_fragments(sock: socket.socket, v6: bool) -> None:
    """As QUIC stacks ask: neither the host nor a router may cut what this socket sends."""
    if v6:
        sock.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, PMTUDISC_DO)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, PMTUDISC_DO)


def tries(client: socket.socket, size: int) -> int:
    """How often a datagram of that size must be sent until it comes back (both ways learn the path's MTU)."""
    data = secrets.token_bytes(size)
    client.settimeout(WAIT_S)
    for attempt in range(1, 8):
        try:
            client.send(data)
            if client.recv(1 << 17) == data:
                return attempt
        except OSError:
            continue  # lost, or too large as the stack has just learnt
    raise AssertionError(f"{size} bytes do not get through")


@FAMILIES
@pytest.mark.parametrize("strict", [False, True], ids=["may-fragment", "no-fragments"])
@pytest.mark.parametrize("mtu", [1280])
def test_a_path_becomes_narrower(routed: Routed, v6: bool, strict: bool, mtu: int) -> None:
    server = Echo(routed.b, v6=v6)
    client = connected(routed.a, routed.b.address(v6), server.port)
    if strict:
        no_fragments(client, v6)
        no_fragments(server.sock, v6)
    wide, narrow = (size - (48 if v6 else 28) for size in (1500, mtu))
    assert tries(client, 1000) == 1
    assert tries(client, wide) == 1
    routed.narrow(mtu)
    for size in (narrow, narrow - 24, narrow - 25, 1000):
        tries(client, size)
    for size in (narrow, narrow - 24, narrow - 25, 1000):
        assert tries(client, size) == 1, "now the path is known"
    if not strict:
        tries(client, 9000)
        assert tries(client, 9000) == 1


@FAMILIES
@pytest.mark.parametrize("mtu", [1400])
def test_a_flow_begins_on_a_narrow_path(routed: Routed, v6: bool, mtu: int) -> None:
    routed.narrow(mtu)
    server = Echo(routed.b, v6=v6)
    client = connected(routed.a, routed.b.address(v6), server.port)
    tries(client, 1452)
    assert tries(client, 1452) == 1
    assert tries(client, 9000) <= 2
