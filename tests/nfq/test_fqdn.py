"""fqdn rules through an enforcer in memory: a question, its answer, and the connection that follows."""

from __future__ import annotations

import pytest
from scapy.layers.dns import DNS, DNSQR, DNSRR
from scapy.layers.inet import IP, TCP, UDP
from scapy.packet import Packet

from nfq import datapath
from nfq.core import Verdict, reminded
from nfq.flow import Flow, State
from nfq.names import GRACE_S
from sectool.clock import SECOND
from sectool.events import DropReason, Point
from sectool.policy import Engine, Party, Request, parse
from tests.nfq.memory import Host, MakeHost

POLICY = """
kind: Policy
name: out
owner: team
rules:
  - allow app=web to call fqdn:api.example.com on tcp/443
  - allow app=web to call fqdn:*.wild.example on tcp/443,udp/443
  - allow app=web to call net:198.51.100.53/32 on udp/53
  - allow app=web to call app=resolver on udp/53
  - deny app=web to call fqdn:bad.wild.example
"""
RESOLVER = "198.51.100.53"


@pytest.fixture
def host(make_host: MakeHost) -> Host:
    host: Host = make_host("a", POLICY)
    host.workload("web", {"app": "web"})
    return host


def lookup(
    host: Host, name: str, *addresses: str, alias: str = "", ttl: int = 60, local: bool = False
) -> None:
    """The host's own question and its answer, through the enforcer."""
    resolver = "127.0.0.1" if local else RESOLVER
    own = "127.0.0.1" if local else "10.0.0.1"
    question = IP(src=own, dst=resolver) / UDP(sport=40_000) / DNS(id=7, rd=1, qd=[DNSQR(qname=name)])
    records = [DNSRR(rrname=alias or name, type="A", rdata=address, ttl=ttl) for address in addresses]
    if alias:
        records.insert(0, DNSRR(rrname=name, type="CNAME", rdata=alias, ttl=ttl))
    answer = IP(src=resolver, dst=own) / UDP(sport=53, dport=40_000)
    answer /= DNS(id=7, qr=1, qd=[DNSQR(qname=name)], an=records)
    assert host.out(question, local=local).verdict is Verdict.ACCEPT
    result = host.out(answer, local=True) if local else host.into(answer)
    assert result.verdict is Verdict.ACCEPT, "datagrams of a name server are never released to the kernel"


def connect(host: Host, address: str, port: int = 443, sport: int = 50_000) -> Verdict:
    return host.out(
        IP(src="10.0.0.1", dst=address) / TCP(sport=sport, dport=port, flags="S", seq=sport)
    ).verdict


def call(host: Host, address: str, port: int = 443, sport: int = 50_000) -> Verdict:
    packet: Packet = IP(src="10.0.0.1", dst=address) / UDP(sport=sport, dport=port) / b"hello"
    return host.out(packet).verdict


def test_a_name_opens_its_addresses_on_the_rules_port(host: Host) -> None:
    assert connect(host, "192.0.2.1") is Verdict.DROP
    lookup(host, "api.example.com", "192.0.2.1", "192.0.2.2")
    assert connect(host, "192.0.2.1", sport=50_001) is Verdict.RELEASE
    assert connect(host, "192.0.2.2", sport=50_002) is Verdict.RELEASE
    assert connect(host, "192.0.2.1", 80, sport=50_003) is Verdict.DROP
    assert connect(host, "192.0.2.3", sport=50_004) is Verdict.DROP
    assert set(host.reasons) == {DropReason.NONE, DropReason.DEFAULT_DENY}


def test_an_alias_a_wildcard_and_an_exception(host: Host) -> None:
    lookup(host, "www.wild.example", "192.0.2.1", alias="edge.cdn.example")
    lookup(host, "bad.wild.example", "192.0.2.2")
    lookup(host, "wild.example", "192.0.2.3")
    assert connect(host, "192.0.2.1") is Verdict.RELEASE
    assert call(host, "192.0.2.1") is Verdict.RELEASE
    assert connect(host, "192.0.2.2") is Verdict.DROP
    assert connect(host, "192.0.2.3") is Verdict.DROP
    assert DropReason.INTENT_DENY in host.reasons


def test_a_name_that_has_expired_opens_nothing_and_cuts_nothing(host: Host) -> None:
    lookup(host, "api.example.com", "192.0.2.1", ttl=10)
    assert connect(host, "192.0.2.1") is Verdict.RELEASE
    host.now_us += (10 + GRACE_S + 1) * SECOND
    assert connect(host, "192.0.2.1", sport=50_001) is Verdict.DROP
    datapath.tick(host.core, host.now_us)
    assert datapath.activate(host.core, Engine(parse(POLICY)), 2, 0, host.now_us) == 0
    assert len(host.core.live) == 1


def test_a_resolver_on_this_host_counts(host: Host) -> None:
    host.workload("dns", {"app": "resolver"}, port=53)
    lookup(host, "api.example.com", "192.0.2.1", local=True)
    assert connect(host, "192.0.2.1") is Verdict.RELEASE


def test_a_restored_connection_keeps_its_names(host: Host) -> None:
    """The journal knows addresses only; the names come from those remembered, expired or not."""
    lookup(host, "api.example.com", "192.0.2.1", ttl=5)
    connect(host, "192.0.2.1")
    (flow,) = host.core.live
    assert flow.request is not None
    again = Flow(flow.key, False, Point.INITIATOR, State.AUTHORISED, 0, flow.start_us)
    again.request = Request(flow.request.source, Party(None, None, flow.request.destination.address), 6, 443)
    host.core.live.add(again)
    host.now_us += 3600 * SECOND
    reminded(host.core, again)
    assert again.request.destination.names == {"api.example.com"}
    assert datapath.activate(host.core, Engine(parse(POLICY)), 2, 0, host.now_us) == 0
