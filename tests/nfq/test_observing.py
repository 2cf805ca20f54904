"""Nothing is enforced: what would be denied passes and is recorded so; once denial begins it is cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from scapy.layers.inet import ICMP, IP

from nfq import datapath, packet
from nfq.core import Attribution, Config, Verdict
from nfq.datapath import observe
from nfq.flow import NOBODY, State
from nfq.journalslot import SIZE, Memory, flow_of, used_as, write
from nfq.suites import ALL
from sectool.events import FLAG_OBSERVED, Action, Auth, AuthResult, DropReason
from sectool.identity.authority import RootAuthority
from sectool.policy import Engine, parse
from tests.nfq.memory import NOW_US, Host, MakeHost, Pair
from tests.nfq.udpmemory import UdpPair, make_udp_pair

B = bytes((10, 0, 0, 2))
GUARDED = """
kind: Policy
name: shop
owner: team-shop
rules:
  - allow app=web to call app=db on tcp/5432
---
kind: Guardrail
name: baseline
owner: security
rules:
  - deny app=web to call app=db
"""
NOTHING = "kind: Policy\nname: empty\nowner: team-shop\nrules:\n  - allow app=x to call app=y on tcp/1\n"
ENCRYPTED = """
kind: Policy
name: shop
owner: team-shop
rules:
  - allow app=web to call app=db on tcp/5432 encrypted
"""


def hosts(make_host: MakeHost, policy: str, *, suites: bool = False) -> Pair:
    config = Config(suites=ALL if suites else ())
    a, b = make_host("a", policy, config), make_host("b", policy, config)
    a.workload("web", {"app": "web"})
    b.workload("db", {"app": "db"}, port=5432)
    return Pair(a, b)


def let_all(*chosen: Host) -> None:
    for host in chosen:
        observe(host.core, True, host.now_us)


def would_deny(host: Host) -> list[DropReason]:
    """Reasons of what passed though it would have been denied."""
    rows = host.records
    marked = rows["flags"] & FLAG_OBSERVED != 0
    assert set(rows["action"][marked]) <= {Action.AUDIT}
    return [DropReason(r) for r in rows["drop_reason"][marked]]


@pytest.mark.parametrize(
    ("policy", "reason"), [(NOTHING, DropReason.DEFAULT_DENY), (GUARDED, DropReason.GUARDRAIL_DENY)]
)
def test_what_policy_denies_passes_with_identities(
    make_host: MakeHost, policy: str, reason: DropReason
) -> None:
    pair = hosts(make_host, policy)
    let_all(pair.a, pair.b)
    pair.establish()
    for host in (pair.a, pair.b):
        assert would_deny(host) == [reason]
        (record,) = host.records
        assert record["auth_method"] == Auth.NOISE_IX
        assert record["auth_result"] == AuthResult.PROVEN
        assert record["source_labels"]
        assert record["destination_labels"]


def test_denial_that_begins_again_cuts_what_was_let_in_and_denies_anew(make_host: MakeHost) -> None:
    pair = hosts(make_host, NOTHING)
    let_all(pair.a, pair.b)
    pair.establish()
    assert observe(pair.b.core, False, NOW_US) == 1
    assert pair.b.records[-1]["action"] == Action.DENY
    assert not pair.b.records[-1]["flags"] & FLAG_OBSERVED
    assert [flow.key for flow in pair.b.ports.cuts]
    pair.sport += 1
    assert pair.b.into(pair.syn_on_wire()).verdict is Verdict.DROP


def test_what_policy_allows_is_no_would_deny(make_pair: Callable[[], Pair]) -> None:
    pair = make_pair()
    let_all(pair.a, pair.b)
    pair.establish()
    assert pair.a.actions == pair.b.actions == [Action.ALLOW]
    assert observe(pair.a.core, False, NOW_US) == observe(pair.b.core, False, NOW_US) == 0


def test_another_revision_cuts_nothing_while_observing(make_pair: Callable[[], Pair]) -> None:
    pair = make_pair()
    let_all(pair.a, pair.b)
    pair.establish()
    assert datapath.activate(pair.b.core, Engine(parse(NOTHING)), 2, 0, NOW_US) == 0
    assert observe(pair.b.core, False, NOW_US) == 1


def test_a_server_without_an_enforcer_is_reached(pair: Pair) -> None:
    let_all(pair.a)
    pair.syn_on_wire()
    bare = pair.a.into(pair.synack())
    assert bare.verdict is Verdict.RELEASE
    assert would_deny(pair.a) == [DropReason.NO_IDENTITY]
    assert pair.a.out(pair.ack(b"GET")).verdict is Verdict.RELEASE
    assert observe(pair.a.core, False, NOW_US) == 1, "it has no identity, so it goes"
    assert pair.a.records[-1]["drop_reason"] == DropReason.NO_IDENTITY


def test_a_client_without_an_enforcer_reaches_us(pair: Pair) -> None:
    let_all(pair.b)
    assert pair.b.into(pair.syn()).verdict is Verdict.RELEASE
    assert would_deny(pair.b) == [DropReason.NO_IDENTITY]
    assert pair.b.out(pair.synack()).verdict is Verdict.RELEASE
    assert pair.b.into(pair.syn()).verdict is Verdict.RELEASE, "its SYN again"
    assert len(pair.b.records) == 1
    assert observe(pair.b.core, False, NOW_US) == 1


def test_a_syn_that_nobody_answers_goes_without_a_handshake_in_the_end(pair: Pair) -> None:
    let_all(pair.a)
    sizes = []
    for _ in range(4):
        result = pair.a.out(pair.syn())
        assert result.verdict is Verdict.ACCEPT
        sizes.append(len(result.packet or b""))
    assert sizes[0] == sizes[1] == sizes[2] > 0
    assert sizes[3] == 0, "as the stack made it"


def test_that_bare_syn_is_taken_by_a_peer_that_observes(pair: Pair) -> None:
    let_all(pair.a, pair.b)
    pair.b.into(pair.syn_on_wire())  # and all answers are lost
    assert pair.b.into(pair.syn()).verdict is Verdict.RELEASE
    assert pair.b.out(pair.synack()).verdict is Verdict.RELEASE
    assert pair.a.into(pair.synack()).verdict is Verdict.RELEASE
    assert pair.a.out(pair.ack(b"GET")).verdict is Verdict.RELEASE


def test_a_credential_that_does_not_hold_is_recorded_and_passes(
    make_host: MakeHost, foreign_root: RootAuthority
) -> None:
    a, b = make_host("a", ca=foreign_root), make_host("b")
    a.workload("web", {"app": "web"})
    b.workload("db", {"app": "db"}, port=5432)
    pair = Pair(a, b)
    let_all(a, b)
    inside = b.into(pair.syn_on_wire())
    assert inside.verdict is Verdict.RELEASE
    assert inside.packet is not None
    assert packet.parse(inside.packet, False).payload == b""
    (reason,) = would_deny(b)
    assert reason in (DropReason.UNTRUSTED_DOMAIN, DropReason.UNTRUSTED_CHAIN)
    assert b.records[0]["auth_result"] == AuthResult.FAILED
    assert a.into(bytes(pair.synack())).verdict is Verdict.RELEASE


def test_a_peer_that_goes_on_without_a_proof_passes(pair: Pair) -> None:
    let_all(pair.a, pair.b)
    pair.synack_on_wire()
    assert pair.b.into(pair.ack(b"GET")).verdict is Verdict.RELEASE
    assert would_deny(pair.b) == [DropReason.PROOF_MISSING]
    assert pair.b.records[0]["auth_result"] == AuthResult.CLAIMED


def test_what_the_other_side_refuses_stays_refused(make_host: MakeHost) -> None:
    pair = hosts(make_host, NOTHING)
    let_all(pair.a)
    assert pair.b.into(pair.syn_on_wire()).verdict is Verdict.DROP
    (refusal,) = pair.b.ports.injected
    pair.a.into(refusal)
    assert pair.a.reasons == [DropReason.PEER_DENIED]
    assert pair.a.actions == [Action.DENY]


def test_encryption_that_one_side_asks_for_is_made_if_both_can(make_host: MakeHost) -> None:
    pair = hosts(make_host, ENCRYPTED, suites=True)
    let_all(pair.a)
    pair.b.into(pair.proof_on_wire())
    assert pair.a.actions == [Action.ALLOW]
    assert next(iter(pair.a.core.live)).suite
    assert next(iter(pair.b.core.live)).suite


def test_encryption_that_cannot_be_made_is_recorded_and_passes_plain(make_host: MakeHost) -> None:
    pair = hosts(make_host, ENCRYPTED)
    let_all(pair.a, pair.b)
    pair.establish()
    assert would_deny(pair.a) == would_deny(pair.b) == [DropReason.ENCRYPTION_UNAVAILABLE]
    assert observe(pair.b.core, False, NOW_US) == 1


def test_a_half_open_connection_does_not_slip_in_when_denial_begins(make_host: MakeHost) -> None:
    pair = hosts(make_host, NOTHING)
    let_all(pair.a, pair.b)
    proof = pair.proof_on_wire()
    observe(pair.b.core, False, NOW_US)
    assert pair.b.into(proof).verdict is Verdict.DROP
    assert not len(pair.b.core.live)


def test_who_cannot_be_named_passes(make_pair: Callable[[], Pair]) -> None:
    pair = make_pair()
    let_all(pair.a, pair.b)
    pair.a.ports.connecting = None
    pair.b.ports.listening.clear()
    assert pair.a.out(pair.syn()).verdict is Verdict.RELEASE
    assert pair.b.into(pair.syn()).verdict is Verdict.RELEASE
    assert would_deny(pair.a) == [DropReason.NO_LOCAL_IDENTITY]


def test_segments_of_unknown_connections_pass_and_no_reset_is_sent(pair: Pair) -> None:
    let_all(pair.a, pair.b)
    assert pair.b.into(pair.ack(b"old")).verdict is Verdict.ACCEPT
    assert pair.a.out(pair.ack(b"old")).verdict is Verdict.ACCEPT
    assert not pair.a.ports.injected
    assert not pair.b.ports.injected


def test_on_one_host_and_with_reject_nothing_is_reset(make_host: MakeHost) -> None:
    host = make_host("a", NOTHING)
    host.core.reconfigure(replace(host.core.config, reject=True))
    host.workload("web", {"app": "web"})
    host.workload("db", {"app": "db"}, port=5432)
    let_all(host)
    assert host.out(Pair(host, host).syn(), local=True).verdict is Verdict.RELEASE
    assert would_deny(host) == [DropReason.DEFAULT_DENY]
    assert not host.ports.resets


def test_more_than_the_rate_of_handshakes_passes_unrecorded(make_host: MakeHost) -> None:
    host = make_host("b", NOTHING, Config(syn_rate=0.001, syn_burst=1.0))
    host.workload("db", {"app": "db"}, port=5432)
    let_all(host)
    pair = Pair(host, host)
    for pair.sport in (40_000, 40_001):
        result = host.into(pair.syn())
        assert result.verdict in (Verdict.RELEASE, Verdict.ACCEPT)
    assert result.verdict is Verdict.ACCEPT, "looked at again, so that it does not outlive the mode"
    assert len(host.records) == 1


def test_a_worker_that_takes_over_cuts_what_had_no_identity(pair: Pair) -> None:
    let_all(pair.a)
    pair.syn_on_wire()
    pair.a.into(pair.synack())
    (flow,) = pair.a.core.live
    slot = memoryview(bytearray(SIZE))
    write(flow, 0, slot)
    slot[0] = used_as(flow)
    mine = flow.local
    assert mine is not None
    restored = flow_of(slot, Memory({mine.identity.id: mine.identity}, {}))
    assert restored.let_in
    assert restored.state is State.AUTHORISED
    pair.b.core.live.add(restored)
    observe(pair.b.core, True, NOW_US)
    assert observe(pair.b.core, False, NOW_US) == 1


# -- datagrams and ICMP ----------------------------------------------------------------------------------------------


@pytest.fixture
def talkers(root: RootAuthority) -> UdpPair:
    return make_udp_pair(root, policy=NOTHING)


def test_a_datagram_to_a_host_that_has_shown_no_enforcer_goes_at_once(talkers: UdpPair) -> None:
    a, b = talkers.a, talkers.b
    let_all(a, b)
    assert talkers.call(b"ping") is Verdict.RELEASE
    talkers.carry()
    assert b.delivered == [b"ping"]
    assert would_deny(a) == would_deny(b) == [DropReason.NO_IDENTITY]
    assert observe(b.core, False, NOW_US) == 1


def test_datagrams_between_known_enforcers_show_identities(talkers: UdpPair) -> None:
    a, b = talkers.a, talkers.b
    let_all(a, b)
    a.core.enforcers.add(B)
    talkers.call(b"ping")
    talkers.carry()
    assert b.delivered == [b"ping"]
    assert would_deny(a) == would_deny(b) == [DropReason.DEFAULT_DENY]
    assert b.records[0]["source_labels"]


def test_datagrams_that_wait_in_vain_go_without(talkers: UdpPair) -> None:
    a = talkers.a
    let_all(a)
    a.core.enforcers.add(B)
    assert talkers.call(b"ping") is Verdict.WAIT
    for seconds in range(2, 12, 2):
        a.pass_time(NOW_US + seconds * 1_000_000)
    assert talkers.datagram(b"ping") in a.sent
    assert would_deny(a) == [DropReason.NO_IDENTITY]


def test_a_peer_that_enforces_is_shown_an_identity_once_it_says_that_it_knows_nobody(
    talkers: UdpPair,
) -> None:
    a, b = talkers.a, talkers.b
    let_all(a)
    talkers.call(b"x" * 200)
    talkers.carry()  # B denies it, and says that it knows no such flow
    assert not b.delivered
    assert a.ports.cuts
    talkers.at(6)
    talkers.call(b"x" * 200)
    talkers.carry()
    assert DropReason.PEER_DENIED in a.reasons, "B's policy denies, and says so to whoever shows an identity"


def test_questions_pass_and_are_judged_again_when_denial_begins(make_host: MakeHost) -> None:
    host = make_host("b", NOTHING)
    host.core.credentials.put("host", host.workload("host", {"app": "host"}), NOW_US)
    let_all(host)
    ping = bytes(IP(src="10.0.0.1", dst="10.0.0.2") / ICMP(type=8, id=7, seq=1))
    assert host.into(ping).verdict is Verdict.ACCEPT
    assert would_deny(host) == [DropReason.DEFAULT_DENY]
    observe(host.core, False, NOW_US)
    assert host.into(ping).verdict is Verdict.DROP


def test_a_question_of_nobody_passes_and_is_recorded_once(make_host: MakeHost) -> None:
    host = make_host("b", NOTHING)
    host.ports.kernel = Attribution("nobody", NOBODY)
    host.core.credentials.put("nobody", "it has ended", NOW_US)
    let_all(host)
    ping = bytes(IP(src="10.0.0.1", dst="10.0.0.2") / ICMP(type=8, id=7, seq=1))
    assert [host.into(ping).verdict for _ in range(3)] == [Verdict.ACCEPT] * 3
    assert would_deny(host) == [DropReason.NO_LOCAL_IDENTITY]
    observe(host.core, False, NOW_US)
    assert host.into(ping).verdict is Verdict.DROP


def test_identities_that_are_revoked_meanwhile_are_cut_when_denial_begins(pair: Pair) -> None:
    let_all(pair.b)
    pair.establish()
    assert datapath.distrust(pair.b.core, lambda _: True, DropReason.REVOKED_LIVE, NOW_US) == 0
    assert not pair.b.ports.cuts
    assert observe(pair.b.core, False, NOW_US) == 1
    assert pair.b.records[-1]["drop_reason"] == DropReason.REVOKED_LIVE


# -- what is encrypted -----------------------------------------------------------------------------------------------


@pytest.fixture
def sealed(make_host: MakeHost) -> Pair:
    """An encrypted connection, while nothing is enforced."""
    pair = hosts(make_host, ENCRYPTED, suites=True)
    let_all(pair.a, pair.b)
    assert pair.b.into(pair.proof_on_wire()).verdict is Verdict.ENCRYPT
    return pair


def test_a_forged_syn_does_not_make_an_encrypted_connection_plain(
    sealed: Pair, make_host: MakeHost, foreign_root: RootAuthority
) -> None:
    (flow,) = sealed.b.core.live
    stranger = make_host("a", ca=foreign_root)
    stranger.workload("web", {"app": "web"})
    shown = Pair(stranger, sealed.b, isn=66_666).syn_on_wire()
    for forged in (bytes(sealed.packet(True, "S", 77_777, 0)), shown):
        passed = sealed.b.into(forged)
        assert passed.verdict is Verdict.ACCEPT, "for the stack, which challenges it"
        assert list(sealed.b.core.live) == [flow]
    answer = sealed.b.out(sealed.reply(b"secret"))
    assert answer.verdict is Verdict.ENCRYPT
    assert b"secret" not in (answer.packet or b"secret")
    assert sealed.b.into(sealed.ack(b"forged")).verdict is Verdict.DROP


def test_an_encrypted_connection_that_a_worker_has_lost_does_not_go_on(sealed: Pair) -> None:
    record = sealed.a.out(sealed.ack(b"secret")).packet
    assert record is not None
    (flow,) = sealed.b.core.live
    sealed.b.core.forget(flow)
    assert sealed.b.into(record).verdict is Verdict.DROP, "its program would read the record"
    sealed.b.ports.sealed_keys.add(flow.key)  # so says the kernel
    answer = sealed.reply(b"secret")
    assert sealed.b.out(answer).verdict is Verdict.DROP
    assert datapath.bulk(sealed.b.core, bytes(answer), True, False, NOW_US).verdict is Verdict.DROP
    assert sealed.b.into(sealed.ack(b"forged")).verdict is Verdict.DROP
    assert sealed.b.into(sealed.ack()).verdict is Verdict.ACCEPT


def test_what_cannot_be_read_passes_but_not_into_or_out_of_an_encrypted_connection(sealed: Pair) -> None:
    """Linux takes what its options' lengths say no more of (tcp_parse_options)."""
    stray = Pair(sealed.a, sealed.b, sport=sealed.sport + 1)
    for pair, verdict in ((sealed, Verdict.DROP), (stray, Verdict.ACCEPT)):
        segment = packet.parse(bytes(pair.ack(b"forged")), False)
        forged = packet.rebuild(segment, packet._RECORD_PREFIX + bytes(4), segment.payload)
        assert pair.b.into(forged).verdict is verdict
        signed = [
            (19, bytes(16)),
            ("NOP", None),
            ("NOP", None),
        ]  # MD5 (RFC 2385): no room for a record's option
        answer = pair.packet(False, "PA", pair.peer_isn + 1, pair.isn + 1, b"secret", options=signed)
        assert pair.b.out(answer).verdict is verdict
    nonsense = bytearray(bytes(sealed.ack(b"forged")))
    nonsense[3] += 1
    assert sealed.b.into(bytes(nonsense)).verdict is Verdict.DROP, "nobody can say whose it is"


def test_a_defect_lets_nothing_out_of_an_encrypted_connection(sealed: Pair) -> None:
    answer = bytes(sealed.reply(b"secret"))
    broken = datapath.broken(sealed.b.core, answer, True, DropReason.INTERNAL_ERROR)
    assert broken.verdict is Verdict.DROP
    sealed.sport += 1
    answer = bytes(sealed.reply(b"secret"))
    assert datapath.broken(sealed.b.core, answer, True, DropReason.INTERNAL_ERROR).verdict is Verdict.ACCEPT


def test_a_broken_datagram_passes_but_not_into_an_encrypted_flow(root: RootAuthority) -> None:
    pair = make_udp_pair(root, app="vault")
    pair.establish()
    let_all(pair.a, pair.b)
    assert next(iter(pair.b.core.udp.live)).suite
    for verdict in (Verdict.DROP, Verdict.ACCEPT):
        broken = bytearray(pair.datagram(b"forged"))
        broken[25] -= 1  # a shorter UDP length: Linux trims the rest away
        assert pair.b.into(bytes(broken)).verdict is verdict
        pair.sport += 1
