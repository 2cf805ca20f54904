"""Playbooks: what two enforcers make of each packet of a connection, without a kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6

from nfq import datapath, packet
from nfq.core import SYN_RECEIVED_TIMEOUT_US, SYN_SENT_TIMEOUT_US, Config, Verdict
from nfq.flow import LocalWorkload, State
from nfq.handshake import CLOCK_WINDOW_S
from nfq.noise import KeyPair
from nfq.recorder import Counts
from sectool.errors import SectoolError
from sectool.events import Action, Auth, AuthResult, ConnState, Decider, DropReason, Phase, Point
from sectool.labels import LabelSet
from sectool.policy import Engine, parse
from tests.nfq.memory import resealed

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.nfq.memory import MakeHost, Pair


def tcp(data: bytes | None) -> TCP:
    """The TCP layer of a packet, after checking that scapy computes the same checksums."""
    assert data is not None
    cls = IPv6 if data[0] >> 4 == 6 else IP
    parsed = cls(data)
    again = cls(data)
    del again[TCP].chksum
    if cls is IP:
        del again.chksum
    assert bytes(again) == data
    layer: TCP = parsed[TCP]
    return layer


def payload(data: bytes | None) -> bytes:
    return bytes(tcp(data).payload)


def option_kinds(data: bytes | None) -> list[object]:
    return [name for name, _ in tcp(data).options]


def test_a_connection_is_authenticated_and_released(pair: Pair) -> None:
    syn = pair.syn_on_wire()
    assert 76 < len(payload(syn)) <= 1180
    assert pair.a.core.credentials.get(("web", 0), 0) is None
    assert packet.HANDSHAKE_OPTION in bytes(tcp(syn))
    assert dict(tcp(syn).options)["MSS"] == 1460 - 28

    inside = pair.b.into(syn)
    assert inside.verdict is Verdict.ACCEPT
    assert payload(inside.packet) == b""
    assert 253 not in option_kinds(inside.packet)

    synack = pair.b.out(pair.synack())
    assert b"spiffe" not in payload(synack.packet), "the responder's credential is encrypted"
    inside = pair.a.into(synack.packet or b"")
    assert inside.verdict is Verdict.ACCEPT
    assert payload(inside.packet) == b""

    proving = pair.a.out(pair.ack())
    assert payload(proving.packet) == b""
    assert 253 in option_kinds(proving.packet)

    released = pair.b.into(proving.packet or b"")
    assert released.verdict is Verdict.RELEASE
    assert 253 not in option_kinds(released.packet)
    assert pair.b.ports.journaled

    assert pair.a.into(pair.reply(b"banner")).verdict is Verdict.RELEASE
    assert pair.a.ports.journaled
    for host, point in ((pair.a, Point.INITIATOR), (pair.b, Point.RESPONDER)):
        (record,) = host.records
        assert record["action"] == Action.ALLOW
        assert record["point"] == point
        assert record["phase"] == Phase.VERDICT
        assert record["auth_method"] == Auth.NOISE_IX
        assert record["auth_result"] == AuthResult.PROVEN
        assert record["source_port"] == 40_000
        assert record["destination_port"] == 5432
        assert record["source_identity"] != 0
        assert record["destination_identity"] != 0
        assert record["rule"] != 0
        assert record["policy_revision"] == 1
        assert record["community"] == pair.a.records[0]["community"]
        assert {b["type"] for b in host.sink.blobs} == {"dict.identity", "dict.labels"}
    assert pair.a.records[0]["source_identity"] == pair.b.records[0]["source_identity"]
    flow = next(iter(pair.b.core.live))
    assert flow.keys is None, "keys do not outlive the handshake of a plain flow"


def test_lost_ack_the_first_data_segment_proves(pair: Pair) -> None:
    segment = pair.proof_on_wire(b"SELECT 1")
    assert payload(segment) == b"SELECT 1"
    inside = pair.b.into(segment)
    assert inside.verdict is Verdict.RELEASE
    assert payload(inside.packet) == b"SELECT 1"


def test_retransmissions_send_the_same_bytes(pair: Pair) -> None:
    first = pair.syn_on_wire()
    assert pair.syn_on_wire() == first
    assert pair.b.into(first).verdict is Verdict.ACCEPT
    assert pair.b.into(first).verdict is Verdict.ACCEPT
    answer = pair.b.out(pair.synack()).packet
    assert pair.b.out(pair.synack()).packet == answer
    assert pair.a.into(answer or b"").verdict is Verdict.ACCEPT
    assert pair.a.into(answer or b"").verdict is Verdict.ACCEPT
    assert pair.a.out(pair.ack()).packet == pair.a.out(pair.ack()).packet
    assert len(pair.b.records) == 0
    assert len(pair.a.records) == 1


def test_nothing_reaches_the_server_before_the_proof(pair: Pair) -> None:
    pair.proof_on_wire()
    for early in (pair.ack(), pair.ack(b"DROP TABLE")):
        assert pair.b.into(early).verdict is Verdict.DROP
    assert pair.b.core.recorder.reasons["proof_missing"] == 2
    assert pair.b.actions == []


def test_client_keeps_proving_until_it_hears_from_the_server(pair: Pair) -> None:
    assert pair.b.into(pair.proof_on_wire()).verdict is Verdict.RELEASE
    for _ in range(3):
        sent = pair.a.out(pair.ack())
        assert sent.verdict is Verdict.ACCEPT
        assert 253 in option_kinds(sent.packet)
    pair.a.now_us += 3600 * 1_000_000
    datapath.tick(pair.a.core, pair.a.now_us)
    assert pair.a.out(pair.ack()).verdict is Verdict.ACCEPT, "an idle connection is not given up"
    assert pair.a.into(pair.reply()).verdict is Verdict.RELEASE


def test_the_proving_ack_lets_data_pass_that_is_there_already(pair: Pair) -> None:
    pair.a.into(pair.synack_on_wire())
    ack, data = (
        datapath.handle(pair.a.core, bytes(pair.ack(body)), True, False, pair.a.now_us)
        for body in (b"", b"a question")
    )
    assert (ack.verdict, data.verdict) == (Verdict.YIELD, Verdict.RELEASE)
    assert ack.hold == data.hold is not None
    inside = pair.b.into(bytes(data.packet or b""))
    assert (inside.verdict, payload(inside.packet)) == (Verdict.RELEASE, b"a question")
    assert pair.b.into(bytes(ack.packet or b"")).verdict is Verdict.RELEASE, (
        "it has nothing to prove any more"
    )


def test_client_that_has_proven_itself_twice_does_not_wait(pair: Pair) -> None:
    pair.a.into(pair.synack_on_wire())
    first, second = pair.a.out(pair.ack()), pair.a.out(pair.ack(b"x" * 1000))
    assert (first.verdict, second.verdict) == (Verdict.ACCEPT, Verdict.RELEASE)
    assert 253 in option_kinds(second.packet)
    assert payload(pair.b.into(second.packet or b"").packet) == b"x" * 1000
    assert pair.a.into(pair.reply()).verdict is Verdict.RELEASE


def test_proofs_that_were_all_lost_are_made_again(pair: Pair) -> None:
    answer = pair.synack_on_wire()
    pair.a.into(answer)
    for body in (b"", b"lost"):
        pair.a.out(pair.ack(body))
    assert pair.b.into(pair.ack(b"lost")).verdict is Verdict.DROP, "the kernel sends it again without a proof"
    again = pair.a.into(pair.b.out(pair.synack()).packet or b"")
    assert (again.verdict, payload(again.packet)) == (Verdict.RELEASE, b"")
    (proof,) = pair.a.ports.injected
    inside = pair.b.into(proof)
    assert inside.verdict is Verdict.RELEASE
    ack = tcp(inside.packet)
    assert (ack.flags, ack.seq, ack.ack) == ("A", pair.isn + 1, pair.peer_isn + 1)
    assert ("Timestamp", (1, 2)) in ack.options
    assert pair.b.into(pair.ack(b"lost")).verdict is Verdict.RELEASE
    assert pair.a.into(pair.synack()).verdict is Verdict.RELEASE
    assert len(pair.a.ports.injected) == 1, "a bare SYN-ACK comes from a responder that is content"


def test_default_deny_is_recorded_on_both_ends(pair: Pair) -> None:
    pair.a.workload("other", {"app": "other"})
    assert pair.b.into(pair.syn_on_wire()).verdict is Verdict.DROP
    assert pair.b.reasons == [DropReason.DEFAULT_DENY]
    assert pair.b.records[0]["auth_result"] == AuthResult.CLAIMED
    (refusal,) = pair.b.ports.injected
    assert tcp(refusal).flags == "RA"
    assert b"spiffe" not in payload(refusal)
    assert pair.a.into(refusal).verdict is Verdict.DROP
    (record,) = pair.a.records
    assert record["drop_reason"] == DropReason.PEER_DENIED
    assert record["peer_reason"] == DropReason.DEFAULT_DENY
    assert record["decider"] == Decider.PEER
    assert pair.b.into(pair.syn_on_wire()).verdict is Verdict.DROP
    assert len(pair.b.records) == 1, "a retransmitted denied SYN is not a second event"


def test_guardrail_names_its_rule_to_the_other_side(pair: Pair) -> None:
    pair.a.workload("web", {"app": "web", "env": "dev"})
    pair.b.workload("db", {"app": "db", "env": "prod"}, port=5432)
    pair.b.into(pair.syn_on_wire())
    pair.a.into(pair.b.ports.injected[0])
    assert pair.b.reasons == [DropReason.GUARDRAIL_DENY]
    assert pair.a.records[0]["peer_rule"] == pair.b.records[0]["rule"] != 0


def test_initiators_policy_counts_too(pair: Pair, make_host: MakeHost) -> None:
    pair.a = make_host("a2", "kind: Policy\nname: none\nowner: x\nrules: [allow app=x to call app=y]\n")
    pair.a.workload("web", {"app": "web"})
    answer = pair.synack_on_wire()
    assert pair.a.into(answer).verdict is Verdict.DROP
    assert pair.a.reasons == [DropReason.DEFAULT_DENY]
    (refusal,) = pair.a.ports.injected
    inside = pair.b.into(refusal)
    assert inside.verdict is Verdict.ACCEPT
    assert payload(inside.packet) == b""
    assert pair.b.reasons == [DropReason.PEER_DENIED]
    assert pair.b.records[0]["peer_reason"] == DropReason.DEFAULT_DENY
    assert pair.b.records[0]["auth_result"] == AuthResult.PROVEN
    assert len(pair.b.core.accepting) == 0


def test_audit_rule_allows_and_marks(pair: Pair) -> None:
    pair.a.workload("batch", {"app": "batch"})
    pair.establish()
    assert pair.a.actions == pair.b.actions == [Action.AUDIT]


def test_reject_tells_the_program(pair: Pair, make_host: MakeHost) -> None:
    pair.a = make_host("a3", config=Config(reject=True))
    pair.a.workload("other", {"app": "other"})
    pair.b.into(pair.syn_on_wire())
    told = pair.a.into(pair.b.ports.injected[0])
    assert told.verdict is Verdict.ACCEPT
    assert tcp(told.packet).flags == "RA"
    assert payload(told.packet) == b""


def test_reject_turns_the_synack_of_a_denied_peer_into_a_reset(pair: Pair, make_host: MakeHost) -> None:
    pair.a = make_host("a4", config=Config(reject=True))
    pair.a.workload("web", {"app": "web"})
    pair.syn_on_wire()
    told = pair.a.into(pair.synack())  # a host without an enforcer answers
    assert tcp(told.packet).flags == "RA"
    assert pair.a.reasons == [DropReason.NO_IDENTITY]


def test_peers_without_identity(pair: Pair) -> None:
    assert pair.b.into(pair.syn()).verdict is Verdict.DROP
    assert pair.b.reasons == [DropReason.NO_IDENTITY]
    pair.syn_on_wire()
    assert pair.a.into(pair.synack()).verdict is Verdict.DROP
    assert pair.a.reasons == [DropReason.NO_IDENTITY]


def test_outside_networks_go_by_network_rules_and_see_no_identity(make_host: MakeHost) -> None:
    host = make_host("edge")
    host.workload("web", {"app": "web"})
    host.workload("db", {"app": "db"}, port=5432)
    options = [("MSS", 1460)]
    out = IP(src="10.0.0.1", dst="192.0.2.9") / TCP(sport=5, dport=443, flags="S", seq=1, options=options)
    result = host.out(out)
    assert result == (Verdict.RELEASE, None, None)
    assert host.into(
        IP(src="192.0.2.9", dst="10.0.0.1") / TCP(sport=443, dport=5, flags="SA", seq=1, ack=2)
    ) == (Verdict.RELEASE, None, None)
    denied = IP(src="10.0.0.1", dst="192.0.2.9") / TCP(sport=6, dport=80, flags="S", seq=1, options=options)
    assert host.out(denied).verdict is Verdict.DROP
    inward = IP(src="192.0.2.9", dst="10.0.0.1") / TCP(sport=7, dport=5432, flags="S", seq=1, options=options)
    assert host.into(inward).verdict is Verdict.RELEASE
    stranger = IP(src="203.0.113.9", dst="10.0.0.1") / TCP(sport=7, dport=5432, flags="S", seq=1)
    assert host.into(stranger).verdict is Verdict.DROP
    assert host.actions == [Action.ALLOW, Action.DENY, Action.ALLOW, Action.DENY]
    assert {int(r["auth_method"]) for r in host.records} == {Auth.NONE}


def test_untrusted_domain(pair: Pair, make_host: MakeHost, foreign_root: object) -> None:
    pair.a = make_host("rogue", ca=foreign_root)
    pair.a.workload("web", {"app": "web"})
    assert pair.b.into(pair.syn_on_wire()).verdict is Verdict.DROP
    assert pair.b.reasons == [DropReason.UNTRUSTED_DOMAIN]
    assert pair.b.ports.injected == [], "strangers get no answer"


@pytest.mark.parametrize("shift_s", [-CLOCK_WINDOW_S - 1, CLOCK_WINDOW_S + 1])
def test_handshake_outside_the_clock_window(pair: Pair, shift_s: int) -> None:
    syn = pair.syn_on_wire()
    pair.b.now_us += shift_s * 1_000_000
    assert pair.b.into(syn).verdict is Verdict.DROP
    assert pair.b.reasons == [DropReason.HANDSHAKE_STALE]


def test_expired_credential(pair: Pair) -> None:
    syn = pair.syn_on_wire()
    stale = bytearray(syn)
    pair.b.now_us += 2 * 3600 * 1_000_000
    # An attacker refreshes the unauthenticated time so that only the credential's own validity decides.
    at = len(syn) - len(payload(syn)) + 4
    stale[at : at + 4] = (pair.b.now_us // 1_000_000).to_bytes(4, "big")
    assert pair.b.into(resealed(bytes(stale))).verdict is Verdict.DROP
    assert pair.b.reasons == [DropReason.CREDENTIAL_EXPIRED]


def test_replayed_syn(pair: Pair) -> None:
    syn = pair.syn_on_wire()
    pair.b.into(syn)
    pair.b.out(pair.synack())
    elsewhere = IPv6(syn) if pair.v6 else IP(syn)
    elsewhere[TCP].sport = 50_000
    del elsewhere[TCP].chksum
    before = len(pair.b.core.accepting)
    assert pair.b.into(elsewhere).verdict is Verdict.DROP
    assert pair.b.reasons == [DropReason.SYN_REPLAYED]
    assert len(pair.b.core.accepting) == before
    assert pair.b.ports.injected == []


def test_replay_after_the_connection_was_made(pair: Pair) -> None:
    syn = pair.syn_on_wire()
    assert pair.b.into(syn).verdict is Verdict.ACCEPT
    answer = pair.b.out(pair.synack()).packet or b""
    pair.a.into(answer)
    pair.b.into(pair.a.out(pair.ack()).packet or b"")
    assert pair.b.into(syn).verdict is Verdict.DROP
    assert pair.b.reasons[-1] == DropReason.SYN_REPLAYED
    assert next(iter(pair.b.core.live)).state is State.AUTHORISED


def test_credential_replayed_without_its_key(pair: Pair, make_host: MakeHost) -> None:
    """A thief has seen a SYN and can make fresh ephemerals, but not the proof."""
    thief = make_host("thief")
    local = thief.workload("web", {"app": "web"})
    found = pair.a.ports.connecting
    assert found is not None
    victim = pair.a.core.credentials.get(found.key, pair.a.now_us)
    assert isinstance(victim, LocalWorkload)
    stolen = KeyPair(local.static.private, victim.identity.x25519)
    pair.a.core.credentials.put(found.key, replace(victim, static=stolen), pair.a.now_us)
    answer = pair.synack_on_wire()
    assert pair.a.into(answer).verdict is Verdict.DROP, "message 2 is readable only with the static key"
    forged_proof = packet.with_option(b"", bytes((253, 28)) + packet.EXID + bytes(24)) or b""
    segment = packet.parse(bytes(pair.ack()), True)
    assert pair.b.into(packet.rebuild(segment, forged_proof, b"")).verdict is Verdict.DROP
    assert pair.b.reasons == [DropReason.PROOF_INVALID]


@given(where=st.integers(0, 1 << 20))
def test_any_flipped_bit_of_the_syn_is_refused_or_unproven(make_pair: Callable[[], Pair], where: int) -> None:
    pair = make_pair()
    syn = bytearray(pair.syn_on_wire())
    start = len(syn) - len(payload(bytes(syn)))
    bit = where % ((len(syn) - start) * 8)
    syn[start + bit // 8] ^= 1 << bit % 8
    result = pair.b.into(resealed(bytes(syn)))
    if result.verdict is Verdict.DROP:
        assert pair.b.reasons[0] not in (DropReason.NONE, DropReason.DEFAULT_DENY)
        return
    # Time, flags and the ephemeral key are not signed: the answer must not authenticate at the initiator.
    answer = pair.b.out(pair.synack()).packet or b""
    assert pair.a.into(answer).verdict is Verdict.DROP
    assert pair.a.reasons == [DropReason.HANDSHAKE_FORGED]


@given(where=st.integers(0, 1 << 20))
def test_any_flipped_bit_of_the_answer_is_refused(make_pair: Callable[[], Pair], where: int) -> None:
    pair = make_pair()
    answer = bytearray(pair.synack_on_wire())
    start = len(answer) - len(payload(bytes(answer)))
    bit = where % ((len(answer) - start) * 8)
    good = bytes(answer)
    answer[start + bit // 8] ^= 1 << bit % 8
    assert pair.a.into(resealed(bytes(answer))).verdict is Verdict.DROP
    assert pair.a.reasons[0] in (
        DropReason.HANDSHAKE_FORGED,
        DropReason.HANDSHAKE_MALFORMED,
        DropReason.VERSION_UNSUPPORTED,
    )
    assert pair.a.into(good).verdict is Verdict.ACCEPT, "the true answer still counts"


@given(data=st.binary(min_size=0, max_size=200), outbound=st.booleans(), local=st.booleans())
def test_garbage_is_dropped(make_pair: Callable[[], Pair], data: bytes, outbound: bool, local: bool) -> None:
    pair = make_pair()
    result = datapath.handle(pair.a.core, data, outbound, local, pair.a.now_us)
    assert result.verdict is Verdict.DROP


@given(options=st.binary(max_size=40), body=st.binary(max_size=1300), ours=st.booleans())
def test_syn_with_garbage_options_or_payload_never_gets_in(
    make_pair: Callable[[], Pair], options: bytes, body: bytes, ours: bool
) -> None:
    pair = make_pair()
    seg = packet.parse(bytes(pair.packet(True, "S", 5, 0)), True)
    options = (packet.HANDSHAKE_OPTION + options[:36]) if ours else options
    raw = packet.rebuild(seg, options[: len(options) // 4 * 4], body)
    assert pair.b.into(raw).verdict is Verdict.DROP
    assert len(pair.b.core.accepting) == 0


def test_forged_reset_and_segments_before_the_answer(pair: Pair) -> None:
    pair.syn_on_wire()
    assert pair.a.into(pair.packet(False, "RA", 0, 77)).verdict is Verdict.DROP
    assert pair.a.into(pair.packet(False, "A", 5, pair.isn + 1, b"data")).verdict is Verdict.DROP
    assert pair.a.into(pair.packet(False, "SA", 5, 99)).verdict is Verdict.DROP
    assert pair.a.into(pair.synack_on_wire()).verdict is Verdict.ACCEPT


def test_policy_change_cuts_live_flows(pair: Pair) -> None:
    pair.establish()
    deny = Engine(parse("kind: Guardrail\nname: g\nowner: s\nrules: [deny any to call app=db]\n"))
    for host in (pair.a, pair.b):
        assert datapath.activate(host.core, deny, 2, 99, host.now_us) == 1
        assert len(host.ports.cuts) == 1
        assert host.ports.journaled == []
        end = host.records[-1]
        assert end["phase"] == Phase.END
        assert end["action"] == Action.DENY
        assert end["drop_reason"] == DropReason.POLICY_CHANGED
        assert end["policy_revision"] == 2
        assert end["source_bytes"] == 1
        assert end["event_id"] == host.records[0]["event_id"]
    assert tcp(pair.a.out(pair.ack(b"more")).packet).flags == "RA"
    assert tcp(pair.a.into(pair.reply(b"more")).packet).flags == "RA"
    assert payload(pair.b.into(pair.ack(b"more")).packet) == b""


def test_live_flows_are_judged_by_the_labels_that_their_workload_has_now(pair: Pair) -> None:
    pair.establish()
    rules = "rules: [deny vuln=critical to call app=db, deny any to call vuln=critical]"
    guarded = f"kind: Guardrail\nname: g\nowner: s\n{rules}\n"
    allow = "---\nkind: Policy\nname: p\nowner: s\nrules: [allow app=web to call app=db]\n"
    for host in (pair.a, pair.b):
        datapath.activate(host.core, Engine(parse(guarded + allow)), 2, 99, host.now_us)
        (flow,) = host.core.live
        assert flow.local is not None
        own = dict(flow.local.identity.labels)
        for labels, cut in ((own, 0), ({**own, "vuln": "low"}, 0), ({**own, "vuln": "critical"}, 1)):
            other = flow.local.id + 1
            assert datapath.relabel(host.core, other, LabelSet({"vuln": "critical"}), host.now_us) == 0
            assert datapath.relabel(host.core, flow.local.id, LabelSet(labels), host.now_us) == cut
        assert host.records[-1]["drop_reason"] == DropReason.POLICY_CHANGED


def test_policy_change_that_still_allows_keeps_the_flow(pair: Pair) -> None:
    pair.establish()
    same = Engine(parse("kind: Policy\nname: p\nowner: s\nrules: [allow app=web to call app=db]\n"))
    assert datapath.activate(pair.a.core, same, 2, 99, pair.a.now_us) == 0
    flow = next(iter(pair.a.core.live))
    assert flow.revision == 2
    assert pair.a.out(pair.ack(b"more")).verdict is Verdict.RELEASE


def test_rule_with_an_end_date_cuts_its_flows(pair: Pair, make_host: MakeHost) -> None:
    day = "2026-09-22"
    text = f"kind: Policy\nname: p\nowner: s\nrules: [allow app=web to call app=db until {day}]\n"
    pair.a, pair.b = make_host("a5", text), make_host("b5", text)
    pair.a.workload("web", {"app": "web"})
    pair.b.workload("db", {"app": "db"}, port=5432)
    pair.establish()
    later = pair.b.now_us + 40 * 3600 * 1_000_000
    datapath.tick(pair.b.core, pair.b.now_us + 1_000_000)
    assert pair.b.ports.cuts == []
    datapath.tick(pair.b.core, later)
    assert len(pair.b.ports.cuts) == 1


def test_end_of_flow(pair: Pair) -> None:
    pair.establish()
    flow = next(iter(pair.b.core.live))
    datapath.ended(pair.b.core, flow.key, Counts(10, 2, 30, 4), ConnState.SF, pair.b.now_us + 5)
    end = pair.b.records[-1]
    assert (end["phase"], end["conn_state"], end["destination_bytes"]) == (Phase.END, ConnState.SF, 30)
    assert end["end"] - end["start"] == 5
    assert len(pair.b.core.live) == 0
    assert pair.b.ports.journaled == []


def test_half_open_flows_time_out_with_their_reason(pair: Pair) -> None:
    pair.synack_on_wire()
    for host, after, reason, state in (
        (pair.a, SYN_SENT_TIMEOUT_US, DropReason.HANDSHAKE_TIMEOUT, ConnState.S0),
        (pair.b, SYN_RECEIVED_TIMEOUT_US, DropReason.PROOF_MISSING, ConnState.SH),
    ):
        datapath.tick(host.core, host.now_us + after - 1)
        assert len(host.core.accepting) + len(host.core.connecting) == 1
        datapath.tick(host.core, host.now_us + after)
        assert len(host.core.accepting) + len(host.core.connecting) == 0
        assert host.reasons == [reason]
        assert host.records[0]["conn_state"] == state


def test_unknown_workload_is_held_and_asked_for(pair: Pair) -> None:
    known = pair.a.core.credentials
    pair.a.core.credentials = type(known)()
    result = pair.a.out(pair.syn())
    assert result.verdict is Verdict.HOLD
    assert result.hold == pair.a.ports.connecting.key  # type: ignore[union-attr]
    pair.a.core.credentials.put(result.hold, "no such executable", pair.a.now_us)
    assert pair.a.out(pair.syn()).verdict is Verdict.DROP
    assert pair.a.reasons == [DropReason.NO_LOCAL_IDENTITY]


def test_nobody_listens(pair: Pair) -> None:
    pair.b.ports.listening.clear()
    assert pair.b.into(pair.syn_on_wire()).verdict is Verdict.DROP
    assert pair.b.reasons == [DropReason.NO_LISTENER]


def test_loopback_is_judged_by_both_workloads(make_host: MakeHost) -> None:
    host = make_host("solo")
    host.workload("web", {"app": "web"})
    host.workload("db", {"app": "db"}, port=5432)
    syn = IP(src="127.0.0.1", dst="127.0.0.1") / TCP(sport=9, dport=5432, flags="S", seq=1)
    assert host.out(syn, local=True) == (Verdict.RELEASE, None, None)
    back = IP(src="127.0.0.1", dst="127.0.0.1") / TCP(sport=5432, dport=9, flags="SA", seq=1, ack=2)
    assert host.out(back, local=True) == (Verdict.RELEASE, None, None)
    (record,) = host.records
    assert (record["point"], record["auth_method"]) == (Point.LOCAL, Auth.KERNEL)
    assert record["source_labels"] != record["destination_labels"] != 0
    host.workload("x", {"app": "x"})
    other = IP(src="127.0.0.1", dst="127.0.0.1") / TCP(sport=10, dport=5432, flags="S", seq=1)
    assert host.out(other, local=True).verdict is Verdict.DROP


def test_flood_of_denials_is_coalesced(pair: Pair) -> None:
    pair.b.core.recorder.denials_per_s = 10
    datapath.tick(pair.b.core, pair.b.now_us)
    for port in range(1000):
        bare = pair.syn()
        bare[TCP].sport = 10_000 + port
        pair.b.into(bare)
    assert len(pair.b.records) == 10
    datapath.tick(pair.b.core, pair.b.now_us + 1_000_000)
    assert len(pair.b.records) == 11
    assert pair.b.records[-1]["flow_count"] == 990
    assert pair.b.records[-1]["drop_reason"] == DropReason.NO_IDENTITY


def test_a_flood_of_unproven_syns_drops_its_oldest_and_leaves_room_to_connect(
    pair: Pair, make_host: MakeHost
) -> None:
    pair.b = make_host("small", config=Config(half_open_limit=1))
    pair.b.workload("db", {"app": "db"}, port=5432)
    pair.b.workload("web", {"app": "web"})
    assert pair.b.into(pair.syn_on_wire()).verdict is Verdict.ACCEPT
    pair.sport += 1
    assert pair.b.into(pair.syn_on_wire()).verdict is Verdict.ACCEPT
    assert len(pair.b.core.accepting) == 1
    assert pair.b.core.recorder.reasons["table_full"] == 1
    own = IP(src="10.0.0.2", dst="10.0.0.9") / TCP(sport=9, dport=5432, flags="S", seq=1)
    assert pair.b.out(own).verdict is Verdict.ACCEPT


def test_a_forged_syn_does_not_disturb_a_live_connection(pair: Pair, make_pair: Callable[[], Pair]) -> None:
    pair.establish()
    thief = make_pair()
    thief.v6, thief.isn = pair.v6, 77_777
    assert pair.b.into(thief.syn_on_wire()).verdict is Verdict.ACCEPT
    assert pair.b.into(pair.ack(b"more")).verdict is Verdict.RELEASE
    assert pair.b.out(pair.reply(b"answer")).verdict is Verdict.RELEASE


def test_what_was_live_before_vouches_for_nobody_once_the_stack_opens_anew(
    pair: Pair, make_pair: Callable[[], Pair]
) -> None:
    """The socket of a connection may go without anybody being told; its entry must not stand for a proof."""
    pair.establish()
    thief = make_pair()
    thief.v6, thief.isn, thief.peer_isn = pair.v6, 77_777, 99_999
    assert pair.b.into(thief.syn_on_wire()).verdict is Verdict.ACCEPT
    assert pair.b.out(thief.synack()).verdict is Verdict.ACCEPT  # only a stack without the old socket says so
    assert pair.b.into(thief.ack()).verdict is Verdict.DROP
    assert pair.b.into(thief.ack(b"drop table")).verdict is Verdict.DROP
    assert pair.b.into(thief.packet(True, "FA", 77_778, 100_000)).verdict is Verdict.DROP
    assert pair.b.actions == [Action.ALLOW, Action.ALLOW]
    assert pair.b.records["phase"].tolist()[-1] == Phase.END


def test_a_repeated_synack_is_no_new_connection(pair: Pair, make_pair: Callable[[], Pair]) -> None:
    """A server slow to accept goes on although somebody sends a SYN with the very number of its client's."""
    assert pair.b.into(pair.proof_on_wire()).verdict is Verdict.RELEASE
    thief = make_pair()
    thief.v6 = pair.v6
    assert pair.b.into(thief.syn_on_wire()).verdict is Verdict.ACCEPT
    pair.b.out(pair.synack())
    assert pair.b.into(pair.ack(b"more")).verdict is Verdict.RELEASE


def test_keepalive_of_an_idle_server_is_heard(pair: Pair) -> None:
    pair.b.into(pair.proof_on_wire())
    assert pair.a.into(pair.packet(False, "A", pair.peer_isn, pair.isn + 1)).verdict is Verdict.RELEASE


def test_a_server_slow_to_accept_may_repeat_its_synack(pair: Pair) -> None:
    assert pair.b.into(pair.proof_on_wire()).verdict is Verdict.RELEASE
    again = pair.b.out(pair.synack())
    assert again == (Verdict.RELEASE, None, None)
    inside = pair.a.into(pair.synack())
    assert inside.verdict is Verdict.ACCEPT
    assert payload(inside.packet) == b""
    assert 253 in option_kinds(pair.a.out(pair.ack()).packet), "and it is proven again"
    other = pair.packet(False, "SA", pair.peer_isn + 5, pair.isn + 1)
    assert pair.a.into(other).verdict is Verdict.DROP


def test_a_damaged_segment_is_not_made_whole(pair: Pair) -> None:
    damaged = bytearray(pair.proof_on_wire(b"pay 100"))
    damaged[-3] ^= 8
    assert pair.b.into(bytes(damaged)).verdict is Verdict.DROP
    assert pair.b.core.recorder.reasons["packet_malformed"] == 1
    assert len(pair.b.core.accepting) == 1


def test_a_synack_to_an_older_syn_carries_nothing(pair: Pair) -> None:
    pair.b.into(pair.syn_on_wire())
    stale = pair.packet(False, "SA", 1, pair.isn + 500)
    assert pair.b.out(stale).verdict is Verdict.DROP


def test_identity_from_outside_the_enforced_networks_is_ignored(make_host: MakeHost, pair: Pair) -> None:
    pair.b = make_host("edge2", config=Config(enforced=()))
    pair.b.workload("db", {"app": "db"}, port=5432)
    assert pair.b.into(pair.syn_on_wire()).verdict is Verdict.DROP
    assert pair.b.reasons == [DropReason.DEFAULT_DENY]
    assert pair.b.records[0]["auth_method"] == Auth.NONE
    assert pair.b.ports.injected == []


def test_a_limited_source_is_not_remembered_as_denied(pair: Pair, make_host: MakeHost) -> None:
    pair.b = make_host("calm", config=Config(syn_rate=1, syn_burst=1))
    pair.b.workload("db", {"app": "db"}, port=5432)
    first = pair.syn_on_wire()
    pair.sport += 1
    second = pair.syn_on_wire()
    assert pair.b.into(first).verdict is Verdict.ACCEPT
    assert pair.b.into(second).verdict is Verdict.DROP
    assert pair.b.reasons == [DropReason.RATE_LIMITED]
    pair.b.now_us += 2_000_000
    assert pair.b.into(second).verdict is Verdict.ACCEPT


def test_a_refusal_by_the_agent_is_not_for_ever(pair: Pair) -> None:
    found = pair.a.ports.connecting
    assert found is not None
    pair.a.core.credentials.put(found.key, "the clock is wrong", pair.a.now_us)
    assert pair.a.out(pair.syn()).verdict is Verdict.DROP
    pair.isn += 1
    pair.a.now_us += 60_000_000
    assert pair.a.out(pair.syn()).verdict is Verdict.HOLD


def test_flows_that_ended_leave_nothing_behind(make_host: MakeHost) -> None:
    text = (
        "kind: Policy\nname: p\nowner: s\nrules: [allow app=web to call net:192.0.2.0/24 until 2099-01-01]\n"
    )
    host = make_host("tidy", text)
    host.workload("web", {"app": "web"})
    for i in range(3000):
        syn = IP(src="10.0.0.1", dst="192.0.2.9") / TCP(sport=1024 + i, dport=443, flags="S", seq=1)
        assert host.out(syn).verdict is Verdict.RELEASE
        flow = next(iter(host.core.live))
        datapath.ended(host.core, flow.key, Counts(), ConnState.SF, host.now_us)
    assert len(host.core.live) == 0
    assert len(host.core.expiring) <= 1100


def test_a_cut_the_kernel_did_not_take_is_tried_again(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair.establish()
    deny = Engine(parse("kind: Guardrail\nname: g\nowner: s\nrules: [deny any to call app=db]\n"))
    with monkeypatch.context() as patch:
        patch.setattr(pair.b.ports, "cut", _fail)
        assert datapath.activate(pair.b.core, deny, 2, 99, pair.b.now_us) == 1
        datapath.tick(pair.b.core, pair.b.now_us)
        assert len(pair.b.core.uncut) == 1
    datapath.tick(pair.b.core, pair.b.now_us)
    assert pair.b.core.uncut == []
    assert len(pair.b.ports.cuts) == 1


def _fail(*_: object) -> Counts:
    raise SectoolError("the kernel does not answer")


def test_a_bare_synack_does_not_end_the_attempt(pair: Pair) -> None:
    syn = pair.syn_on_wire()
    assert pair.a.into(pair.synack()).verdict is Verdict.DROP
    assert pair.a.into(pair.synack()).verdict is Verdict.DROP
    assert pair.a.reasons == [DropReason.NO_IDENTITY]
    assert pair.b.into(syn).verdict is Verdict.ACCEPT
    answer = pair.b.out(pair.synack()).packet or b""
    assert pair.a.into(answer).verdict is Verdict.ACCEPT
