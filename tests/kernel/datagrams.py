"""UDP sockets of users on the hosts of a lan, and what passes the wire between them."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from nfq import rules
from nfq.udpcontrol import Kind, read
from tests.kernel.conftest import DEADLINE_S, Namespace
from tests.kernel.hosts import Host, Lan, as_user, port_of


def unbound(host: Host, *, v6: bool = False, dual: bool = False, uid: int = 0) -> socket.socket:
    """A UDP socket of a user's; closed at the end of the test."""
    family = socket.AF_INET6 if v6 else socket.AF_INET
    with host.space.enter(), as_user(uid or host.own):
        made = socket.socket(family, socket.SOCK_DGRAM)
    if v6:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dual else 1)
    made.settimeout(DEADLINE_S)
    host.space.opened.append(made)
    return made


def bound(
    host: Host, *, v6: bool = False, dual: bool = False, uid: int = 0, address: str = ""
) -> socket.socket:
    """One on a port of its own."""
    made = unbound(host, v6=v6, dual=dual, uid=uid)
    made.bind((address, 0))
    return made


def connected(host: Host, address: str, port: int, *, uid: int = 0) -> socket.socket:
    """A connected UDP socket of a user's."""
    made = bound(host, v6=":" in address, uid=uid)
    made.connect((address, port))
    return made


class Echo:
    """A server that sends back what it gets, in a thread."""

    def __init__(self, host: Host, **kwargs: object) -> None:
        self.sock = bound(host, **kwargs)  # type: ignore[arg-type]
        self.port = port_of(self.sock)
        self.got: list[bytes] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.sock.settimeout(0.1)
        self._stop = False
        self._thread.start()

    def _serve(self) -> None:
        while not self._stop:
            try:
                data, peer = self.sock.recvfrom(1 << 17)
            except TimeoutError:
                continue
            except OSError:
                return
            self.got.append(data)
            with contextlib.suppress(OSError):
                self.sock.sendto(data, peer)

    def close(self) -> None:
        """Stop serving."""
        self._stop = True
        self._thread.join()
        self.sock.close()


def ask(client: socket.socket, data: bytes) -> bytes:
    """Send over a connected socket; what comes back."""
    client.send(data)
    return client.recv(1 << 17)


class DatagramTap:
    """All packets of one UDP port that pass a leg of the wire, in both directions, before anything drops them."""

    def __init__(self, space: Namespace, leg: str, port: int) -> None:
        with space.enter():
            self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 20)
        self._sock.bind((leg, 3))
        self._sock.setblocking(False)
        self.port = port
        self.raw: list[bytes] = []  # frames of any kind
        self.packets: list[Packet] = []

    def all(self) -> list[Packet]:
        """Every datagram so far, from the IP header on."""
        with contextlib.suppress(BlockingIOError):
            while True:
                data = self._sock.recv(1 << 17)
                self.raw.append(data)
                frame = Ether(data)
                if UDP in frame and self.port in (frame[UDP].sport, frame[UDP].dport):
                    self.packets.append(frame.payload)
        return self.packets

    def kinds(self) -> list[Kind | None]:
        """What control datagrams they are."""
        return [None if (c := read(body(p))) is None else c.kind for p in self.all()]

    def bodies(self, kind: Kind) -> set[bytes]:
        """What control datagrams of a kind said; repetitions count once."""
        return {c.body for p in self.all() if (c := read(body(p))) is not None and c.kind is kind}

    def close(self) -> None:
        """Stop listening."""
        self._sock.close()


def body(packet: Packet) -> bytes:
    """The UDP payload, without Ethernet padding."""
    return bytes(packet[UDP].payload)[: packet[UDP].len - 8]


def of_family(packet: Packet) -> type[IP] | type[IPv6]:
    """Which IP it is."""
    return IPv6 if IPv6 in packet else IP


@contextlib.contextmanager
def tapped(lan: Lan, leg: str, port: int) -> Iterator[DatagramTap]:
    """Listen on a host's leg."""
    tap = DatagramTap(lan.wire.space, f"leg-{leg}", port)
    try:
        yield tap
    finally:
        tap.close()


@pytest.fixture
def udp(lan: Lan) -> Iterator[Lan]:
    """The lan with rules that judge datagrams, too."""
    for host in lan.hosts:
        with host.space.enter():
            rules.install(rules.RulesConfig(beyond_tcp=True), host.run)
    yield lan
    for host in lan.hosts:
        with host.space.enter():
            rules.install(rules.RulesConfig(), host.run)
