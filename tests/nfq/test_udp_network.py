"""Datagrams over a network that loses, repeats and reorders what it likes: properties of every schedule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nfq import udp
from nfq.core import Verdict
from nfq.udpflow import UdpFlow
from sectool.events import Phase
from sectool.identity.authority import RootAuthority
from tests.nfq.udpmemory import UdpHost, UdpPair, make_udp_pair

MakePair = Callable[..., UdpPair]

# What the network and the programs do next. Numbers pick one of the packets under way.
ACTIONS = st.lists(
    st.one_of(
        st.just(("call", 0)),
        st.just(("answer", 0)),
        st.tuples(
            st.sampled_from(["to_b", "to_a", "again_to_b", "again_to_a", "lose_a", "lose_b"]),
            st.integers(0, 7),
        ),
        st.tuples(st.just("wait"), st.integers(1, 1500)),
        st.tuples(st.just("port"), st.integers(0, 2)),
        st.just(("forget_a", 0)),
        st.just(("forget_b", 0)),
    ),
    max_size=40,
)


@pytest.fixture(scope="session")
def make(root: RootAuthority) -> MakePair:
    def made(**kwargs: bool | str) -> UdpPair:
        return make_udp_pair(root, **kwargs)  # type: ignore[arg-type]

    return made


def forget(host: UdpHost) -> None:
    """A host loses all it knows of its flows, as a worker that is killed without a journal."""
    for flow in host.core.udp.live:
        assert isinstance(flow, UdpFlow)
        host.core.udp.leave(flow)
    for table in (host.core.udp.connecting, host.core.udp.accepting):
        for flow in table:
            table.remove(flow)
    host.core.sessions.clear()
    host.held.clear()


class Driver:
    """Plays a schedule and checks after each step what must always hold."""

    def __init__(self, pair: UdpPair, encrypted: bool) -> None:
        self.pair = pair
        self.encrypted = encrypted
        self.sent: dict[UdpHost, list[bytes]] = {pair.a: [], pair.b: []}
        self.now_ms = 0
        self.remembers = True  # b has not forgotten what it has delivered

    def step(self, action: str, which: int) -> None:
        pair = self.pair
        match action:
            case "call":
                self.sent[pair.a].append(b"question %d" % len(self.sent[pair.a]))
                pair.call(self.sent[pair.a][-1])
            case "answer":
                if pair.b.core.udp.live.get(self.key_of_b()):  # a server answers, it does not begin
                    self.sent[pair.b].append(b"answer %d" % len(self.sent[pair.b]))
                    pair.answer(self.sent[pair.b][-1])
            case "wait":
                self.now_ms += which
                pair.at(self.now_ms / 1000)
            case "port":  # another flow, under a session if there is one by now
                pair.sport = 40_000 + which
            case "forget_a":
                forget(pair.a)
            case "forget_b":
                forget(pair.b)
                self.remembers = False
            case _:
                self._move(action, which)
        self.check()

    def key_of_b(self) -> bytes:
        from nfq.datagram import parse

        return parse(self.pair.datagram(b"", to_b=False), True).key

    def _move(self, action: str, which: int) -> None:
        at_a = action in ("to_b", "again_to_b", "lose_a")
        line = (self.pair.a if at_a else self.pair.b).sent
        if not line:
            return
        packet = line[which % len(line)]
        if not action.startswith("again"):
            del line[which % len(line)]
        if not action.startswith("lose"):
            (self.pair.b if at_a else self.pair.a).receive(packet)

    def check(self) -> None:
        for receiver, sender in ((self.pair.b, self.pair.a), (self.pair.a, self.pair.b)):
            assert set(receiver.delivered) <= set(self.sent[sender]), "programs get what programs sent"
            if self.encrypted and self.remembers:
                assert len(set(receiver.delivered)) == len(receiver.delivered), "nothing twice"
        for host in (self.pair.a, self.pair.b):
            for packet in host.sent:
                if self.encrypted:
                    assert b"question" not in packet
                    assert b"answer" not in packet

    def recover(self) -> None:
        """The network is well again: within some seconds, and some datagrams, all goes through."""
        for _ in range(20):
            self.now_ms += 1100
            self.pair.at(self.now_ms / 1000)
            self.step("call", 0)
            self.pair.carry()
            self.check()
            if self.pair.b.delivered[-1:] == self.sent[self.pair.a][-1:]:
                return
        raise AssertionError("they do not find together again")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS, encrypted=st.booleans(), v6=st.booleans())
def test_no_schedule_delivers_what_was_not_sent_or_keeps_them_apart(
    make: MakePair, actions: list[tuple[str, int]], encrypted: bool, v6: bool
) -> None:
    driver = Driver(make(v6=v6, app="vault" if encrypted else "db"), encrypted)
    for action, which in actions:
        driver.step(action, which)
    driver.recover()
    for host in (driver.pair.a, driver.pair.b):
        assert host.core.recorder.reasons.get("internal_error", 0) == 0
        ends = [r for r in host.records if r["phase"] == Phase.END]
        verdicts = {bytes(r["event_id"]) for r in host.records if r["phase"] == Phase.VERDICT}
        assert all(bytes(r["event_id"]) in verdicts for r in ends)


def test_a_lost_hello_is_sent_again_and_given_up_after_three_seconds(make: MakePair) -> None:
    pair = make()
    pair.call(b"x")
    times = []
    for ms in range(0, 3600, 50):
        pair.at(ms / 1000)
        if pair.a.sent:
            times.append(ms)
            pair.a.sent.clear()
    assert times == [0, 250, 750, 1750]
    assert [r["drop_reason"] for r in pair.a.records] == [47]
    assert not pair.a.held
    assert udp.due_us(pair.a.core, 1 << 62) == 1 << 62, "no timer is left"
    assert pair.call(b"again") is Verdict.DROP
    pair.at(4.5)
    assert pair.call(b"again") is Verdict.WAIT, "and begun anew a second later"
