"""Rules for what is not TCP: judged, left alone so that the network works, or dropped."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nfq import rules
from nfq.ip import header
from nfq.queue import PacketQueue, QueuedPacket, release
from tests.kernel.conftest import Namespace, Pair, wait_until

pytestmark = pytest.mark.kernel

FAMILIES = pytest.mark.parametrize("family", ["v4", "v6"])
SHORT_S = 0.1
GRE, IGMP, UDP, ICMP6 = 47, 2, 17, 58
GROUP = "239.77.7.7"


class Watch:
    """The rules in a namespace, and a listener on its normal queue that decides by IP protocol."""

    def __init__(self, space: Namespace, *, others: tuple[int, ...] = ()) -> None:
        self.config = rules.RulesConfig(others=others)
        self.space = space
        self.seen: list[tuple[int, bytes]] = []  # IP protocol, what follows the IP header
        self.verdict: int | None = None  # our mark; None: drop
        self._run = Path(tempfile.mkdtemp(prefix="sectool-test-"))
        self._stop = threading.Event()
        with space.enter():
            self._queue = PacketQueue(self.config.queue, self._packet)
            rules.install(self.config, self._run)
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def _packet(self, packet: QueuedPacket) -> None:
        data = packet.get_payload()
        found = header(data)
        self.seen.append((found.protocol, data[found.off :]))
        if self.verdict is None:
            packet.drop()
        else:
            release(packet, self.verdict, self.config.mask)

    def _loop(self) -> None:
        with select.epoll() as poll:
            poll.register(self._queue.fd, select.EPOLLIN)
            while not self._stop.is_set():
                if poll.poll(0.02):
                    self._queue.drain()

    def of(self, protocol: int) -> list[bytes]:
        """What was judged of an IP protocol."""
        return [body for number, body in self.seen if number == protocol]

    def passed(self, words: str, tool: str = "iptables") -> int:
        """Packets that a rule with these words has counted."""
        saved = self.space.run(f"{tool}-save", "-c", "-t", "mangle").splitlines()
        lines = [line for line in saved if words in line]
        assert lines, words
        return sum(int(line[1:].split(":")[0]) for line in lines)

    def close(self) -> None:
        """No more judging, no more rules."""
        self._stop.set()
        self._thread.join()
        self._queue.close()
        with self.space.enter():
            rules.remove(self._run)
        self._run.rmdir()


@pytest.fixture
def watch(pair: Pair) -> Iterator[Watch]:
    """Namespace a under rules."""
    made = Watch(pair.a)
    yield made
    made.close()


def address(space: Namespace, family: str) -> str:
    """The namespace's address."""
    return space.v4 if family == "v4" else space.v6


def datagram_socket(space: Namespace, family: str, port: int = 0) -> socket.socket:
    """A bound UDP socket."""
    sock = space.new_socket(socket.AF_INET if family == "v4" else socket.AF_INET6, socket.SOCK_DGRAM)
    sock.bind((address(space, family), port))
    return sock


def silent(sock: socket.socket) -> bool:
    """Nothing arrives for a moment."""
    sock.settimeout(SHORT_S)
    try:
        sock.recv(100)
    except TimeoutError:
        return True
    finally:
        sock.settimeout(10)
    return False


@FAMILIES
def test_datagrams_are_judged_both_ways(pair: Pair, watch: Watch, family: str) -> None:
    here, there = datagram_socket(pair.a, family), datagram_socket(pair.b, family)
    here.sendto(b"out", there.getsockname())
    there.sendto(b"in", here.getsockname())
    assert silent(there)
    assert silent(here)
    assert sorted(body[8:] for body in watch.of(UDP)) == [b"in", b"out"]


@FAMILIES
def test_a_released_flow_of_datagrams_is_not_asked_about_again(pair: Pair, watch: Watch, family: str) -> None:
    watch.verdict = watch.config.marks.allowed
    here, there = datagram_socket(pair.a, family), datagram_socket(pair.b, family)
    for n in range(3):
        here.sendto(b"ask %d" % n, there.getsockname())
        assert there.recv(100) == b"ask %d" % n
        there.sendto(b"say %d" % n, here.getsockname())
        assert here.recv(100) == b"say %d" % n
    assert [body[8:] for body in watch.of(UDP)] == [b"ask 0"]


def test_a_mark_of_a_program_counts_for_nothing(pair: Pair, watch: Watch) -> None:
    here, there = datagram_socket(pair.a, "v4"), datagram_socket(pair.b, "v4")
    for bits in ("allowed", "passing", "encrypted", "mask"):
        mark = watch.config.mask if bits == "mask" else getattr(watch.config.marks, bits)
        here.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        here.sendto(bits.encode(), there.getsockname())
    assert silent(there)
    assert len(watch.of(UDP)) == 4


def test_neighbours_find_each_other_unasked(pair: Pair, watch: Watch) -> None:
    """Solicitation and advertisement, both directions."""
    watch.verdict = watch.config.marks.allowed
    for space in (pair.a, pair.b):
        space.run("ip", "-6", "neigh", "flush", "dev", "eth0", "nud", "all")
        space.run("ip", "neigh", "flush", "dev", "eth0", "nud", "all")
    for family in ("v4", "v6"):
        here, there = datagram_socket(pair.a, family), datagram_socket(pair.b, family)
        here.sendto(b"who are you", there.getsockname())
        assert there.recv(100) == b"who are you"
    assert watch.of(ICMP6) == []
    # Both hosts have asked or been asked: type 135 and 136.
    kinds = [watch.passed(f"--icmpv6-type {kind} ", "ip6tables") for kind in (135, 136)]
    assert min(kinds) > 0, kinds


def test_groups_are_joined_and_left_unasked(pair: Pair, watch: Watch) -> None:
    four, six = datagram_socket(pair.a, "v4"), datagram_socket(pair.a, "v6")
    with pair.a.enter():
        index = socket.if_nametoindex("eth0")
    request = socket.inet_aton(GROUP) + socket.inet_aton(pair.a.v4)
    four.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, request)
    joined = socket.inet_pton(socket.AF_INET6, "ff15::7777") + struct.pack("=I", index)
    six.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, joined)
    wait_until(lambda: watch.passed("-p igmp "), "a membership report to leave")
    wait_until(lambda: watch.passed("--icmpv6-type 143 ", "ip6tables"), "an IPv6 membership report to leave")
    assert watch.of(IGMP) == []
    assert watch.of(ICMP6) == []


@pytest.mark.parametrize(("family", "client", "server"), [("v4", 68, 67), ("v6", 546, 547)])
def test_an_address_is_leased_unasked(
    pair: Pair, watch: Watch, family: str, client: int, server: int
) -> None:
    here, there = datagram_socket(pair.a, family, client), datagram_socket(pair.b, family, server)
    here.sendto(b"discover", there.getsockname())
    assert there.recv(100) == b"discover"
    there.sendto(b"offer", here.getsockname())
    assert here.recv(100) == b"offer"
    assert watch.seen == []


def test_an_address_is_asked_for_by_who_has_none(pair: Pair, watch: Watch) -> None:
    sock = pair.a.new_socket(kind=socket.SOCK_DGRAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
    sock.bind(("0.0.0.0", 68))
    server = pair.b.new_socket(kind=socket.SOCK_DGRAM)
    server.bind(("0.0.0.0", 67))
    sock.sendto(b"discover", ("255.255.255.255", 67))
    assert server.recv(100) == b"discover"
    assert watch.seen == []


def raw_socket(space: Namespace, family: str) -> socket.socket:
    """A socket of IP protocol 47."""
    with space.enter():
        sock = socket.socket(socket.AF_INET if family == "v4" else socket.AF_INET6, socket.SOCK_RAW, GRE)
    space.opened.append(sock)
    return sock


@FAMILIES
@pytest.mark.parametrize("listed", [False, True])
def test_other_protocols_pass_if_listed_and_are_dropped_otherwise(
    pair: Pair, family: str, listed: bool
) -> None:
    watch = Watch(pair.a, others=(GRE, 50) if listed else (50,))
    try:
        here, there = raw_socket(pair.a, family), raw_socket(pair.b, family)
        with contextlib.suppress(PermissionError):  # how the kernel tells a sender of a drop in OUTPUT
            here.sendto(b"tunnelled", (address(pair.b, family), 0))
        there.sendto(b"tunnelled", (address(pair.a, family), 0))
        assert silent(there) is not listed
        assert silent(here) is not listed
        assert watch.seen == [], "they are no business of the worker"
    finally:
        watch.close()
