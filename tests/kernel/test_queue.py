"""The queue binding on a real kernel: holding packets, big packets, many packets, and its errors."""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest

from nfq import queue
from nfq.packet import Segment
from nfq.queue import PacketQueue, QueuedPacket
from sectool.errors import SectoolError
from tests.kernel.conftest import Decide, Enforcer, Namespace, Pair, pass_once, wait_until

pytestmark = pytest.mark.kernel

Enforce = Callable[[Namespace, Decide], Enforcer]


def test_a_held_packet_gets_its_verdict_later_while_others_pass(pair: Pair, enforce: Enforce) -> None:
    held: list[QueuedPacket] = []
    slow = pair.b.listen()
    slow_port = slow.getsockname()[1]

    def decide(enforcer: Enforcer, packet: QueuedPacket, segment: Segment) -> None:
        if segment.destination_port == slow_port:
            packet.retain()
            held.append(packet)
        else:
            pass_once(enforcer, packet, segment)

    enforcer = enforce(pair.a, decide)
    waiting = pair.a.new_socket()
    waiting.setblocking(False)
    assert waiting.connect_ex((pair.b.v4, slow_port)) != 0
    wait_until(lambda: held, "the SYN to be held")
    other = pair.b.listen()
    for _ in range(20):  # 20 connections overtake it
        pair.a.connect(pair.b.v4, other.getsockname()[1])
    assert len(held) == 1
    assert held[0].get_payload(), "the bytes stay available"
    enforcer.decide = pass_once
    queue.release(held[0], enforcer.config.marks.passing, enforcer.config.mask)
    _, writable, _ = select.select([], [waiting], [], 5)
    assert writable
    assert waiting.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    with pytest.raises(RuntimeError, match="already"):
        held[0].drop()


@pytest.mark.parametrize("gso", [False, True])
def test_packets_larger_than_the_library_buffer_arrive_whole(pair: Pair, gso: bool) -> None:
    sizes: list[int] = []

    def callback(packet: QueuedPacket) -> None:
        sizes.append(packet.get_payload_len())
        packet.accept()

    number = 6000 + gso
    with pair.a.enter():
        bound = PacketQueue(number, callback, gso=gso)
    pair.a.run(
        "iptables", "-A", "OUTPUT", "-p", "tcp", "--dport", "7", "-j", "NFQUEUE", "--queue-num", str(number)
    )
    pair.a.run("ip", "link", "set", "eth0", "mtu", "9000")
    pair.b.run("ip", "link", "set", "eth0", "mtu", "9000")
    server = pair.b.listen(port=7)
    client = pair.a.new_socket()
    client.setblocking(False)
    client.connect_ex((pair.b.v4, 7))
    sent = received = 0
    payload = bytes(200_000)
    peer: socket.socket | None = None
    with select.epoll() as poll:
        poll.register(bound.fd, select.EPOLLIN)
        server.setblocking(False)

        def step() -> bool:
            nonlocal sent, received, peer
            poll.poll(0.01)
            bound.drain()
            if peer is None:
                try:
                    peer, _ = server.accept()
                    peer.setblocking(False)
                except BlockingIOError:
                    return False
            if sent < len(payload):
                with contextlib.suppress(BlockingIOError):
                    sent += client.send(payload[sent:])
            with contextlib.suppress(BlockingIOError):
                received += len(peer.recv(1 << 20))
            return received == len(payload)

        wait_until(step, "200,000 bytes to arrive")
    if peer is not None:
        peer.close()
    bound.close()
    # Without GSO the kernel cuts segments to the MTU before queueing; with it super-packets come as they are.
    assert max(sizes) > (20_000 if gso else 8_000)
    assert max(sizes) <= (65_535 if gso else 9_000)


def test_drain_takes_no_more_than_asked_and_never_blocks(pair: Pair) -> None:
    seen: list[int] = []

    def callback(packet: QueuedPacket) -> None:
        seen.append(packet.id)
        packet.drop()

    with pair.a.enter():
        bound = PacketQueue(6100, callback)
        pair.a.run("iptables", "-A", "OUTPUT", "-p", "udp", "-j", "NFQUEUE", "--queue-num", "6100")
        bound.drain()
        assert seen == []
        sender = pair.a.new_socket(kind=socket.SOCK_DGRAM)
        for _ in range(10):
            sender.sendto(b"x", (pair.b.v4, 9))
        assert bound.counters()["waiting"] == 10
        bound.drain(4)
        assert len(seen) == 4
        bound.drain()
        assert len(seen) == 10
        counted = bound.counters()
        assert (counted["waiting"], counted["dropped"], counted["user_dropped"], counted["seen"]) == (
            0,
            0,
            0,
            10,
        )
        bound.close()
        assert queue.bound_by(6100) is None


def test_a_full_queue_drops_and_counts(pair: Pair) -> None:
    with pair.a.enter():
        bound = PacketQueue(6200, lambda packet: packet.accept(), length=5)
        pair.a.run("iptables", "-A", "OUTPUT", "-p", "udp", "-j", "NFQUEUE", "--queue-num", "6200")
        receiver = pair.b.new_socket(kind=socket.SOCK_DGRAM)
        receiver.bind((pair.b.v4, 0))
        sender = pair.a.new_socket(kind=socket.SOCK_DGRAM)
        for _ in range(8):
            sender.sendto(b"x", receiver.getsockname())
        assert bound.counters()["dropped"] == 3
        bound.drain()
        for _ in range(5):
            receiver.recv(10)
        receiver.setblocking(False)
        with pytest.raises(BlockingIOError):  # fail closed: what was too much did not pass
            receiver.recv(10)
        bound.close()


def test_what_the_callback_raises_comes_out_of_drain_and_the_queue_lives_on(pair: Pair) -> None:
    calls: list[int] = []

    def callback(packet: QueuedPacket) -> None:
        calls.append(1)
        packet.drop()
        if len(calls) == 1:
            raise ValueError("a defect")

    with pair.a.enter():
        bound = PacketQueue(6300, callback)
    pair.a.run("iptables", "-A", "OUTPUT", "-p", "udp", "-j", "NFQUEUE", "--queue-num", "6300")
    sender = pair.a.new_socket(kind=socket.SOCK_DGRAM)
    for _ in range(3):
        sender.sendto(b"x", (pair.b.v4, 9))
    with pytest.raises(ValueError, match="a defect"):
        bound.drain()
    bound.drain()
    assert len(calls) == 3
    bound.close()


def test_a_number_that_is_taken_is_told(namespace: Namespace) -> None:
    with namespace.enter():
        bound = PacketQueue(6400, lambda packet: packet.drop())
        assert queue.bound_by(6400) is not None
        with pytest.raises(SectoolError, match="6400 is taken") as caught:
            PacketQueue(6400, lambda packet: packet.drop())
        assert "queue:" in caught.value.hint
        bound.close()


def test_without_privilege_it_says_so(namespace: Namespace) -> None:
    code = (
        "import os; os.setgid(65534); os.setuid(65534)\n"
        "from nfq.queue import PacketQueue\n"
        "from sectool.errors import SectoolError\n"
        "try: PacketQueue(1, print)\n"
        "except SectoolError as e: print(type(e).__name__, '|', e.hint)\n"
    )
    with namespace.enter():
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("PrivilegeError | run as root"), done.stderr
