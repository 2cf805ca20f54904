"""Encrypted connections' way through rules and queues: what comes to the bulk queue, whole, and how it goes on."""

from __future__ import annotations

import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import pytest
from scapy.compat import raw
from scapy.layers.inet import IP, TCP, IPOption_NOP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt
from scapy.packet import Packet

from nfq.bulk import BulkQueue
from nfq.core import Result, Verdict
from nfq.packet import ACK, FIN, SYN, Segment, parse
from nfq.queue import QueuedPacket, release
from nfq.rules import RulesConfig
from tests.kernel.conftest import Enforcer, Namespace, Pair, wait_until
from tests.kernel.hosts import accept, read_exactly
from tests.kernel.test_rules import marks

pytestmark = pytest.mark.kernel

FAMILIES = pytest.mark.parametrize("family", ["v4", "v6"])
SO_MARK = 36
Judge = Callable[[Segment, bool], Verdict]


def passing(_segment: Segment, _gso: bool) -> Verdict:
    """On, as it is."""
    return Verdict.ACCEPT


class Bulk:
    """Rules and both queues of a namespace. Every connection is marked encrypted, and nothing is encrypted."""

    def __init__(self, space: Namespace) -> None:
        self.judge: Judge = passing
        self.seen: list[
            tuple[Segment, bool]
        ] = []  # in the bulk queue: a copy; whether the kernel has to split it
        self.marked = "encrypted"
        self.small: list[Segment] = []  # in the normal queue
        self.enforcer = Enforcer(space, self._normal)
        self.reading = threading.Event()
        self.reading.set()
        config = self.enforcer.config
        with space.enter():
            self.queue = BulkQueue(config.queue + 1, self._bulk, config.mask)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()

    def _normal(self, enforcer: Enforcer, packet: QueuedPacket, segment: Segment) -> None:
        if not segment.flags & SYN:
            self.small.append(segment)
        release(packet, getattr(enforcer.config.marks, self.marked), enforcer.config.mask)

    def _bulk(self, data: memoryview, outbound: bool, gso: bool, room: memoryview) -> Result:
        segment = parse(bytes(data), outbound)
        assert room[: len(data)] == data
        assert len(room) >= len(data) + 16
        self.seen.append((segment, gso))
        return Result(self.judge(segment, gso))

    def _loop(self) -> None:
        with select.epoll() as poll:
            poll.register(self.queue.fd, select.EPOLLIN)
            while not self._stop.is_set():
                if self.reading.wait(0.05) and poll.poll(0.02):
                    self.queue.drain()

    def payloads(self) -> list[bytes]:
        """What the bulk queue's segments carried so far."""
        return [segment.payload for segment, _ in self.seen]

    def close(self) -> None:
        """No more judging, no more rules."""
        self._stop.set()
        self._thread.join()
        self.enforcer.close()
        self.queue.close()


@pytest.fixture
def bulk(pair: Pair) -> Iterator[Bulk]:
    """Namespace a, with both queues."""
    made = Bulk(pair.a)
    yield made
    made.close()


def connected(pair: Pair, family: str = "v4", mark: int = 0) -> tuple[socket.socket, socket.socket]:
    """A connection from a to b."""
    listener = pair.b.listen(v6=family == "v6")
    client = pair.a.new_socket(socket.AF_INET6 if family == "v6" else socket.AF_INET)
    if mark:
        client.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
    client.connect((pair.b.v6 if family == "v6" else pair.b.v4, listener.getsockname()[1]))
    server = accept(listener)
    pair.b.opened.append(server)
    return client, server


@FAMILIES
@pytest.mark.parametrize("timestamps", ["1", "0"])
def test_segments_with_payload_or_fin_are_queued_and_no_others(
    pair: Pair, bulk: Bulk, family: str, timestamps: str
) -> None:
    pair.a.run("sysctl", "-qw", f"net.ipv4.tcp_timestamps={timestamps}")
    client, server = connected(pair, family)
    for size in (1, 100, 1448):
        client.sendall(bytes(size))
        read_exactly(server, size)
        server.sendall(bytes(size))
        read_exactly(client, size)
    client.close()
    assert server.recv(1) == b""
    server.close()
    wait_until(lambda: sum(bool(s.flags & FIN) for s, _ in bulk.seen) == 2, "both FINs")
    assert all(s.payload or s.flags & FIN for s, _ in bulk.seen)
    assert sorted(len(p) for p in bulk.payloads()) == [0, 0, 1, 1, 100, 100, 1448, 1448]
    assert bulk.enforcer.flags() == [SYN, SYN | ACK], "the normal queue sees its opening alone"
    config = bulk.enforcer.config
    assert [m & config.mask for m in marks(pair.a)] == [config.marks.encrypted]


@FAMILIES
def test_a_reset_passes_unasked(pair: Pair, bulk: Bulk, family: str) -> None:
    client, server = connected(pair, family)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    with pytest.raises(ConnectionResetError):
        server.recv(1)
    client, server = connected(pair, family)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    server.close()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert bulk.seen == []


def crafted(bulk: Bulk, client: socket.socket, server: socket.socket, kind: str) -> Packet:
    """A segment as if from `server`, that connection tracking finds in order: nothing new, or an old byte again."""
    v6 = client.family == socket.AF_INET6
    source, target = server.getsockname(), client.getsockname()
    ip: Packet = IPv6(src=source[0], dst=target[0]) if v6 else IP(src=source[0], dst=target[0])
    (syn, syn_ack) = (segment for _, segment, _ in bulk.enforcer.seen if segment.flags & SYN)
    mine, other = syn_ack.seq, syn.seq + 1 & 0xFFFFFFFF
    tcp = TCP(sport=source[1], dport=target[1], flags="A", seq=mine + 1 & 0xFFFFFFFF, ack=other)
    if "IP options" in kind:
        ip.options = [IPOption_NOP()] * 4
    if "extension header" in kind:
        ip = ip / IPv6ExtHdrDestOpt()
    if "SACK" in kind:
        tcp.options = [("NOP", None), ("NOP", None), ("SAck", (other,) * 4)]
    if "byte" in kind:
        tcp.seq = mine
        tcp = tcp / b"x"
    return ip / tcp


@pytest.mark.parametrize(
    ("family", "kind", "queued"),
    [
        ("v4", "ACK", False),
        ("v4", "SACK", False),
        ("v4", "IP options", False),
        ("v4", "a byte", True),
        ("v4", "IP options and a byte", True),
        ("v6", "ACK", False),
        ("v6", "SACK", False),
        ("v6", "extension header", True),
        ("v6", "a byte", True),
    ],
)
def test_segments_of_other_shapes(pair: Pair, bulk: Bulk, family: str, kind: str, queued: bool) -> None:
    client, server = connected(pair, family)
    segment = crafted(bulk, client, server, kind)
    with pair.b.enter():
        if family == "v4":
            sender = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        else:
            sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x86DD)
            sender.bind(("eth0", 0x86DD))
    with sender:
        if family == "v4":
            sender.sendto(raw(segment), (pair.a.v4, 0))
        else:
            frame = bytes.fromhex("020000000001 020000000002 86dd") + raw(segment)
            sender.send(frame)
    server.sendall(b"after it")
    read_exactly(client, 8)
    assert (len(bulk.seen) > 1) is queued
    assert bulk.payloads()[-1] == b"after it"


@FAMILIES
def test_super_packets_come_whole_both_ways(pair: Pair, bulk: Bulk, family: str) -> None:
    client, server = connected(pair, family)
    total = 4 << 20
    for sender, receiver in ((client, server), (server, client)):
        thread = threading.Thread(target=sender.sendall, args=(bytes(total),))
        thread.start()
        read_exactly(receiver, total)
        thread.join()
    for outbound in (True, False):
        sizes = [len(s.data) for s, gso in bulk.seen if gso and s.outbound is outbound]
        assert sizes, "some have still to be split"
        assert max(sizes) > 30_000
        alone = [len(s.data) for s, gso in bulk.seen if not gso and s.outbound is outbound]
        assert all(size <= 1500 for size in alone)


def test_packets_with_marks_of_others_keep_them(pair: Pair, bulk: Bulk) -> None:
    client, server = connected(pair, mark=0x45)
    mask = f"0x45/{0x45 | bulk.enforcer.config.mask:#x}"
    pair.a.run("iptables", "-t", "mangle", "-A", "POSTROUTING", "-p", "tcp", "-m", "mark", "--mark", mask)
    client.sendall(b"marked")
    assert read_exactly(server, 6) == b"marked"
    assert bulk.payloads() == [b"marked"]
    saved = pair.a.run("iptables-save", "-c", "-t", "mangle").splitlines()
    (counted,) = [line for line in saved if "-A POSTROUTING" in line]
    assert counted.startswith("[1:")


def test_of_one_round_only_what_is_to_be_dropped_is_dropped(pair: Pair, bulk: Bulk) -> None:
    """The drops of a round are told to the kernel together, by the last of their ids."""
    ends = [connected(pair) for _ in range(6)]
    lost = {ends[n][0].getsockname()[1] for n in (0, 2, 3)}
    bulk.judge = lambda s, _: Verdict.DROP if s.source_port in lost else Verdict.ACCEPT
    bulk.reading.clear()
    wait_until(lambda: not bulk.seen, "nothing")
    for n, (client, _) in enumerate(ends):
        client.sendall(b"line %d" % n)
    wait_until(lambda: bulk.queue.counters()["waiting"] >= 6 or bulk.seen, "all to wait")
    bulk.reading.set()
    for n in (1, 4, 5):
        assert read_exactly(ends[n][1], 6) == b"line %d" % n
    for n in (0, 2, 3):
        ends[n][1].settimeout(0.02)
        with pytest.raises(TimeoutError):
            ends[n][1].recv(1)
        ends[n][1].settimeout(10)
    bulk.judge = passing
    for n in (0, 2, 3):  # sent again
        assert read_exactly(ends[n][1], 6) == b"line %d" % n
    assert bulk.queue.counters()["waiting"] == 0


@FAMILIES
def test_what_is_put_back_comes_in_segments_to_the_normal_queue(pair: Pair, bulk: Bulk, family: str) -> None:
    bulk.judge = lambda _, gso: Verdict.REQUEUE
    bulk.marked = "passing"
    bulk.enforcer.decide = _marking(bulk)
    client, server = connected(pair, family)
    data = bytes(range(256)) * 1000
    client.sendall(data)
    assert read_exactly(server, len(data)) == data
    assert sum(len(s.payload) for s in bulk.small) >= len(data)
    assert max(len(s.data) for s in bulk.small) <= 1500
    assert max(len(s.data) for s, _ in bulk.seen) > 3000
    config = bulk.enforcer.config
    assert [m & config.mask for m in marks(pair.a)] == [config.marks.encrypted], "it stays as it is"


def _marking(bulk: Bulk) -> Callable[[Enforcer, QueuedPacket, Segment], None]:
    """Opens connections as encrypted ones, lets everything else pass."""

    def decide(enforcer: Enforcer, packet: QueuedPacket, segment: Segment) -> None:
        bulk.marked = "encrypted" if segment.flags & SYN else "passing"
        bulk._normal(enforcer, packet, segment)

    return decide


@FAMILIES
def test_a_connection_with_losses_comes_by_the_normal_queue_in_segments(
    pair: Pair, bulk: Bulk, family: str
) -> None:
    bulk.marked = "small"
    client, server = connected(pair, family)
    data = bytes(range(256)) * 1000
    client.sendall(data)
    assert read_exactly(server, len(data)) == data
    server.sendall(b"answer")
    assert read_exactly(client, 6) == b"answer"
    assert [s.payload for s, _ in bulk.seen] == [b"answer"], "what arrives has one queue, whatever leaves"
    assert max(len(s.data) for s in bulk.small) <= 1500
    assert all(s.payload for s in bulk.small), "pure ACKs pass"
    bulk.marked = "encrypted"
    client.sendall(b"one more")  # its verdict puts the connection back
    read_exactly(server, 8)
    client.sendall(data)
    read_exactly(server, len(data))
    assert max(len(s.data) for s, _ in bulk.seen) > 3000
    config = bulk.enforcer.config
    assert [m & config.mask for m in marks(pair.a)] == [config.marks.encrypted]


def allow_big_packets(space: Namespace, size: int) -> None:
    """What `ip link set eth0 gso_max_size …` does, also for IPv4, which older ones cannot say."""
    attributes = (
        b"".join(  # IFLA_GSO_MAX_SIZE, IFLA_GRO_MAX_SIZE, IFLA_GSO_IPV4_MAX_SIZE, IFLA_GRO_IPV4_MAX_SIZE
            struct.pack("=HHI", 8, kind, size) for kind in (41, 58, 63, 64)
        )
    )
    with space.enter(), socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as netlink:
        link = struct.pack("=BxHiII", 0, 0, socket.if_nametoindex("eth0"), 0, 0)
        head = struct.pack("=IHHII", 32 + len(attributes), 16, 5, 1, 0)  # RTM_NEWLINK, to be acknowledged
        netlink.send(head + link + attributes)
        (error,) = struct.unpack_from("=i", netlink.recv(4096), 16)
    assert error == 0


@FAMILIES
def test_packets_over_64_kib_are_split_and_pass(pair: Pair, bulk: Bulk, family: str) -> None:
    """BIG TCP: larger than what the kernel copies, so they go through the normal queue in segments."""
    for space in (pair.a, pair.b):
        allow_big_packets(space, 180_000)
        space.run(
            "sysctl",
            "-qw",
            "net.ipv4.tcp_wmem=4096 4194304 8388608",
            "net.ipv4.tcp_rmem=4096 4194304 8388608",
        )
    bulk.enforcer.decide = _marking(bulk)
    client, server = connected(pair, family)
    block = bytes(range(256)) * (8 << 12)
    thread = threading.Thread(target=client.sendall, args=(block,))
    thread.start()
    assert read_exactly(server, len(block)) == block
    thread.join()
    judged = sum(len(s.payload) for s, _ in bulk.seen)
    assert bulk.small, "some packets were larger than 64 KiB"
    assert max(len(s.data) for s in bulk.small) <= 1500
    assert judged + sum(len(s.payload) for s in bulk.small) >= len(block)


def test_an_ordinary_connection_passes_after_an_encrypted_one_on_the_same_ports(
    pair: Pair, bulk: Bulk
) -> None:
    """The mark of the one before is gone with the SYN."""
    listener = pair.b.listen()
    where = (pair.b.v4, listener.getsockname()[1])
    own = 0
    for marked in ("encrypted", "allowed"):
        bulk.marked = marked
        client = pair.a.new_socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.bind(("0.0.0.0", own))
        client.connect(where)
        own = client.getsockname()[1]
        with accept(listener) as server:
            client.sendall(b"said")
            assert read_exactly(server, 4) == b"said"
            client.close()
            with pytest.raises(ConnectionResetError):
                server.recv(1)
    assert bulk.payloads() == [b"said"], "of the first alone"
    assert RulesConfig().marks.allowed in [m & bulk.enforcer.config.mask for m in marks(pair.a)]
