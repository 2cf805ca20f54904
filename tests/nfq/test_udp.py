"""Playbooks of datagrams: what two enforcers make of each, without a kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from nfq import udp, udpflow
from nfq.core import Verdict
from nfq.datagram import craft, parse
from nfq.flow import State
from nfq.session import unknown
from nfq.udpcontrol import HELLO_SIZE, Kind, read, write
from sectool.events import Action, Auth, AuthResult, DropReason, Encryption, Phase, Point
from sectool.identity.authority import RootAuthority
from tests.nfq.udpmemory import POLICY, UdpPair, checked, made, make_udp_pair

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


def test_a_plain_flow_under_a_session_is_proven_before_anything_more_is_let_in(make: MakePair) -> None:
    pair = make()
    pair.establish()
    pair.sport = 41_001
    pair.call(b"question")
    withheld = pair.a.sent.popleft()
    assert pair.b.receive(withheld) is Verdict.ACCEPT, "not released"
    assert pair.b.delivered == [b"question"]
    assert pair.b.receive(pair.datagram(b"in the clear")) is Verdict.DROP, "whoever withheld it cannot go on"
    assert pair.answer(b"answer") is Verdict.ACCEPT
    resumed, *_ = pair.b.sent
    pair.carry()
    assert pair.a.delivered == [b"answer"]
    pair.call(b"more")
    assert kinds(pair.a.sent) == [Kind.PROOF_DATA]
    pair.carry()
    assert pair.call(b"released") is Verdict.RELEASE
    pair.carry()
    assert pair.b.delivered == [b"question", b"more", b"released"]
    assert len(pair.b.records) == 2
    assert kinds([resumed]) == [Kind.RESUMED]


def test_a_short_plain_flow_under_a_session_is_two_datagrams_and_their_handshake(make: MakePair) -> None:
    pair = make()
    pair.establish()
    pair.sport = 41_001
    pair.call(b"question")
    pair.carry()
    pair.answer(b"answer")
    pair.carry()
    for host in (pair.a, pair.b):
        assert host.records[-1]["auth_method"] == Auth.SESSION
    udp.tick(pair.b.core, pair.b.now_us + 11_000_000)
    assert pair.b.records[-1]["phase"] == Phase.END
    assert pair.b.records[-1]["action"] == Action.ALLOW
    assert len(pair.b.core.udp.accepting) == 0


def test_a_session_that_is_revoked_proves_nothing_any_more(make: MakePair) -> None:
    pair = make()
    pair.establish()
    pair.sport = 41_001
    pair.call(b"question")
    pair.carry()
    pair.call(b"more")
    pair.b.core.sessions.clear()
    pair.b.receive(pair.a.sent.popleft())
    assert pair.b.delivered == [b"question"]


def test_an_initiator_that_only_listens_proves_itself_all_the_same(make: MakePair) -> None:
    pair = make()
    pair.establish()
    pair.sport = 41_001
    pair.call(b"subscribe")
    pair.carry()
    pair.at(0.3)
    assert kinds(pair.a.sent) == [Kind.PROOF]
    pair.carry()
    assert pair.answer(b"news") is Verdict.RELEASE
    pair.carry()
    assert pair.a.delivered == [b"news"]


@FAMILIES
@pytest.mark.parametrize("app", ["db", "vault"], ids=["plain", "encrypted"])
def test_under_a_session_the_first_datagram_waits_for_nothing(make: MakePair, v6: bool, app: str) -> None:
    pair = make(v6=v6, app=app)
    pair.establish()
    for turn in range(1, 4):
        pair.sport = 41_000 + turn
        assert pair.call(b"secret question") is Verdict.ACCEPT
        assert kinds(pair.a.sent) == [Kind.RESUME]
        assert b"secret" not in pair.a.sent[0], "it is sealed, whatever the flow becomes"
        pair.call(b"another")
        pair.b.receive(pair.a.sent.popleft())
        assert pair.b.delivered[-1:] == [b"secret question"], "before anything else was exchanged"
        (answer,) = pair.b.sent
        assert kinds(pair.b.sent) == [Kind.RESUMED]
        assert len(answer) < len(pair.a.sent[0])
        pair.answer(b"at once")
        pair.carry()
        assert pair.a.delivered[-1:] == [b"at once"]
        assert pair.b.delivered[-1:] == [b"another"]
        assert pair.call(b"later") is (Verdict.ENCRYPT if app == "vault" else Verdict.ACCEPT)
        pair.carry()
    for host in (pair.a, pair.b):
        assert [Auth(r["auth_method"]) for r in host.records] == [Auth.NOISE_IX] + [Auth.SESSION] * 3
        states = {Encryption(r["encryption"]) for r in host.records}
        assert states == {Encryption.ENCRYPTED if app == "vault" else Encryption.PLAIN}
    assert pair.a.core.udp.early_bytes == 0


def test_a_replayed_resume_is_delivered_once_and_elsewhere_never(make: MakePair) -> None:
    pair = make()
    pair.establish()
    pair.sport = 41_000
    pair.call(b"once")
    resume = pair.a.sent[0]
    pair.carry()
    for _ in range(3):
        pair.b.receive(resume)
    elsewhere = bytearray(resume)
    elsewhere[21] ^= 1  # source port
    elsewhere[26:28] = b"\0\0"
    pair.b.receive(bytes(elsewhere))
    pair.carry()
    assert pair.b.delivered == [b"once"]
    assert DropReason.SYN_REPLAYED in pair.b.reasons


def test_an_unknown_session_costs_nothing_but_a_full_handshake(make: MakePair) -> None:
    pair = make(app="vault")
    pair.establish()
    pair.b.core.sessions.clear()
    pair.sport = 41_000
    pair.call(b"one")
    pair.call(b"two")
    pair.carry()
    assert pair.b.delivered == [b"one", b"two"]
    assert pair.a.records[-1]["auth_method"] == Auth.NOISE_IX


def test_whoever_makes_up_that_a_session_is_unknown_has_nothing_delivered_twice(make: MakePair) -> None:
    pair = make(app="vault")
    pair.establish()
    pair.sport = 41_000
    pair.call(b"pay 100")
    resume = pair.a.sent[0]
    pair.b.receive(pair.a.sent.popleft())
    pair.b.sent.clear()  # the answer is kept from the initiator
    control = read(checked(resume).payload)
    assert control is not None
    hint = craft(parse(resume, False).key, write(Kind.UNKNOWN_SESSION, unknown(control.body)))
    pair.a.receive(hint)
    pair.carry()
    assert pair.b.delivered == [b"pay 100"]
    pair.call(b"pay 100")
    pair.carry()
    assert pair.b.delivered == [b"pay 100"] * 2, "the program itself may say it again"


def test_without_an_answer_a_full_handshake_follows(make: MakePair) -> None:
    pair = make()
    pair.establish()
    pair.sport = 41_000
    pair.call(b"lost")
    pair.a.sent.clear()
    pair.at(0.3)
    assert kinds(pair.a.sent) == [Kind.RESUME]
    pair.a.sent.clear()
    pair.at(0.8)
    assert kinds(pair.a.sent) == [Kind.HELLO]
    assert pair.call(b"next") is Verdict.WAIT
    pair.carry()
    assert pair.b.delivered == [b"next"]


def test_a_session_ends_when_trust_does(make: MakePair) -> None:
    pair = make()
    pair.establish()
    for host in (pair.a, pair.b):
        host.core.sessions.clear()
    pair.sport = 41_000
    assert pair.call(b"x") is Verdict.WAIT


def test_a_resume_made_for_tcp_is_worth_nothing_for_datagrams(make: MakePair) -> None:
    pair = make()
    pair.establish()
    core = pair.a.core
    (lanes,) = core.sessions._held.values()
    (session,) = lanes.values()
    data = write(Kind.RESUME, session.attempt(0).payload)
    pair.sport = 41_000
    pair.b.receive(pair.datagram(data))
    assert pair.b.reasons[-1] is DropReason.SESSION_FORGED


def test_made_up_sources_from_outside_push_out_the_oldest_who_are_judged_anew(
    make: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(udpflow, "STRANGERS", 3)
    pair = make()
    packets = [made(f"192.0.2.{n}", "10.0.0.2", 1000, 5432, b"x") for n in range(10)]
    for packet in packets:
        assert pair.b.receive(packet) is Verdict.RELEASE
        pair.b.pass_time(pair.b.now_us + 1)
    assert len(pair.b.core.udp.live) == 3
    assert len(pair.b.ports.cuts) == 7, "the kernel carries them no more"
    assert pair.b.receive(packets[0]) is Verdict.RELEASE, "who is still there is let in again"


@FAMILIES
def test_a_rule_with_an_end_ends_the_flow(make: MakePair, v6: bool) -> None:
    until = POLICY.replace("on udp/5432\n", "on udp/5432 until 2026-09-22T00:00:00Z\n", 1)
    pair = make(v6=v6, policy=until)
    pair.establish()
    ends_us = pair.a.core.udp.expiring[0][0]
    for host in (pair.a, pair.b):
        udp.tick(host.core, ends_us - 1)
        assert len(host.core.udp.live) == 1
        udp.tick(host.core, ends_us)
        assert len(host.core.udp.live) == 0
        assert host.records[-1]["drop_reason"] == DropReason.POLICY_CHANGED


def test_a_half_open_flow_that_nobody_proves_is_given_up_and_recorded(make: MakePair) -> None:
    pair = make()
    pair.call(b"x")
    pair.b.receive(pair.a.sent.popleft())
    assert len(pair.b.core.udp.accepting) == 1
    udp.tick(pair.b.core, pair.b.now_us + 11_000_000)
    assert len(pair.b.core.udp.accepting) == 0
    assert pair.b.reasons == [DropReason.PROOF_MISSING]


def test_closed_sockets_end_their_flows_a_few_at_a_time(make: MakePair) -> None:
    pair = make(app="vault")
    found = pair.b.ports.listening[5432]
    pair.b.ports.listening[5432] = found._replace(socket=77)
    for n in range(100):
        pair.sport = 40_000 + n
        pair.call(b"x")
        pair.carry()
    udp.socket_ended(pair.b.core, 78)
    assert udp.due_us(pair.b.core, 5) == 5
    udp.socket_ended(pair.b.core, 77)
    assert udp.due_us(pair.b.core, 5) == 0, "at once"
    udp.timers(pair.b.core, pair.b.now_us)
    assert len(pair.b.core.udp.live) == 100 - udp.ENDS_AT_ONCE
    udp.timers(pair.b.core, pair.b.now_us)
    assert len(pair.b.core.udp.live) == 0
    ends = [r for r in pair.b.records if r["phase"] == Phase.END]
    assert len(ends) == 100
    assert ends[0]["source_packets"] == 2, "what connection tracking has counted"
