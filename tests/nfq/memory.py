"""Two enforcers joined in memory: real credentials, real policy, real packets built by scapy, no kernel."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.packet import Packet, Raw

from nfq import datapath
from nfq import packet as packet_layer
from nfq.core import Attribution, Config, Core, Result, Verdict
from nfq.datagram import Datagram
from nfq.flow import Flow, LocalWorkload, Owner
from nfq.noise import KeyPair
from nfq.packet import Segment
from nfq.recorder import Counts, Recorder
from sectool.events import FLOW_DTYPE, Action, DropReason
from sectool.identity.authority import HostAuthority, RootAuthority
from sectool.identity.extensions import LabelConstraints
from sectool.identity.trust import TrustBundle
from sectool.identity.verify import Verifier
from sectool.labels import LabelSet
from sectool.policy import Engine, parse

NOW_US = 1_790_000_000_000_000


class Sink:
    """Keeps what a ring would."""

    lost = 0

    def __init__(self) -> None:
        self.records: list[bytes] = []
        self.blobs: list[dict[str, object]] = []

    def put(self, record: bytes) -> bool:
        self.records.append(record)
        return True

    def put_blob(self, blob: dict[str, object]) -> bool:
        self.blobs.append(blob)
        return True


@dataclass
class MemoryPorts:
    """Sockets as a table, effects as lists."""

    connecting: Attribution | None = None
    listening: dict[int, Attribution] = field(default_factory=dict)
    pinging: Attribution | None = None
    kernel: Attribution = field(default_factory=lambda: Attribution("host", Owner(0, 0, 1)))
    members: dict[int, tuple[Attribution, ...]] = field(default_factory=dict)
    mtu: int = 1500
    large: list[bytes] = field(default_factory=list)
    injected: list[bytes] = field(default_factory=list)
    repeated: list[bytes] = field(default_factory=list)
    resets: list[Segment] = field(default_factory=list)
    cuts: list[Flow] = field(default_factory=list)
    journaled: list[Flow] = field(default_factory=list)
    known: set[bytes] = field(default_factory=set)
    sealed_keys: set[bytes] = field(default_factory=set)

    def attribute(self, seg: Segment, *, listener: bool) -> Attribution | None:
        return self.listening.get(seg.destination_port) if listener else self.connecting

    def sender(self, v6: bool, identifier: bytes) -> Attribution:
        return self.pinging or self.host()

    def host(self) -> Attribution:
        return self.kernel

    def attribute_datagram(
        self, d: Datagram, *, receiver: bool, group: bool = False
    ) -> tuple[Attribution, ...]:
        if group and d.destination_port in self.members:
            return self.members[d.destination_port]
        found = self.listening.get(d.destination_port) if receiver else self.connecting
        return () if found is None else (found,)

    def is_broadcast(self, raw: bytes) -> bool:
        return raw[-1] == 255

    def path_mtu(self, raw: bytes, device: int) -> int:
        return self.mtu

    def proven(self, raw: bytes, now_us: int) -> None:
        self.known.add(raw)

    def sealed(self, seg: Segment) -> bool:
        return seg.key in self.sealed_keys

    def inject(self, packet: bytes) -> None:
        self.injected.append(packet)

    def inject_large(self, packet: bytes) -> None:
        self.large.append(packet)

    def repeat(self, packet: bytes) -> None:
        self.repeated.append(packet)

    def reset_local(self, seg: Segment) -> None:
        self.resets.append(seg)

    def cut(self, flow: Flow) -> Counts:
        self.cuts.append(flow)
        return Counts(1, 2, 3, 4)

    def journal(self, flow: Flow) -> None:
        if flow in self.journaled:
            return
        flow.journal_slot = len(self.journaled)
        self.journaled.append(flow)

    def unjournal(self, flow: Flow) -> None:
        if flow in self.journaled:
            self.journaled.remove(flow)
            flow.journal_slot = -1


def resealed(data: bytes) -> bytes:
    """A tampered packet with its checksums made right, as an attacker would."""
    seg = packet_layer.parse(data, False)
    return packet_layer.rebuild(seg, seg.options, seg.payload)


class Seen(NamedTuple):
    """A result whose packet is a copy: a view would not outlive the next packet."""

    verdict: Verdict
    packet: bytes | None = None
    hold: Hashable = None


def seen(result: Result) -> Seen:
    """Keep what the packet path gave."""
    packet = None if result.packet is None else bytes(result.packet)
    if result.verdict is Verdict.YIELD:  # nothing comes at once, so it goes
        return Seen(Verdict.ACCEPT, packet)
    kept = result.hold if result.verdict in (Verdict.HOLD, Verdict.WAIT) else None
    return Seen(result.verdict, packet, kept)


class Host:
    """One enforcer with one workload, driven packet by packet."""

    def __init__(self, authority: HostAuthority, verifier: Verifier, policy: str, config: Config) -> None:
        self.authority = authority
        self.sink = Sink()
        self.ports = MemoryPorts()
        self.core = Core(config, Engine(parse(policy)), verifier, Recorder(self.sink), self.ports)
        self.core.revision = 1
        self.now_us = NOW_US

    def workload(self, name: str, labels: dict[str, str], *, port: int | None = None) -> LocalWorkload:
        """Issue an SVID and attribute the connecting socket, or the listener of `port`, to it."""
        path = f"/host/{self.authority.host_name}/wl/{name}"
        credential = self.authority.issue(path, LabelSet(labels), self.now_us)
        local = LocalWorkload(
            len(name),
            name,
            KeyPair(credential.x25519_private, credential.x25519_public),
            credential.blob,
            credential.peer,
        )
        key: Hashable = (name, credential.peer.id)
        self.core.credentials.put(key, local, self.now_us)
        found = Attribution(key, Owner(42, 1000, 7))
        if port is None:
            self.ports.connecting = found
        else:
            self.ports.listening[port] = found
        return local

    def out(self, packet: Packet | bytes, *, local: bool = False) -> Seen:
        return seen(datapath.handle(self.core, bytes(packet), True, local, self.now_us))

    def into(self, packet: Packet | bytes) -> Seen:
        return seen(datapath.handle(self.core, bytes(packet), False, False, self.now_us))

    @property
    def records(self) -> np.ndarray:
        self.core.recorder.catch_up()
        return np.frombuffer(b"".join(self.sink.records), FLOW_DTYPE)

    @property
    def reasons(self) -> list[DropReason]:
        """Drop reasons of all records so far."""
        return [DropReason(r) for r in self.records["drop_reason"]]

    @property
    def actions(self) -> list[Action]:
        """Actions of all records so far."""
        return [Action(r) for r in self.records["action"]]


POLICY = """
kind: Policy
name: shop
owner: team-shop
rules:
  - allow app=web to call app=db on tcp/5432
  - audit app=batch to call app=db on tcp/5432 because "migration"
  - allow net:192.0.2.0/24 to call app=db on tcp/5432
  - allow app=web to call net:192.0.2.0/24 on tcp/443
---
kind: Guardrail
name: baseline
owner: security
rules:
  - deny env=dev to call env=prod
"""

MakeHost = Callable[..., Host]


def make_host(
    trusted: RootAuthority,
    name: str,
    policy: str = POLICY,
    config: Config | None = None,
    *,
    ca: RootAuthority | None = None,
) -> Host:
    """A host that trusts `trusted`, enrolled with it or with `ca`."""
    key = ec.generate_private_key(ec.SECP256R1())
    constraints = LabelConstraints({"app": ("*",), "env": ("*",)}, f"/host/{name}/")
    certificate = (ca or trusted).issue_host(key.public_key(), name, constraints, NOW_US)
    pem = trusted.certificate.public_bytes(Encoding.PEM).decode()
    verifier = Verifier(TrustBundle().with_root(trusted.trust_domain, pem))
    return Host(HostAuthority(certificate, key), verifier, policy, config or Config())


@dataclass
class Pair:
    """A client host and a server host, with addresses, and the packets a TCP stack would make."""

    a: Host
    b: Host
    v6: bool = False
    sport: int = 40_000
    dport: int = 5432
    isn: int = 1_000
    peer_isn: int = 9_000

    @property
    def addresses(self) -> tuple[str, str]:
        return ("fd00::1", "fd00::2") if self.v6 else ("10.0.0.1", "10.0.0.2")

    def packet(self, to_b: bool, flags: str, seq: int, ack: int, payload: bytes = b"", **tcp: Any) -> Packet:
        src, dst = self.addresses if to_b else self.addresses[::-1]
        sport, dport = (self.sport, self.dport) if to_b else (self.dport, self.sport)
        ip = IPv6(src=src, dst=dst) if self.v6 else IP(src=src, dst=dst)
        packet = ip / TCP(sport=sport, dport=dport, flags=flags, seq=seq, ack=ack, **tcp)
        return packet / Raw(payload) if payload else packet

    def syn(self) -> Packet:
        options = [("MSS", 1460), ("SAckOK", b""), ("Timestamp", (1, 0)), ("NOP", None), ("WScale", 7)]
        return self.packet(True, "S", self.isn, 0, options=options)

    def synack(self) -> Packet:
        options = [("MSS", 1460), ("SAckOK", b""), ("Timestamp", (2, 1)), ("NOP", None), ("WScale", 7)]
        return self.packet(False, "SA", self.peer_isn, self.isn + 1, options=options)

    def ack(self, payload: bytes = b"") -> Packet:
        options = [("NOP", None), ("NOP", None), ("Timestamp", (3, 2))]
        return self.packet(
            True, "PA" if payload else "A", self.isn + 1, self.peer_isn + 1, payload, options=options
        )

    def reply(self, payload: bytes = b"") -> Packet:
        return self.packet(False, "A", self.peer_isn + 1, self.isn + 1, payload)

    def syn_on_wire(self) -> bytes:
        """The SYN as it leaves A."""
        result = self.a.out(self.syn())
        assert result.verdict is Verdict.ACCEPT
        assert result.packet is not None
        return result.packet

    def synack_on_wire(self) -> bytes:
        """SYN delivered to B, its SYN-ACK as it leaves B."""
        assert self.b.into(self.syn_on_wire()).verdict is Verdict.ACCEPT
        result = self.b.out(self.synack())
        assert result.packet is not None
        return result.packet

    def proof_on_wire(self, payload: bytes = b"") -> bytes:
        """Everything up to A's proving segment as it leaves A."""
        result = self.a.into(self.synack_on_wire())
        assert result.verdict is Verdict.ACCEPT
        proving = self.a.out(self.ack(payload))
        assert proving.packet is not None
        return proving.packet

    def establish(self) -> None:
        """The whole handshake, released on both ends."""
        assert self.b.into(self.proof_on_wire()).verdict is Verdict.RELEASE
        assert self.a.into(self.reply(b"hello")).verdict is Verdict.RELEASE


def make_pair(trusted: RootAuthority) -> Pair:
    """A web client and a database server that policy lets talk."""
    a, b = make_host(trusted, "a"), make_host(trusted, "b")
    a.workload("web", {"app": "web"})
    b.workload("db", {"app": "db"}, port=5432)
    return Pair(a, b)
