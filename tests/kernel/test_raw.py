"""Refusals on a real kernel: how fast, and how, a program learns that its connection is denied."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from nfq.packet import RST, SYN_ACK, Segment, as_reset, reply_reset
from nfq.queue import QueuedPacket, release
from nfq.raw import RawSender
from tests.kernel.conftest import Decide, Enforcer, Namespace, Pair, allow, deny

pytestmark = pytest.mark.kernel

Enforce = Callable[[Namespace, Decide], Enforcer]
FAMILIES = ("v4", "v6")
AT_ONCE_S = 0.5  # a lost SYN is sent again after a second


def address(space: Namespace, family: str) -> str:
    """The namespace's address."""
    return space.v4 if family == "v4" else space.v6


def refuse(enforcer: Enforcer, packet: QueuedPacket, segment: Segment) -> None:
    """Drop the packet and answer it with a RST from its destination."""
    packet.drop()
    enforcer.raw.send(reply_reset(segment))


def fails_at_once(space: Namespace, where: str, port: int, error: type[OSError]) -> None:
    """A connection attempt ends with this error long before its SYN would be repeated."""
    started = time.monotonic()
    with pytest.raises(error):
        space.connect(where, port)
    assert time.monotonic() - started < AT_ONCE_S


@pytest.mark.parametrize("family", FAMILIES)
def test_a_denied_outgoing_syn_is_refused_as_if_by_the_peer(
    pair: Pair, enforce: Enforce, family: str
) -> None:
    enforcer = enforce(pair.a, refuse)
    server = pair.b.listen(v6=family == "v6")
    fails_at_once(pair.a, address(pair.b, family), server.getsockname()[1], ConnectionRefusedError)
    assert len(enforcer.seen) == 1, "the RST itself is not queued"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_denied_incoming_syn_is_refused_to_the_peer(pair: Pair, enforce: Enforce, family: str) -> None:
    enforcer = enforce(pair.a, refuse)
    server = pair.a.listen(v6=family == "v6")
    fails_at_once(pair.b, address(pair.a, family), server.getsockname()[1], ConnectionRefusedError)
    assert len(enforcer.seen) == 1


@pytest.mark.parametrize("where", ["127.0.0.1", "::1"])
def test_a_denied_loopback_syn_is_refused(pair: Pair, enforce: Enforce, where: str) -> None:
    enforce(pair.a, refuse)
    server = pair.a.listen(v6=where == "::1")
    fails_at_once(pair.a, where, server.getsockname()[1], ConnectionRefusedError)


def test_strict_reverse_path_filtering_does_not_stop_the_refusal(pair: Pair, enforce: Enforce) -> None:
    for name in ("all", "lo", "eth0"):
        pair.a.run("sysctl", "-qw", f"net.ipv4.conf.{name}.rp_filter=1")
    enforce(pair.a, refuse)
    server = pair.b.listen()
    fails_at_once(pair.a, pair.b.v4, server.getsockname()[1], ConnectionRefusedError)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_denied_on_arrival_becomes_a_reset(pair: Pair, enforce: Enforce, family: str) -> None:
    """The verdict on the SYN-ACK: its bytes replaced by those of a RST."""

    def decide(enforcer: Enforcer, packet: QueuedPacket, segment: Segment) -> None:
        if segment.flags & SYN_ACK == SYN_ACK:
            packet.set_payload(as_reset(segment))
        release(packet, enforcer.config.marks.passing, enforcer.config.mask)

    enforce(pair.a, decide)
    server = pair.b.listen(v6=family == "v6")
    fails_at_once(pair.a, address(pair.b, family), server.getsockname()[1], ConnectionRefusedError)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_live_connection_is_reset_by_its_next_packet(pair: Pair, enforce: Enforce, family: str) -> None:
    enforcer = enforce(pair.a, allow)
    server = pair.b.listen(v6=family == "v6")
    client = pair.a.connect(address(pair.b, family), server.getsockname()[1])
    peer, _ = server.accept()
    peer.settimeout(5)

    def cut(enforcer: Enforcer, packet: QueuedPacket, segment: Segment) -> None:
        if not segment.flags & RST:
            packet.set_payload(as_reset(segment))
        release(packet, enforcer.config.marks.passing, enforcer.config.mask)

    from nfq.conntrack import ConntrackControl

    with pair.a.enter():
        control = ConntrackControl()
        for entry in control.dump():
            assert control.set_mark(entry.tuple, 0, enforcer.config.mask)
        control.close()
    enforcer.decide = cut
    client.send(b"more")
    with peer, pytest.raises(ConnectionResetError):
        peer.recv(10)


def test_raw_packets_of_others_are_queued(pair: Pair, enforce: Enforce) -> None:
    """Only the worker's own raw socket is known to the rules, not raw sockets as such."""
    enforcer = enforce(pair.a, deny)
    server = pair.b.listen()
    client = pair.b.new_socket()
    client.setblocking(False)
    del server
    from scapy.compat import raw
    from scapy.layers.inet import IP, TCP

    packet = raw(IP(src=pair.a.v4, dst=pair.b.v4) / TCP(sport=1234, dport=80, flags="R"))
    with pair.a.enter():
        other = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    with other:
        other.sendto(packet, (pair.b.v4, 0))
        assert len(enforcer.seen) == 1 or _soon(enforcer)
        before = len(enforcer.seen)
        enforcer.raw.send(packet)
        other.sendto(packet, (pair.b.v4, 0))
        _soon(enforcer, before)
        assert len(enforcer.seen) == before + 1


def _soon(enforcer: Enforcer, before: int = 0) -> bool:
    from tests.kernel.conftest import wait_until

    wait_until(lambda: len(enforcer.seen) > before, "the packet to be queued")
    return True


def test_opening_leaves_the_thread_as_it_was_and_says_what_is_missing(namespace: Namespace) -> None:
    from pathlib import Path

    def groups() -> str:
        status = Path("/proc/thread-self/status").read_text()
        return next(line for line in status.splitlines() if line.startswith("Gid:"))

    before = groups()
    with namespace.enter():
        sender = RawSender()
        assert groups() == before
        with pytest.raises(OSError, match="unreachable"):
            sender.send(b"\x45" + bytes(15) + socket.inet_aton("10.1.2.3") + bytes(20))
        sender.close()
        code = (
            "import os; os.setgid(65534); os.setuid(65534)\n"
            "from nfq.raw import RawSender\n"
            "from sectool.errors import SectoolError\n"
            "try: RawSender()\n"
            "except SectoolError as e: print(type(e).__name__, '|', e.hint)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("PrivilegeError | run as root"), done.stderr
