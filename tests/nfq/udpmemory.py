"""Two enforcers joined in memory by a network that the test controls, for datagrams."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.packet import Raw

from nfq import udp
from nfq.core import Config, Verdict
from nfq.datagram import Datagram, parse
from nfq.suites import ALL
from sectool.identity.authority import RootAuthority
from tests.nfq.memory import Host, Seen, make_host

POLICY = """
kind: Policy
name: shop
owner: team-shop
rules:
  - allow app=web to call app=db on udp/5432
  - allow app=web to call app=vault on udp/5432 encrypted
  - allow net:192.0.2.0/24 to call app=db on udp/5432
  - allow app=web to call net:192.0.2.0/24 on udp/53
  - allow app=web to call net:224.0.0.0/4 on udp/5353
  - allow net:10.0.0.0/8 to call app=db on udp/5353
"""


class UdpHost(Host):
    """A host whose held datagrams are kept as its worker would."""

    def begin(self, address: str) -> None:
        """Say which address it has."""
        self.address = address
        self.held: dict[object, list[bytes]] = {}
        self.delivered: list[bytes] = []  # payloads its programs got
        self.sent: deque[bytes] = deque()  # packets on their way

    def send(self, packet: bytes) -> Verdict:
        """A program's datagram meets OUTPUT."""
        result = self.out(packet)
        self._apply(packet, result, self.sent)
        self.after()
        return result.verdict

    def receive(self, packet: bytes) -> Verdict:
        """A packet meets INPUT."""
        result = self.into(packet)
        if result.verdict not in (Verdict.DROP, Verdict.HOLD, Verdict.WAIT):
            checked(result.packet or packet)
            self.delivered.append(parse(result.packet or packet, False).payload)
        self.after()
        return result.verdict

    def _apply(self, packet: bytes, result: Seen, out: deque[bytes]) -> None:
        if result.verdict is Verdict.WAIT:
            self.held.setdefault(result.hold, []).append(packet)
        elif result.verdict not in (Verdict.DROP, Verdict.HOLD):
            checked(result.packet or packet)
            out.append(result.packet or packet)

    def after(self) -> None:
        """What the worker does after each packet: held datagrams of settled flows, crafted packets."""
        self.sent.extend(self.ports.injected)
        self.ports.injected.clear()
        self._repeat()
        settled = self.core.udp.settled
        while settled:
            for packet in self.held.pop(settled.popleft().key, []):
                self._apply(packet, self.out(packet), self.sent)
            self.sent.extend(self.ports.injected)
            self.ports.injected.clear()

    def _repeat(self) -> None:
        """What is sent anew meets OUTPUT like any other."""
        repeated, self.ports.repeated = self.ports.repeated, []
        for packet in repeated:
            self.send(packet)

    def pass_time(self, now_us: int) -> None:
        """Timers that are due by then."""
        self.now_us = now_us
        udp.timers(self.core, now_us)
        self.after()


def checked(packet: bytes) -> Datagram:
    """The packet parsed, after checking that scapy computes the same checksums (a UDP one of 0 over IPv4 is none)."""
    cls = IPv6 if packet[0] >> 4 == 6 else IP
    again = cls(packet)
    if UDP in again:
        if again[UDP].chksum:
            del again[UDP].chksum
        else:
            assert cls is IP
        if cls is IP:
            del again.chksum
        assert bytes(again) == packet
    return parse(packet, True)


def made(src: str, dst: str, sport: int, dport: int, payload: bytes) -> bytes:
    """A datagram as a stack makes it."""
    head = IPv6(src=src, dst=dst) if ":" in src else IP(src=src, dst=dst, flags="DF")
    return bytes(head / UDP(sport=sport, dport=dport) / Raw(payload))


@dataclass
class UdpPair:
    """A client and a server host."""

    a: UdpHost
    b: UdpHost
    v6: bool = False
    sport: int = 40_000
    dport: int = 5432
    lost: list[bytes] = field(default_factory=list)

    def datagram(self, payload: bytes, *, to_b: bool = True) -> bytes:
        """As the sender's stack makes it."""
        src, dst = (self.a.address, self.b.address) if to_b else (self.b.address, self.a.address)
        sport, dport = (self.sport, self.dport) if to_b else (self.dport, self.sport)
        return made(src, dst, sport, dport, payload)

    def call(self, payload: bytes) -> Verdict:
        """The client sends."""
        return self.a.send(self.datagram(payload))

    def answer(self, payload: bytes) -> Verdict:
        """The server sends."""
        return self.b.send(self.datagram(payload, to_b=False))

    def carry(self, rounds: int = 50) -> None:
        """Deliver everything under way, in order, without loss."""
        for _ in range(rounds):
            if not self.a.sent and not self.b.sent:
                return
            while self.a.sent:
                self.b.receive(self.a.sent.popleft())
            while self.b.sent:
                self.a.receive(self.b.sent.popleft())
        raise AssertionError("they do not come to an end")

    def at(self, seconds: float) -> None:
        """Let both hosts' clocks stand at so many seconds after the start."""
        for host in (self.a, self.b):
            host.pass_time(self.start + int(seconds * 1e6))

    def __post_init__(self) -> None:
        self.start = self.a.now_us

    def establish(self) -> None:
        """The whole handshake."""
        self.call(b"first")
        self.carry()
        assert self.b.delivered == [b"first"]
        self.b.delivered.clear()


def make_udp_pair(
    root: RootAuthority, *, v6: bool = False, app: str = "db", policy: str = POLICY, encrypts: bool = True
) -> UdpPair:
    """A web client and a server on port 5432 that policy lets talk (`vault`: encrypted)."""
    config = Config(suites=ALL if encrypts else ())
    hosts: list[UdpHost] = []
    for name in ("a", "b"):
        host = make_host(root, name, policy, config)
        udp_host = UdpHost.__new__(UdpHost)
        udp_host.__dict__.update(host.__dict__)
        number = 1 + len(hosts)
        udp_host.begin(f"fd00::{number}" if v6 else f"10.0.0.{number}")
        hosts.append(udp_host)
    a, b = hosts
    a.workload("web", {"app": "web"})
    b.workload(app, {"app": app}, port=5432)
    return UdpPair(a, b, v6)
