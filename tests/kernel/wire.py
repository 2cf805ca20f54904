"""The wire between the hosts: a bridge in a namespace of its own that sees every frame, loses some, and forges others.

The namespace is also a plain host without an enforcer, inside (10.77.0.3, fd77::3) and outside (192.0.2.3,
2001:db8::3) the enforced networks, and speaks for addresses that no kernel answers for (10.77.0.66, fd77::66).
"""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Callable, Iterator

from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from tests.kernel.conftest import Namespace, wait_until

STRANGER = {False: "10.77.0.66", True: "fd77::66"}  # by "is it IPv6": addresses that no kernel answers for
OUTSIDE = {False: "192.0.2.3", True: "2001:db8::3"}
MAC = "02:00:00:00:77:03"


def our_options(packet: Packet) -> list[bytes]:
    """Content of the options of this protocol's kind on a segment."""
    return [bytes(value) for kind, value in packet[TCP].options if kind == 253]


def body(packet: Packet) -> bytes:
    """The TCP payload, without Ethernet padding."""
    size = packet[IP].len - packet[IP].ihl * 4 if IP in packet else packet[IPv6].plen
    data = bytes(packet[TCP].payload)
    return data[: size - packet[TCP].dataofs * 4]


def flags(packet: Packet) -> str:
    """TCP flags as letters."""
    return str(packet[TCP].flags)


class Tap:
    """All TCP segments of one port that pass a leg of the wire, in both directions, before anything drops them."""

    def __init__(self, space: Namespace, leg: str, port: int) -> None:
        with space.enter():
            self._sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 20)
        self._sock.bind((leg, 3))
        self._sock.setblocking(False)
        self.port = port
        self.packets: list[Packet] = []
        self._given = 0

    def all(self) -> list[Packet]:
        """Every segment so far, from the IP header on."""
        with contextlib.suppress(BlockingIOError):
            while True:
                frame = Ether(self._sock.recv(1 << 16))
                if TCP in frame and self.port in (frame[TCP].sport, frame[TCP].dport):
                    self.packets.append(frame.payload)
        return self.packets

    def next(self, what: str, wanted: Callable[[Packet], bool]) -> Packet:
        """The first segment after the one given last that is wanted; waits for it."""

        def look() -> bool:
            packets = self.all()
            while self._given < len(packets):
                self._given += 1
                if wanted(packets[self._given - 1]):
                    return True
            return False

        wait_until(look, what)
        return self.packets[self._given - 1]

    def flags(self, letters: str, to_port: bool | None = None) -> Packet:
        """The next segment with exactly these flags (and direction, if given)."""
        return self.next(
            f"a segment {letters}",
            lambda p: flags(p) == letters and to_port in (None, p[TCP].dport == self.port),
        )

    def close(self) -> None:
        """Stop listening."""
        self._sock.close()


class Wire:
    """The namespace between the hosts: bridge, plain host, eavesdropper and forger."""

    def __init__(self, space: Namespace) -> None:
        self.space = space
        space.v4, space.v6 = "10.77.0.3", "fd77::3"
        lines = [f"link add br0 address {MAC} type bridge forward_delay 0 mcast_snooping 0"]
        lines += [f"addr add {address}/24 dev br0" for address in (space.v4, OUTSIDE[False])]
        lines += [f"addr add {address}/64 dev br0 nodad" for address in (space.v6, OUTSIDE[True])]
        space.run("ip", "-batch", "-", stdin="\n".join([*lines, "link set br0 up"]) + "\n")
        self.taps: list[Tap] = []
        self._numbers = itertools.count()
        self._out: dict[str, socket.socket] = {}
        self.macs: dict[str, str] = {}

    def join(self, name: str, space: Namespace, number: int) -> None:
        """Plug a namespace in."""
        self.macs[name] = f"02:00:00:00:77:{number:02x}"
        leg = f"leg-{name}"
        self.space.run("ip", "link", "add", leg, "type", "veth", "peer", "name", "eth0", "netns", space.name)
        self.space.run("ip", "link", "set", leg, "master", "br0", "up")
        space.v4, space.v6 = f"10.77.0.{number}", f"fd77::{number}"
        lines = [f"link set eth0 address {self.macs[name]}", f"addr add {space.v4}/24 dev eth0"]
        lines += [f"addr add {space.v6}/64 dev eth0 nodad", "link set eth0 up"]
        lines += ["route add 192.0.2.0/24 dev eth0", "route add 2001:db8::/64 dev eth0"]
        lines += [f"neigh add {a} lladdr {MAC} dev eth0" for a in STRANGER.values()]
        space.run("ip", "-batch", "-", stdin="\n".join(lines) + "\n")
        with self.space.enter():
            sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        sock.bind((leg, 0))
        self._out[name] = sock

    def tap(self, leg: str, port: int) -> Tap:
        """Listen on a host's leg until the end of the test."""
        self.taps.append(Tap(self.space, f"leg-{leg}", port))
        return self.taps[-1]

    def send(self, to: str, packet: Packet | bytes) -> None:
        """Deliver an IP packet to a host, past everybody's OUTPUT rules; scapy fills in checksums it was left."""
        raw = bytes(packet)
        kind = 0x86DD if raw[0] >> 4 == 6 else 0x0800
        head = bytes(int(b, 16) for b in (self.macs[to] + ":" + MAC).split(":"))
        self._out[to].send(head + kind.to_bytes(2, "big") + raw)

    @contextlib.contextmanager
    def losing(self, match: str, *, first: int = 0) -> Iterator[None]:
        """Lose what matches (nft) on its way through the bridge; with `first`, only so many."""
        table = f"losing{next(self._numbers)}"
        limit = f"numgen inc mod 1000000 < {first} " if first else ""
        chain = f"chain f {{\ntype filter hook forward priority 0\n{match} {limit}counter drop\n}}"
        self.space.run("nft", "-f", "-", stdin=f"table bridge {table} {{\n{chain}\n}}\n")
        try:
            yield
            listed = self.space.run("nft", "list", "table", "bridge", table)
            assert "counter packets 0 " not in listed, f"nothing was lost by {match}"
        finally:
            self.space.run("nft", "delete", "table", "bridge", table)

    def new_socket(self, v6: bool = False, *, outside: bool = True) -> socket.socket:
        """A plain socket of a host without an enforcer, inside or outside the enforced networks."""
        sock = self.space.new_socket(socket.AF_INET6 if v6 else socket.AF_INET)
        sock.bind((OUTSIDE[v6] if outside else self.address(v6), 0))
        return sock

    def address(self, v6: bool = False) -> str:
        """The plain host's address inside the enforced networks."""
        return self.space.v6 if v6 else self.space.v4

    def reset(self) -> None:
        """For the next test."""
        for sock in self.space.opened:
            sock.close()
        for tap in self.taps:
            tap.close()
        self.space.opened.clear()
        self.taps.clear()

    def close(self) -> None:
        """Close what was opened."""
        self.reset()
        for sock in self._out.values():
            sock.close()


def again(packet: Packet, payload: bytes | None = None, **fields: object) -> Packet:
    """A copy of a captured packet, with another payload or other TCP fields; lengths and checksums made anew."""
    payload = body(packet) if payload is None else payload
    copy = packet.copy()
    for name, value in fields.items():
        setattr(copy[TCP], name, value)
    copy[TCP].remove_payload()
    del copy[TCP].chksum, copy[TCP].dataofs
    if IP in copy:
        del copy[IP].chksum, copy[IP].len
    else:
        del copy[IPv6].plen
    return copy / Raw(payload) if payload else copy
