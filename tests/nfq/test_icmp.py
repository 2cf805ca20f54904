"""ICMP through an enforcer in memory: questions by policy, answers by state, errors by what they are about."""

from __future__ import annotations

import base64
import contextlib
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6MLReport2,
    ICMPv6ND_NS,
    ICMPv6ND_Redirect,
    ICMPv6PacketTooBig,
    ICMPv6TimeExceeded,
    IPv6,
)
from scapy.packet import Packet, Raw

from nfq import datapath, encrypted, icmp
from nfq.core import Attribution, Config, Result, Verdict
from nfq.exchanges import IDLE_US
from nfq.flow import Owner, State
from nfq.packet import parse
from nfq.suites import ALL
from nfq.udpflow import UdpFlow
from sectool.clock import SECOND, iso
from sectool.events import Action, ConnState, DropReason, Phase, Point
from sectool.policy import Engine
from sectool.policy import parse as parse_policy
from tests.nfq.memory import POLICY, Host, MakeHost, Pair

PING_POLICY = """
kind: Policy
name: ping
owner: team
rules:
  - allow app=web to call net:192.0.2.0/24 on icmp/echo-request,icmp6/echo-request
  - allow app=web to call net:2001:db8::/32 on icmp6/echo-request
  - allow net:10.9.0.0/16 to call app=kernel on icmp/echo-request
  - allow net:fd09::/16 to call app=kernel on icmp6/echo-request
  - allow app=web to call app=kernel on icmp,icmp6
  - allow app=web to call net:224.0.0.0/4 on icmp/echo-request
"""
HERE = {False: "10.0.0.1", True: "fd00::1"}
OUT = {False: "192.0.2.7", True: "2001:db8::7"}
IN = {False: "10.9.0.7", True: "fd09::7"}
ROUTER = {False: "10.0.0.254", True: "fd00::fe"}


@pytest.fixture(params=[False, True], ids=["v4", "v6"])
def v6(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def host(make_host: MakeHost) -> Host:
    host: Host = make_host("a", PING_POLICY)
    local = host.workload("web", {"app": "web"})
    host.core.credentials.put("pinger", local, host.now_us)
    host.ports.pinging = Attribution("pinger", Owner(77, 1000, 9))
    kernel = replace(local, id=99, identity=host.authority.issue("/host/a/wl/host", LABELS, host.now_us).peer)
    host.core.credentials.put("host", kernel, host.now_us)
    return host


from sectool.flowids import community_id  # noqa: E402
from sectool.labels import LabelSet  # noqa: E402

LABELS = LabelSet({"env": "prod", "app": "kernel"})


def ip(v6: bool, source: str, destination: str) -> Packet:
    return IPv6(src=source, dst=destination) if v6 else IP(src=source, dst=destination)


def echo(
    v6: bool, source: str, destination: str, *, reply: bool = False, number: int = 1, id_: int = 5
) -> bytes:
    if v6:
        message = (ICMPv6EchoReply if reply else ICMPv6EchoRequest)(id=id_, seq=number, data=b"ping")
        return bytes(ip(v6, source, destination) / message)
    return bytes(ip(v6, source, destination) / ICMP(type=0 if reply else 8, id=id_, seq=number) / b"ping")


def out(host: Host, packet: Packet | bytes, local: bool = False) -> Result:
    return icmp.handle(host.core, bytes(packet), True, local, host.now_us)


def into(host: Host, packet: Packet | bytes, device: int = 2) -> Result:
    return icmp.handle(host.core, bytes(packet), False, False, host.now_us, device)


def reason(host: Host, what: DropReason) -> int:
    return host.core.recorder.reasons[what.name.lower()]


# -- questions and answers -------------------------------------------------------------------------------------------


def test_a_ping_and_its_answers(host: Host, v6: bool) -> None:
    for number in range(3):
        assert out(host, echo(v6, HERE[v6], OUT[v6], number=number)).verdict is Verdict.ACCEPT
        assert into(host, echo(v6, OUT[v6], HERE[v6], reply=True, number=number)).verdict is Verdict.ACCEPT
    record = host.records[0]
    assert (
        (record["transport"], record["source_port"], record["destination_port"]) == (58, 128, 0)
        if v6
        else (1, 8, 0)
    )
    assert (record["point"], record["pid"], len(host.records)) == (Point.INITIATOR, 77, 1)
    host.now_us += IDLE_US
    datapath.tick(host.core, host.now_us)
    end = host.records[1]
    assert (end["phase"], end["conn_state"]) == (Phase.END, ConnState.SF)
    assert (end["source_packets"], end["destination_packets"]) == (3, 3)
    assert end["source_bytes"] == end["destination_bytes"] == 3 * (40 if v6 else 20) + 3 * 12
    assert len(host.core.exchanges) == 0


def test_a_ping_that_policy_does_not_allow(host: Host, v6: bool) -> None:
    for number in range(3):
        assert out(host, echo(v6, HERE[v6], IN[v6], number=number)).verdict is Verdict.DROP
    assert host.reasons == [DropReason.DEFAULT_DENY]
    assert reason(host, DropReason.DENIED_BEFORE) == 2
    assert into(host, echo(v6, IN[v6], HERE[v6], reply=True)).verdict is Verdict.DROP


def test_answers_nobody_asked_for(host: Host, v6: bool) -> None:
    assert into(host, echo(v6, OUT[v6], HERE[v6], reply=True)).verdict is Verdict.DROP
    assert out(host, echo(v6, HERE[v6], OUT[v6], reply=True)).verdict is Verdict.DROP
    out(host, echo(v6, HERE[v6], OUT[v6]))
    assert into(host, echo(v6, OUT[v6], HERE[v6], reply=True, id_=6)).verdict is Verdict.DROP
    assert into(host, echo(v6, IN[v6], HERE[v6], reply=True)).verdict is Verdict.DROP
    # An answer to a question that never came does not ride on one that was sent.
    assert out(host, echo(v6, HERE[v6], OUT[v6], reply=True)).verdict is Verdict.DROP
    assert reason(host, DropReason.UNKNOWN_FLOW) == 5


def test_a_ping_from_outside_is_the_hosts_to_answer(host: Host, v6: bool) -> None:
    assert into(host, echo(v6, IN[v6], HERE[v6])).verdict is Verdict.ACCEPT
    assert out(host, echo(v6, HERE[v6], IN[v6], reply=True)).verdict is Verdict.ACCEPT
    record = host.records[0]
    assert (record["point"], record["destination_workload"]) == (Point.RESPONDER, 99)
    assert into(host, echo(v6, OUT[v6], HERE[v6])).verdict is Verdict.DROP
    assert host.reasons[1] is DropReason.DEFAULT_DENY


def test_a_message_of_a_workload_not_known_yet_waits(host: Host) -> None:
    host.ports.pinging = Attribution("new", Owner(1, 2, 3))
    assert out(host, echo(False, HERE[False], OUT[False])) == Result(Verdict.HOLD, hold="new")


def test_pinging_oneself(host: Host, v6: bool) -> None:
    assert out(host, echo(v6, HERE[v6], HERE[v6]), local=True).verdict is Verdict.ACCEPT
    assert out(host, echo(v6, HERE[v6], HERE[v6], reply=True), local=True).verdict is Verdict.ACCEPT
    assert host.records[0]["point"] == Point.LOCAL
    assert out(host, echo(v6, HERE[v6], HERE[v6], reply=True, id_=9), local=True).verdict is Verdict.DROP


def test_anybody_may_answer_a_question_to_all(host: Host) -> None:
    assert out(host, echo(False, HERE[False], "224.0.0.1")).verdict is Verdict.ACCEPT
    assert into(host, echo(False, "10.1.2.3", HERE[False], reply=True)).verdict is Verdict.ACCEPT


def test_a_policy_that_changes_its_mind(host: Host, v6: bool) -> None:
    out(host, echo(v6, HERE[v6], OUT[v6]))
    datapath.activate(host.core, Engine(parse_policy(PING_POLICY)), 2, 0, host.now_us)
    assert out(host, echo(v6, HERE[v6], OUT[v6])).verdict is Verdict.ACCEPT
    assert len(host.records) == 1
    datapath.activate(host.core, Engine(parse_policy(POLICY)), 3, 0, host.now_us)
    assert out(host, echo(v6, HERE[v6], OUT[v6])).verdict is Verdict.DROP
    assert host.reasons[1:] == [DropReason.POLICY_CHANGED, DropReason.DEFAULT_DENY]
    assert [Action(r["action"]) for r in host.records] == [Action.ALLOW, Action.DENY, Action.DENY]
    assert into(host, echo(v6, OUT[v6], HERE[v6], reply=True)).verdict is Verdict.DROP


def test_a_rule_that_ends(host: Host) -> None:
    first = "icmp/echo-request,icmp6/echo-request"
    until = PING_POLICY.replace(first, f"{first} until {iso(host.now_us + 600 * SECOND)}", 1)
    datapath.activate(host.core, Engine(parse_policy(until)), 2, 0, host.now_us)
    host.now_us += 599 * SECOND
    assert out(host, echo(False, HERE[False], OUT[False])).verdict is Verdict.ACCEPT
    host.now_us += 2 * SECOND
    assert out(host, echo(False, HERE[False], OUT[False])).verdict is Verdict.DROP


def test_a_flood_of_questions_is_bounded(host: Host) -> None:
    """Many identifiers from everywhere: the table keeps its size, one prefix its rate."""
    host.core.exchanges.limit = 100
    for n in range(1000):
        into(host, echo(False, f"10.9.{n % 200}.{n // 200}", HERE[False], id_=n))
    assert len(host.core.exchanges) == 100
    for n in range(1000):
        into(host, echo(False, "10.9.250.1", HERE[False], id_=n))
    assert reason(host, DropReason.RATE_LIMITED) > 500


def test_neighbourhood_passes_and_a_redirect_does_not(host: Host) -> None:
    solicitation = IPv6(src="fe80::1", dst="ff02::1:ff00:1", hlim=255) / ICMPv6ND_NS(tgt="fd00::1")
    assert into(host, solicitation).verdict is Verdict.ACCEPT
    assert out(host, IPv6(src="fe80::1", dst="ff02::16") / ICMPv6MLReport2()).verdict is Verdict.ACCEPT
    redirect = IPv6(src="fe80::fe", dst="fd00::1", hlim=255) / ICMPv6ND_Redirect(
        tgt="fe80::66", dst="2001:db8::7"
    )
    assert into(host, redirect).verdict is Verdict.DROP
    assert (
        into(
            host,
            IP(src=ROUTER[False], dst=HERE[False]) / ICMP(type=5, code=1, gw="10.0.0.66") / Raw(bytes(28)),
        ).verdict
        is Verdict.DROP
    )
    assert host.reasons == [DropReason.DEFAULT_DENY] * 2


def test_malformed(host: Host) -> None:
    for packet in (
        b"",
        b"\x45",
        bytes(IP(src=HERE[False], dst=OUT[False]) / Raw(b"1234")),
        bytes(ip(True, HERE[True], OUT[True]) / ICMP()),
    ):
        assert into(host, packet).verdict is Verdict.DROP
    assert reason(host, DropReason.PACKET_MALFORMED) == 4


# -- errors ----------------------------------------------------------------------------------------------------------


def error(
    v6: bool,
    about: Packet | bytes,
    *,
    mtu: int = 0,
    source: str = "",
    destination: str = "",
    exceeded: bool = False,
) -> Packet:
    """An error from the router, or `source`, about a packet; to its sender, or `destination`."""
    about = bytes(about)
    inner = IPv6(about) if v6 else IP(about)
    head = ip(v6, source or ROUTER[v6], destination or inner.src)
    if v6:
        kind = (
            ICMPv6TimeExceeded()
            if exceeded
            else ICMPv6PacketTooBig(mtu=mtu)
            if mtu
            else ICMPv6DestUnreach(code=4)
        )
        return head / kind / Raw(about[:1200])
    return (
        head
        / ICMP(type=11 if exceeded else 3, code=4 if mtu else 0 if exceeded else 1, nexthopmtu=mtu)
        / Raw(about[:548])
    )


def encrypted_pair(make_host: MakeHost, v6: bool, rule: str = " encrypted") -> Pair:
    policy = POLICY.replace("on tcp/5432\n  - audit", f"on tcp/5432{rule}\n  - audit")
    a, b = (make_host(name, policy, Config(suites=ALL)) for name in ("a", "b"))
    a.workload("web", {"app": "web"})
    b.workload("db", {"app": "db"}, port=5432)
    return Pair(a, b, v6=v6)


def established(pair: Pair) -> Pair:
    """The handshake and an answer, whatever the flow carries."""
    pair.b.into(pair.proof_on_wire())
    wire = pair.b.out(pair.reply(b"hello"))
    assert pair.a.into(wire.packet or bytes(pair.reply(b"hello"))).verdict is not Verdict.DROP
    return pair


def test_an_error_about_a_connection_that_is_made(make_host: MakeHost, v6: bool) -> None:
    pair = encrypted_pair(make_host, v6)
    syn = pair.syn_on_wire()
    assert into(pair.a, error(v6, syn)).verdict is Verdict.ACCEPT
    guessed = pair.syn()
    guessed[TCP].seq += 1
    assert into(pair.a, error(v6, guessed)).verdict is Verdict.DROP
    other = pair.syn()
    other[TCP].sport += 1
    assert into(pair.a, error(v6, other)).verdict is Verdict.DROP
    assert into(pair.a, error(v6, syn, destination=OUT[v6])).verdict is Verdict.DROP
    assert reason(pair.a, DropReason.UNKNOWN_FLOW) == 3


def test_a_damaged_error_is_not_repaired(make_host: MakeHost, v6: bool) -> None:
    pair = encrypted_pair(make_host, v6)
    packet = bytearray(bytes(error(v6, pair.syn_on_wire())))
    packet[-1] ^= 1
    assert into(pair.a, bytes(packet)).verdict is Verdict.DROP
    assert reason(pair.a, DropReason.PACKET_MALFORMED) == 1


def test_errors_about_pings(host: Host, v6: bool) -> None:
    ping = echo(v6, HERE[v6], OUT[v6])
    assert into(host, error(v6, ping, exceeded=True)).verdict is Verdict.DROP
    out(host, ping)
    assert into(host, error(v6, ping, exceeded=True)).verdict is Verdict.ACCEPT
    assert into(host, error(v6, echo(v6, HERE[v6], OUT[v6], id_=6))).verdict is Verdict.DROP
    asked = echo(v6, IN[v6], HERE[v6])
    assert into(host, asked).verdict is Verdict.ACCEPT
    answer = echo(v6, HERE[v6], IN[v6], reply=True)
    assert into(host, error(v6, answer)).verdict is Verdict.ACCEPT
    assert out(host, error(v6, asked, source=HERE[v6])).verdict is Verdict.ACCEPT
    assert out(host, error(v6, echo(v6, OUT[v6], HERE[v6]), source=HERE[v6])).verdict is Verdict.DROP


def test_an_error_does_not_show_what_was_decrypted(make_host: MakeHost, v6: bool) -> None:
    pair = established(encrypted_pair(make_host, v6))
    inner = pair.packet(False, "PA", pair.peer_isn + 6, pair.isn + 1, b"the secret")
    result = out(pair.a, error(v6, inner, source=HERE[v6]))
    assert result.verdict is Verdict.ACCEPT
    assert result.packet is not None
    assert b"the secret" not in result.packet
    assert b"the secret" in bytes(error(v6, inner))
    plain = established(encrypted_pair(make_host, v6, rule=""))
    assert out(plain.a, error(v6, inner, source=HERE[v6])) == Result(Verdict.ACCEPT)


def test_errors_about_datagrams(host: Host, v6: bool) -> None:
    datagram = ip(v6, OUT[v6], HERE[v6]) / UDP(sport=9, dport=10) / b"the secret"
    sent = ip(v6, HERE[v6], OUT[v6]) / UDP(sport=10, dport=9) / b"a question"
    assert out(host, error(v6, datagram, source=HERE[v6])).verdict is Verdict.DROP
    assert into(host, error(v6, sent)).verdict is Verdict.DROP
    here, there = (ip_address(at).packed for at in (HERE[v6], OUT[v6]))
    flow = UdpFlow(here + there + b"\0\x0a\0\x09", v6, Point.RESPONDER, State.AUTHORISED, host.now_us)
    host.core.udp.live.add(flow)
    assert into(host, error(v6, sent)).verdict is Verdict.ACCEPT
    assert out(host, error(v6, datagram, source=HERE[v6])) == Result(Verdict.ACCEPT)
    flow.suite = 1
    result = out(host, error(v6, datagram, source=HERE[v6]))
    assert result.packet is not None
    assert b"the secret" not in result.packet


# -- path MTU --------------------------------------------------------------------------------------------------------


def full(pair: Pair, size: int, seq: int = 0, flags: str = "PA") -> Packet:
    options = [("NOP", None), ("NOP", None), ("Timestamp", (3, 2))]
    data = bytes(i * 7 & 0xFF for i in range(size))
    return pair.packet(True, flags, pair.isn + 1 + seq, pair.peer_isn + 6, data, options=options)


def delivered(pair: Pair, packets: list[bytes]) -> bytes:
    """What the server's stack gets of these, in order."""
    got = b""
    for packet in packets:
        result = pair.b.into(packet)
        assert result.packet is not None
        got += parse(bytes(result.packet), False).payload
    return got


@pytest.mark.parametrize("mtu", [1280, 1400])
@pytest.mark.parametrize("bulk", [False, True])
def test_an_encrypted_flow_is_cut_to_its_path(make_host: MakeHost, v6: bool, mtu: int, bulk: bool) -> None:
    pair = established(encrypted_pair(make_host, v6))
    flow = next(iter(pair.a.core.live))
    large = full(pair, 20_000 if bulk else 1380)
    first = pair.a.out(full(pair, 1380)).packet
    assert first is not None
    assert len(first) > mtu
    assert into(pair.a, error(v6, first, mtu=mtu)).verdict is Verdict.ACCEPT
    segment = parse(bytes(large), True)
    result = encrypted.outgoing(pair.a.core, segment, flow, pair.a.now_us, bulk=bulk, gso=bulk)
    sent = [*pair.a.ports.injected]
    assert (result.verdict is Verdict.DROP) is bulk
    if result.packet is not None:
        sent.append(bytes(result.packet))
    assert all(len(packet) <= mtu for packet in sent)
    assert max(map(len, sent)) == mtu
    assert delivered(pair, sent) == bytes(large[TCP].payload)


def test_a_path_is_learnt_only_from_what_is_on_its_way(make_host: MakeHost, v6: bool) -> None:
    pair = established(encrypted_pair(make_host, v6))
    pair.a.out(full(pair, 1380))
    for offset in (1 << 27, 1 << 31, 5000):
        assert into(pair.a, error(v6, full(pair, 1380, seq=offset), mtu=1300)).verdict is Verdict.DROP
    assert into(pair.a, error(v6, full(pair, 1380), mtu=9000)).verdict is Verdict.ACCEPT
    assert pair.a.core.paths.mtu(parse(bytes(pair.syn()), True).destination) == 0


def test_what_the_stack_tells_itself_counts(make_host: MakeHost, v6: bool) -> None:
    """A path already known to the stack: the record does not fit, and it says so over the loopback device."""
    pair = established(encrypted_pair(make_host, v6))
    wire = pair.a.out(full(pair, 1380)).packet
    assert wire is not None
    own = error(v6, wire, mtu=1400, source=pair.addresses[0])
    assert out(pair.a, own, local=True).verdict is Verdict.ACCEPT
    assert into(pair.a, own, device=icmp.LOOPBACK).verdict is Verdict.ACCEPT
    assert pair.a.core.paths.version == 1
    pair.a.out(full(pair, 1380))
    assert len(pair.a.ports.injected) == 1


def test_proofs_fit_the_path_too(make_host: MakeHost, v6: bool) -> None:
    """A plain connection that begins with a full segment carries proofs until it is answered."""
    pair = encrypted_pair(make_host, v6, rule="")
    synack = pair.synack_on_wire()
    pair.a.into(synack)
    first = pair.a.out(full(pair, 1380)).packet
    assert first is not None
    assert into(pair.a, error(v6, first, mtu=1400)).verdict is Verdict.ACCEPT
    last = pair.a.out(full(pair, 1380)).packet
    assert last is not None
    (before,) = pair.a.ports.injected
    assert len(before) == 1400
    assert delivered(pair, [before]) + parse(bytes(last), False).payload == bytes(
        full(pair, 1380)[TCP].payload
    )


def test_the_next_connection_is_told_an_mss_that_fits(make_host: MakeHost, v6: bool) -> None:
    pair = established(encrypted_pair(make_host, v6))
    first = pair.a.out(full(pair, 1380)).packet
    assert first is not None
    into(pair.a, error(v6, first, mtu=1400))
    pair.sport += 1
    told = pair.a.into(pair.synack_on_wire())
    assert told.packet is not None
    mss = dict((IPv6 if v6 else IP)(told.packet)[TCP].options)["MSS"]
    assert mss == 1400 - (60 if v6 else 40) - 28
    flow = pair.a.core.live.get(parse(bytes(pair.syn()), True).key)
    assert flow is not None
    assert flow.mss == mss
    pair.a.out(full(pair, 1380))  # the stack would not send it so, but a super-packet is left to the device
    assert not pair.a.ports.injected


def test_paths_are_forgotten(make_host: MakeHost) -> None:
    pair = established(encrypted_pair(make_host, False))
    wire = pair.a.out(full(pair, 1380)).packet
    into(pair.a, error(False, wire or b"", mtu=1400))
    pair.a.out(full(pair, 1380))
    assert len(pair.a.ports.injected) == 1
    pair.a.now_us += 601_000_000
    datapath.tick(pair.a.core, pair.a.now_us)
    assert len(pair.a.out(full(pair, 1380)).packet or b"") > 1400
    assert len(pair.a.ports.injected) == 1


# -- whatever comes ---------------------------------------------------------------------------------------------------


def test_community_id() -> None:
    """The vector of the specification's baseline for an echo, the same from either end."""
    here, there = (bytes((192, 168, 0, n)) for n in (89, 1))
    assert community_id(here, there, 8, 0, 1) == community_id(there, here, 0, 0, 1)
    assert base64.b64encode(community_id(here, there, 8, 0, 1)) == b"X0snYXpgwiv9TZtqg64sgzUn6Dk="


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.binary(max_size=160),
    st.sampled_from([0, 3, 5, 8, 11, 12, 13, 1, 2, 4, 128, 129, 135, 137]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_no_packet_does_more_than_get_a_verdict(
    host: Host, rest: bytes, kind: int, v6: bool, outbound: bool, local: bool
) -> None:
    """Invariant: any message gets a verdict, and all tables stay bounded."""
    head: Any = (
        IPv6(src=OUT[True], dst=HERE[True], nh=58) if v6 else IP(src=OUT[False], dst=HERE[False], proto=1)
    )
    data = bytes(head / Raw(bytes((kind, 0)) + rest))
    for packet in (data, data[:-1], rest):
        result = icmp.handle(host.core, packet, outbound, outbound and local, host.now_us)
        assert result.verdict in (Verdict.ACCEPT, Verdict.DROP)
    assert len(host.core.exchanges) <= host.core.exchanges.limit
    with contextlib.suppress(IndexError):
        assert host.records[-1]["transport"] in (1, 58)
