"""Connections that were being made when an enforcer was started anew, and strangers' claims to the same SYN."""

from __future__ import annotations

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6

from nfq.core import Verdict
from nfq.flow import State
from nfq.packet import RST, parse
from sectool.events import DropReason
from tests.nfq.memory import Pair

pytestmark = pytest.mark.parametrize("answered", [False, True], ids=["before the answer", "after it"])


def restarted_a(pair: Pair) -> None:
    """The initiator's worker died: what it knew of half-open connections is gone."""
    for flow in pair.a.core.connecting:
        pair.a.core.connecting.remove(flow)


def make_it(pair: Pair) -> None:
    """SYN-ACK, and the ACK that proves."""
    answer = pair.b.out(pair.synack())
    assert answer.verdict is Verdict.ACCEPT
    assert answer.packet is not None
    assert pair.a.into(answer.packet).verdict is Verdict.ACCEPT
    proof = pair.a.out(pair.ack()).packet
    assert proof is not None
    assert pair.b.into(proof).verdict is Verdict.RELEASE


def test_an_initiator_started_anew_makes_its_connection_with_the_next_syn(pair: Pair, answered: bool) -> None:
    assert pair.b.into(pair.syn_on_wire()).verdict is Verdict.ACCEPT
    if answered:
        pair.b.out(pair.synack())
    restarted_a(pair)
    assert pair.b.into(pair.syn_on_wire()).verdict is Verdict.ACCEPT, (
        "a new greeting with the old sequence number"
    )
    make_it(pair)
    assert len(pair.b.core.accepting) == 0
    assert len(pair.b.core.live) == 1
    assert pair.b.reasons == [DropReason.NONE]


def test_a_strangers_greeting_takes_nobodys_place(pair: Pair, answered: bool) -> None:
    """Whoever is on the path can make a greeting in the initiator's name for its SYN, but never the proof."""
    honest = pair.syn_on_wire()
    assert pair.b.into(honest).verdict is Verdict.ACCEPT
    answer = pair.b.out(pair.synack()).packet if answered else None
    (flow,) = pair.a.core.connecting
    restarted_a(pair)
    for _ in range(2):
        assert pair.b.into(pair.syn_on_wire()).verdict is Verdict.ACCEPT
        restarted_a(pair)
        if answered:
            break
    pair.a.core.connecting.add(flow)
    if answer is None:
        # Its own retransmission makes its claim the one that is answered. Two strangers since: it greets again.
        assert pair.b.into(honest).verdict is Verdict.DROP
        assert pair.b.reasons[-1] is DropReason.SYN_REPLAYED
        return
    assert pair.a.into(answer).verdict is Verdict.ACCEPT
    proof = pair.a.out(pair.ack()).packet
    assert proof is not None
    assert pair.b.into(proof).verdict is Verdict.RELEASE
    assert len(pair.b.core.accepting) == 0


def test_a_retransmission_is_answered_in_its_own_terms(pair: Pair, answered: bool) -> None:
    first = pair.syn_on_wire()
    assert pair.b.into(first).verdict is Verdict.ACCEPT
    if answered:
        pair.b.out(pair.synack())
    (flow,) = pair.a.core.connecting
    restarted_a(pair)
    second = pair.syn_on_wire()
    for syn in (second, first, second, first):
        assert pair.b.into(syn).verdict is Verdict.ACCEPT
    restarted_a(pair)
    pair.a.core.connecting.add(flow)
    make_it(pair)


def test_a_responder_started_anew_tells_who_believes_in_a_connection(pair: Pair, answered: bool) -> None:
    proof = parse(pair.proof_on_wire(b"question" if answered else b""), False)
    for flow in pair.b.core.accepting:
        pair.b.core.accepting.remove(flow)
    assert pair.b.into(bytes(proof.data)).verdict is Verdict.DROP
    assert pair.b.core.recorder.reasons["unknown_flow"] == 1
    (told,) = pair.b.ports.injected
    seg = parse(told, False)
    assert seg.flags & RST
    assert (seg.source, seg.destination) == (proof.destination, proof.source)
    assert seg.seq == proof.ack, "as the stack over there will believe it"
    assert pair.a.into(told).verdict is Verdict.ACCEPT
    assert next(iter(pair.a.core.live)).state is State.PROVING, "anybody can say so: the enforcer goes on"


def test_nobody_else_is_told_anything(pair: Pair, answered: bool) -> None:
    """Neither who shows no record, nor a RST, nor somebody outside the enforced networks, nor another worker's."""
    proof = pair.proof_on_wire()
    for flow in pair.b.core.accepting:
        pair.b.core.accepting.remove(flow)
    reset = (IPv6 if pair.v6 else IP)(proof)
    reset[TCP].flags = "R" if answered else "RA"
    outside = (IPv6 if pair.v6 else IP)(proof)
    outside.src = "2001:db8::1" if pair.v6 else "192.0.2.1"
    for packet in (reset, outside):
        del packet[TCP].chksum
        if not pair.v6:
            del packet.chksum
        assert pair.b.into(bytes(packet)).verdict is Verdict.DROP
    assert pair.b.into(pair.ack(b"data" if answered else b"")).verdict is Verdict.DROP
    assert pair.b.ports.injected == []
