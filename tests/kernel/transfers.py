"""Many transfers at once, both ways, that go on until told to stop; and a watch on the counters of their records.

Every end sends bytes that depend on the connection, its direction and their position, and takes the SHA-256 of what it
sends and of what it gets: at the end each pair has to agree.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Final

from nfq.frame import RECORD_HEAD
from tests.kernel.conftest import Namespace, wait_until

CHUNK: Final = 1 << 16
_BLOCK: Final = random.Random(20).randbytes(1 << 20) * 2
_IDLE_MS: Final = 100
_BURST_S: Final = 0.1  # of the rate, at once
RATE: Final = float(
    os.environ.get("SECTOOL_SURVIVAL_RATE", "5e6")
)  # leaves processors to those who have to come back


@dataclass
class End:
    """One end of one connection. `seed`: of the bytes it sends."""

    sock: socket.socket
    fd: int
    seed: int
    sent: int = 0
    got: int = 0
    pending: memoryview = field(default_factory=lambda: memoryview(b""))
    sent_sum: hashlib._Hash = field(default_factory=hashlib.sha256)
    got_sum: hashlib._Hash = field(default_factory=hashlib.sha256)
    closed: bool = False  # its own direction
    over: bool = False  # the other's
    error: str = ""

    def next_chunk(self) -> memoryview:
        """What follows what was sent so far; a chunk of a length of its own."""
        mixed = (self.sent * 2_654_435_761 + self.seed * 40_503) & 0xFFFFFFFF
        begin, size = mixed % (1 << 20), 1 + mixed * 7 % CHUNK
        return memoryview(_BLOCK)[begin : begin + size]


class Transfers:
    """A thread that keeps all connections busy. `pairs`: client and server sockets; `rate`: bytes a second, of all."""

    def __init__(self, pairs: list[tuple[socket.socket, socket.socket]], rate: float = RATE) -> None:
        self._rate = rate
        self.pairs: list[tuple[End, End]] = []
        for number, (client, server) in enumerate(pairs):
            for sock in (client, server):
                sock.setblocking(False)
            first, second = client.fileno(), server.fileno()
            self.pairs.append((End(client, first, 2 * number), End(server, second, 2 * number + 1)))
        self._ends = {end.fd: end for pair in self.pairs for end in pair}
        self._stopping = False
        self._moved = 0
        self._room = memoryview(bytearray(CHUNK * 4))
        self._thread = threading.Thread(target=self._run, name="transfers", daemon=True)

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread.start()

    def _run(self) -> None:
        poll = select.epoll()
        for fd in self._ends:
            poll.register(fd, select.EPOLLIN | select.EPOLLOUT)
        left = set(self._ends)
        due, counted = time.monotonic(), 0
        while left:
            # What could not move while an enforcer was away is not made up for: just then processors are needed most.
            due = max(due, time.monotonic() - _BURST_S) + (self._moved - counted) / self._rate
            counted = self._moved
            ahead = due - time.monotonic()
            if ahead > 0:
                threading.Event().wait(min(ahead, 0.1))
            for fd, events in poll.poll(_IDLE_MS / 1000):
                end = self._ends[fd]
                try:
                    if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                        self._receive(end)
                    if events & select.EPOLLOUT and not end.closed:
                        self._send(end)
                except OSError as error:
                    end.error = str(error)
                    end.closed = end.over = True
                if end.closed and end.over:
                    poll.unregister(fd)
                    left.discard(fd)
                elif end.closed:
                    poll.modify(fd, select.EPOLLIN)
        poll.close()

    def _receive(self, end: End) -> None:
        with contextlib.suppress(BlockingIOError):
            size = end.sock.recv_into(self._room)
            if not size:
                end.over = True
            end.got_sum.update(self._room[:size])
            end.got += size
            self._moved += size

    def _send(self, end: End) -> None:
        if not end.pending:
            if self._stopping:
                end.sock.shutdown(socket.SHUT_WR)
                end.closed = True
                return
            end.pending = end.next_chunk()
        with contextlib.suppress(BlockingIOError):
            size = end.sock.send(end.pending)
            end.sent_sum.update(end.pending[:size])
            end.sent += size
            end.pending = end.pending[size:]

    @property
    def bytes(self) -> int:
        """Received so far, by all."""
        return sum(end.got for pair in self.pairs for end in pair)

    def errors(self) -> list[str]:
        """What went wrong, and between whom."""
        return [
            f"connection {number}, {side}: {end.error}"
            for number, pair in enumerate(self.pairs)
            for side, end in zip(("client", "server"), pair, strict=True)
            if end.error
        ]

    def progress(self, size: int, deadline_s: float) -> None:
        """Wait until every end has received `size` bytes more than now."""
        before = {fd: end.got for fd, end in self._ends.items()}

        def behind() -> int:
            return sum(end.got < before[fd] + size for fd, end in self._ends.items())

        with contextlib.suppress(AssertionError):
            wait_until(lambda: not behind() or self.errors(), "progress", deadline_s)
        assert not self.errors(), self.errors()[:5]
        still = [
            f"connection {number}, {side}: {end.got - before[end.fd]} bytes"
            for number, pair in enumerate(self.pairs)
            for side, end in zip(("client", "server"), pair, strict=True)
            if end.got < before[end.fd] + size
        ]
        assert not still, f"{len(still)} of {len(self._ends)} ends stand still after {deadline_s} s: {still}"

    def finish(self, deadline_s: float) -> int:
        """End all streams and compare; how many bytes arrived. Fails the test if a single one is wrong or missing."""
        self._stopping = True
        self._thread.join(deadline_s)
        assert not self.errors(), self.errors()[:5]
        assert not self._thread.is_alive(), f"not all streams have ended within {deadline_s} s"
        for number, (client, server) in enumerate(self.pairs):
            for sender, receiver in ((client, server), (server, client)):
                assert sender.sent == receiver.got, f"connection {number}: bytes are missing"
                assert sender.sent_sum.digest() == receiver.got_sum.digest(), (
                    f"connection {number}: wrong bytes"
                )
        return self.bytes


# -- counters on the wire ----------------------------------------------------------------------------------------------

_RECORD: Final = RECORD_HEAD.to_bytes(4, "big")  # kind and length alone also turn up within timestamps
_SNAP: Final = 160  # bytes of a frame: its headers


@dataclass
class Counters:
    """What a capture says about the records of one direction of one flow."""

    records: dict[int, bytes] = field(default_factory=dict)  # counter -> start, length and tag
    reused: list[int] = field(default_factory=list)  # counters seen with two contents

    def leaps(self) -> int:
        """How often the counter went ahead by more than a lost packet would explain."""
        ordered = sorted(self.records)
        return sum(after - before > 1 << 15 for before, after in pairwise(ordered))


class CounterWatch:
    """tcpdump on a leg of the wire, headers only."""

    def __init__(self, space: Namespace, device: str, file: Path) -> None:
        self._file = file
        self._process = space.popen(
            *(
                "tcpdump",
                "-i",
                device,
                "-s",
                str(_SNAP),
                "-B",
                "131072",
                "-Z",
                "root",
                "-w",
                str(file),
                "tcp",
            ),
            stderr=subprocess.PIPE,
        )
        assert self._process.stderr is not None
        said = self._process.stderr.readline()
        assert b"listening on" in said, said

    def stop(self) -> tuple[dict[bytes, Counters], int]:
        """Counters by flow and direction (addresses and ports as on the wire); how many packets the capture lost."""
        self._process.send_signal(signal.SIGINT)
        _, said = self._process.communicate(timeout=60)
        lost = next(
            int(line.split()[0]) for line in said.decode().splitlines() if "dropped by kernel" in line
        )
        return read_counters(self._file), lost


def read_counters(file: Path) -> dict[bytes, Counters]:
    """All record options in a capture, except for proofs (counter 0)."""
    out: dict[bytes, Counters] = defaultdict(Counters)
    data = memoryview(file.read_bytes())
    head = struct.Struct("<IIII")
    at = 24
    while at + 16 <= len(data):
        size = head.unpack_from(data, at)[2]
        _frame(data[at + 16 : at + 16 + size], out)
        at += 16 + size
    return out


def _frame(frame: memoryview, out: dict[bytes, Counters]) -> None:
    ip = frame[14:]
    if ip[0] >> 4 == 4:
        tcp, addresses = ip[(ip[0] & 15) * 4 :], bytes(ip[12:20])
    else:
        tcp, addresses = ip[40:], bytes(ip[8:40])
    options = bytes(tcp[20 : (tcp[12] >> 4) * 4])
    found = options.find(_RECORD)
    if found < 0 or len(options) < found + 28:
        return
    option = options[found : found + 28]
    counter = int.from_bytes(option[4:8], "big")
    if not counter:
        return
    flow = out[addresses + bytes(tcp[:4])]
    before = flow.records.setdefault(counter, option[8:])
    if before != option[8:]:
        flow.reused.append(counter)


def environment_size(default: int) -> int:
    """How many transfers of each kind: SECTOOL_SURVIVAL_FLOWS, for long runs."""
    return int(os.environ.get("SECTOOL_SURVIVAL_FLOWS", str(default)))
