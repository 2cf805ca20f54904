"""Encrypted flows through two enforcers in memory: who asks for encryption, and what becomes of each segment."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from scapy.layers.inet import IP, TCP

from nfq import datapath
from nfq.core import Config, Result, Verdict
from nfq.encrypted import LOSS_US
from nfq.packet import URG, parse, rebuild, record_option
from nfq.recorder import Counts
from nfq.suites import ALL
from sectool.events import Action, Cipher, ConnState, DropReason, Encryption
from sectool.identity.authority import RootAuthority
from sectool.policy import Engine
from sectool.policy import parse as parse_policy
from tests.nfq.memory import POLICY, MakeHost, Pair, Seen

BOTH = Config(suites=ALL)
MARKER = b"a line that must not be seen on the wire"
ENCRYPTED = POLICY.replace("on tcp/5432\n  - audit", "on tcp/5432 encrypted\n  - audit")
GUARDED = POLICY.replace(
    "  - deny env=dev", "  - require encryption for any to call app=db\n  - deny env=dev"
)

MakePair = Callable[..., Pair]


@pytest.fixture
def talking(make_host: MakeHost) -> MakePair:
    """Makes a client and a server by their policies and settings."""

    def make(
        client: str = POLICY,
        server: str = POLICY,
        settings: tuple[Config, Config] = (BOTH, BOTH),
        v6: bool = False,
    ) -> Pair:
        a, b = make_host("a", client, settings[0]), make_host("b", server, settings[1])
        a.workload("web", {"app": "web"})
        b.workload("db", {"app": "db"}, port=5432)
        return Pair(a, b, v6=v6)

    return make


def connected(pair: Pair) -> Pair:
    """The handshake, and one answer from the server."""
    first = pair.b.into(pair.proof_on_wire())
    assert first.verdict is Verdict.ENCRYPT
    wire = pair.b.out(pair.reply(MARKER))
    assert wire.verdict is Verdict.ENCRYPT
    assert wire.packet is not None
    got = pair.a.into(wire.packet)
    assert got.verdict is Verdict.ENCRYPT
    assert got.packet is not None
    assert parse(got.packet, False).payload == MARKER
    return pair


def sent(result: Result | Seen) -> bytes:
    """The bytes of a packet that passes."""
    assert result.verdict in (Verdict.ENCRYPT, Verdict.ACCEPT, Verdict.SMALL)
    assert result.packet is not None
    return bytes(result.packet)


@pytest.mark.parametrize(
    ("client", "server", "with_timestamps"),
    [
        (POLICY, POLICY, (True, True)),
        (ENCRYPTED, ENCRYPTED, (False, False)),
        (POLICY, ENCRYPTED, (False, False)),
        (ENCRYPTED, POLICY, (True, False)),  # the responder learns of it when its stack has begun
    ],
    ids=["plain", "both", "responder", "initiator"],
)
def test_encrypted_stacks_do_without_timestamps(
    talking: MakePair, client: str, server: str, with_timestamps: tuple[bool, bool]
) -> None:
    pair = talking(client, server)
    syn = sent(pair.b.into(pair.syn_on_wire()))
    assert ("Timestamp" in dict(IP(syn)[TCP].options)) == with_timestamps[0]
    assert sent(pair.b.into(pair.syn_on_wire())) == syn, "a retransmission comes to the same"
    synack = sent(pair.a.into(sent(pair.b.out(pair.synack()))))
    assert ("Timestamp" in dict(IP(synack)[TCP].options)) == with_timestamps[1]
    assert dict(IP(synack)[TCP].options)["MSS"] == 1460 - 28


def urgent(packet: bytes) -> bytes:
    """The packet with an urgent pointer, its checksum made right."""
    seg = parse(packet, False)
    changed = rebuild(seg, seg.options, seg.payload, flags=seg.data[seg.tcp_off + 13] | URG)
    pointed = bytearray(changed)
    pointed[seg.tcp_off + 19] = 2
    seg = parse(bytes(pointed), False)
    return rebuild(seg, seg.options, seg.payload)


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize(
    ("client", "server"),
    [(ENCRYPTED, POLICY), (POLICY, ENCRYPTED), (ENCRYPTED, ENCRYPTED), (GUARDED, POLICY), (POLICY, GUARDED)],
    ids=["client", "server", "both", "client's guardrail", "server's guardrail"],
)
def test_either_side_can_ask_for_encryption(talking: MakePair, client: str, server: str, v6: bool) -> None:
    pair = connected(talking(client, server, v6=v6))
    wire = sent(pair.a.out(pair.ack(MARKER)))
    assert MARKER not in wire
    assert len(wire) == len(bytes(pair.ack(MARKER))) + 28
    there = parse(sent(pair.b.into(wire)), False)
    assert (there.payload, there.seq) == (MARKER, pair.isn + 1)
    assert record_option(there) is None
    for host in (pair.a, pair.b):
        verdict = host.records[0]
        assert (verdict["action"], verdict["conn_state"]) == (Action.ALLOW, ConnState.S1)
        assert (verdict["encryption"], verdict["cipher"]) == (Encryption.ENCRYPTED, Cipher.AES_256_GCM)


def test_nobody_asks_so_it_is_plain(talking: MakePair) -> None:
    pair = talking()
    pair.establish()
    assert pair.a.records[0]["encryption"] == Encryption.PLAIN
    assert pair.a.records[0]["cipher"] == Cipher.NONE


@pytest.mark.parametrize(("a", "b", "expected"), [((1, 2), (2, 1), 2), ((2,), (1, 2), 2), ((1,), (1, 2), 1)])
def test_the_server_chooses_among_what_both_have(
    talking: MakePair, a: tuple[int, ...], b: tuple[int, ...], expected: int
) -> None:
    by_number = {suite.cipher: suite for suite in ALL}
    settings = tuple(Config(suites=tuple(by_number[Cipher(n)] for n in side)) for side in (a, b))
    pair = connected(talking(ENCRYPTED, POLICY, settings))
    assert pair.a.records[0]["cipher"] == pair.b.records[0]["cipher"] == expected


@pytest.mark.parametrize("asks", ["client", "server"])
def test_no_suite_in_common_is_a_denial_that_says_so(talking: MakePair, asks: str) -> None:
    client, server = (ENCRYPTED, POLICY) if asks == "client" else (POLICY, ENCRYPTED)
    pair = talking(client, server, (BOTH, Config()))
    on_wire = pair.syn_on_wire()
    result = pair.b.into(on_wire)
    if asks == "server":
        assert result.verdict is Verdict.DROP
        assert pair.b.reasons == [DropReason.ENCRYPTION_UNAVAILABLE]
        return
    answer = pair.b.out(pair.synack()).packet
    assert answer is not None
    assert pair.a.into(answer).verdict is Verdict.DROP
    assert pair.a.reasons == [DropReason.ENCRYPTION_UNAVAILABLE]


def test_the_ack_is_lost_and_data_proves(talking: MakePair) -> None:
    pair = talking(ENCRYPTED)
    wire = pair.proof_on_wire(MARKER)
    assert MARKER not in wire
    result = pair.b.into(wire)
    assert result.verdict is Verdict.ENCRYPT
    assert parse(sent(result), False).payload == MARKER
    assert pair.b.actions == [Action.ALLOW]


def test_plain_data_behind_a_proof_of_encryption_is_dropped(talking: MakePair) -> None:
    pair = talking(ENCRYPTED)
    proof = record_option(parse(pair.proof_on_wire(), False))
    assert proof is not None
    kept = pair.packet(True, "PA", pair.isn + 1, pair.peer_isn + 1, b"injected", options=[(253, proof[2:])])
    assert pair.b.into(kept).verdict is Verdict.DROP
    assert pair.b.core.recorder.reasons["record_missing"] == 1


@pytest.mark.parametrize(
    ("flags", "payload"), [("PA", b"injected"), ("FA", b""), ("FPA", b"injected"), ("PAU", b"injected")]
)
def test_segments_without_a_record_are_dropped(talking: MakePair, flags: str, payload: bytes) -> None:
    pair = connected(talking(ENCRYPTED))
    plain = pair.packet(True, flags, pair.isn + 1, pair.peer_isn + 1, payload)
    assert pair.b.into(plain).verdict is Verdict.DROP
    assert pair.b.core.recorder.reasons["record_missing"] == 1


def test_acks_and_resets_pass_as_they_are(talking: MakePair) -> None:
    pair = connected(talking(ENCRYPTED))
    for flags in ("A", "R", "RA"):
        packet = pair.packet(True, flags, pair.isn + 1, pair.peer_isn + 1)
        assert pair.a.out(packet) == Seen(Verdict.ACCEPT)
        assert pair.b.into(packet) == Seen(Verdict.ACCEPT)


def test_fin_is_authenticated(talking: MakePair) -> None:
    pair = connected(talking(ENCRYPTED))
    fin = pair.packet(True, "FA", pair.isn + 1, pair.peer_isn + 1)
    wire = sent(pair.a.out(fin))
    assert record_option(parse(wire, False)) is not None
    assert parse(sent(pair.b.into(wire)), False).flags & 1


def test_no_urgent_pointer_arrives_that_is_in_no_record(talking: MakePair) -> None:
    """A stack takes the byte it points at out of the stream, whatever segment it came with."""
    pair = talking(ENCRYPTED)
    syn = pair.syn_on_wire()
    assert not parse(sent(pair.b.into(urgent(syn))), False).flags & URG
    answer = pair.b.out(pair.synack()).packet
    assert answer is not None
    assert not parse(sent(pair.a.into(urgent(answer))), False).flags & URG
    proof = sent(pair.a.out(pair.ack()))
    for expected in (Verdict.ENCRYPT, Verdict.ENCRYPT):  # it proves, and is repeated
        got = pair.b.into(urgent(proof))
        assert got.verdict is expected
        assert not parse(sent(got), False).flags & URG
    bare = bytes(pair.packet(True, "A", pair.isn + 1, pair.peer_isn + 1))
    got = pair.b.into(urgent(bare))
    assert not parse(sent(got), False).flags & URG
    data = sent(pair.a.out(pair.ack(MARKER)))
    assert pair.b.into(urgent(data)).verdict is Verdict.DROP
    assert parse(sent(pair.b.into(data)), False).payload == MARKER


def test_bulk_packets_take_the_short_way(talking: MakePair) -> None:
    pair = connected(talking(ENCRYPTED))
    payload = MARKER * 1000
    out = datapath.bulk(pair.a.core, bytes(pair.ack(payload)), True, True, pair.a.now_us)
    assert out.verdict is Verdict.ACCEPT
    into = datapath.bulk(pair.b.core, sent(out), False, True, pair.b.now_us)
    assert parse(sent(into), False).payload == payload


def test_a_retransmission_is_a_new_record_and_makes_records_small(talking: MakePair) -> None:
    pair = connected(talking(ENCRYPTED))
    wires = []
    for expected in (Verdict.ENCRYPT, Verdict.SMALL):
        result = pair.a.out(pair.ack(MARKER))
        assert result.verdict is expected
        wires.append(sent(result))
    assert wires[0] != wires[1]
    for wire in wires:
        assert parse(sent(pair.b.into(wire)), False).payload == MARKER
    assert pair.b.into(wires[0]).verdict is Verdict.DROP
    assert pair.b.core.recorder.reasons["record_replayed"] == 1
    pair.a.now_us += LOSS_US
    after = pair.packet(True, "PA", pair.isn + 1 + len(MARKER), pair.peer_isn + 1, MARKER)
    assert pair.a.out(after).verdict is Verdict.ENCRYPT


def test_a_forged_syn_does_not_disturb_an_encrypted_connection(talking: MakePair) -> None:
    pair = connected(talking(ENCRYPTED))
    other = talking(ENCRYPTED)
    other.isn = 77_777
    assert pair.b.into(other.syn_on_wire()).verdict is Verdict.ACCEPT  # half-open beside the live one
    wire = sent(pair.a.out(pair.ack(MARKER)))
    assert parse(sent(pair.b.into(wire)), False).payload == MARKER
    over = datapath.bulk(pair.b.core, sent(pair.a.out(pair.ack(MARKER))), False, False, pair.b.now_us)
    assert parse(sent(over), False).payload == MARKER


@pytest.mark.parametrize("closed", [False, True])
def test_a_flow_that_lingers_vouches_for_nobody(talking: MakePair, closed: bool) -> None:
    pair = connected(talking(ENCRYPTED))
    if closed:
        key = next(iter(pair.b.core.live)).key
        datapath.ended(pair.b.core, key, Counts(), ConnState.SF, pair.b.now_us)
    thief = talking(ENCRYPTED)
    thief.isn, thief.peer_isn = 77_777, 99_999
    assert pair.b.into(thief.syn_on_wire()).verdict is Verdict.ACCEPT
    assert pair.b.out(thief.synack()).verdict is Verdict.ACCEPT
    assert pair.b.into(thief.ack()).verdict is Verdict.DROP
    assert pair.b.out(thief.reply(MARKER)).verdict is Verdict.DROP, "a server that speaks first"


def test_a_forged_record_does_not_settle_where_the_stream_begins(talking: MakePair) -> None:
    """A stack that has forgotten its first answer (SYN cookies, a full backlog) picks another number."""
    pair = talking(ENCRYPTED)
    assert pair.b.into(pair.syn_on_wire()).verdict is Verdict.ACCEPT
    assert pair.b.out(pair.synack()).verdict is Verdict.ACCEPT  # lost
    forged = b"\x5e\xc7" + bytes((0, 0, 0, 1, 0, 0, 0, 1)) + bytes(16)
    record = pair.packet(True, "PA", pair.isn + 1, pair.peer_isn + 1, b"x", options=[(253, forged)])
    assert pair.b.into(record).verdict is Verdict.DROP
    pair.peer_isn += 500
    answer = pair.b.out(pair.synack()).packet
    assert answer is not None
    assert pair.a.into(answer).verdict is Verdict.ACCEPT
    assert pair.b.into(sent(pair.a.out(pair.ack(MARKER)))).verdict is Verdict.ENCRYPT
    got = pair.a.into(sent(pair.b.out(pair.reply(MARKER))))
    assert parse(sent(got), False).payload == MARKER


def test_policy_that_now_requires_encryption_cuts_plain_flows(talking: MakePair) -> None:
    pair = talking()
    pair.establish()
    assert datapath.activate(pair.b.core, Engine(parse_policy(GUARDED)), 2, 0, pair.b.now_us) == 1
    assert pair.b.reasons[-1] is DropReason.POLICY_CHANGED
    encrypted = connected(talking(ENCRYPTED))
    assert datapath.activate(encrypted.b.core, Engine(parse_policy(GUARDED)), 2, 0, pair.b.now_us) == 0


def test_policy_change_cuts_encrypted_flows_and_forgets_their_keys(talking: MakePair) -> None:
    pair = connected(talking(ENCRYPTED))
    flow = next(iter(pair.b.core.live))
    datapath.activate(pair.b.core, Engine(parse_policy("")), 2, 0, pair.b.now_us)
    assert flow.records is None
    answer = pair.b.into(sent(pair.a.out(pair.ack(MARKER))))
    assert answer.packet is not None
    assert parse(answer.packet, False).flags & 4


def test_the_same_ports_again_have_new_keys(talking: MakePair, root: RootAuthority) -> None:
    pair = connected(talking(ENCRYPTED))
    old = sent(pair.a.out(pair.ack(MARKER)))
    pair.isn, pair.peer_isn = 500_000, 900_000
    connected(pair)
    assert pair.b.into(old).verdict is Verdict.DROP
    assert pair.b.core.recorder.reasons["record_invalid"] == 1
    assert parse(sent(pair.b.into(sent(pair.a.out(pair.ack(MARKER))))), False).payload == MARKER


def test_loopback_meets_a_demand_for_encryption_and_says_plain(make_host: MakeHost) -> None:
    host = make_host("solo", GUARDED)
    host.workload("web", {"app": "web"})
    host.workload("db", {"app": "db"}, port=5432)
    syn = IP(src="127.0.0.1", dst="127.0.0.1") / TCP(sport=9, dport=5432, flags="S", seq=1)
    assert host.out(syn, local=True).verdict is Verdict.RELEASE
    assert host.records[0]["encryption"] == Encryption.PLAIN
    assert datapath.activate(host.core, Engine(parse_policy(GUARDED)), 2, 0, host.now_us) == 0


def test_an_encrypted_flow_whose_keys_are_gone_never_goes_on_in_plain(talking: MakePair) -> None:
    pair = connected(talking(ENCRYPTED))
    for host, packet in ((pair.a, pair.ack(MARKER)), (pair.b, pair.reply(MARKER))):
        flow = next(iter(host.core.live))
        flow.forget_keys()
        assert host.out(packet).verdict is Verdict.DROP
        assert datapath.bulk(host.core, bytes(packet), True, True, host.now_us).verdict is Verdict.DROP
    assert pair.b.into(pair.ack(MARKER)).verdict is Verdict.DROP


def test_what_fails_on_the_way_to_an_encrypted_flow_opens_no_plain_one(
    talking: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = talking(ENCRYPTED)
    answer = pair.synack_on_wire()

    def fails(*_: object) -> None:
        raise OSError(28, "no room")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no room"):
        patch.setattr(pair.a.core, "records", fails)
        pair.a.into(answer)
    assert pair.a.out(pair.ack(MARKER)).verdict is Verdict.DROP
    assert pair.a.into(answer).verdict is Verdict.ACCEPT, "the next transmission tries again"
    proof = sent(pair.a.out(pair.ack()))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no room"):
        patch.setattr(pair.b.core, "records", fails)
        pair.b.into(proof)
    assert pair.b.out(pair.reply(MARKER)).verdict is Verdict.DROP
    assert pair.b.into(pair.ack(MARKER)).verdict is Verdict.DROP
