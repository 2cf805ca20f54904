"""Floods of SYNs from spoofed addresses, as fast as this machine makes them, while honest clients go on connecting.

The sender (flood.c) puts prebuilt frames on host b's leg of the wire, each from another address that routes back to the
wire, so that what b answers goes out for real.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP
from scapy.packet import Raw

from nfq import rules
from nfq.handshake import Hello
from nfq.noise import KeyPair
from sectool.events import FLAG_COALESCED, DropReason, now_us
from tests.kernel.conftest import wait_until
from tests.kernel.hosts import Lan, port_of
from tests.kernel.test_attacks import HANDSHAKE, PLAIN, keys_of
from tests.kernel.wire import MAC, STRANGER, body

pytestmark = pytest.mark.kernel

SECONDS = 4.0  # of flood; honest clients connect all the while
PATIENCE_S = 5.0  # how long an honest client waits
EVERY_S = 0.04  # between two honest attempts
SPOOFED = ("10.128.0.0", "9")  # 8 million addresses
GROWTH_KB = 64 << 10  # of the worker's memory, at most
HALF_OPEN = 6_000  # what strangers may have open at once
STRANGERS = 150  # the default of stranger_rate
ROWS = 6_000  # records that a flood of hundreds of thousands of packets may leave

Frames = list[tuple[bytes, int]]  # with where eight bytes differ


def syn(
    lan: Lan, port: int, payload: bytes, vary: int = 0, options: list[Any] = HANDSHAKE
) -> tuple[bytes, int]:
    """A frame for b's leg, and where bytes of its payload may differ."""
    segment = TCP(sport=1, dport=port, flags="S", window=60_000, options=list(options))
    packet = bytes(IP(src="10.128.0.1", dst=lan.b.address()) / segment / Raw(payload))
    head = bytes(int(byte, 16) for byte in f"{lan.wire.macs['b']}:{MAC}".split(":")) + b"\x08\0"
    return head + packet, 14 + len(packet) - len(payload) + vary if vary else 0


def garbage(lan: Lan, port: int) -> Frames:
    """Identities made of random bytes, each another one."""
    return [
        syn(lan, port, Hello(KeyPair.generate(), os.urandom(600), now_us()).payload, 200) for _ in range(8)
    ]


def replayed(lan: Lan, port: int) -> Frames:
    """What a itself has sent to b before."""
    tap = lan.wire.tap("b", port)
    with lan.a.connect(lan.b.address(), port):
        sent = tap.next("a's SYN", lambda p: bool(p[TCP].flags == "S"))
    return [syn(lan, port, body(sent))]


def without_key(lan: Lan, port: int) -> Frames:
    """A genuine credential with an ephemeral key that differs each time, but not the key that belongs to it."""
    thief = KeyPair(KeyPair.generate().private, keys_of(lan.a.identity()).public)
    hello = Hello(thief, lan.a.identity().blob, now_us())
    return [syn(lan, port, hello.payload, 20)]


def unknown_session(lan: Lan, port: int) -> Frames:
    """Session ids that b has never given."""
    return [syn(lan, port, bytes((1, 4, 1, 0)) + os.urandom(48), 6)]


def bare(lan: Lan, port: int) -> Frames:
    """No handshake at all."""
    return [syn(lan, port, b"", options=PLAIN)]


KINDS: tuple[Callable[[Lan, int], Frames], ...] = (bare, garbage, replayed, without_key, unknown_session)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sender, built by the system's compiler."""
    source, target = Path(__file__).with_name("flood.c"), tmp_path_factory.mktemp("flood") / "flood"
    argv = ["gcc", "-O2", "-Wall", "-Wextra", "-o", str(target), str(source)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


class Honest:
    """A client at a that connects again and again, and a server at b that says something to each."""

    def __init__(self, lan: Lan) -> None:
        self.lan = lan
        self.listener = lan.b.listen()
        self.port = port_of(self.listener)
        self.served = 0
        self._stop = threading.Event()
        self._server = threading.Thread(target=self._serve, daemon=True)
        self._server.start()

    def _serve(self) -> None:
        self.listener.settimeout(0.05)
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError, OSError):
                connection, _ = self.listener.accept()
                with connection:
                    connection.sendall(b"x")
                    self.served += 1

    def connect(self, seconds: float, look: Callable[[], None] = lambda: None) -> tuple[int, int]:
        """How many attempts were made in that time, and how many got the server's byte before PATIENCE_S.

        `look` is called once in a while.
        """
        begun: dict[socket.socket, float] = {}
        done = tried = 0
        end, due = time.monotonic() + seconds, time.monotonic()
        with selectors.DefaultSelector() as ready:
            while (now := time.monotonic()) < end or begun:
                if due <= now < end:
                    sock = self.lan.a.dial(self.lan.b.address(), self.port)
                    ready.register(sock, selectors.EVENT_READ)
                    begun[sock] = now
                    tried += 1
                    due += EVERY_S
                    if not tried % 25:
                        look()
                for sock in [s for s, since in begun.items() if now - since > PATIENCE_S]:
                    self._over(sock, begun, ready)
                for key, _ in ready.select(0.01):
                    assert isinstance(key.fileobj, socket.socket)
                    with contextlib.suppress(OSError):
                        done += key.fileobj.recv(1) == b"x"
                    self._over(key.fileobj, begun, ready)
        return tried, done

    @staticmethod
    def _over(sock: socket.socket, begun: dict[socket.socket, float], ready: selectors.BaseSelector) -> None:
        ready.unregister(sock)
        del begun[sock]
        sock.close()

    def close(self) -> None:
        """End the server."""
        self._stop.set()
        self._server.join()


@pytest.fixture
def honest(lan: Lan) -> Iterator[Honest]:
    """b answers the spoofed addresses by way of somebody on the wire who takes everything."""
    lan.b.space.run("ip", "route", "replace", "10.128.0.0/9", "via", STRANGER[False])
    with lan.b.space.enter():
        rules.install(rules.RulesConfig(strangers=STRANGERS), lan.b.run)
    made = Honest(lan)
    assert made.connect(0.5)[1] > 0
    yield made
    made.close()


def memory_kb(pid: int) -> int:
    """VmRSS."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_honest_clients_get_through_a_flood(
    lan: Lan, honest: Honest, program: Path, tmp_path: Path, kind: Callable[[Lan, int], Frames]
) -> None:
    frames = tmp_path / "frames"
    frames.write_bytes(
        b"".join(
            len(frame).to_bytes(2, "big") + vary.to_bytes(2, "big") + frame
            for frame, vary in kind(lan, honest.port)
        )
    )
    worker = lan.b.worker.pid
    before = memory_kb(worker)
    rows, anywhere = len(lan.b.records(honest.port)), len(lan.b.records(0))
    turned_away = lan.b.count(DropReason.RATE_LIMITED)
    argv = (str(program), "leg-b", str(SECONDS + PATIENCE_S), *SPOOFED, str(frames))
    sender = lan.wire.space.popen(*argv, stdout=subprocess.PIPE)
    half_open: list[int] = []
    tried, done = honest.connect(SECONDS, lambda: half_open.append(int(lan.b.status()["half_open"])))
    sender.terminate()  # each honest attempt has come through, or was given up
    sent = int(sender.communicate()[0])
    assert sent > 10_000, "that was no flood"
    assert done >= 0.8 * tried, f"{done} of {tried} honest connections came through"

    status = lan.b.status()
    grown = memory_kb(worker) - before
    assert grown < GROWTH_KB, f"the worker has grown by {grown} KiB"
    assert max(half_open) <= HALF_OPEN, half_open
    assert status["failures"] == 0, status["last_failure"]
    assert status["lost"] == 0

    # One record a second tells of what the rules have turned away, and some of what came through.
    wait_until(lambda: lan.b.count(DropReason.RATE_LIMITED) - turned_away > sent // 2, "the count")
    wait_until(
        lambda: _told(lan, anywhere) >= lan.b.count(DropReason.RATE_LIMITED) - turned_away, "the record"
    )
    records = [*lan.b.records(honest.port)[rows:], *lan.b.records(0)[anywhere:]]
    assert len(records) < ROWS, f"{len(records)} records of {sent} packets"

    assert lan.b.status()["queue"]["waiting"] < 100
    tried, done = honest.connect(0.5)
    assert 0 < done == tried, "something is still wrong when it is over"


def _told(lan: Lan, since: int) -> int:
    """How many packets the records say that the kernel rules have turned away."""
    return sum(
        int(record["flow_count"])
        for record in lan.b.records(0)[since:]
        if record["drop_reason"] == DropReason.RATE_LIMITED and record["flags"] & FLAG_COALESCED
    )
