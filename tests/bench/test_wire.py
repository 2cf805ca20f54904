"""That a wire is what it says, seen from the devices and the router."""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from labs import netns
from labs.lab import Lab
from nfq.netns import enter
from tests.bench.datapath import Case, topology
from tests.bench.wire import Wire, lay

pytestmark = pytest.mark.kernel
SIZE = 24 << 20
PORT = 5000


@contextmanager
def pair(wire: Wire) -> Iterator[Lab]:
    """Two hosts joined by it."""
    lab = Lab(f"w{secrets.token_hex(4)}", topology(Case(wire=wire)))
    try:
        lab.up(temporary=True)
        lay(wire, lab)
        yield lab
    finally:
        lab.down()


def counters(lab: Lab) -> tuple[int, int]:
    """Bytes and packets that the server's device has received."""
    line = next(
        one
        for one in netns.run("cat", "/proc/net/dev", netns=lab["server"].netns).splitlines()
        if "eth0:" in one
    )
    words = line.split(":")[1].split()
    return int(words[0]), int(words[1])


def send(lab: Lab) -> tuple[float, int]:
    """Send SIZE bytes from client to server: mean packet on the wire, and the largest that a sniffer sees."""
    with enter(Path(lab["server"].netns)):
        listener = socket.create_server(("", PORT))
        sniffer = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
        sniffer.bind(("eth0", 0x0800))
    with enter(Path(lab["client"].netns)):
        client = socket.socket()
    client.settimeout(30)
    client.connect((lab["server"].host.ip4, PORT))
    server, _ = listener.accept()
    server.settimeout(30)
    bytes_before, packets_before = counters(lab)
    sender = threading.Thread(target=client.sendall, args=(bytes(SIZE),))
    sender.start()
    left = SIZE
    while left:
        part = server.recv(1 << 20)
        assert part, f"{left} bytes are missing"
        left -= len(part)
    sender.join()
    received, packets = counters(lab)
    sniffer.setblocking(False)
    largest = 0
    while True:
        try:
            largest = max(largest, len(sniffer.recv(1 << 17)))
        except BlockingIOError:
            break
    for sock in (listener, sniffer, client, server):
        sock.close()
    return (received - bytes_before) / (packets - packets_before), largest


def test_with_offloads_super_packets_cross() -> None:
    with pair(Wire()) as lab:
        mean, largest = send(lab)
    assert mean > 3000
    assert largest > 16000


@pytest.mark.parametrize("gro", [False, True])
def test_segments_cross_and_are_merged_only_by_gro(gro: bool) -> None:
    with pair(Wire(segments=True, gro=gro)) as lab:
        mean, largest = send(lab)
    assert mean <= 1514
    assert (largest > 3000) is gro


def test_a_router_loses_its_share_of_single_segments() -> None:
    with pair(Wire(segments=True, gro=True, loss=0.01)) as lab:
        mean, _ = send(lab)
        router = netns.path(lab.name, netns.BRIDGE)
        rows = netns.run(
            "iptables", "-t", "raw", "-L", "PREROUTING", "-v", "-n", "-x", netns=router
        ).splitlines()
    head = rows[0].replace(",", "").split()
    lost, lost_bytes = map(int, rows[2].split()[:2])
    assert mean <= 1514
    assert lost >= 20, head
    assert lost_bytes / lost <= 1500
