"""Playbooks of connections under a session: packet by packet through two enforcers, without a kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import TCP

from nfq import datapath, packet
from nfq.core import Config, Verdict
from nfq.packet import HANDSHAKE_OPTION
from nfq.session import ANSWER_SIZE, LIFETIME_S, SYN_SIZE, UNKNOWN_SIZE
from nfq.steering import worker_of
from nfq.suites import ALL
from sectool.events import Action, Auth, AuthResult, ConnState, Decider, DropReason, Encryption, Point
from sectool.policy import Engine, parse
from tests.nfq import memory
from tests.nfq.memory import POLICY, resealed

if TYPE_CHECKING:
    from collections.abc import Callable

    from sectool.identity.authority import RootAuthority
    from tests.nfq.memory import MakeHost, Pair

SECOND = 1_000_000


def payload(data: bytes | None) -> bytes:
    assert data is not None
    return packet.parse(bytes(data), False).payload


def changed(data: bytes, where: int, bit: int = 0) -> bytes:
    """A packet with one bit of its payload flipped and its checksums made right."""
    out = bytearray(data)
    out[len(out) - len(payload(data)) + where] ^= 1 << bit
    return resealed(bytes(out))


def again(pair: Pair) -> Pair:
    """The same hosts, about to make the next connection."""
    pair.sport += 1
    pair.isn += 1000
    pair.peer_isn += 1000
    return pair


def later(pair: Pair, us: int) -> None:
    pair.a.now_us += us
    pair.b.now_us += us


@pytest.fixture
def resumable(pair: Pair) -> Pair:
    """A pair that has made a full handshake and is about to connect again."""
    pair.establish()
    return again(pair)


def make_resumable(make_pair: Callable[[], Pair]) -> Pair:
    made = make_pair()
    made.establish()
    return again(made)


def test_the_second_connection_costs_no_public_key_work(
    resumable: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_of_it(*_: object) -> bytes:
        raise AssertionError("an X25519 exchange")

    monkeypatch.setattr("nfq.noise._dh", none_of_it)
    for host in (resumable.a, resumable.b):
        monkeypatch.setattr(host.core.ephemerals, "take", none_of_it)
    syn = resumable.syn_on_wire()
    assert len(payload(syn)) == SYN_SIZE
    assert payload(resumable.b.into(syn).packet) == b""
    answer = resumable.b.out(resumable.synack()).packet
    assert len(payload(answer)) == ANSWER_SIZE
    assert payload(resumable.a.into(answer or b"").packet) == b""
    assert resumable.b.into(resumable.a.out(resumable.ack()).packet or b"").verdict is Verdict.RELEASE
    assert resumable.a.into(resumable.reply(b"hello")).verdict is Verdict.RELEASE
    for host, point in ((resumable.a, Point.INITIATOR), (resumable.b, Point.RESPONDER)):
        first, second = host.records
        assert (first["auth_method"], second["auth_method"]) == (Auth.NOISE_IX, Auth.SESSION)
        assert (second["auth_result"], second["point"]) == (AuthResult.PROVEN, point)
        assert (second["action"], second["conn_state"]) == (Action.ALLOW, ConnState.S1)
        assert second["source_identity"] == first["source_identity"] != 0
        assert second["rule"] == first["rule"] != 0
        assert len(host.core.accepting) + len(host.core.connecting) == 0


def test_many_connections_out_of_order(resumable: Pair) -> None:
    syns = []
    for _ in range(40):
        syns.append((resumable.sport, resumable.isn, resumable.peer_isn, resumable.syn_on_wire()))
        again(resumable)
    for sport, isn, peer_isn, syn in reversed(syns):
        resumable.sport, resumable.isn, resumable.peer_isn = sport, isn, peer_isn
        assert resumable.b.into(syn).verdict is Verdict.ACCEPT
        answer = resumable.b.out(resumable.synack()).packet or b""
        resumable.a.into(answer)
        assert resumable.b.into(resumable.a.out(resumable.ack()).packet or b"").verdict is Verdict.RELEASE
    assert list(resumable.b.records["auth_method"][1:]) == [Auth.SESSION] * 40


# -- loss ----------------------------------------------------------------------------------------------------


def test_a_lost_syn_becomes_a_full_handshake(resumable: Pair) -> None:
    assert len(payload(resumable.syn_on_wire())) == SYN_SIZE
    later(resumable, SECOND)
    resumable.establish()
    for host in (resumable.a, resumable.b):
        assert list(host.records["auth_method"]) == [Auth.NOISE_IX] * 2
    again(resumable).establish()
    assert resumable.b.records["auth_method"][-1] == Auth.SESSION, "it has left a new session"


def test_a_lost_synack_becomes_a_full_handshake(resumable: Pair) -> None:
    late = resumable.synack_on_wire()
    later(resumable, SECOND)
    syn = resumable.syn_on_wire()
    assert len(payload(syn)) > SYN_SIZE
    assert resumable.a.into(late).verdict is Verdict.DROP, "too late: it has been given up"
    assert resumable.b.into(syn).verdict is Verdict.ACCEPT
    assert len(resumable.b.core.accepting) == 1
    answer = resumable.b.out(resumable.synack()).packet or b""
    assert resumable.a.into(answer).verdict is Verdict.ACCEPT
    assert resumable.b.into(resumable.a.out(resumable.ack()).packet or b"").verdict is Verdict.RELEASE
    for host in (resumable.a, resumable.b):
        assert list(host.records["auth_method"]) == [Auth.NOISE_IX] * 2
        assert list(host.actions) == [Action.ALLOW] * 2


def test_a_lost_ack_leaves_the_proof_to_the_data(resumable: Pair) -> None:
    resumable.a.into(resumable.synack_on_wire())
    resumable.a.out(resumable.ack())
    proven = resumable.b.into(resumable.a.out(resumable.ack(b"GET /")).packet or b"")
    assert proven.verdict is Verdict.RELEASE
    assert payload(proven.packet) == b"GET /"


def test_the_same_syn_and_synack_again_are_no_replay(resumable: Pair) -> None:
    syn = resumable.syn_on_wire()
    for _ in range(3):
        assert payload(resumable.b.into(syn).packet) == b""
    answers = {resumable.b.out(resumable.synack()).packet for _ in range(3)}
    assert len(answers) == 1
    for answer in answers:
        assert resumable.a.into(answer or b"").verdict is Verdict.ACCEPT
        assert resumable.a.into(answer or b"").verdict is Verdict.ACCEPT
    assert resumable.b.into(resumable.a.out(resumable.ack()).packet or b"").verdict is Verdict.RELEASE


# -- lost state ----------------------------------------------------------------------------------------------


def forget(pair: Pair) -> None:
    """The responder's worker has been replaced."""
    pair.b.core.sessions.clear()


def test_a_responder_without_the_session_hints_and_nobody_waits(resumable: Pair) -> None:
    forget(resumable)
    assert resumable.b.into(resumable.syn_on_wire()).verdict is Verdict.DROP
    (hint,) = resumable.b.ports.injected
    assert len(payload(hint)) == UNKNOWN_SIZE
    assert resumable.a.into(hint).verdict is Verdict.DROP
    (syn,) = resumable.a.ports.repeated
    assert syn == bytes(resumable.syn())
    resumable.establish()
    assert resumable.b.core.recorder.reasons["session_unknown"] == 1
    for host in (resumable.a, resumable.b):
        assert list(host.records["auth_method"]) == [Auth.NOISE_IX] * 2
        assert list(host.actions) == [Action.ALLOW] * 2, "nothing was denied"
    again(resumable).establish()
    assert resumable.b.records["auth_method"][-1] == Auth.SESSION


def test_a_session_is_used_once_the_responder_is_heard(pair: Pair) -> None:
    """Before, the next SYN could overtake the proof."""
    proof = pair.proof_on_wire()
    assert len(payload(again(pair).syn_on_wire())) > SYN_SIZE
    pair.b.into(proof)
    pair.sport, pair.isn, pair.peer_isn = pair.sport - 1, pair.isn - 1000, pair.peer_isn - 1000
    assert pair.a.into(pair.reply()).verdict is Verdict.RELEASE
    pair.sport, pair.isn = pair.sport + 2, pair.isn + 2000
    assert len(payload(pair.syn_on_wire())) == SYN_SIZE


def test_hints_are_limited_and_silence_works_too(resumable: Pair, make_host: MakeHost) -> None:
    forget(resumable)
    resumable.b.core.hint_limit.burst = resumable.b.core.hint_limit.rate = 0
    assert resumable.b.into(resumable.syn_on_wire()).verdict is Verdict.DROP
    assert resumable.b.ports.injected == []
    later(resumable, SECOND)
    resumable.establish()


def test_only_who_has_seen_the_syn_can_hint(resumable: Pair) -> None:
    syn = resumable.syn_on_wire()
    seg = packet.parse(syn, False)
    for guess in (bytes(16), payload(syn)[-17:-1]):
        forged = packet.reply_reset(seg, options=HANDSHAKE_OPTION, payload=b"\x01\x06" + guess)
        assert resumable.a.into(forged).verdict is Verdict.DROP
    assert resumable.a.ports.repeated == []
    assert resumable.b.into(syn).verdict is Verdict.ACCEPT
    assert resumable.a.core.recorder.reasons["session_forged"] == 2


def test_a_hint_says_nothing_to_a_full_handshake(pair: Pair) -> None:
    syn = pair.syn_on_wire()
    forged = packet.reply_reset(
        packet.parse(syn, False), options=HANDSHAKE_OPTION, payload=b"\x01\x06" + payload(syn)[-16:]
    )
    assert pair.a.into(forged).verdict is Verdict.DROP
    assert pair.a.ports.repeated == []
    pair.establish()


def test_an_initiator_that_has_lost_its_sessions(resumable: Pair) -> None:
    resumable.a.core.sessions.clear()
    resumable.establish()
    assert list(resumable.a.records["auth_method"]) == [Auth.NOISE_IX] * 2


# -- time and renewal ------------------------------------------------------------------------------------------


def test_sessions_are_renewed_early_and_by_one_connection(resumable: Pair) -> None:
    later(resumable, (LIFETIME_S - 2) * SECOND * 3 // 4)
    resumable.establish()
    again(resumable).establish()
    assert list(resumable.b.records["auth_method"]) == [Auth.NOISE_IX, Auth.NOISE_IX, Auth.SESSION]
    later(resumable, LIFETIME_S // 2 * SECOND)
    again(resumable).establish()
    assert resumable.b.records["auth_method"][-1] == Auth.SESSION, "that was the new one"


def test_a_session_that_expires_on_the_way_is_hinted_at(resumable: Pair) -> None:
    later(resumable, (LIFETIME_S - 2) * SECOND * 3 // 4)
    resumable.syn_on_wire()
    syn = again(resumable).syn_on_wire()
    assert len(payload(syn)) == SYN_SIZE
    resumable.b.now_us += LIFETIME_S * SECOND
    assert resumable.b.into(syn).verdict is Verdict.DROP
    assert resumable.a.into(resumable.b.ports.injected[-1]).verdict is Verdict.DROP
    assert resumable.a.ports.repeated


def _leads_to(pair: Pair, worker: int, workers: int) -> bool:
    """Whether the pair's next connection meets that worker of B."""
    pair.a.core.connecting = type(pair.a.core.connecting)()
    key = packet.parse(bytes(pair.syn()), True).key
    return worker_of(key, workers) == worker


def test_a_session_is_used_where_its_worker_is_met(pair: Pair, make_host: MakeHost) -> None:
    pair.b = make_host("b3", config=Config(worker=1, workers=3))
    pair.b.workload("db", {"app": "db"}, port=5432)
    while not _leads_to(pair, 1, 3):
        again(pair)
    pair.establish()
    sizes: dict[bool, set[int]] = {True: set(), False: set()}
    for _ in range(20):
        again(pair)
        sizes[_leads_to(pair, 1, 3)].add(len(payload(pair.syn_on_wire())))
    assert sizes[True] == {SYN_SIZE}
    assert min(sizes[False]) > SYN_SIZE


def test_no_session_is_kept_where_addresses_are_translated(pair: Pair, make_host: MakeHost) -> None:
    """The responder's worker is not the one that the initiator's own view of the ports leads to."""
    pair.b = make_host("b4", config=Config(worker=1, workers=3))
    pair.b.workload("db", {"app": "db"}, port=5432)
    while _leads_to(pair, 1, 3):
        again(pair)
    pair.establish()
    assert pair.a.core.sessions.counts == (0, 0)


def test_a_connection_begun_in_time_outlives_its_session(resumable: Pair) -> None:
    answer = resumable.synack_on_wire()
    resumable.b.now_us += 2 * LIFETIME_S * SECOND
    assert resumable.a.into(answer).verdict is Verdict.ACCEPT
    assert resumable.b.into(resumable.a.out(resumable.ack()).packet or b"").verdict is Verdict.RELEASE


def test_a_renewed_credential_of_either_side_makes_a_new_session(resumable: Pair) -> None:
    resumable.a.workload("web", {"app": "web"})
    resumable.establish()
    again(resumable).establish()
    assert list(resumable.b.records["auth_method"]) == [Auth.NOISE_IX, Auth.NOISE_IX, Auth.SESSION]
    resumable.b.workload("db", {"app": "db"}, port=5432)
    assert resumable.b.into(again(resumable).syn_on_wire()).verdict is Verdict.DROP
    resumable.a.into(resumable.b.ports.injected[-1])
    resumable.establish()
    assert list(resumable.b.records["auth_method"][-2:]) == [Auth.SESSION, Auth.NOISE_IX]


def test_the_session_of_another_listener_is_not_taken(resumable: Pair) -> None:
    resumable.b.workload("intruder", {"app": "db"}, port=5432)
    assert resumable.b.into(resumable.syn_on_wire()).verdict is Verdict.DROP
    assert resumable.b.core.recorder.reasons["session_unknown"] == 1
    assert len(resumable.b.core.accepting) == 0


def test_a_listener_that_is_looked_up_first(resumable: Pair) -> None:
    found = resumable.b.ports.listening[5432]
    local = resumable.b.core.credentials.get(found.key, resumable.b.now_us)
    assert local is not None
    resumable.b.core.credentials.clear()
    syn = resumable.syn_on_wire()
    assert resumable.b.into(syn).verdict is Verdict.HOLD
    resumable.b.core.credentials.put(found.key, local, resumable.b.now_us)
    assert resumable.b.into(syn).verdict is Verdict.ACCEPT


# -- revocation and policy ---------------------------------------------------------------------------------------


def test_revocation_ends_what_is_half_made(resumable: Pair) -> None:
    proof = resumable.proof_on_wire()
    peer = resumable.b.core.live
    name = next(iter(peer)).peer
    assert name is not None
    assert resumable.b.core.sessions.revoke(lambda s: s.peer.fingerprint == name.fingerprint) == 1
    assert resumable.b.into(proof).verdict is Verdict.DROP
    assert resumable.b.core.recorder.reasons["session_unknown"] == 1
    assert len(resumable.b.core.live) == 1


def test_an_initiator_believes_no_answer_under_a_revoked_session(resumable: Pair) -> None:
    answer = resumable.synack_on_wire()
    resumable.a.core.sessions.clear()
    assert resumable.a.into(answer).verdict is Verdict.DROP
    later(resumable, SECOND)
    resumable.establish()
    assert resumable.a.records["auth_method"][-1] == Auth.NOISE_IX


DENIED = "kind: Guardrail\nname: g\nowner: s\nrules: [deny any to call app=db]\n"


def test_policy_is_judged_on_every_connection(resumable: Pair) -> None:
    datapath.activate(resumable.b.core, Engine(parse(DENIED)), 2, 99, resumable.b.now_us)
    assert resumable.b.into(resumable.syn_on_wire()).verdict is Verdict.DROP
    denied = resumable.b.records[-1]
    assert (denied["auth_method"], denied["drop_reason"]) == (Auth.SESSION, DropReason.GUARDRAIL_DENY)
    refusal = resumable.b.ports.injected[-1]
    assert len(payload(refusal)) == ANSWER_SIZE
    resumable.a.into(refusal)
    told = resumable.a.records[-1]
    assert (told["auth_method"], told["auth_result"]) == (Auth.SESSION, AuthResult.PROVEN)
    assert (told["decider"], told["peer_reason"]) == (Decider.PEER, DropReason.GUARDRAIL_DENY)


def test_an_initiator_that_denies_tells_the_responder(resumable: Pair) -> None:
    datapath.activate(resumable.a.core, Engine(parse(DENIED)), 2, 99, resumable.a.now_us)
    assert resumable.a.into(resumable.synack_on_wire()).verdict is Verdict.DROP
    resumable.b.into(resumable.a.ports.injected[-1])
    told = resumable.b.records[-1]
    assert (told["decider"], told["peer_reason"]) == (Decider.PEER, DropReason.GUARDRAIL_DENY)
    assert len(resumable.b.core.accepting) == 0


# -- attacks -------------------------------------------------------------------------------------------------------


def test_a_replayed_syn_is_refused_for_that(resumable: Pair) -> None:
    syn = resumable.syn_on_wire()
    resumable.b.into(syn)
    elsewhere = bytearray(syn)
    seg = packet.parse(syn, False)
    elsewhere[seg.tcp_off + 1] ^= 1  # from another port
    later(resumable, SECOND)
    assert resumable.b.into(resealed(bytes(elsewhere))).verdict is Verdict.DROP
    record = resumable.b.records[-1]
    assert (record["drop_reason"], record["auth_method"]) == (DropReason.SYN_REPLAYED, Auth.SESSION)
    assert len(resumable.b.core.accepting) == 1


def test_a_replay_after_the_connection_is_made_changes_nothing(resumable: Pair) -> None:
    syn = resumable.syn_on_wire()
    resumable.b.into(syn)
    resumable.a.into(resumable.b.out(resumable.synack()).packet or b"")
    resumable.b.into(resumable.a.out(resumable.ack()).packet or b"")
    assert resumable.b.into(syn).verdict is Verdict.DROP
    assert resumable.b.reasons[-1] is DropReason.SYN_REPLAYED
    assert resumable.b.into(resumable.ack(b"more")).verdict is Verdict.RELEASE


def test_a_syn_taken_from_the_wire_gets_no_further_without_the_key(resumable: Pair) -> None:
    """An attacker keeps the true SYN and sends it from elsewhere: it is let in, and never proves itself."""
    syn = bytearray(resumable.syn_on_wire())
    seg = packet.parse(bytes(syn), False)
    syn[seg.tcp_off : seg.tcp_off + 2] = (4444).to_bytes(2, "big")
    assert resumable.b.into(resealed(bytes(syn))).verdict is Verdict.ACCEPT
    resumable.sport = 4444
    assert resumable.b.out(resumable.synack()).verdict is Verdict.ACCEPT
    assert resumable.b.into(resumable.ack(b"data")).verdict is Verdict.DROP
    forged = packet.with_option(b"", bytes((253, 28)) + packet.EXID + bytes(24)) or b""
    segment = packet.parse(bytes(resumable.ack()), True)
    assert resumable.b.into(packet.rebuild(segment, forged, b"")).verdict is Verdict.DROP
    assert resumable.b.reasons[-1] is DropReason.PROOF_INVALID


@pytest.mark.parametrize("where", range(SYN_SIZE))
def test_a_changed_syn_is_refused_and_the_true_one_still_counts(
    make_pair: Callable[[], Pair], where: int
) -> None:
    pair = make_resumable(make_pair)
    syn = pair.syn_on_wire()
    assert pair.b.into(changed(syn, where, where % 8)).verdict is Verdict.DROP
    reasons = pair.b.core.recorder.reasons
    # The type decides who reads the rest; a made-up id is counted, and no event.
    expected = {
        0: "version_unsupported",
        1: "handshake_malformed",
        **dict.fromkeys(range(4, 20), "session_unknown"),
    }.get(where, "session_forged")
    assert dict(reasons) == {expected: 1}
    assert pair.b.into(syn).verdict is Verdict.ACCEPT


@pytest.mark.parametrize("where", range(ANSWER_SIZE))
def test_a_changed_answer_is_refused_and_the_true_one_still_counts(
    make_pair: Callable[[], Pair], where: int
) -> None:
    pair = make_resumable(make_pair)
    answer = pair.synack_on_wire()
    assert pair.a.into(changed(answer, where, where % 8)).verdict is Verdict.DROP
    expected = {0: DropReason.VERSION_UNSUPPORTED, 1: DropReason.HANDSHAKE_MALFORMED}
    assert pair.a.reasons[-1] is expected.get(where, DropReason.SESSION_FORGED)
    assert pair.a.into(answer).verdict is Verdict.ACCEPT


@settings(deadline=None)
@given(option=st.binary(min_size=24, max_size=24))
def test_a_made_up_proof_is_refused(make_pair: Callable[[], Pair], option: bytes) -> None:
    pair = make_resumable(make_pair)
    pair.synack_on_wire()
    seg = packet.parse(bytes(pair.ack()), True)
    forged = packet.rebuild(seg, bytes((253, 28)) + packet.EXID + option, b"data")
    assert pair.b.into(forged).verdict is Verdict.DROP
    assert len(pair.b.core.live) == 1


@settings(deadline=None)
@given(body=st.binary(max_size=80))
def test_garbage_behind_a_session_header_gets_nowhere(make_pair: Callable[[], Pair], body: bytes) -> None:
    pair = make_resumable(make_pair)
    seg = packet.parse(bytes(pair.packet(True, "S", 5, 0)), True)
    raw = packet.rebuild(seg, HANDSHAKE_OPTION, b"\x01\x04" + body)
    assert pair.b.into(raw).verdict is Verdict.DROP
    assert len(pair.b.core.accepting) == 0
    assert all(len(p) <= len(raw) for p in pair.b.ports.injected), "no amplification"


# -- encryption ----------------------------------------------------------------------------------------------------

ENCRYPTED = POLICY.replace("app=db on tcp/5432\n", "app=db on tcp/5432 encrypted\n", 1)


def encrypted_pair(root: RootAuthority) -> Pair:
    config = Config(suites=ALL)
    a = memory.make_host(root, "a", POLICY, config)
    b = memory.make_host(root, "b", ENCRYPTED, config)
    a.workload("web", {"app": "web"})
    b.workload("db", {"app": "db"}, port=5432)
    return memory.Pair(a, b)


def connect(pair: Pair, data: bytes) -> bytes:
    """Handshake, and the first data as it arrives at B."""
    assert pair.b.into(pair.proof_on_wire()).verdict is Verdict.ENCRYPT
    record = pair.a.out(pair.ack(data)).packet or b""
    assert data not in bytes(record)
    inside = pair.b.into(bytes(record)).packet or b""
    pair.a.into(pair.reply())
    return payload(bytes(inside))


def test_encrypted_connections_have_keys_of_their_own(root: RootAuthority) -> None:
    pair = encrypted_pair(root)
    for _ in range(3):
        assert connect(pair, b"the marker") == b"the marker"
        again(pair)
    assert list(pair.b.records["auth_method"]) == [Auth.NOISE_IX, Auth.SESSION, Auth.SESSION]
    assert set(pair.b.records["encryption"]) == {Encryption.ENCRYPTED}


@pytest.mark.parametrize(("where", "bit"), [(2, 0), (3, 0), (3, 1)])
def test_encryption_cannot_be_talked_down(root: RootAuthority, where: int, bit: int) -> None:
    pair = encrypted_pair(root)
    connect(pair, b"the marker")
    syn = again(pair).syn_on_wire()
    assert pair.b.into(changed(syn, where, bit)).verdict is Verdict.DROP
    assert pair.b.reasons[-1] is DropReason.SESSION_FORGED
    assert pair.b.into(syn).verdict is Verdict.ACCEPT


def test_a_host_that_stopped_encrypting_is_refused(root: RootAuthority) -> None:
    pair = encrypted_pair(root)
    connect(pair, b"the marker")
    pair.a.core.suites = 0
    assert pair.b.into(again(pair).syn_on_wire()).verdict is Verdict.DROP
    assert pair.b.reasons[-1] is DropReason.ENCRYPTION_UNAVAILABLE


# -- floods --------------------------------------------------------------------------------------------------------


def test_a_flood_of_made_up_sessions_costs_nothing_but_counters(resumable: Pair) -> None:
    seg = packet.parse(bytes(resumable.syn()), True)
    for i in range(1000):
        body = b"\x01\x04\x01\x01" + i.to_bytes(16, "big") + bytes(32)
        assert resumable.b.into(packet.rebuild(seg, HANDSHAKE_OPTION, body)).verdict is Verdict.DROP
    assert resumable.b.core.recorder.reasons["session_unknown"] == 1000
    assert len(resumable.b.records) == 1
    assert len(resumable.b.ports.injected) <= 400
    assert resumable.b.core.sessions.counts == (0, 1)
    resumable.establish()


def test_ports_and_numbers_of_a_client_are_its_own(resumable: Pair) -> None:
    tcp = TCP(payload_of_tcp(resumable.syn_on_wire()))
    assert tcp.seq == resumable.isn, "no sequence number moves"


def payload_of_tcp(data: bytes) -> bytes:
    return data[packet.parse(data, False).tcp_off :]
