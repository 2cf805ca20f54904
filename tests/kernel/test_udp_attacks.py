"""Attackers on the wire between two hosts, against datagrams: nothing wrong is ever delivered, each has its reason."""

from __future__ import annotations

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.packet import Packet, Raw

from nfq.udpcontrol import HELLO_SIZE, MAGIC, Kind, read, write
from sectool.events import Action, AuthResult, DropReason, Encryption, Phase
from tests.kernel.conftest import wait_until
from tests.kernel.datagrams import DatagramTap, Echo, ask, body, bound, connected, tapped
from tests.kernel.datagrams import udp as udp
from tests.kernel.hosts import POLICY, Lan, port_of
from tests.kernel.wire import body as segment_body

pytestmark = pytest.mark.kernel

FAMILIES = pytest.mark.parametrize("v6", [False, True], ids=["v4", "v6"])
ENCRYPTED = POLICY.replace("allow app=web to call app=db", "allow app=web to call app=db encrypted")


def with_payload(packet: Packet, payload: bytes, **ports: int) -> Packet:
    """A captured datagram with another payload; lengths and checksums made anew."""
    sport, dport = ports.get("sport", packet[UDP].sport), ports.get("dport", packet[UDP].dport)
    if IP in packet:
        head: Packet = IP(src=packet[IP].src, dst=packet[IP].dst)
    else:
        head = IPv6(src=packet[IPv6].src, dst=packet[IPv6].dst)
    return head / UDP(sport=sport, dport=dport) / Raw(payload)


def of_kind(tap: DatagramTap, kind: Kind) -> Packet:
    """The first control datagram of a kind."""
    wait_until(lambda: kind in tap.kinds(), f"a {kind.name}")
    return tap.packets[tap.kinds().index(kind)]


def sealed(tap: DatagramTap, to_port: bool) -> list[Packet]:
    """Sealed datagrams of one direction."""
    return [p for p in tap.all() if read(body(p)) is None and (p[UDP].dport == tap.port) == to_port]


def flipped(data: bytes, at: int) -> bytes:
    """One bit changed."""
    at %= len(data)
    return data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :]


# -- sealed datagrams --------------------------------------------------------------------------------------------


@FAMILIES
def test_changed_truncated_replayed_and_made_up_datagrams_are_dropped(udp: Lan, v6: bool) -> None:
    udp.policy(ENCRYPTED)
    server = Echo(udp.b, v6=v6)
    with tapped(udp, "a", server.port) as tap:
        client = connected(udp.a, udp.b.address(v6), server.port)
        for i in range(3):
            assert ask(client, b"true %d" % i) == b"true %d" % i
        wait_until(lambda: len(sealed(tap, True)) == 3 and len(sealed(tap, False)) == 3, "the capture")
        packet = sealed(tap, True)[-1]
        payload = body(packet)
        before = {r: udp.b.count(r) for r in DropReason}
        forged = [flipped(payload, at) for at in (8, 12, len(payload) - 1)]
        higher = (1000).to_bytes(8, "big") + payload[8:]
        forged += [payload[:-1], payload + b"x", payload[:24], higher]
        for one in forged:
            udp.wire.send("b", with_payload(packet, one))
        for replayed in sealed(tap, True):
            udp.wire.send("b", replayed)
        for bare in (b"", b"bare", bytes(23)):
            udp.wire.send("b", with_payload(packet, bare))

        def grown(reason: DropReason) -> int:
            return udp.b.count(reason) - before[reason]

        # What claims a used counter is a replay before it is looked at.
        wait_until(lambda: grown(DropReason.RECORD_REPLAYED) == 3 + 6, "replays to be counted")
        wait_until(lambda: grown(DropReason.RECORD_INVALID) == 1, "forgeries to be counted")
        wait_until(lambda: grown(DropReason.RECORD_MISSING) == 3, "bare datagrams to be counted")
        # Towards the client, too; and a datagram turned back to whence it came.
        answer = sealed(tap, False)[-1]
        udp.wire.send("a", with_payload(answer, flipped(body(answer), 9)))
        udp.wire.send("a", answer)
        mirrored = with_payload(answer, (77).to_bytes(8, "big") + payload[8:])
        udp.wire.send("a", mirrored)
        wait_until(lambda: udp.a.count(DropReason.RECORD_INVALID) >= 1, "the mirrored one to be counted")
        assert ask(client, b"goes on") == b"goes on"
    assert server.got == [b"true 0", b"true 1", b"true 2", b"goes on"]


def test_datagrams_of_one_flow_are_worth_nothing_in_another(udp: Lan) -> None:
    udp.policy(ENCRYPTED)
    server = Echo(udp.b)
    with tapped(udp, "a", server.port) as tap:
        first, second = (connected(udp.a, udp.b.address(), server.port) for _ in range(2))
        for client in (first, second):
            ask(client, b"begin")
        for i in range(4):
            ask(first, b"first %d" % i)
        ours = [p for p in sealed(tap, True) if p[UDP].sport == port_of(first)][-1]
        before = udp.b.count(DropReason.RECORD_INVALID)
        udp.wire.send("b", with_payload(ours, body(ours), sport=port_of(second)))
        wait_until(lambda: udp.b.count(DropReason.RECORD_INVALID) == before + 1, "it to be counted")
        assert ask(second, b"second") == b"second"


def test_reordered_datagrams_are_delivered_once(udp: Lan) -> None:
    udp.policy(ENCRYPTED)
    server = bound(udp.b)
    with tapped(udp, "a", port_of(server)) as tap:
        client = connected(udp.a, udp.b.address(), port_of(server))
        client.send(b"begin")
        assert server.recv(100) == b"begin"
        wait_until(lambda: len(sealed(tap, True)) == 1, "the first")
        with udp.wire.losing(f"udp dport {port_of(server)}"):
            for i in range(20):
                client.send(b"%02d" % i)
            wait_until(lambda: len(sealed(tap, True)) == 21, "all of them")
        lost = sealed(tap, True)[1:]
        for packet in (*reversed(lost), *lost):
            udp.wire.send("b", packet)
        assert [server.recv(100) for _ in range(20)] == [b"%02d" % i for i in reversed(range(20))]
        wait_until(lambda: udp.b.count(DropReason.RECORD_REPLAYED) >= 20, "the second ones to be dropped")


# -- the handshake -----------------------------------------------------------------------------------------------


@FAMILIES
def test_a_handshake_played_again_yields_nothing(udp: Lan, v6: bool) -> None:
    server = Echo(udp.b, v6=v6)
    with tapped(udp, "a", server.port) as tap:
        client = connected(udp.a, udp.b.address(v6), server.port)
        assert ask(client, b"question") == b"question"
        hello, proof = of_kind(tap, Kind.HELLO), of_kind(tap, Kind.PROOF_DATA)
        client.close()
        udp.a.event(server.port, phase=Phase.END)
        server.close()
        udp.b.event(server.port, phase=Phase.END)
        server = Echo(udp.b, v6=v6)
        before = udp.b.count(DropReason.SYN_REPLAYED), udp.b.count(DropReason.DENIED_BEFORE)
        for packet in (hello, proof):
            for port in (server.port, packet[UDP].dport):
                udp.wire.send("b", with_payload(packet, body(packet), dport=port))
        udp.b.denial(server.port, DropReason.SYN_REPLAYED)
        wait_until(lambda: udp.b.count(DropReason.DENIED_BEFORE) > before[1], "the second to be known")
        assert udp.b.count(DropReason.SYN_REPLAYED) == before[0] + 1
    assert server.got == []


def test_a_changed_handshake_comes_to_nothing_and_the_true_one_goes_on(udp: Lan) -> None:
    """Whoever changes or injects messages keeps nobody from connecting, as long as the true ones arrive."""
    server = Echo(udp.b)
    with tapped(udp, "a", server.port) as tap, tapped(udp, "b", server.port) as there:
        client = connected(udp.a, udp.b.address(), server.port)
        with udp.wire.losing(
            f"udp sport {server.port}", first=1
        ):  # the Answer: so that there is time to forge one
            client.send(b"patience")
            answer = of_kind(there, Kind.ANSWER)
            for at in (20, 60, 200, -1):
                udp.wire.send("a", with_payload(answer, flipped(body(answer), at)))
            udp.wire.send("a", with_payload(answer, write(Kind.ACK, bytes(16))))
            hello = of_kind(tap, Kind.HELLO)
            for at in (17, 18, 30, 100, 400):
                udp.wire.send("b", with_payload(hello, flipped(body(hello), at)))
            udp.wire.send("b", with_payload(hello, write(Kind.PROOF, bytes(28))))
            udp.wire.send("b", with_payload(hello, write(Kind.PROOF_DATA, bytes(28), b"injected")))
            assert client.recv(100) == b"patience"
    assert server.got == [b"patience"]
    record = udp.a.denial(server.port, DropReason.HANDSHAKE_FORGED)
    assert record["auth_result"] == AuthResult.FAILED


def test_encryption_cannot_be_talked_out_of(udp: Lan) -> None:
    """The offer is part of the Noise prologue: a Hello without suites makes the Answer unreadable."""
    udp.policy(ENCRYPTED)
    server = Echo(udp.b)
    with tapped(udp, "a", server.port) as tap, udp.wire.losing(f"udp dport {server.port}"):
        client = connected(udp.a, udp.b.address(), server.port)
        client.send(b"SECRET")
        hello = of_kind(tap, Kind.HELLO)
    payload = bytearray(body(hello))
    payload[16 + 2 : 16 + 4] = b"\0\0"  # never, none
    udp.wire.send("b", with_payload(hello, bytes(payload)))
    udp.b.denial(server.port, DropReason.ENCRYPTION_UNAVAILABLE)
    assert client.recv(100) == b"SECRET", "the true Hello goes on"
    assert udp.a.event(server.port, action=Action.ALLOW)["encryption"] == Encryption.ENCRYPTED


def test_a_syns_handshake_is_worth_nothing_as_a_datagram(udp: Lan) -> None:
    listener = udp.b.listen()
    tap = udp.wire.tap("a", port_of(listener))
    udp.a.dial(udp.b.address(), port_of(listener))
    syn = tap.flags("S", True)
    taken = segment_body(syn)
    server = Echo(udp.b)
    hello = write(Kind.HELLO, taken)
    assert len(hello) == HELLO_SIZE
    head = IP(src=udp.a.address(), dst=udp.b.address()) / UDP(sport=4444, dport=server.port)
    udp.wire.send("b", head / Raw(hello))
    udp.b.denial(server.port, DropReason.HANDSHAKE_MALFORMED)


# -- look-alikes, state, reflection ------------------------------------------------------------------------------


@FAMILIES
def test_data_that_begins_like_a_control_datagram_is_data(udp: Lan, v6: bool) -> None:
    server = Echo(udp.b, v6=v6)
    client = connected(udp.a, udp.b.address(v6), server.port)
    likes = [MAGIC, MAGIC + bytes(8), MAGIC + b"\1\7" + bytes(100), MAGIC[:7] + b"x", MAGIC * 3]
    likes += [
        write(Kind.ACK, bytes(16))[:-1],
        write(Kind.ACK, bytes(16)) + b"x",
        write(Kind.PROOF, bytes(28))[:20],
    ]
    for data in (b"first", *likes):
        assert ask(client, data) == data


def test_control_datagrams_that_prove_nothing_reach_no_program(udp: Lan) -> None:
    server = Echo(udp.b)
    client = connected(udp.a, udp.b.address(), server.port)
    ask(client, b"begin")
    made_up = [write(kind, bytes(n)) for kind in Kind for n in (0, 8, 16, 28, 100)]
    made_up.append(write(Kind.PROOF_DATA, bytes(28), b"inner"))
    for data in made_up:
        client.send(data)
    assert ask(client, b"goes on") == b"goes on"
    assert server.got == [b"begin", b"goes on"]


def test_unknown_is_believed_by_those_only_who_sent_what_it_names(udp: Lan) -> None:
    udp.policy(ENCRYPTED)
    server = Echo(udp.b)
    with tapped(udp, "a", server.port) as tap:
        client = connected(udp.a, udp.b.address(), server.port)
        ask(client, b"begin")
        answer = sealed(tap, False)[-1]
        hellos = tap.kinds().count(Kind.HELLO)
        for made_up in (bytes(8), b"12345678"):
            udp.wire.send("a", with_payload(answer, write(Kind.UNKNOWN, made_up)))
        wait_until(lambda: udp.a.count(DropReason.HANDSHAKE_FORGED) >= 2, "them to be counted")
        assert ask(client, b"goes on") == b"goes on"
        assert tap.kinds().count(Kind.HELLO) == hellos
        # Who has seen a datagram can have a new handshake made, and no more.
        mine = sealed(tap, True)[-1]
        udp.wire.send("a", with_payload(answer, write(Kind.UNKNOWN, body(mine)[-8:])))
        assert ask(client, b"still") == b"still"


@FAMILIES
def test_no_answer_is_larger_than_the_question(udp: Lan, v6: bool) -> None:
    """Whatever a stranger sends, with a source address of its choice: that address gets no more than was sent."""
    server = Echo(udp.b, v6=v6)
    with tapped(udp, "b", server.port) as tap:
        made = (
            IPv6(src="fd77::66", dst=udp.b.address(True)) if v6 else IP(src="10.77.0.66", dst=udp.b.address())
        )
        sizes = [0, 1, 8, 15, 16, 23, 24, 25, 100, 1000]
        questions = [bytes(n) for n in sizes] + [write(kind, bytes(28)) for kind in Kind]
        sent = 0
        for number, data in enumerate(questions * 3):
            packet = made / UDP(sport=5000 + number % 4, dport=server.port) / Raw(data)
            udp.wire.send("b", packet)
            sent += len(bytes(packet))
        wait_until(lambda: udp.b.status()["reasons"].get("denied_before", 0) > 20, "all to be judged")
        answers = [p for p in tap.all() if p[UDP].sport == server.port]
        assert answers, "an unknown flow is told"
        assert sum(len(bytes(p)) for p in answers) <= sent
        by_port = {
            port: sum(len(bytes(p)) for p in answers if p[UDP].dport == port) for port in range(5000, 5004)
        }
        for port, size in by_port.items():
            questioned = sum(len(bytes(p)) for p in tap.all() if p[UDP].sport == port)
            assert size <= questioned
    assert server.got == []


def test_a_flood_of_made_up_datagrams_leaves_the_true_ones(udp: Lan) -> None:
    server = Echo(udp.b)
    flood = [
        bytes(
            IP(src=f"10.{n >> 8 & 255}.{n & 255}.9", dst=udp.b.address())
            / UDP(sport=n, dport=server.port)
            / Raw(d)
        )
        for n in range(2000, 4000)
        for d in (bytes(50), write(Kind.HELLO, bytes(1000)))
    ]
    reached = 0
    for _ in range(10):
        for packet in flood[:: 10 + reached]:
            udp.wire.send("b", packet)
        client = connected(udp.a, udp.b.address(), server.port)
        client.settimeout(3)
        reached += ask(client, b"x") == b"x"
    assert reached == 10
    status = udp.b.status()
    assert status["half_open"] < 100
    assert status["live"] < 100


def test_a_connection_attempt_by_both_sides_at_once_becomes_one_flow(udp: Lan) -> None:
    """Symmetric protocols use one port on both sides, and may both begin."""
    policy = POLICY.replace("  - allow app=web to call app=db\n", "  - allow any to call any\n")
    udp.policy(policy)
    for turn in range(6):
        one, other = bound(udp.a), bound(udp.b)
        one.connect((udp.b.address(), port_of(other)))
        other.connect((udp.a.address(), port_of(one)))
        one.send(b"from a %d" % turn)
        other.send(b"from b %d" % turn)
        assert other.recv(100) == b"from a %d" % turn
        assert one.recv(100) == b"from b %d" % turn
        one.close()
        other.close()
