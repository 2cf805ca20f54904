"""The queue of the packet worker on a real kernel: bursts, verdicts given late, packets replaced, marks of others."""

from __future__ import annotations

import select
import socket
from typing import TYPE_CHECKING

import pytest

from nfq import queue
from nfq.burst import BURST, BurstQueue, Packet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.kernel.conftest import Pair

pytestmark = pytest.mark.kernel
QUEUE, MASK, PASSING, THEIRS = 6400, 0x7000_0000, 0x2000_0000, 0x5


class Traffic:
    """Datagrams from A to B that pass A's queue; `judge` gets each of them."""

    def __init__(self, pair: Pair, judge: Callable[[Packet], None]) -> None:
        with pair.a.enter():
            self.queue = BurstQueue(QUEUE, judge, MASK)
        rules = (
            f"-t mangle -A OUTPUT -p udp -j MARK --or-mark {THEIRS:#x}",
            f"-A OUTPUT -p udp -m mark --mark {PASSING | THEIRS:#x}/0xffffffff -j ACCEPT",
            f"-A OUTPUT -p udp -j NFQUEUE --queue-num {QUEUE}",
        )
        for rule in rules:
            pair.a.run("iptables", *rule.split())
        self.receiver = pair.b.new_socket(kind=socket.SOCK_DGRAM)
        self.receiver.bind((pair.b.v4, 0))
        self.sender = pair.a.new_socket(kind=socket.SOCK_DGRAM)

    def send(self, *bodies: bytes) -> None:
        for body in bodies:
            self.sender.sendto(body, self.receiver.getsockname())

    def received(self) -> list[bytes]:
        """What has arrived: the sender's softirq delivers before the verdict's send returns."""
        out = []
        while select.select([self.receiver], [], [], 0.05)[0]:
            out.append(self.receiver.recv(1 << 16))
        return out


@pytest.fixture
def traffic(pair: Pair) -> Iterator[Callable[[Callable[[Packet], None]], Traffic]]:
    made: list[Traffic] = []

    def make(judge: Callable[[Packet], None]) -> Traffic:
        made.append(Traffic(pair, judge))
        return made[-1]

    yield make
    for one in made:
        one.queue.close()


def test_bursts_are_judged_in_order_and_none_is_lost(
    traffic: Callable[[Callable[[Packet], None]], Traffic],
) -> None:
    seen: list[Packet] = []

    def judge(packet: Packet) -> None:
        seen.append(packet)
        packet.send_on(PASSING)

    made = traffic(judge)
    bodies = [b"%d" % i * (i + 1) for i in range(3 * BURST)]
    made.send(*bodies)
    for expected in (1, 3, 7, 15, 15 + BURST, 15 + 2 * BURST, 3 * BURST):
        made.queue.drain()
        assert len(seen) == expected
    assert [p.data[28:] for p in seen] == bodies
    assert made.received() == bodies
    assert {(p.outbound, p.device > 0) for p in seen} == {(True, True)}
    made.queue.drain(100)
    assert len(seen) == len(bodies), "none came back to the queue: our mark is set and theirs is kept"


def test_dropped_packets_do_not_arrive(
    traffic: Callable[[Callable[[Packet], None]], Traffic], pair: Pair
) -> None:
    def judge(packet: Packet) -> None:
        if packet.data.endswith(b"bad"):
            packet.drop()
        else:
            packet.send_on(PASSING)

    made = traffic(judge)
    made.send(b"bad", b"good", b"bad", b"bad", b"fine")
    made.queue.drain(100)
    assert made.received() == [b"good", b"fine"]
    with pair.a.enter():
        counted = made.queue.counters()
    assert (counted["waiting"], counted["seen"]) == (0, 5)


def test_packets_of_any_size_are_replaced(traffic: Callable[[Callable[[Packet], None]], Traffic]) -> None:
    """Verdicts lie one behind the other in a message: their padding must hold."""

    def judge(packet: Packet) -> None:
        data = bytearray(packet.data)
        data[26:28] = b"\0\0"  # no UDP checksum
        data[28:] = bytes(len(data) - 28).replace(b"\0", b"x")
        packet.send_on(PASSING, memoryview(data))

    made = traffic(judge)
    sizes = [*range(1, 2 * BURST), 1000, 1001, 30_000]
    made.send(*(bytes(n) for n in sizes))
    made.queue.drain(1000)
    assert [len(body) for body in made.received() if set(body) == {0x78}] == sizes


def test_a_verdict_may_come_late_while_others_pass(
    traffic: Callable[[Callable[[Packet], None]], Traffic],
) -> None:
    held: list[Packet] = []

    def judge(packet: Packet) -> None:
        if packet.data.endswith(b"wait"):
            held.append(packet)
        else:
            packet.send_on(PASSING)

    made = traffic(judge)
    made.send(b"wait", b"go", b"wait")
    made.queue.drain(100)
    assert made.received() == [b"go"]
    for packet in reversed(held):
        packet.send_on(PASSING)
    assert made.received() == [], "not before the flush"
    made.queue.flush()
    assert made.received() == [b"wait", b"wait"]


def test_a_second_verdict_disturbs_nothing(traffic: Callable[[Callable[[Packet], None]], Traffic]) -> None:
    def judge(packet: Packet) -> None:
        packet.send_on(PASSING)
        packet.drop()

    made = traffic(judge)
    made.send(b"once")
    made.queue.drain(100)
    assert made.received() == [b"once"]
    made.send(b"again")
    made.queue.drain(100)  # reads the kernel's complaint first
    assert made.received() == [b"again"]


def test_closing_frees_the_number(traffic: Callable[[Callable[[Packet], None]], Traffic], pair: Pair) -> None:
    made = traffic(lambda packet: packet.drop())
    with pair.a.enter():
        assert queue.bound_by(QUEUE) is not None
        made.queue.close()
        assert queue.bound_by(QUEUE) is None
