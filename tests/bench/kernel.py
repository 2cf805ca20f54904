"""What one question to the kernel costs: socket lookup, attribution, connection tracking, a queued packet.

Microseconds of process CPU time per call, user and system, in a namespace of its own.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nfq import cgroup, netns
from nfq.attribution import Attributor
from nfq.conntrack import ConntrackControl, FlowTuple
from nfq.ctnetlink import ORIG, REPLY, parse, tuple_attr
from nfq.queue import PacketQueue
from nfq.sockdiag import SockDiag
from tests.bench.rows import Row, row

CALLS = 1000
LOCAL = ipaddress.ip_address("127.0.0.1").packed
QUEUE = 5999
# A listener and a connection to it; says both ports, ends with its standard input.
_PROGRAM = """
import socket, sys
server = socket.create_server(("127.0.0.1", 0))
client = socket.create_connection(server.getsockname())
print(server.getsockname()[1], client.getsockname()[1], flush=True)
sys.stdin.read()
"""


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, capture_output=True)


def _cost(call: Callable[[], object], calls: int = CALLS) -> float:
    begin = time.process_time_ns()
    for _ in range(calls):
        call()
    return (time.process_time_ns() - begin) / 1000 / calls


@contextmanager
def _programs(folder: Path, count: int) -> Iterator[list[tuple[int, int]]]:
    """Some processes of one executable in a cgroup; their ports."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            preexec_fn=lambda: cgroup.join(folder, os.getpid()),
        )
        for _ in range(count)
    ]
    try:
        ports = []
        for process in started:
            assert process.stdout is not None
            listening, connected = map(int, process.stdout.readline().split())
            ports.append((listening, connected))
        yield ports
    finally:
        for process in started:
            process.kill()
            process.wait()


def _packets(queue: PacketQueue, sender: socket.socket) -> float:
    """CPU time to take a packet from the queue and drop it."""
    spent, taken = 0, 0
    while taken < CALLS:
        for _ in range(50):
            sender.sendto(b"x" * 64, ("127.0.0.1", 9))
        begin = time.process_time_ns()
        queue.drain()
        spent += time.process_time_ns() - begin
        taken += 50
    return spent / 1000 / taken


def rows(rounds: int) -> list[Row]:
    """One row per kind of question."""
    folder = cgroup.create(f"/st-bench-{secrets.token_hex(4)}")
    try:
        with netns.throwaway():
            _run("ip", "link", "set", "lo", "up")
            _run("iptables", "-A", "OUTPUT", "-m", "conntrack", "--ctstate", "NEW")
            _run("iptables", "-A", "OUTPUT", "-p", "udp", "-j", "NFQUEUE", "--queue-num", str(QUEUE))
            return _measure(folder, rounds)
    finally:
        cgroup.remove(folder)


def _measure(folder: Path, rounds: int) -> list[Row]:
    diag, control = SockDiag(), ConntrackControl()
    attributor = Attributor(diag)
    queue = PacketQueue(QUEUE, lambda packet: packet.drop())
    made: list[Row] = []

    def add(case: str, measure: Callable[[], float]) -> None:
        made.append(row("kernel", case, "cpu", "µs", [measure() for _ in range(rounds)]))

    try:
        with _programs(folder, 1) as ports:
            _lookups(add, diag, attributor, control, *ports[0])
        with _programs(folder, 8) as ports:
            _crowd(add, attributor, folder, *ports[0])
        add("conntrack event parsed", _parsing())
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            add("packet queued and dropped", lambda: _packets(queue, sender))
    finally:
        queue.close()
        attributor.close()
        diag.close()
        control.close()
    return made


Add = Callable[[str, Callable[[], float]], None]


def _lookups(
    add: Add,
    diag: SockDiag,
    attributor: Attributor,
    control: ConntrackControl,
    listening: int,
    connected: int,
) -> None:
    owner = (LOCAL, connected, LOCAL, listening)
    flow = FlowTuple(LOCAL, LOCAL, connected, listening)
    add("socket lookup", lambda: _cost(lambda: diag.lookup(*owner)))
    add("attribution, 1 process", lambda: _cost(lambda: attributor.incoming(LOCAL, listening, LOCAL, 1)))
    add("conntrack get", lambda: _cost(lambda: control.get(flow)))
    add("conntrack set mark", lambda: _cost(lambda: control.set_mark(flow, 1, 1)))


def _crowd(add: Add, attributor: Attributor, folder: Path, listening: int, _connected: int) -> None:
    owner = (LOCAL, listening, LOCAL, 1)
    add("attribution, 8 processes", lambda: _cost(lambda: attributor.incoming(*owner)))
    with subprocess.Popen(["sleep", "600"]) as other:
        cgroup.join(folder, other.pid)
        add("attribution, mixed cgroup of 9", lambda: _cost(lambda: attributor.incoming(*owner), CALLS // 10))
        other.kill()


def _parsing() -> Callable[[], float]:
    flow = FlowTuple(LOCAL, LOCAL, 1, 2)
    event = tuple_attr(ORIG, flow) + tuple_attr(REPLY, flow.reversed())
    header = (20 + len(event)).to_bytes(4, sys.byteorder) + (0x0102).to_bytes(2, sys.byteorder) + bytes(14)
    assert len(parse(header + event).entries) == 1
    return lambda: _cost(lambda: parse(header + event))
