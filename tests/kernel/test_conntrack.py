"""ctnetlink on a real kernel, checked against pyroute2 and the conntrack program's view."""

from __future__ import annotations

import ipaddress
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import NFCTSocket
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6

from nfq import rules
from nfq.conntrack import ConntrackControl, DestroyListener, Ended, FlowTuple
from nfq.journal import Journal
from nfq.marks import Marks
from nfq.packet import parse
from nfq.ports import KernelPorts
from tests.kernel.conftest import Enforcer, Namespace, Pair, allow, deny, wait_until

pytestmark = pytest.mark.kernel

FAMILIES = ("v4", "v6")


def packed(text: str) -> bytes:
    """An address as bytes."""
    return ipaddress.ip_address(text).packed


def tracked(pair: Pair) -> None:
    """Make namespace a track connections and count their bytes, without any enforcement."""
    for tool in ("iptables", "ip6tables"):
        pair.a.run(tool, "-A", "INPUT", "-m", "conntrack", "--ctstate", "NEW")
        pair.a.run(tool, "-A", "INPUT", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP")
        pair.a.run(tool, "-A", "OUTPUT", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP")
    pair.a.run("sysctl", "-qw", "net.netfilter.nf_conntrack_acct=1", "net.netfilter.nf_conntrack_timestamp=1")


@pytest.fixture
def control(pair: Pair) -> Iterator[ConntrackControl]:
    """Questions to namespace a, which tracks."""
    tracked(pair)
    with pair.a.enter():
        made = ConntrackControl()
    yield made
    made.close()


def connect(pair: Pair, family: str) -> tuple[FlowTuple, socket.socket, socket.socket]:
    """A connection from b into a; the tuple, and both ends."""
    v6 = family == "v6"
    server = pair.a.listen(v6=v6)
    where = pair.a.v6 if v6 else pair.a.v4
    client = pair.b.connect(where, server.getsockname()[1])
    peer, _ = server.accept()
    pair.a.opened.append(peer)
    peer.settimeout(10)
    own = client.getsockname()
    return FlowTuple(packed(own[0]), packed(where), own[1], server.getsockname()[1]), client, peer


@pytest.mark.parametrize("family", FAMILIES)
def test_an_entry_has_what_pyroute2_sees(pair: Pair, control: ConntrackControl, family: str) -> None:
    flow, client, peer = connect(pair, family)
    client.sendall(b"x" * 1000)
    assert len(peer.recv(1000, socket.MSG_WAITALL)) == 1000
    entry = control.get(flow)
    assert entry is not None
    assert entry.tuple == flow
    assert entry.reply == flow.reversed()
    assert entry.tcp_state == "ESTABLISHED"
    assert entry.start_ns > 1_600_000_000 * 10**9
    if family == "v4":  # pyroute2 asks for IPv4 entries only
        with pair.a.enter(), NFCTSocket() as independent:
            theirs = [e for e in independent.dump() if _source_port(e) == flow.sport]
        assert len(theirs) == 1
        original, reply = (theirs[0].get_attr(f"CTA_COUNTERS_{way}") for way in ("ORIG", "REPLY"))
        assert entry.orig_bytes == original.get_attr("CTA_COUNTERS_BYTES")
        assert entry.orig_packets == original.get_attr("CTA_COUNTERS_PACKETS")
        assert entry.reply_bytes == reply.get_attr("CTA_COUNTERS_BYTES")
    assert entry.orig_bytes > 1000


def _source_port(message: Any) -> int:
    return int(message.get_attr("CTA_TUPLE_ORIG").get_attr("CTA_TUPLE_PROTO").get_attr("CTA_PROTO_SRC_PORT"))


@pytest.mark.parametrize("family", FAMILIES)
def test_marks_change_in_the_bits_asked_for(pair: Pair, control: ConntrackControl, family: str) -> None:
    flow, _, _ = connect(pair, family)
    assert control.set_mark(flow, 0x1234_5678, 0xFFFF_FFFF)
    assert control.set_mark(flow, 0x2000_0000, 0x3000_0000)
    entry = control.get(flow)
    assert entry is not None
    assert entry.mark == 0x2234_5678
    with pair.a.enter():
        assert [e.tuple for e in control.dump(mark=0x2000_0000, mask=0x3000_0000)] == [flow]
        assert list(control.dump(mark=0x1000_0000, mask=0x3000_0000)) == []
        assert list(control.dump(proto=17)) == []
    assert control.get(flow.reversed()) is not None, "either direction names it"
    assert control.set_mark(flow.reversed(), 0, 0xFFFF_FFFF)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernel_remembers_which_connections_are_encrypted(
    pair: Pair, control: ConntrackControl, family: str
) -> None:
    where, _, _ = connect(pair, family)
    marks, v6 = Marks(), family == "v6"
    ip = (IPv6 if v6 else IP)(
        src=ipaddress.ip_address(where.dst).compressed, dst=ipaddress.ip_address(where.src).compressed
    )
    answer = parse(bytes(ip / TCP(sport=where.dport, dport=where.sport, flags="A")), True)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, pair.a.enter():
        ports = KernelPorts(Journal(Path(folder, "flows")), marks.mask)
    for mark, sealed in (
        (0, False),
        (marks.allowed, False),
        (marks.encrypted, True),
        (marks.small, True),
    ):
        assert control.set_mark(where, mark, marks.mask)
        assert ports.sealed(answer) == sealed
    assert control.delete(where)
    assert not ports.sealed(answer)
    ports.conntrack.close()
    assert ports.sealed(answer), "nobody knows"


def test_what_is_not_there_is_none(pair: Pair, control: ConntrackControl) -> None:
    nothing = FlowTuple(packed("10.9.9.9"), packed(pair.a.v4), 1, 2)
    assert control.get(nothing) is None
    assert not control.set_mark(nothing, 1, 1)
    assert not control.delete(nothing)
    assert control.malformed == 0


def test_a_translated_connection_is_found_as_the_socket_sees_it(
    pair: Pair, control: ConntrackControl
) -> None:
    """DNAT on the way in: the socket knows its own address only, the tracked original is the public one."""
    pair.a.run(
        "iptables", "-t", "nat", "-A", "PREROUTING", "-d", "10.77.0.9", "-j", "DNAT", "--to", pair.a.v4
    )
    pair.a.run("ip", "addr", "add", "10.77.0.9/32", "dev", "lo")
    server = pair.a.listen(pair.a.v4)
    port = server.getsockname()[1]
    client = pair.b.connect("10.77.0.9", port)
    seen = FlowTuple(packed(pair.b.v4), packed(pair.a.v4), client.getsockname()[1], port)
    entry = control.get(seen)
    assert entry is not None
    assert entry.dst == packed("10.77.0.9")
    assert control.set_mark(seen, 5, 0xFF)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_end_of_a_connection_is_heard_with_its_counters(
    pair: Pair, control: ConntrackControl, family: str
) -> None:
    with pair.a.enter():
        listener = DestroyListener()
    flow, client, peer = connect(pair, family)
    client.sendall(b"x" * 5000)
    peer.recv(5000, socket.MSG_WAITALL)
    before = control.get(flow)
    assert before is not None
    assert listener.drain() == []
    assert control.delete(flow)
    ended: list[Ended] = []

    def heard() -> bool:
        ended.extend(listener.drain())
        return bool(ended)

    wait_until(heard, "the event")
    assert [e.tuple for e in ended] == [flow]
    assert ended[0].orig_bytes >= before.orig_bytes > 5000
    assert ended[0].tcp_state == "ESTABLISHED"
    assert ended[0].stop_ns > ended[0].start_ns > 0
    assert (listener.missed, listener.malformed) == (0, 0)
    listener.close()


def test_events_that_do_not_fit_are_counted(pair: Pair, control: ConntrackControl) -> None:
    with pair.a.enter():
        listener = DestroyListener(buffer_bytes=1)  # the kernel's minimum
    flows = [connect(pair, "v4")[0] for _ in range(20)]
    for flow in flows:
        assert control.delete(flow)
    heard = listener.drain()
    assert listener.missed >= 1
    assert len(heard) < 20
    listener.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_cutting_a_released_connection_brings_it_back_to_the_queue(pair: Pair, family: str) -> None:
    enforcer = Enforcer(pair.a, allow)
    try:
        flow, client, peer = connect(pair, family)
        client.sendall(b"before")
        assert peer.recv(10) == b"before"
        enforcer.decide = deny
        with pair.a.enter():
            control = ConntrackControl()
        assert control.set_mark(flow, 0, enforcer.config.mask)
        seen = len(enforcer.seen)
        client.sendall(b"after")
        wait_until(lambda: len(enforcer.seen) > seen, "the packet to be queued")
        peer.settimeout(0.2)
        with pytest.raises(TimeoutError):
            peer.recv(10)
        control.close()
    finally:
        enforcer.close()


# -- adoption ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True], ids=["untracked", "tracked"])
@pytest.mark.parametrize("family", FAMILIES)
def test_connections_from_before_are_adopted_and_live_on(pair: Pair, family: str, known: bool) -> None:
    if known:
        tracked(pair)
    inbound = connect(pair, family)
    outbound = connect(Pair(pair.b, pair.a), family)
    local = _within(pair.a, family)
    config = rules.RulesConfig()
    enforcer = Enforcer(pair.a, deny, config, adopt=True)
    adopted = enforcer.adopted
    try:
        if not known:
            tracked(pair)  # drops what connection tracking calls invalid
        assert {(a.remote_port, a.inbound) for a in adopted} >= {
            (inbound[0].sport, True),
            (outbound[0].dport, False),
        }
        assert len(adopted) == 4, "the one within the host is there from both ends"
        for _, client, peer in (inbound, outbound, local):
            for number in range(20):
                client.sendall(bytes((number,)) * 50_000)
                got = 0  # MSG_WAITALL does not wait on a socket with a timeout
                while got < 50_000:
                    more = len(peer.recv(50_000 - got))
                    assert more, "the connection was closed"
                    got += more
                peer.sendall(b"ok")
                assert client.recv(10) == b"ok"
        assert enforcer.seen == []
        with pair.a.enter():
            control = ConntrackControl()
            entry = control.get(inbound[0])
            assert entry is not None
            assert entry.tuple == inbound[0]
            assert entry.orig_bytes > 1_000_000, "its bytes are counted"
            control.close()
    finally:
        enforcer.close()


def _within(space: Namespace, family: str) -> tuple[None, socket.socket, socket.socket]:
    server = space.listen(v6=family == "v6")
    client = space.connect("::1" if family == "v6" else "127.0.0.1", server.getsockname()[1])
    peer, _ = server.accept()
    space.opened.append(peer)
    peer.settimeout(10)
    return None, client, peer
