"""What two enforcers refuse of each other, of attackers, of groups and of their own programs: datagrams, in memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from scapy.layers.inet import IP

from nfq import datapath, udp
from nfq.core import Attribution, Verdict
from nfq.datagram import MIN_MTU, craft, parse
from nfq.flow import Owner, State
from nfq.handshake import proof_option
from nfq.udpcontrol import MAGIC, Kind, read, write
from nfq.udpflow import UdpFlow
from sectool.events import Action, Auth, DropReason, Encryption, Phase, Point
from sectool.identity.authority import RootAuthority
from sectool.identity.credential import PeerIdentity
from sectool.labels import LabelSet
from sectool.policy import Engine
from sectool.policy import parse as parse_policy
from tests.nfq.udpmemory import POLICY, UdpHost, UdpPair, checked, made, make_udp_pair

MakePair = Callable[..., UdpPair]


@pytest.fixture
def make(root: RootAuthority) -> MakePair:
    def build(**kwargs: object) -> UdpPair:
        return make_udp_pair(root, **kwargs)  # type: ignore[arg-type]

    return build


def kind_of(packet: bytes) -> Kind | None:
    control = read(checked(packet).payload)
    return None if control is None else control.kind


def from_b(pair: UdpPair, payload: bytes) -> bytes:
    """A datagram to a, as anybody on the path can make it."""
    return pair.datagram(payload, to_b=False)


def flow_of(host: UdpHost) -> UdpFlow:
    """The only live flow."""
    (flow,) = host.core.udp.live
    assert isinstance(flow, UdpFlow)
    return flow


def activate(host: UdpHost, policy: str) -> int:
    return datapath.activate(host.core, Engine(parse_policy(policy)), 2, 0, host.now_us)


# -- forged and replayed -----------------------------------------------------------------------------------------


def test_a_made_up_ack_proves_nothing(make: MakePair) -> None:
    pair = make()
    pair.call(b"x")
    pair.b.receive(pair.a.sent.popleft())
    pair.a.receive(pair.b.sent.popleft())
    assert flow_of(pair.a).state is State.PROVING
    pair.a.receive(from_b(pair, write(Kind.ACK, bytes(16))))
    assert flow_of(pair.a).state is State.PROVING
    assert pair.call(b"still proving") is Verdict.ACCEPT
    pair.carry()
    assert flow_of(pair.a).state is State.AUTHORISED


def test_a_replayed_hello_gets_no_second_answer(make: MakePair) -> None:
    pair = make()
    pair.call(b"x")
    hello = pair.a.sent[0]
    pair.carry()
    for where in ("live", "elsewhere", "elsewhere again", "forgotten"):
        if where == "forgotten":
            pair.b.core.udp.leave(flow_of(pair.b))
            pair.b.core.denials.clear()
        packet = hello
        if where.startswith("elsewhere"):
            d = parse(hello, True)
            packet = craft(d.key[:-4] + b"\x11\x11" + d.key[-2:], d.payload)
        pair.b.receive(packet)
        assert not pair.b.sent, where
        assert len(pair.b.core.udp.accepting) == 0
    assert [r for r in pair.b.reasons if r is not DropReason.NONE] == [DropReason.SYN_REPLAYED] * 2


def test_the_proof_cannot_say_plain_where_encryption_is_required(make: MakePair) -> None:
    pair = make(app="vault")
    pair.call(b"SECRET")
    pair.b.receive(pair.a.sent.popleft())
    (half_open,) = pair.b.core.udp.accepting
    assert half_open.keys is not None
    plain = write(Kind.PROOF_DATA, proof_option(half_open.keys, 0), b"plain data")
    pair.b.receive(pair.datagram(plain))
    assert pair.b.delivered == []
    assert pair.b.reasons == [DropReason.PROOF_INVALID]
    pair.carry()
    assert pair.b.delivered == [b"SECRET"], "the true one goes on"


def test_copies_of_a_hello_that_somebody_changed_keep_nobody_out(make: MakePair) -> None:
    pair = make()
    pair.call(b"patience")
    hello = pair.a.sent.popleft()
    body = checked(hello).payload
    pair.b.receive(hello)
    pair.b.sent.clear()
    for at in (16 + 14, 16 + 20, 16 + 30):  # the ephemeral key
        changed = body[:at] + bytes((body[at] ^ 1,)) + body[at + 1 :]
        pair.b.receive(pair.datagram(changed))
    pair.b.sent.clear()
    pair.at(0.3)
    pair.carry()
    assert pair.b.delivered == [b"patience"]


def test_what_enforcers_say_counts_only_from_inside_the_enforced_networks(make: MakePair) -> None:
    pair = make()
    pair.establish()
    pair.call(b"x")
    hello = write(Kind.HELLO, bytes(700))
    outside = made("192.0.2.9", "10.0.0.2", 1000, 5432, hello)
    assert pair.b.receive(outside) is Verdict.RELEASE, "judged by its address, whatever it carries"
    assert pair.b.delivered == [hello]


def test_only_data_and_proofs_are_told_that_their_flow_is_unknown(make: MakePair) -> None:
    pair = make()
    for kind in Kind:
        pair.b.core.udp.denied.clear()
        pair.b.receive(pair.datagram(write(kind, bytes(28))))
        answers = [kind_of(packet) for packet in pair.b.sent]
        assert answers == (
            [Kind.UNKNOWN] if kind in (Kind.PROOF, Kind.PROOF_DATA)
            else [Kind.UNKNOWN_SESSION] if kind is Kind.RESUME and len(write(kind, bytes(28))) > 60
            else []
        )  # fmt: skip
        pair.b.sent.clear()


@pytest.mark.parametrize("v6", [False, True], ids=["v4", "v6"])
def test_nobody_gets_more_than_was_received(make: MakePair, v6: bool) -> None:
    pair = make(v6=v6)
    received = answered = 0
    for size in [0, 1, 5, 23, 24, 30, 0, 0, 0, 0, 40, 1000] * 4:
        packet = pair.datagram(bytes(size))
        pair.b.receive(packet)
        received += len(packet)
        answered += sum(map(len, pair.b.sent))
        pair.b.sent.clear()
        assert answered <= received
    assert answered > 0


def test_a_made_up_unknown_changes_nothing_and_a_true_one_little(make: MakePair) -> None:
    pair = make(app="vault")
    pair.establish()
    pair.a.receive(from_b(pair, write(Kind.UNKNOWN, b"12345678")))
    assert not flow_of(pair.a).doubted
    pair.call(b"two")
    seen = checked(pair.a.sent[0]).payload
    pair.carry()
    pair.at(2)
    pair.a.receive(from_b(pair, write(Kind.UNKNOWN, seen[-8:])))
    assert flow_of(pair.a).doubted
    pair.a.receive(from_b(pair, write(Kind.UNKNOWN, seen[-8:])))
    pair.call(b"three")
    pair.carry()
    assert pair.b.delivered == [b"two", b"three"]
    for host in (pair.a, pair.b):
        assert len(host.core.udp.live) == 1


def test_a_plain_flow_is_doubted_seldom_and_its_mark_taken_away(make: MakePair) -> None:
    pair = make()
    pair.establish()
    pair.at(10)
    for _ in range(3):
        pair.a.receive(from_b(pair, write(Kind.UNKNOWN, bytes(8))))
    assert len(pair.a.ports.cuts) == 1
    pair.call(b"again")
    pair.carry()
    assert pair.b.delivered == [b"again"]
    pair.at(12)
    pair.a.receive(from_b(pair, write(Kind.UNKNOWN, bytes(8))))
    assert not flow_of(pair.a).doubted, "two seconds later"
    pair.at(16)
    pair.a.receive(from_b(pair, write(Kind.UNKNOWN, bytes(8))))
    assert flow_of(pair.a).doubted


# -- both at once ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [False, True], ids=["full", "under-a-session"])
@pytest.mark.parametrize("app", ["plain", "encrypted"])
def test_two_hosts_that_begin_at_once_share_one_flow(make: MakePair, known: bool, app: str) -> None:
    word = " encrypted" if app == "encrypted" else ""
    policy = f"kind: Policy\nname: p\nowner: o\nrules:\n  - allow any to call any{word}\n"
    for turn in range(4):  # either may win
        pair = make(policy=policy)
        pair.b.workload("db", {"app": "db"})
        pair.a.workload("web", {"app": "web"}, port=40_000)
        if known:
            pair.establish()
            for host in (pair.a, pair.b):
                flow = flow_of(host)
                host.core.udp.leave(flow)
            pair.answer(b"first")
            pair.carry()
            for host in (pair.a, pair.b):
                host.core.udp.leave(flow_of(host))
            pair.a.delivered.clear()
            pair.b.delivered.clear()
        pair.call(b"from a %d" % turn)
        pair.answer(b"from b %d" % turn)
        pair.carry()
        pair.at(0.3)
        pair.carry()
        pair.at(1.2)
        pair.carry()
        assert pair.b.delivered == [b"from a %d" % turn]
        assert pair.a.delivered == [b"from b %d" % turn]
        assert {flow_of(pair.a).point, flow_of(pair.b).point} == {Point.INITIATOR, Point.RESPONDER}


# -- policy ------------------------------------------------------------------------------------------------------


def test_egress_denies_at_the_answer_and_says_so(make: MakePair) -> None:
    pair = make()
    pair.a.core.engine = Engine(parse_policy(""))
    pair.call(b"x")
    pair.carry()
    assert pair.b.delivered == []
    assert pair.a.reasons == [DropReason.DEFAULT_DENY]
    assert pair.b.reasons == [DropReason.PEER_DENIED]
    assert pair.b.records[0]["peer_reason"] == DropReason.DEFAULT_DENY
    assert not pair.a.held


@pytest.mark.parametrize("who", ["a", "b"])
def test_either_side_can_have_a_flow_encrypted_also_under_a_session(make: MakePair, who: str) -> None:
    pair = make()
    asks = pair.a if who == "a" else pair.b
    asks.core.engine = Engine(
        parse_policy(POLICY.replace("app=db on udp/5432", "app=db on udp/5432 encrypted"))
    )
    pair.establish()
    pair.sport = 41_000
    pair.call(b"SECRET")
    assert kind_of(pair.a.sent[0]) is Kind.RESUME
    pair.carry()
    pair.call(b"SECRET")
    assert b"SECRET" not in pair.a.sent[-1]
    pair.carry()
    assert pair.b.delivered == [b"SECRET"] * 2
    for host in (pair.a, pair.b):
        assert {Encryption(r["encryption"]) for r in host.records} == {Encryption.ENCRYPTED}


def test_a_policy_that_changes_before_the_answer_counts(make: MakePair) -> None:
    pair = make()
    pair.establish()
    pair.sport = 41_000
    pair.call(b"x")
    activate(pair.a, POLICY.replace("app=db on udp/5432", "app=db on udp/5432 encrypted"))
    pair.carry()
    assert pair.b.delivered[-1:] == [b"x"]
    assert pair.call(b"y") is Verdict.ENCRYPT


def test_a_renewed_or_replaced_server_takes_no_old_session(make: MakePair) -> None:
    pair = make()
    pair.establish()
    pair.b.workload("other-db", {"app": "db"}, port=5432)
    pair.sport = 41_000
    pair.call(b"x")
    pair.b.receive(pair.a.sent.popleft())
    assert [kind_of(p) for p in pair.b.sent] == [Kind.UNKNOWN_SESSION]
    pair.carry()
    assert pair.b.delivered == [b"x"]
    assert pair.b.records[-1]["auth_method"] == Auth.NOISE_IX


def test_plain_datagrams_behind_a_resume_come_once_whoever_says_what(make: MakePair) -> None:
    pair = make()
    pair.establish()
    pair.sport = 41_000
    pair.call(b"pay 100")
    resume = pair.a.sent.popleft()
    control = read(checked(resume).payload)
    assert control is not None
    pair.b.receive(resume)
    pair.b.sent.clear()
    hint = write(Kind.UNKNOWN_SESSION, b"\x01\x06" + control.body[-16:])
    pair.a.receive(from_b(pair, hint))
    pair.carry()
    assert pair.b.delivered == [b"pay 100"]


# -- what does not fit -------------------------------------------------------------------------------------------


def test_datagrams_too_large_for_a_proof_wait_for_the_ack(make: MakePair) -> None:
    pair = make()
    large = bytes(1400)
    pair.call(large)
    pair.b.receive(pair.a.sent.popleft())
    pair.a.receive(pair.b.sent.popleft())
    assert [kind_of(p) for p in pair.a.sent] == [Kind.PROOF]
    assert all(len(p) <= MIN_MTU for p in pair.a.sent)
    pair.carry()
    assert pair.b.delivered == [large]


@pytest.mark.parametrize("v6", [False, True], ids=["v4", "v6"])
def test_sealed_datagrams_that_exceed_the_path_may_be_fragmented(make: MakePair, v6: bool) -> None:
    pair = make(v6=v6, app="vault")
    pair.establish()
    head = 48 if v6 else 28
    for size, fits in ((1500 - head - 24, True), (1500 - head - 23, False)):
        pair.call(bytes(size))
        if v6 and not fits:
            assert not pair.a.sent
            (packet,) = pair.a.ports.large
        else:
            packet = pair.a.sent.popleft()
            if not v6:
                assert bool(IP(packet).flags.DF) == fits
        assert pair.b.receive(packet) is Verdict.ENCRYPT
        assert pair.b.delivered[-1] == bytes(size)
    pair.a.core.paths.learn(b"\xfd" + bytes(14) + b"\2" if v6 else b"\x0a\0\0\2", 1400, pair.a.now_us)
    pair.call(bytes(1400 - head - 23))
    if v6:
        assert len(pair.a.ports.large) == 2
    else:
        assert not IP(pair.a.sent[-1]).flags.DF


# -- whose sockets -----------------------------------------------------------------------------------------------


def test_who_could_be_two_workloads_is_nobody(make: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = make()
    web = pair.a.ports.connecting
    assert web is not None
    pair.a.workload("evil", {"app": "evil"})
    evil = pair.a.ports.connecting
    assert evil is not None
    monkeypatch.setattr(pair.a.ports, "attribute_datagram", lambda d, **_: (web, evil))
    assert pair.call(b"x") is Verdict.DROP
    assert pair.a.reasons == [DropReason.NO_LOCAL_IDENTITY]


def test_groups_are_judged_by_rules_for_all_their_members(make: MakePair) -> None:
    pair = make()
    out = made("10.0.0.1", "224.0.0.251", 5353, 5353, b"query")
    assert pair.a.send(out) is Verdict.RELEASE
    assert pair.a.send(made("10.0.0.1", "224.0.0.251", 5353, 5354, b"query")) is Verdict.DROP
    assert pair.a.send(made("10.0.0.1", "10.0.0.255", 5353, 5353, b"query")) is Verdict.DROP
    assert not pair.a.sent or all(kind_of(p) is None for p in pair.a.sent), "no handshake with a group"
    pair.b.workload("db", {"app": "db"}, port=5353)
    db = pair.b.ports.listening[5353]
    pair.b.workload("other", {"app": "other"}, port=5353)
    other = pair.b.ports.listening[5353]
    into = made("10.0.0.1", "224.0.0.251", 5353, 5353, b"query")
    pair.b.ports.members[5353] = (db,)
    assert pair.b.receive(into) is Verdict.ACCEPT, "seen by us each time"
    pair.b.ports.members[5353] = (db, other)
    assert pair.b.receive(into) is Verdict.ACCEPT, "judged a moment ago"
    pair.b.pass_time(pair.b.now_us + 1_000_001)
    assert pair.b.receive(into) is Verdict.DROP, "another member joined that may not hear it"
    assert pair.b.reasons[-1] is DropReason.DEFAULT_DENY
    pair.b.core.udp.denied.clear()
    pair.b.ports.members[5353] = (db, Attribution(("unknown", 1), Owner(1, 2, 3)))
    assert pair.b.receive(into) is Verdict.HOLD
    pair.b.core.credentials.put(("unknown", 1), "nobody", pair.b.now_us)
    assert pair.b.receive(into) is Verdict.DROP


def test_on_one_host_both_workloads_are_judged(make: MakePair) -> None:
    pair = make()
    pair.a.workload("db", {"app": "db"}, port=5432)
    pair.a.workload("other", {"app": "other"}, port=5433)
    to = [made("127.0.0.1", "127.0.0.1", 40_000, port, b"x") for port in (5432, 5433, 5434)]
    verdicts = [pair.a.out(packet, local=True).verdict for packet in to]
    assert verdicts == [Verdict.RELEASE, Verdict.DROP, Verdict.ACCEPT], (
        "the last: the kernel refuses by itself"
    )
    back = made("127.0.0.1", "127.0.0.1", 5432, 40_000, b"y")
    assert pair.a.out(back, local=True).verdict is Verdict.RELEASE
    assert [Action(r["action"]) for r in pair.a.records] == [Action.ALLOW, Action.DENY]
    assert {Point(r["point"]) for r in pair.a.records} == {Point.LOCAL}
    assert pair.a.records[0]["auth_method"] == Auth.KERNEL


def test_looking_like_control_is_not_enough(make: MakePair) -> None:
    pair = make()
    pair.establish()
    for data in (MAGIC, MAGIC + bytes(30), write(Kind.ACK, bytes(16))[:-1]):
        pair.call(data)
        pair.carry()
        assert pair.b.delivered[-1] == data
    count = len(pair.b.delivered)
    for kind in Kind:
        pair.b.receive(pair.datagram(write(kind, bytes(16))))
    assert len(pair.b.delivered) == count
    ends = [r for r in pair.b.records if r["phase"] == Phase.END]
    assert ends == []
    assert udp.due_us(pair.b.core, 7) == 7


# -- who is not trusted any more, and who has other labels -------------------------------------------------------


def only(peer: PeerIdentity) -> Callable[[PeerIdentity], bool]:
    return lambda who: who.id == peer.id


def test_flows_of_peers_that_are_not_trusted_any_more_are_cut(make: MakePair) -> None:
    pair = make()
    pair.establish()
    for host in (pair.a, pair.b):
        peer = flow_of(host).peer
        assert peer is not None
        reason = DropReason.UNTRUSTED_DOMAIN
        assert datapath.distrust(host.core, lambda _: False, reason, host.now_us) == 0
        assert datapath.distrust(host.core, only(peer), reason, host.now_us) == 1
        assert len(host.core.udp.live) == 0
        assert host.records[-1]["drop_reason"] == reason


def test_a_greeting_of_a_peer_that_is_not_trusted_any_more_comes_to_nothing(make: MakePair) -> None:
    pair = make()
    pair.call(b"x")
    pair.b.receive(pair.a.sent.popleft())
    assert len(pair.b.core.udp.accepting) == 1
    datapath.distrust(pair.b.core, lambda _: True, DropReason.UNTRUSTED_DOMAIN, pair.b.now_us)
    assert len(pair.b.core.udp.accepting) == 0
    pair.carry()
    assert pair.b.delivered == []


def test_datagrams_are_judged_by_the_labels_that_their_workload_has_now(make: MakePair) -> None:
    pair = make()
    pair.establish()
    guarded = "---\nkind: Guardrail\nname: v\nowner: s\nrules: [deny vuln=critical to call app=db]\n"
    activate(pair.a, POLICY + guarded)
    local = flow_of(pair.a).local
    assert local is not None
    own = dict(local.identity.labels)
    assert datapath.relabel(pair.a.core, local.id, LabelSet({**own, "vuln": "low"}), pair.a.now_us) == 0
    assert datapath.relabel(pair.a.core, local.id, LabelSet({**own, "vuln": "critical"}), pair.a.now_us) == 1
    assert len(pair.a.core.udp.live) == 0
