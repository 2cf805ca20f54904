"""Attacks on encrypted connections from the wire: nothing wrong is ever delivered, each has its drop reason.

The attacker sees, loses, changes, repeats and makes up frames, and speaks on from where the true hosts stopped.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from scapy.layers.inet import TCP
from scapy.packet import Packet

from nfq.handshake import proof_option
from sectool.events import Cipher, DropReason, Encryption, Phase
from tests.kernel.conftest import wait_until
from tests.kernel.hosts import POLICY, SHORT_S, Host, Lan, accept, echo, finish, port_of, read_exactly
from tests.kernel.test_attacks import shake
from tests.kernel.wire import Tap, again, body, flags, our_options

pytestmark = pytest.mark.kernel

FAMILIES = pytest.mark.parametrize("v6", [False, True], ids=["v4", "v6"])
ENCRYPTED = POLICY.replace("app=web to call app=db", "app=web to call app=db encrypted")
SECRET = b"a line that nobody on the wire may read"


@dataclass
class Talk:
    """An encrypted connection from a to b, and ears on both legs."""

    client: socket.socket
    server: socket.socket
    port: int
    legs: dict[str, Tap]

    def next(self, leg: str, to_port: bool, payload: bool = True) -> Packet:
        """The next segment of a direction with (or without) payload."""
        return self.legs[leg].next(
            "a record" if payload else "an ACK",
            lambda p: (
                (p[TCP].dport == self.port) is to_port and bool(body(p)) is payload and "S" not in flags(p)
            ),
        )


def record_of(packet: Packet) -> bytes:
    """The 28-byte record option."""
    (content,) = [c for c in our_options(packet) if len(c) == 26]
    return b"\xfd\x1c" + content


def with_record(packet: Packet, option: bytes | None) -> list[tuple[object, object]]:
    """The segment's options with another record option, or none."""
    kept = [(k, v) for k, v in packet[TCP].options if k != 253]
    return kept if option is None else [*kept, (253, option[2:])]


@pytest.fixture
def encrypting(lan: Lan) -> Iterator[Lan]:
    """Hosts whose policy asks for encryption. No connection tracking entry finds anything odd in any test."""
    for host in (lan.a, lan.b):
        host.policy(ENCRYPTED)
    yield lan


def talk(lan: Lan, v6: bool = False) -> Talk:
    """Connect, and exchange a first line each way."""
    listener = lan.b.listen(v6=v6)
    port = port_of(listener)
    legs = {leg: lan.wire.tap(leg, port) for leg in ("a", "b")}
    client = lan.a.connect(lan.b.address(v6), port)
    server = accept(listener)
    echo(client, server)
    for tap in legs.values():
        tap.all()
        tap._given = len(tap.packets)
    return Talk(client, server, port, legs)


def delivered_nothing(sock: socket.socket) -> None:
    """For a moment nothing can be read."""
    sock.settimeout(SHORT_S)
    with contextlib.suppress(TimeoutError):
        got = sock.recv(1)
        raise AssertionError(f"delivered {got!r}" if got else "the stream was ended")
    sock.settimeout(10)


@contextlib.contextmanager
def counted(host: Host, reason: DropReason, at_least: int = 1) -> Iterator[None]:
    """What is done inside makes the host drop for that reason."""
    before = host.count(reason)
    yield
    wait_until(lambda: host.count(reason) >= before + at_least, f"{host.name}'s drop for {reason.name}")


@FAMILIES
def test_the_wire_carries_records_and_the_events_say_so(encrypting: Lan, v6: bool) -> None:
    lan = encrypting
    t = talk(lan, v6)
    t.client.sendall(SECRET)
    assert read_exactly(t.server, len(SECRET)) == SECRET
    t.server.sendall(SECRET[::-1])
    assert read_exactly(t.client, len(SECRET)) == SECRET[::-1]
    t.client.close()
    t.server.close()
    for host in (lan.a, lan.b):
        end = host.event(t.port, phase=Phase.END)
        assert (end["encryption"], end["cipher"]) == (Encryption.ENCRYPTED, Cipher.AES_256_GCM)
    for tap in t.legs.values():
        seen = [p for p in tap.all() if "S" not in flags(p)]
        assert seen
        for packet in seen:
            assert SECRET not in bytes(packet)
            assert SECRET[::-1] not in bytes(packet)
            if body(packet) or "F" in flags(packet):
                assert len(record_of(packet)) == 28
    assert lan.a.invalid() == lan.b.invalid() == 0


@FAMILIES
@pytest.mark.parametrize("where", ["payload", "tag", "counter", "start", "length", "sequence"])
def test_a_changed_bit_is_dropped_and_the_true_one_still_counts(
    encrypting: Lan, where: str, v6: bool
) -> None:
    lan = encrypting
    t = talk(lan, v6)
    with lan.wire.losing(f"tcp dport {t.port} tcp flags & psh == psh"):
        t.client.sendall(SECRET)
        true = t.next("a", True)
        option, data, seq = bytearray(record_of(true)), bytearray(body(true)), true[TCP].seq
        match where:
            case "payload":
                data[7] ^= 1
            case "sequence":
                seq += 1
            case _:
                option[{"counter": 7, "start": 9, "length": 11, "tag": 20}[where]] ^= 1
        changed = again(true, bytes(data), seq=seq, options=with_record(true, bytes(option)))
        if where == "length":  # claims more than is there: a piece of something that never completes
            lan.wire.send("b", changed)
        else:
            with counted(lan.b, DropReason.RECORD_INVALID):
                lan.wire.send("b", changed)
        delivered_nothing(t.server)
    assert read_exactly(t.server, len(SECRET)) == SECRET  # the stack sends it again


@FAMILIES
def test_repeated_reordered_and_late_records(encrypting: Lan, v6: bool) -> None:
    lan = encrypting
    t = talk(lan, v6)
    with lan.wire.losing(f"tcp dport {t.port} tcp flags & psh == psh"):
        t.client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        t.client.sendall(b"first ")
        first = t.next("a", True)
        t.client.sendall(b"second")
        second = t.next("a", True)
        while body(second) == body(first) or second[TCP].seq == first[TCP].seq:
            second = t.next("a", True)
        for packet in (second, first):
            lan.wire.send("b", again(packet))
        assert read_exactly(t.server, 12) == b"first second"
        with counted(lan.b, DropReason.RECORD_REPLAYED, 2):
            for packet in (first, second):
                lan.wire.send("b", again(packet))
        delivered_nothing(t.server)
    echo(t.client, t.server)


@pytest.mark.parametrize("kept", [1, 20])
def test_a_truncated_record_is_a_piece_that_never_completes(encrypting: Lan, kept: int) -> None:
    lan = encrypting
    t = talk(lan)
    with lan.wire.losing(f"tcp dport {t.port} tcp flags & psh == psh"):
        t.client.sendall(SECRET)
        true = t.next("a", True)
        lan.wire.send("b", again(true, body(true)[:kept]))
        delivered_nothing(t.server)
    assert read_exactly(t.server, len(SECRET)) == SECRET


def test_an_injected_segment_without_a_record(encrypting: Lan) -> None:
    lan = encrypting
    t = talk(lan)
    t.client.sendall(SECRET)
    true = t.next("a", True)
    assert read_exactly(t.server, len(SECRET)) == SECRET
    after = true[TCP].seq + len(body(true))
    with counted(lan.b, DropReason.RECORD_MISSING):
        lan.wire.send("b", again(true, b"DROP TABLE", seq=after, options=with_record(true, None)))
    delivered_nothing(t.server)
    echo(t.client, t.server)


def test_a_stripped_option(encrypting: Lan) -> None:
    lan = encrypting
    t = talk(lan)
    with lan.wire.losing(f"tcp dport {t.port} tcp flags & psh == psh"):
        t.client.sendall(SECRET)
        true = t.next("a", True)
        with counted(lan.b, DropReason.RECORD_MISSING):
            lan.wire.send("b", again(true, options=with_record(true, None)))
        delivered_nothing(t.server)
    assert read_exactly(t.server, len(SECRET)) == SECRET


@FAMILIES
@pytest.mark.parametrize("how", ["bare", "with an old record"])
def test_a_forged_end(encrypting: Lan, how: str, v6: bool) -> None:
    lan = encrypting
    t = talk(lan, v6)
    t.client.sendall(SECRET)
    true = t.next("a", True)
    assert read_exactly(t.server, len(SECRET)) == SECRET
    after = true[TCP].seq + len(body(true))
    option = None if how == "bare" else record_of(true)
    reason = DropReason.RECORD_MISSING if option is None else DropReason.RECORD_INVALID
    with counted(lan.b, reason):
        lan.wire.send("b", again(true, b"", seq=after, flags="FA", options=with_record(true, option)))
    delivered_nothing(t.server)
    t.client.close()  # the true end does come
    assert t.server.recv(1) == b""


def test_fin_put_on_a_true_record(encrypting: Lan) -> None:
    lan = encrypting
    t = talk(lan)
    with lan.wire.losing(f"tcp dport {t.port} tcp flags & psh == psh"):
        t.client.sendall(SECRET)
        true = t.next("a", True)
        with counted(lan.b, DropReason.RECORD_INVALID):
            lan.wire.send("b", again(true, flags="FPA"))
        delivered_nothing(t.server)
    assert read_exactly(t.server, len(SECRET)) == SECRET


@FAMILIES
def test_an_urgent_pointer_takes_no_octet_out_of_the_stream(encrypting: Lan, v6: bool) -> None:
    """Without SO_OOBINLINE a stack leaves out the octet that any segment of the connection points at."""
    lan = encrypting
    t = talk(lan, v6)
    t.client.sendall(SECRET)
    true = t.next("a", True)
    assert read_exactly(t.server, len(SECRET)) == SECRET
    after = true[TCP].seq + len(body(true))
    bare = with_record(true, None)
    passed = t.legs["b"]
    lan.wire.send("b", again(true, b"", seq=after, flags="AU", urgptr=3, options=bare))
    passed.next("the forged ACK", lambda p: "U" in flags(p))
    with lan.wire.losing(f"tcp dport {t.port} tcp flags & psh == psh"):
        t.client.sendall(SECRET)
        true = t.next("a", True)
        with counted(lan.b, DropReason.RECORD_INVALID):
            lan.wire.send("b", again(true, flags="PAU", urgptr=5))
    assert read_exactly(t.server, len(SECRET)) == SECRET
    echo(t.client, t.server)


def test_a_record_of_another_connection(encrypting: Lan) -> None:
    lan = encrypting
    one, other = talk(lan), talk(lan)
    with lan.wire.losing("tcp flags & psh == psh"):
        one.client.sendall(SECRET)
        other.client.sendall(SECRET)
        mine, foreign = one.next("a", True), other.next("a", True)
        swapped = again(mine, body(foreign), options=with_record(mine, record_of(foreign)))
        with counted(lan.b, DropReason.RECORD_INVALID):
            lan.wire.send("b", swapped)
        delivered_nothing(one.server)
    assert read_exactly(one.server, len(SECRET)) == SECRET
    assert read_exactly(other.server, len(SECRET)) == SECRET


def test_a_record_sent_back_to_its_sender(encrypting: Lan) -> None:
    lan = encrypting
    t = talk(lan)
    with lan.wire.losing(f"tcp sport {t.port} tcp flags & psh == psh"):
        t.client.sendall(SECRET)
        true = t.next("a", True)
        assert read_exactly(t.server, len(SECRET)) == SECRET
        t.server.sendall(SECRET)
        back = t.next("b", False)
        reflected = again(back, body(true), options=with_record(back, record_of(true)))
        before = sum(lan.a.count(r) for r in (DropReason.RECORD_INVALID, DropReason.RECORD_REPLAYED))
        lan.wire.send("a", reflected)
        wait_until(
            lambda: (
                sum(lan.a.count(r) for r in (DropReason.RECORD_INVALID, DropReason.RECORD_REPLAYED)) > before
            ),
            "a's drop of its own record",
        )
        delivered_nothing(t.client)
    assert read_exactly(t.client, len(SECRET)) == SECRET


def test_a_proof_of_a_plain_flow_where_encryption_is_asked_for(encrypting: Lan) -> None:
    lan = encrypting
    listener = lan.b.listen()
    hand, keys = shake(lan, port_of(listener), suites=1)
    with counted(lan.b, DropReason.PROOF_INVALID):
        hand.prove(proof_option(keys, 0), "PA", b"in the clear")
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.accept()


def test_a_downgraded_offer_makes_the_answer_unreadable(encrypting: Lan) -> None:
    lan = encrypting
    listener = lan.b.listen()
    port = port_of(listener)
    tap = lan.wire.tap("a", port)
    with lan.wire.losing(f"tcp dport {port} tcp flags syn"):
        client = lan.a.dial(lan.b.address(), port)
        syn = tap.flags("S")
        offer = bytearray(body(syn))
        assert offer[3] == 3
        offer[3] = 2  # no AES any more
        lan.wire.send("b", again(syn, bytes(offer)))
        lan.a.denial(port, DropReason.HANDSHAKE_FORGED)
    listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        listener.accept()
    client.close()


def test_an_offer_without_suites_is_denied_where_encryption_is_asked_for(encrypting: Lan) -> None:
    lan = encrypting
    lan.a.policy(POLICY)
    listener = lan.b.listen()
    port = port_of(listener)
    tap = lan.wire.tap("a", port)
    with lan.wire.losing(f"tcp dport {port} tcp flags syn"):
        client = lan.a.dial(lan.b.address(), port)
        syn = tap.flags("S")
        offer = bytearray(body(syn))
        offer[2] = offer[3] = 0
        lan.wire.send("b", again(syn, bytes(offer)))
        lan.b.denial(port, DropReason.ENCRYPTION_UNAVAILABLE)
    client.close()


def test_the_lost_proof_is_made_up_for_by_the_first_record(encrypting: Lan) -> None:
    lan = encrypting
    listener = lan.b.listen()
    port = port_of(listener)
    with lan.wire.losing(f"tcp dport {port} tcp flags & (syn | psh | ack) == ack", first=1):
        client = lan.a.connect(lan.b.address(), port)
        client.sendall(SECRET)
        server = accept(listener)
    assert read_exactly(server, len(SECRET)) == SECRET
    echo(client, server)


def test_policy_change_cuts_an_encrypted_connection(encrypting: Lan) -> None:
    lan = encrypting
    t = talk(lan)
    assert lan.b.policy(POLICY.replace("app=web to call app=db", "app=web to call app=none")) >= 1
    with pytest.raises(ConnectionError):
        t.server.recv(1)
    lan.b.event(t.port, phase=Phase.END, drop_reason=DropReason.POLICY_CHANGED)


def test_a_demand_for_encryption_cuts_a_plain_connection(lan: Lan) -> None:
    listener = lan.b.listen()
    client = lan.a.connect(lan.b.address(), port_of(listener))
    server = accept(listener)
    echo(client, server)
    assert lan.b.policy(ENCRYPTED) >= 1
    with pytest.raises(ConnectionError):
        server.recv(1)
    finish_new = lan.a.dial(lan.b.address(), port_of(listener))
    echo(finish(finish_new), accept(listener))
