"""Floods of datagrams from spoofed addresses, as fast as this machine makes them, while honest clients ask on."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from scapy.layers.inet import IP, UDP
from scapy.packet import Raw

from nfq import rules
from nfq.handshake import Hello
from nfq.ip import UDP as PROTOCOL
from nfq.noise import KeyPair
from nfq.udpcontrol import Kind, write
from sectool.events import DropReason, now_us
from tests.kernel.datagrams import Echo, connected
from tests.kernel.hosts import Lan
from tests.kernel.test_attacks import keys_of
from tests.kernel.test_flood import GROWTH_KB, HALF_OPEN, ROWS, SPOOFED, STRANGERS, Frames, memory_kb
from tests.kernel.test_flood import program as program
from tests.kernel.wire import MAC, STRANGER

pytestmark = pytest.mark.kernel

SECONDS = 4.0
PATIENCE_S = 3.0  # how long an honest client waits, asking each second again as name resolution does


def frame(lan: Lan, port: int, payload: bytes, vary: int = 0) -> tuple[bytes, int]:
    """A frame for b's leg, and where bytes of its payload may differ."""
    packet = bytes(
        IP(src="10.128.0.1", dst=lan.b.address()) / UDP(sport=1, dport=port, chksum=0) / Raw(payload)
    )
    head = bytes(int(byte, 16) for byte in f"{lan.wire.macs['b']}:{MAC}".split(":")) + b"\x08\0"
    return head + packet, 14 + len(packet) - len(payload) + vary if vary else 0


def bare(lan: Lan, port: int) -> Frames:
    """Data of nobody."""
    return [frame(lan, port, bytes(200), 8)]


def garbage(lan: Lan, port: int) -> Frames:
    """Identities made of random bytes, each another one."""
    hellos = [Hello(KeyPair.generate(), os.urandom(600), now_us(), protocol=PROTOCOL) for _ in range(8)]
    return [frame(lan, port, write(Kind.HELLO, hello.payload), 200) for hello in hellos]


def without_key(lan: Lan, port: int) -> Frames:
    """A genuine credential with an ephemeral key that differs each time, but not the key that belongs to it."""
    thief = KeyPair(KeyPair.generate().private, keys_of(lan.a.identity()).public)
    hello = Hello(thief, lan.a.identity().blob, now_us(), protocol=PROTOCOL)
    return [frame(lan, port, write(Kind.HELLO, hello.payload), 36)]


def unknown_session(lan: Lan, port: int) -> Frames:
    """Session ids that b has never given."""
    return [frame(lan, port, write(Kind.RESUME, bytes((1, 4, 1, 0)) + os.urandom(48)), 22)]


KINDS: tuple[Callable[[Lan, int], Frames], ...] = (bare, garbage, without_key, unknown_session)


@pytest.fixture
def server(lan: Lan) -> Iterator[Echo]:
    """b answers the spoofed addresses by way of somebody on the wire who takes everything."""
    lan.b.space.run("ip", "route", "replace", "10.128.0.0/9", "via", STRANGER[False])
    with lan.b.space.enter():
        rules.install(rules.RulesConfig(strangers=STRANGERS), lan.b.run)
    made = Echo(lan.b)
    assert asked(lan, made, 0.5)[1] > 0
    yield made
    made.close()


def asked(lan: Lan, server: Echo, seconds: float) -> tuple[int, int]:
    """How many new clients asked in that time, and how many were answered."""
    end = time.monotonic() + seconds
    tried = done = 0
    while time.monotonic() < end:
        client = connected(lan.a, lan.b.address(), server.port)
        client.settimeout(1)
        tried += 1
        for _ in range(int(PATIENCE_S)):
            client.send(b"question")
            try:
                done += client.recv(100) == b"question"
                break
            except TimeoutError:
                continue
        client.close()
    return tried, done


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_honest_clients_get_through_a_flood_of_datagrams(
    lan: Lan, server: Echo, program: Path, tmp_path: Path, kind: Callable[[Lan, int], Frames]
) -> None:
    frames = tmp_path / "frames"
    frames.write_bytes(
        b"".join(
            len(data).to_bytes(2, "big") + vary.to_bytes(2, "big") + data
            for data, vary in kind(lan, server.port)
        )
    )
    worker = lan.b.worker.pid
    before, rows, everywhere = memory_kb(worker), len(lan.b.records(server.port)), len(lan.b.records(0))
    argv = (str(program), "leg-b", str(SECONDS), *SPOOFED, str(frames))
    sender = lan.wire.space.popen(*argv, stdout=subprocess.PIPE)
    tried, done = asked(lan, server, SECONDS - 0.5)
    half_open = int(lan.b.status()["half_open"])
    sent = int(sender.communicate()[0])
    assert sent > 10_000, "that was no flood"
    assert done >= 0.8 * tried, f"{done} of {tried} honest questions were answered"
    status = lan.b.status()
    assert memory_kb(worker) - before < GROWTH_KB
    assert half_open <= HALF_OPEN
    assert status["failures"] == 0, status["last_failure"]
    assert status["lost"] == 0
    records = len(lan.b.records(server.port)) - rows + len(lan.b.records(0)) - everywhere
    assert records < ROWS, f"{records} records of {sent} datagrams"
    assert lan.b.count(DropReason.RATE_LIMITED) > 0
    tried, done = asked(lan, server, 0.5)
    assert 0 < done == tried, "something is still wrong when it is over"
