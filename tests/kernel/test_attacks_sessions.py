"""Connections under a session on real hosts, and what somebody on the wire can make of them: nothing.

The attacker has every SYN, answer and proof that ever passed, before its owner if he likes, and can lose what he likes.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from scapy.layers.inet import TCP

from nfq.session import ANSWER_SIZE, SYN_SIZE, UNKNOWN_SIZE
from sectool.events import Action, Auth, AuthResult, DropReason
from tests.kernel.conftest import wait_until
from tests.kernel.hosts import accept, echo, finish, nothing_arrives, port_of
from tests.kernel.test_attacks import FAMILIES, Hand, flipped
from tests.kernel.wire import again, body, flags, our_options

if TYPE_CHECKING:
    import socket

    from tests.kernel.hosts import Lan
    from tests.kernel.wire import Tap

pytestmark = pytest.mark.kernel

SYN_ACK = "tcp flags & (syn | ack) == (syn | ack)"
SYN = "tcp flags & (syn | ack) == syn"


class Known:
    """A port of host b to which host a has a session."""

    def __init__(self, lan: Lan, *, v6: bool = False) -> None:
        self.lan, self.v6 = lan, v6
        self.listener = lan.b.listen(v6=v6)
        self.port = port_of(self.listener)
        echo(self.connect(), accept(self.listener))

    def connect(self) -> socket.socket:
        return self.lan.a.connect(self.lan.b.address(self.v6), self.port)

    def dial(self) -> socket.socket:
        return self.lan.a.dial(self.lan.b.address(self.v6), self.port)

    def tap(self, leg: str = "a") -> Tap:
        return self.lan.wire.tap(leg, self.port)

    def methods(self, *expected: Auth) -> None:
        """How the connections were authenticated so far, on both hosts."""
        for host in (self.lan.a, self.lan.b):

            def seen(h=host) -> list[int]:  # type: ignore[no-untyped-def]
                rows = [r for r in h.records(self.port) if r["phase"] == 1 and r["action"] == Action.ALLOW]
                return [int(r["auth_method"]) for r in rows]

            wait_until(lambda s=seen: s() == list(expected), f"{host.name}'s connections by {expected}")  # type: ignore[misc]


@FAMILIES
def test_connections_after_the_first_have_a_session(lan: Lan, v6: bool) -> None:
    known = Known(lan, v6=v6)
    tap = known.tap()
    for _ in range(3):
        echo(known.connect(), accept(known.listener), b"a question")
    sizes = [(len(body(p)), flags(p)) for p in tap.all() if "S" in flags(p)]
    assert sizes == [(SYN_SIZE, "S"), (ANSWER_SIZE, "SA")] * 3
    known.methods(Auth.NOISE_IX, Auth.SESSION, Auth.SESSION, Auth.SESSION)
    record = lan.b.event(known.port, auth_method=Auth.SESSION)
    assert (record["auth_result"], record["source_identity"] != 0) == (AuthResult.PROVEN, True)


def test_many_connections_at_once(lan: Lan) -> None:
    known = Known(lan)
    clients = [known.dial() for _ in range(100)]
    servers = [accept(known.listener) for _ in clients]
    for client in clients:
        finish(client)
    by_port = {server.getpeername()[1]: server for server in servers}
    for number, client in enumerate(clients):
        echo(client, by_port[port_of(client)], b"%d" % number)
    known.methods(Auth.NOISE_IX, *[Auth.SESSION] * 100)


# -- loss ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "lost", [f"tcp dport {{}} {SYN}", f"tcp sport {{}} {SYN_ACK}"], ids=["syn", "synack"]
)
def test_what_is_lost_becomes_a_full_handshake(lan: Lan, lost: str) -> None:
    known = Known(lan)
    with lan.wire.losing(lost.format(known.port), first=1):
        echo(known.connect(), accept(known.listener))
    known.methods(Auth.NOISE_IX, Auth.NOISE_IX)
    echo(known.connect(), accept(known.listener))
    known.methods(Auth.NOISE_IX, Auth.NOISE_IX, Auth.SESSION)


@pytest.mark.parametrize("first", [1, 2, 3])
def test_lost_proofs_are_made_again(lan: Lan, first: int) -> None:
    """The ACK, the data behind it, and what the kernel then sends again without one."""
    known = Known(lan)
    with lan.wire.losing(f"tcp dport {known.port} tcp flags & (syn | ack) == ack", first=first):
        client = known.connect()
        client.sendall(b"a question")
        server = accept(known.listener)
    assert server.recv(100) == b"a question"
    server.sendall(b"an answer")
    assert client.recv(100) == b"an answer"
    known.methods(Auth.NOISE_IX, Auth.SESSION)


# -- lost state ------------------------------------------------------------------------------------------------


@FAMILIES
def test_a_responder_that_starts_anew_says_so_and_nobody_waits(lan: Lan, v6: bool) -> None:
    known = Known(lan, v6=v6)
    lan.b.kill()
    lan.b.restart()
    tap = known.tap()
    before = lan.a.count(DropReason.SESSION_UNKNOWN)
    begun = time.monotonic()
    client = known.connect()
    took = time.monotonic() - begun
    echo(client, accept(known.listener))
    assert took < 0.9, "not by the retransmission after a second"
    hint = next(p for p in tap.all() if "R" in flags(p))
    assert len(body(hint)) == UNKNOWN_SIZE
    assert lan.a.count(DropReason.SESSION_UNKNOWN) == before + 1
    assert lan.b.count(DropReason.SESSION_UNKNOWN) == 1
    echo(known.connect(), accept(known.listener))
    assert lan.b.event(known.port, auth_method=Auth.SESSION)["action"] == Action.ALLOW


def test_an_initiator_that_starts_anew_makes_another(lan: Lan) -> None:
    known = Known(lan)
    lan.a.kill()
    lan.a.restart()
    for _ in range(2):
        echo(known.connect(), accept(known.listener))
    wait_until(
        lambda: (
            [int(r["auth_method"]) for r in lan.b.records(known.port) if r["phase"] == 1]
            == [Auth.NOISE_IX, Auth.NOISE_IX, Auth.SESSION]
        ),
        "a full handshake and a session",
    )


def test_only_who_has_seen_the_syn_can_hint(lan: Lan) -> None:
    known = Known(lan)
    tap = known.tap("b")
    with lan.wire.losing(f"tcp sport {known.port} {SYN_ACK}"):
        client = known.dial()
        syn = tap.flags("S", to_port=True)
        answer = tap.flags("SA")
        before = lan.a.count(DropReason.SESSION_FORGED)
        lan.wire.send("a", again(answer, b"\x01\x06" + bytes(16), flags="RA"))
        wait_until(lambda: lan.a.count(DropReason.SESSION_FORGED) == before + 1, "the forged hint's drop")
        assert len([p for p in tap.all() if flags(p) == "S"]) == 1, "no other SYN for it"
        lan.wire.send("a", again(answer))
    echo(finish(client), accept(known.listener))
    assert len(body(syn)) == SYN_SIZE
    known.methods(Auth.NOISE_IX, Auth.SESSION)


# -- replays ---------------------------------------------------------------------------------------------------


@FAMILIES
def test_a_syn_replayed(lan: Lan, v6: bool) -> None:
    """From its own port while the connection lives, and from others."""
    known = Known(lan, v6=v6)
    tap = known.tap()
    client = known.connect()
    server = accept(known.listener)
    syn = tap.flags("S")
    assert len(body(syn)) == SYN_SIZE
    for sport in (port_of(client), 40_001, 40_002):
        lan.wire.send("b", again(syn, sport=sport))
        lan.b.denial(known.port, DropReason.SYN_REPLAYED, source_port=sport, auth_method=Auth.SESSION)
    nothing_arrives(known.listener)
    echo(client, server, b"undisturbed")


def test_a_syn_that_never_arrived_opens_nothing_to_who_kept_it(lan: Lan) -> None:
    """It is fresh and its tag holds; but whoever sends it from elsewhere cannot prove himself."""
    known = Known(lan)
    tap = known.tap()
    with lan.wire.losing(f"tcp dport {known.port} {SYN}", first=1):
        client = known.dial()
        syn = tap.flags("S")
        hand = Hand(lan, known.port)
        hand.syn(body(syn))
        assert len(hand.synack()) == ANSWER_SIZE
        missing = lan.b.count(DropReason.PROOF_MISSING)
        hand.send("PA", b"DROP TABLE")
        wait_until(lambda: lan.b.count(DropReason.PROOF_MISSING) == missing + 1, "the drop of the data")
        hand.prove(b"\xfd\x1c\x5e\xc7" + bytes(24))
        lan.b.denial(known.port, DropReason.PROOF_INVALID, source_port=hand.sport)
        nothing_arrives(known.listener)
        known.listener.setblocking(True)
    echo(finish(client), accept(known.listener))


def test_proofs_of_another_connection_open_nothing(lan: Lan) -> None:
    known = Known(lan)
    tap = known.tap()
    echo(known.connect(), accept(known.listener))
    (proof,) = our_options(tap.next("a proof", lambda p: flags(p) == "A" and bool(our_options(p))))
    with lan.wire.losing(f"tcp dport {known.port} tcp flags & (syn | ack) == ack"):
        client = known.connect()  # its own stack has had the answer
        own = port_of(client)
        ack = tap.next("the proving ACK", lambda p: flags(p) == "A" and p[TCP].sport == own)
        forged = again(ack)
        forged[TCP].options = [(k, proof if k == 253 else v) for k, v in ack[TCP].options]
        lan.wire.send("b", forged)
        lan.b.denial(known.port, DropReason.PROOF_INVALID, source_port=own, auth_method=Auth.SESSION)
        nothing_arrives(known.listener)
        known.listener.setblocking(True)
        lan.wire.send("b", again(ack))  # the true one still counts
        server = accept(known.listener)
    echo(client, server)


# -- forgeries ---------------------------------------------------------------------------------------------------

FIELDS = {
    "version": (0, 3, DropReason.VERSION_UNSUPPORTED),
    "type": (1, 8, DropReason.HANDSHAKE_MALFORMED),
    "wish": (2, 1, DropReason.SESSION_FORGED),
    "suites": (3, 3, DropReason.SESSION_FORGED),
    "id": (4, 1, DropReason.SESSION_UNKNOWN),
    "id-end": (19, 128, DropReason.SESSION_UNKNOWN),
    "number": (27, 1, DropReason.SESSION_FORGED),
    "nonce": (28, 1, DropReason.SESSION_FORGED),
    "tag": (36, 1, DropReason.SESSION_FORGED),
    "tag-end": (51, 128, DropReason.SESSION_FORGED),
}


@pytest.mark.parametrize("field", FIELDS)
def test_a_syn_changed_on_its_way(lan: Lan, field: str) -> None:
    """A downgrade of suites or of encryption is one of them."""
    at, bits, reason = FIELDS[field]
    known = Known(lan)
    tap = known.tap()
    with lan.wire.losing(f"tcp dport {known.port} {SYN}", first=1):
        client = known.dial()
        syn = tap.flags("S")
        before = lan.b.count(reason)
        lan.wire.send("b", again(syn, flipped(body(syn), at, bits)))
        wait_until(lambda: lan.b.count(reason) == before + 1, "its drop")
        if reason is not DropReason.SESSION_UNKNOWN:
            nothing_arrives(known.listener)
            known.listener.setblocking(True)
            lan.wire.send("b", again(syn))  # the true one still counts
        # A session not known is hinted at: who can change the SYN can make the initiator start over, safely.
        echo(finish(client), accept(known.listener))
    known.methods(Auth.NOISE_IX, Auth.NOISE_IX if reason is DropReason.SESSION_UNKNOWN else Auth.SESSION)


@pytest.mark.parametrize("at", [0, 1, 2, 17, 18, 33, 34, 49], ids=lambda at: f"byte{at}")
def test_an_answer_changed_on_its_way(lan: Lan, at: int) -> None:
    known = Known(lan)
    tap = known.tap("b")
    with lan.wire.losing(f"tcp sport {known.port} {SYN_ACK}"):
        client = known.dial()
        true = tap.flags("SA")
        lan.wire.send("a", again(true, flipped(body(true), at, 2)))
        wanted = {0: DropReason.VERSION_UNSUPPORTED, 1: DropReason.HANDSHAKE_MALFORMED}
        lan.a.denial(known.port, wanted.get(at, DropReason.SESSION_FORGED), action=Action.ERROR)
        nothing_arrives(known.listener)
        known.listener.setblocking(True)
        lan.wire.send("a", again(true))  # the true one still counts
    echo(finish(client), accept(known.listener))


def test_an_answer_of_another_connection(lan: Lan) -> None:
    known = Known(lan)
    tap = known.tap("b")
    echo(known.connect(), accept(known.listener))
    recorded = body(tap.flags("SA"))
    with lan.wire.losing(f"tcp sport {known.port} {SYN_ACK}"):
        client = known.dial()
        true = tap.flags("SA")
        lan.wire.send("a", again(true, recorded))
        lan.a.denial(known.port, DropReason.SESSION_FORGED, source_port=port_of(client))
        with pytest.raises(TimeoutError):
            finish(client, 0.02)
        lan.wire.send("a", again(true))
    echo(finish(client), accept(known.listener))
