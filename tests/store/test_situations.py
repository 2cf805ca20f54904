"""The history as situations: whatever part of it a running store process still writes."""

from __future__ import annotations

from typing import Any

from sectool.labels import LabelSet
from sectool.policy import parse
from sectool.policy.network import NetworkSpec, NetworkTable, parse_cidr
from sectool.policy.places import Places, address_of
from store.backtest import Kind, backtest
from store.observations import observations
from store.situations import History, Window, open_history

NOWHERE = Places([])
T0 = 1_772_330_584_000_000


def test_sealed_segments_and_the_one_being_written(lab: Any) -> None:
    """The first run's segment is sealed and read directly; the second run's is asked of the store."""
    for run in range(2):
        web, db = lab.labels("app=web"), lab.labels("app=db")
        ring = lab.ring()
        for flow in range(3):
            number = 10 * run + flow
            ring.put(
                lab.record(
                    flow=number,
                    source_labels=web,
                    destination_labels=db,
                    start=T0 + number,
                    destination_port=80 + run,
                )
            )
        lab.start()
        lab.stored(3 * (run + 1))
        if run == 0:
            lab.stop()
    history = open_history(lab.events, lab.run / "events.sock")
    try:
        found = history.situations(Window(), NOWHERE)
        assert sorted((s.port, s.flows, s.first, s.last) for s in found) == [
            (80, 3, T0, T0 + 2),
            (81, 3, T0 + 10, T0 + 12),
        ]
        assert not history.warnings
        seen = observations(history, Window())
        assert sorted((o.port, o.flows) for o in seen.flows) == [(80, 3), (81, 3)]
        assert set(seen.known) >= {LabelSet({"app": "web"}), LabelSet({"app": "db"})}
        assert history.span(Window()) == (T0, T0 + 12)
        only = parse("kind: Policy\nname: p\nowner: me\nrules: [allow app=web to call app=db on tcp/80]\n")
        outcome = backtest(history, only)
        assert [(c.kind, c.service, c.flows) for c in outcome.changes] == [(Kind.NEWLY_DENIED, "tcp/81", 3)]
    finally:
        history.close()


def test_a_place_is_what_rules_tell_apart() -> None:
    specs = [
        NetworkSpec((parse_cidr("10.0.0.0/8"),), (parse_cidr("10.1.0.0/16"),)),
        NetworkSpec((parse_cidr("10.1.2.0/24"), parse_cidr("2001:db8::/32"))),
        NetworkSpec((parse_cidr("0.0.0.0/0"),)),
        NetworkSpec((parse_cidr("::/0"),)),
    ]
    table, places = NetworkTable(specs), Places(specs)
    for start in places.starts:
        for number in (start - 1, start, start + 1):
            if 0 <= number < 1 << 128:
                address = address_of(number)
                assert table.find(places.samples[places.find(address)]) == table.find(address)


def test_times_of_a_window(lab: Any) -> None:
    ring = lab.ring()
    for flow in range(4):
        ring.put(lab.record(flow=flow, start=T0 + flow * 1_000_000))
    lab.start()
    lab.stored(4)
    lab.stop()
    history = History(lab.events)
    try:
        (one,) = history.situations(Window(T0 + 1_000_000, T0 + 3_000_000), NOWHERE)
        assert (one.flows, one.first) == (2, T0 + 1_000_000)
        assert history.examples([(T0, one.example)]) == {}
        assert history.examples([(one.first, one.example)]) == {one.example: ("10.0.0.1", "10.0.0.2")}
    finally:
        history.close()
