"""Playbooks of datagrams: what two enforcers make of each, without a kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nfq.core import Verdict
from nfq.datagram import parse
from nfq.flow import State
from nfq.udpcontrol import HELLO_SIZE, Kind, read
from sectool.events import Action, Auth, AuthResult, DropReason, Encryption, Phase, Point
from sectool.identity.authority import RootAuthority
from tests.nfq.udpmemory import UdpPair, checked, make_udp_pair

MakePair = Callable[..., UdpPair]
FAMILIES = pytest.mark.parametrize("v6", [False, True], ids=["v4", "v6"])


@pytest.fixture
def make(root: RootAuthority) -> MakePair:
    def made(**kwargs: object) -> UdpPair:
        return make_udp_pair(root, **kwargs)  # type: ignore[arg-type]

    return made


def kinds(packets: object) -> list[Kind | None]:
    """What control datagrams these packets are."""
    out: list[Kind | None] = []
    for packet in packets:  # type: ignore[attr-defined]
        control = read(checked(packet).payload)
        out.append(None if control is None else control.kind)
    return out


@FAMILIES
def test_a_first_datagram_waits_for_the_handshake_and_is_delivered_once(make: MakePair, v6: bool) -> None:
    pair = make(v6=v6)
    assert pair.call(b"question") is Verdict.WAIT
    (hello,) = pair.a.sent
    assert len(checked(hello).payload) == HELLO_SIZE
    assert b"question" not in hello
    pair.b.receive(pair.a.sent.popleft())
    assert kinds(pair.b.sent) == [Kind.ANSWER]
    assert len(pair.b.sent[0]) <= len(hello), "no amplification"
    pair.a.receive(pair.b.sent.popleft())
    assert kinds(pair.a.sent) == [Kind.PROOF_DATA]
    pair.b.receive(pair.a.sent.popleft())
    assert pair.b.delivered == [b"question"]
    assert kinds(pair.b.sent) == [Kind.ACK]
    pair.a.receive(pair.b.sent.popleft())
    assert pair.a.delivered == []
    assert pair.answer(b"answer") is Verdict.RELEASE
    pair.carry()
    assert pair.a.delivered == [b"answer"]
    assert pair.call(b"next") is Verdict.RELEASE
    for host, point in ((pair.a, Point.INITIATOR), (pair.b, Point.RESPONDER)):
        (record,) = host.records
        assert record["action"] == Action.ALLOW
        assert record["transport"] == 17
        assert record["point"] == point
        assert record["phase"] == Phase.VERDICT
        assert record["auth_method"] == Auth.NOISE_IX
        assert record["auth_result"] == AuthResult.PROVEN
        assert record["source_port"] == 40_000
        assert record["destination_port"] == 5432
        assert record["encryption"] == Encryption.PLAIN


@FAMILIES
def test_an_encrypted_flow_needs_no_separate_proof(make: MakePair, v6: bool) -> None:
    pair = make(v6=v6, app="vault")
    pair.call(b"first secret")
    pair.b.receive(pair.a.sent.popleft())
    pair.a.receive(pair.b.sent.popleft())
    assert kinds(pair.a.sent) == [None]
    assert b"secret" not in pair.a.sent[0]
    pair.carry()
    assert pair.b.delivered == [b"first secret"]
    for i in range(5):
        assert pair.call(b"secret %d" % i) is Verdict.ENCRYPT
        assert b"secret" not in pair.a.sent[0]
        assert pair.answer(b"reply %d" % i) is Verdict.ENCRYPT
        pair.carry()
        assert pair.b.delivered[-1] == b"secret %d" % i
        assert pair.a.delivered[-1] == b"reply %d" % i
    for host in (pair.a, pair.b):
        assert host.records[0]["encryption"] == Encryption.ENCRYPTED
        assert host.records[0]["cipher"] == 1


def test_default_is_deny_on_either_side_and_told(make: MakePair) -> None:
    pair = make(app="other")
    pair.call(b"x")
    pair.carry()
    assert pair.b.delivered == []
    assert pair.b.reasons == [DropReason.DEFAULT_DENY]
    assert pair.a.reasons == [DropReason.PEER_DENIED]
    assert pair.a.records[0]["peer_reason"] == DropReason.DEFAULT_DENY
    assert pair.call(b"again") is Verdict.DROP, "remembered"
    assert len(pair.a.records) == 1


def test_a_proof_sent_back_to_who_made_it_gives_no_ack(make: MakePair) -> None:
    """The Ack that nobody but the responder may say must not be had from the initiator."""
    pair = make()
    pair.call(b"first")
    pair.b.receive(pair.a.sent.popleft())
    pair.a.receive(pair.b.sent.popleft())
    proof = parse(pair.a.sent.popleft(), True)  # never arrives
    pair.a.receive(pair.datagram(proof.payload, to_b=False))
    assert not pair.a.sent
    assert pair.a.delivered == []
    assert next(iter(pair.a.core.udp.live)).state is State.PROVING


def test_a_replay_beside_a_half_open_flow_does_not_make_a_live_one_unknown(
    make: MakePair, root: RootAuthority
) -> None:
    pair = make(app="vault")
    pair.establish()
    pair.call(b"once")
    copy = pair.a.sent[-1]
    pair.carry()
    thief = make(app="vault")
    thief.call(b"hello")
    pair.b.receive(thief.a.sent.popleft())
    pair.b.sent.clear()
    for _ in range(8):
        assert pair.b.receive(copy) is Verdict.DROP
    assert not pair.b.sent
