"""Throwaway network namespaces for kernel tests.

Every namespace is named `st-<hex>-<role>`; those older than an hour, left by a killed run, are swept at the start.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import selectors
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from nfq import netns, rules
from nfq.adoption import adopt_established
from nfq.packet import Segment, parse
from nfq.queue import LOCAL_OUT, PacketQueue, QueuedPacket, release
from nfq.raw import RawSender
from tests import preloaded

NETNS = Path("/run/netns")
PREFIX = "st-"
STALE_S = 3600
DEADLINE_S = 25.0


def run(*argv: str, stdin: str | None = None) -> str:
    """A command in the calling thread's namespace; its standard output. Fails the test with its own words."""
    done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr or done.stdout}"
    return done.stdout


def wait_until(condition: Callable[[], object], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Poll a condition until it is truthy; fail after the deadline. A condition that costs much is asked less often."""
    end = time.monotonic() + deadline_s
    pause = selectors.DefaultSelector()  # an empty selector is a pause without busy waiting
    with pause:
        while True:
            began = time.monotonic()
            if condition():
                return
            assert time.monotonic() < end, f"waited {deadline_s} s in vain for {what}"
            pause.select(min(0.5, max(0.005, time.monotonic() - began)))


@dataclass
class Namespace:
    """One namespace with its addresses on eth0."""

    name: str
    v4: str = ""
    v6: str = ""
    opened: list[socket.socket] = field(default_factory=list)
    started: list[subprocess.Popen[bytes] | preloaded.Forked] = field(default_factory=list)

    @property
    def path(self) -> Path:
        """What netns.enter takes."""
        return NETNS / self.name

    def enter(self) -> contextlib.AbstractContextManager[None]:
        """Be in this namespace for a block."""
        return netns.enter(self.path)

    def run(self, *argv: str, stdin: str | None = None) -> str:
        """Run a program to its end inside."""
        with self.enter():
            return run(*argv, stdin=stdin)

    def popen(self, *argv: str, **kwargs: object) -> subprocess.Popen[bytes]:
        """Start a program inside; it is killed at the end of the test."""
        with self.enter():
            process: subprocess.Popen[bytes] = subprocess.Popen(argv, **kwargs)  # type: ignore[call-overload]
        self.started.append(process)
        return process

    def new_socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A socket of this namespace with a timeout; closed at the end of the test."""
        with self.enter():
            sock = socket.socket(family, kind)
        sock.settimeout(DEADLINE_S)
        self.opened.append(sock)
        return sock

    def listen(
        self, address: str = "", port: int = 0, *, v6: bool = False, dual: bool = False
    ) -> socket.socket:
        """A listening TCP socket on an address (default: the wildcard)."""
        sock = self.new_socket(socket.AF_INET6 if v6 else socket.AF_INET)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if v6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if dual else 1)
        sock.bind((address or ("::" if v6 else "0.0.0.0"), port))
        sock.listen(64)
        return sock

    def connect(self, address: str, port: int) -> socket.socket:
        """A connection from here."""
        sock = self.new_socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        sock.connect((address, port))
        return sock

    def close(self) -> None:
        """End what was started and opened here."""
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.wait()
        for sock in self.opened:
            sock.close()


@dataclass
class Pair:
    """Two namespaces joined by a veth: 10.77.0.1/fd77::1 and 10.77.0.2/fd77::2."""

    a: Namespace
    b: Namespace


def _sweep() -> None:
    if not NETNS.is_dir():
        return
    for entry in NETNS.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            # The mount keeps the namespace's inode, and with it the time it was made.
            if time.time() - entry.lstat().st_ctime > STALE_S:
                subprocess.run(["ip", "netns", "del", entry.name], capture_output=True, check=False)


@pytest.fixture(scope="session", autouse=True)
def _preloaded() -> None:
    """Commands are forked from a process that starts here, outside what tests make."""
    preloaded.start()


@pytest.fixture(scope="session", autouse=True)
def swept() -> None:
    """Remove namespaces of runs that were killed long ago."""
    _sweep()


@contextlib.contextmanager
def make_namespace(role: str, token: str | None = None) -> Iterator[Namespace]:
    """A namespace with its loopback device up."""
    space = Namespace(f"{PREFIX}{token or secrets.token_hex(4)}-{role}")
    run("ip", "netns", "add", space.name)
    try:
        space.run("ip", "link", "set", "lo", "up")
        yield space
    finally:
        space.close()
        subprocess.run(["ip", "netns", "del", space.name], capture_output=True, check=False)


@contextlib.contextmanager
def make_pair() -> Iterator[Pair]:
    """Two namespaces joined by a veth, IPv4 and IPv6."""
    token = secrets.token_hex(4)
    with make_namespace("a", token) as a, make_namespace("b", token) as b:
        a.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", b.name)
        for number, space in enumerate((a, b), 1):
            space.v4, space.v6 = f"10.77.0.{number}", f"fd77::{number}"
            space.run("ip", "addr", "add", f"{space.v4}/24", "dev", "eth0")
            space.run("ip", "addr", "add", f"{space.v6}/64", "dev", "eth0", "nodad")
            space.run("ip", "link", "set", "eth0", "address", f"02:00:00:00:00:0{number}", "up")
        for space, other, number in ((a, b, 2), (b, a, 1)):
            # Known beforehand: right after a link comes up the first IPv6 neighbour discovery can take a second.
            for address in (other.v4, other.v6):
                space.run(
                    "ip", "neigh", "replace", address, "lladdr", f"02:00:00:00:00:0{number}", "dev", "eth0"
                )
        yield Pair(a, b)


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    """One empty namespace."""
    with make_namespace("one") as space:
        yield space


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two namespaces joined by a veth."""
    with make_pair() as both:
        yield both


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """An empty cgroup v2 group for this test's processes; removed at the end, with what was made below it."""
    from nfq.cgroup import mount

    folder = mount() / f"{PREFIX}{os.getpid()}-{secrets.token_hex(4)}"
    folder.mkdir()
    try:
        yield folder
    finally:
        for inner in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
            inner.rmdir()
        wait_until(lambda: not (folder / "cgroup.procs").read_text(), "the test's processes to end")
        folder.rmdir()


Decide = Callable[["Enforcer", QueuedPacket, Segment], None]


def allow(enforcer: Enforcer, packet: QueuedPacket, _segment: Segment) -> None:
    """Release the connection."""
    release(packet, enforcer.config.marks.allowed, enforcer.config.mask)


def pass_once(enforcer: Enforcer, packet: QueuedPacket, _segment: Segment) -> None:
    """Let this packet pass, and no other."""
    release(packet, enforcer.config.marks.passing, enforcer.config.mask)


def deny(_enforcer: Enforcer, packet: QueuedPacket, _segment: Segment) -> None:
    """Drop it."""
    packet.drop()


class Enforcer:
    """The real rules and queue in a namespace, and a thread that lets `decide` judge each packet."""

    def __init__(
        self,
        space: Namespace,
        decide: Decide,
        config: rules.RulesConfig | None = None,
        *,
        adopt: bool = False,
    ) -> None:
        self.space = space
        self.decide = decide
        self.config = config or rules.RulesConfig(beyond_tcp=False)
        self.run = Path(tempfile.mkdtemp(prefix="sectool-test-"))
        self.seen: list[tuple[int, Segment, int]] = []  # hook, segment, mark
        self.failures: list[BaseException] = []
        self._stop = threading.Event()
        with space.enter():
            self.queue = PacketQueue(self.config.queue, self._packet)
            self.raw = RawSender()
            self.adopted = adopt_established(self.config, self.run) if adopt else []
            rules.install(self.config, self.run)
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def _packet(self, packet: QueuedPacket) -> None:
        segment = parse(packet.get_payload(), packet.hook == LOCAL_OUT)
        self.seen.append((packet.hook, segment, packet.mark))
        self.decide(self, packet, segment)

    def _loop(self) -> None:
        with select.epoll() as poll:
            poll.register(self.queue.fd, select.EPOLLIN)
            while not self._stop.is_set():
                if poll.poll(0.05):
                    try:
                        self.queue.drain()
                    except BaseException as e:
                        self.failures.append(e)

    def flags(self, hook: int | None = None) -> list[int]:
        """TCP flags of the packets that were queued."""
        return [segment.flags for where, segment, _ in self.seen if hook in (None, where)]

    def close(self) -> None:
        """Stop judging and take the rules away."""
        self._stop.set()
        self._thread.join()
        self.queue.close()
        self.raw.close()
        with self.space.enter():
            rules.remove(self.run)
        self.run.rmdir()
        assert not self.failures, self.failures


@pytest.fixture
def enforce() -> Iterator[Callable[[Namespace, Decide], Enforcer]]:
    """Put a namespace under enforcement until the test ends."""
    made: list[Enforcer] = []

    def start(space: Namespace, decide: Decide) -> Enforcer:
        made.append(Enforcer(space, decide))
        return made[-1]

    yield start
    for enforcer in made:
        enforcer.close()


from tests.kernel.hosts import lan as lan  # noqa: E402  hosts.py itself imports from above
from tests.kernel.hosts import running_lan as running_lan  # noqa: E402
