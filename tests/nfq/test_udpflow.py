"""Tables of datagram flows: bounded, timers in order, flows found by socket; what waits; sockets that are closed."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from nfq.burst import Packet
from nfq.flow import State
from nfq.udpends import cookies
from nfq.udpflow import Denials, UdpFlow, UdpTables
from nfq.waiting import FLOW_BYTES, FLOW_LIMIT, LIMIT, LIMIT_BYTES, TIMEOUT_US, Waiting
from sectool.events import Point


def flow(number: int, socket: int = 0) -> UdpFlow:
    made = UdpFlow(number.to_bytes(12, "big"), False, Point.INITIATOR, State.SYN_SENT, 0)
    made.socket = socket
    return made


@given(dues=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 50)), max_size=40), now=st.integers(0, 60))
def test_a_flow_has_one_timer_the_one_set_last(dues: list[tuple[int, int]], now: int) -> None:
    tables = UdpTables(100, 100)
    flows = [flow(i) for i in range(10)]
    last: dict[int, int] = {}
    for which, due in dues:
        tables.arm(flows[which], due)
        last[which] = due
    running = {i: due for i, due in last.items() if due}
    assert tables.next_us() == min(running.values(), default=None)
    assert {id(f) for f in tables.due(now)} == {id(flows[i]) for i, due in running.items() if due <= now}
    assert tables.next_us() == min((due for due in running.values() if due > now), default=None)


def test_flows_are_found_by_either_socket_until_they_are_over() -> None:
    tables = UdpTables(100, 100)
    first, second = flow(1, 7), flow(2, 7)
    second.peer_socket = 9
    for one in (first, second):
        tables.enter(one)
    assert list(tables.by_socket[7]) == [first.key, second.key]
    assert list(tables.by_socket[9]) == [second.key]
    tables.leave(second)
    assert list(tables.by_socket[7]) == [first.key]
    assert 9 not in tables.by_socket
    tables.leave(first)
    assert not tables.by_socket


def test_denials_are_bounded_and_end() -> None:
    denials = Denials(limit=3)
    for i in range(5):
        denials.add(False, bytes((i,)), 100)
    assert len(denials) == 3
    assert denials.knows(False, b"\4", 99)
    assert not denials.knows(False, b"\4", 100)
    assert not denials.knows(True, b"\4", 99), "each direction by itself"
    assert not denials.knows(False, b"\0", 99), "the oldest gave way"


@given(st.lists(st.integers(0, 100), max_size=50))
def test_never_more_is_answered_than_was_received(sizes: list[int]) -> None:
    denials = Denials()
    denials.add(False, b"k", 100)
    received = answered = 0
    for size in sizes:
        received += size
        if denials.received(b"k", size) >= 52:
            answered += 52
            denials.answered(b"k")
    assert answered <= received


@dataclass
class Queue:
    """Notes verdicts."""

    dropped: list[bytes] = field(default_factory=list)

    def give(self, number: bytes, _verdict: bytes, _mark: int, _packet: bytes | None) -> None:
        self.dropped.append(number)


def packet(queue: Queue, number: int, size: int = 100) -> Packet:
    return Packet(queue, number.to_bytes(4, "big"), 0, bytes(size), True, 0)  # type: ignore[arg-type]


def test_a_flow_keeps_its_first_datagrams_in_order() -> None:
    queue, waiting = Queue(), Waiting()
    for i in range(FLOW_LIMIT + 3):
        waiting.hold(packet(queue, i), "flow", 0)
    assert len(queue.dropped) == waiting.refused == 3
    assert [p._id for p in waiting.take("flow")] == [i.to_bytes(4, "big") for i in range(FLOW_LIMIT)]
    assert (waiting.count, waiting.size) == (0, 0)
    assert waiting.take("flow") == []


def test_the_largest_datagram_waits_and_bytes_are_bounded() -> None:
    queue, waiting = Queue(), Waiting()
    waiting.hold(packet(queue, 1, 65_531), "one", 0)
    waiting.hold(packet(queue, 2, 100), "one", 0)
    assert [p._id for p in waiting.take("one")] == [(1).to_bytes(4, "big")]
    for i in range(LIMIT + 10):
        waiting.hold(packet(queue, i, FLOW_BYTES), i, 0)
    assert waiting.size <= LIMIT_BYTES
    assert waiting.count <= LIMIT


def test_what_waits_too_long_is_dropped() -> None:
    queue, waiting = Queue(), Waiting()
    waiting.hold(packet(queue, 1), "old", 0)
    waiting.hold(packet(queue, 2), "young", TIMEOUT_US // 2)
    waiting.expire(TIMEOUT_US)
    assert queue.dropped == [(1).to_bytes(4, "big")]
    assert len(waiting.take("young")) == 1


@given(st.binary(max_size=400))
def test_destroy_notifications_may_be_anything(data: bytes) -> None:
    assert all(0 <= cookie < 1 << 64 for cookie in cookies(data))
