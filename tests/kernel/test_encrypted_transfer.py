"""What goes into an encrypted connection comes out of it, unchanged and unseen, whatever devices do to its segments.

Two sizes can be raised: SECTOOL_TRANSFER_BYTES (each way of every transfer: 10000000000 for a long run), over
SECTOOL_TRANSFER_FLOWS connections at once (loss holds back each of them), and SECTOOL_MARKED_CONNECTIONS (10000).
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import random
import secrets
import signal
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from sectool.events import DropReason, Encryption, Phase
from tests.kernel.conftest import Namespace, wait_until
from tests.kernel.hosts import POLICY, Lan, accept, echo, port_of

pytestmark = pytest.mark.kernel

FAMILIES = pytest.mark.parametrize("v6", [False, True], ids=["v4", "v6"])
ENCRYPTED = POLICY.replace("app=web to call app=db", "app=web to call app=db encrypted")
BYTES = int(os.environ.get("SECTOOL_TRANSFER_BYTES", "0"))
FLOWS = int(os.environ.get("SECTOOL_TRANSFER_FLOWS", "1"))
CONNECTIONS = int(os.environ.get("SECTOOL_MARKED_CONNECTIONS", "200"))
PATIENCE_S = 60.0  # without a byte of progress
CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Devices:
    """How the hosts' devices are set (ethtool -K), what the wire loses, and bytes each way in a usual run."""

    name: str
    host: tuple[str, ...] = ()
    loss: str = ""
    size: int = 48 << 20


WRONG = (DropReason.RECORD_INVALID, DropReason.RECORD_REPLAYED, DropReason.RECORD_MISSING)
LOSS = "meta l4proto tcp numgen random mod 100 < 1"
CASES = (
    Devices("offloads"),  # super-packets of 64 KiB from stack to stack
    Devices(
        "segments", ("tso", "off", "gro", "off")
    ),  # the kernel cuts records into segments, nobody merges them
    Devices("segments-gro", ("tso", "off", "gro", "on")),
    Devices(
        "no-offloads", ("tso", "off", "gso", "off", "gro", "off"), size=8 << 20
    ),  # the stack itself sends segments
    Devices("no-gso-gro", ("tso", "off", "gso", "off", "gro", "on"), size=8 << 20),
    Devices("loss", ("tso", "off", "gro", "off"), LOSS, 4 << 20),
    Devices("loss-gro", ("tso", "off", "gro", "on"), LOSS, 4 << 20),
)


@pytest.fixture(scope="module")
def encrypting(running_lan: Lan) -> Lan:
    """The module's hosts with a policy that asks for encryption, under reno: a pacing default hides their speed."""
    for host in running_lan.hosts:
        host.policy(ENCRYPTED)
        host.space.run("sysctl", "-qw", "net.ipv4.tcp_congestion_control=reno")
    return running_lan


@pytest.fixture
def hosts(encrypting: Lan) -> Iterator[Lan]:
    """These, tidied after each test."""
    yield encrypting
    encrypting.wire.reset()
    for host in encrypting.hosts:
        host.reset(ENCRYPTED)


def _set(space: Namespace, device: str, settings: tuple[str, ...]) -> None:
    if settings:
        space.run("ethtool", "-K", device, *settings)


@contextlib.contextmanager
def devices(lan: Lan, case: Devices) -> Iterator[None]:
    """Set the devices of both hosts, and what the bridge hands them: GRO merges only what it did not cut by itself."""
    everywhere = [
        *((host.space, "eth0") for host in lan.hosts),
        *((lan.wire.space, f"leg-{n}") for n in "ab"),
    ]
    try:
        for space, device in everywhere:
            _set(space, device, case.host if device == "eth0" else case.host[:2])
        yield
    finally:
        for space, device in everywhere:
            _set(space, device, ("tso", "on", "gso", "on", "gro", "off"))


def _received(space: Namespace, device: str) -> tuple[int, int]:
    """Bytes and packets that a device has received."""
    line = next(one for one in space.run("cat", "/proc/net/dev").splitlines() if f"{device}:" in one)
    words = line.partition(":")[2].split()
    return int(words[0]), int(words[1])


def _chunks(total: int, seed: int) -> Iterator[memoryview]:
    """Bytes that never repeat in step with anything, in writes of all sizes."""
    source = random.Random(seed)
    block = memoryview(source.randbytes(2 * CHUNK))
    while total:
        size = min(total, source.choice((1, 100, 1448, 5000, 65536, CHUNK)))
        begin = source.randrange(CHUNK)
        yield block[begin : begin + size]
        total -= size


def _pump(sock: socket.socket, total: int, seed: int) -> str:
    """Send so many bytes and the end of the stream; their SHA-256."""
    digest = hashlib.sha256()
    for chunk in _chunks(total, seed):
        digest.update(chunk)
        rest = memoryview(chunk)
        while rest:  # not sendall, whose patience is for the whole chunk
            rest = rest[sock.send(rest) :]
    sock.shutdown(socket.SHUT_WR)
    return digest.hexdigest()


def _drain(sock: socket.socket) -> tuple[str, int]:
    """Read to the end of the stream; SHA-256 and number of the bytes."""
    digest, total = hashlib.sha256(), 0
    room = memoryview(bytearray(CHUNK))
    while size := sock.recv_into(room):
        digest.update(room[:size])
        total += size
    return digest.hexdigest(), total


@FAMILIES
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_sent_both_ways_at_once_arrives_unchanged(hosts: Lan, case: Devices, v6: bool) -> None:
    lan, total = hosts, (BYTES or case.size) // FLOWS
    forged = [host.count(reason) for host in lan.hosts for reason in WRONG]
    before = _received(lan.b.space, "eth0")
    with devices(lan, case):
        pairs = [lan.establish(v6=v6) for _ in range(FLOWS)]
        ports = [port_of(server) for _, server in pairs]
        ends = [sock for pair in pairs for sock in pair]
        for sock in ends:
            sock.settimeout(PATIENCE_S)
        with (
            lan.wire.losing(case.loss) if case.loss else contextlib.nullcontext(),
            ThreadPoolExecutor(2 * len(ends)) as pool,
        ):
            heard = [pool.submit(_drain, other) for pair in pairs for other in reversed(pair)]
            said = [pool.submit(_pump, sock, total, seed) for seed, sock in enumerate(ends, 1)]
            sent = [future.result() for future in said]
            received = [future.result() for future in heard]
        for sock in ends:
            sock.close()
        for host in lan.hosts:
            for port in ports:
                end = host.event(port, phase=Phase.END)
                assert end["encryption"] == Encryption.ENCRYPTED
    assert received == [(digest, total) for digest in sent]
    assert [host.count(reason) for host in lan.hosts for reason in WRONG] == forged
    after = _received(lan.b.space, "eth0")
    mean = (after[0] - before[0]) / (after[1] - before[1])
    # No frame of a device without offloads is longer. (How much longer they are with them depends on what else runs.)
    assert (mean <= 1514) == bool(case.host), f"{mean:.0f} bytes: the devices were not set as the case says"


# -- nothing of it can be read on the way ------------------------------------------------------------------------


class Capture:
    """tcpdump on a leg of the wire."""

    def __init__(self, lan: Lan, file: Path) -> None:
        self._file = file
        command = (
            "tcpdump",
            "-i",
            "leg-a",
            "-s",
            "0",
            "-B",
            "65536",
            "-U",
            "-Z",
            "root",
            "-w",
            str(file),
            "tcp",
        )
        self._process = lan.wire.space.popen(*command, stderr=subprocess.PIPE)
        assert self._process.stderr is not None
        said = self._process.stderr.readline()
        assert b"listening on" in said, said

    def holds(self, last: bytes) -> None:
        """Wait until something sent last of all is in the file."""
        wait_until(lambda: self.count(last), "the capture to catch up")

    def count(self, what: bytes) -> int:
        """How often the file has these bytes so far."""
        with self._file.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return 0
            found, at = 0, -1
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                while (at := view.find(what, at + 1)) >= 0:
                    found += 1
        return found

    def stop(self) -> tuple[int, int]:
        """End it; how many packets it has, and how many it lost."""
        self._process.send_signal(signal.SIGINT)
        _, said = self._process.communicate(timeout=30)
        numbers = {
            line.split(maxsplit=1)[1]: int(line.split()[0]) for line in said.decode().splitlines() if line
        }
        return numbers["packets captured"], numbers["packets dropped by kernel"]


def _say(lan: Lan, listener: socket.socket, v6: bool, marker: bytes, *, uid: int = 0) -> None:
    """A connection that carries the marker both ways, and is closed."""
    client = lan.a.connect(lan.b.address(v6), port_of(listener), uid=uid)
    server = accept(listener)
    echo(client, server, marker)
    client.close()
    server.close()


def _ends(lan: Lan, port: int, encryption: Encryption) -> int:
    """How many connections to that port the responder saw end, with that encryption."""
    ends = [r for r in lan.b.records(port) if r["phase"] == Phase.END]
    return sum(1 for r in ends if r["encryption"] == encryption)


def test_a_capture_of_many_connections_never_holds_what_they_said(hosts: Lan, tmp_path: Path) -> None:
    lan = hosts
    secret, open_marker = secrets.token_bytes(32), secrets.token_bytes(32)
    listeners = {v6: lan.b.listen(v6=v6) for v6 in (False, True)}
    ports = [port_of(one) for one in listeners.values()]
    capture = Capture(lan, tmp_path / "wire.pcap")
    for number in range(CONNECTIONS):
        v6 = number % 2 == 1
        _say(lan, listeners[v6], v6, secret)
        if number % 500 == 499:  # so that the rings of events never fill
            for host in lan.hosts:
                host.records(0)
    wait_until(
        lambda: sum(_ends(lan, port, Encryption.ENCRYPTED) for port in ports) == CONNECTIONS,
        "the ends of all encrypted connections",
    )
    _say(
        lan, listeners[False], False, open_marker, uid=lan.a.user(app="batch")
    )  # plain, so that a capture shows it
    capture.holds(open_marker)
    captured, lost = capture.stop()
    assert lost == 0
    assert captured >= 7 * CONNECTIONS
    assert capture.count(open_marker) == 2
    assert capture.count(secret) == 0
