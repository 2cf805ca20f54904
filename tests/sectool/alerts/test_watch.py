"""Raised once, cleared once, and bounded."""

from __future__ import annotations

from sectool.alerts.rules import AlertRule, AlertSettings, When
from sectool.alerts.watch import (
    MAX_ACTIVE,
    MAX_ALL_PLACES,
    MAX_KEYS,
    MAX_PLACES,
    Alert,
    Counting,
    Finding,
    Places,
    Watch,
)

SECOND = 1_000_000
RULE = AlertRule("burst", When.DENIED_BURST, hold_us=60 * SECOND, send=("ops",))


def test_an_alert_is_raised_once_and_cleared_when_it_has_been_quiet() -> None:
    watch = Watch(AlertSettings((RULE,), {}))
    (change,) = watch.found(RULE, [Finding("a", "text", ("x", "y"))], 0)
    assert (change.raised, change.send) == (True, ("ops",))
    assert change.alert.describe()["owners"] == ["x", "y"]
    assert watch.found(RULE, [Finding("a", "again")], 50 * SECOND) == []
    assert watch.tick(109 * SECOND) == []
    (over,) = watch.tick(110 * SECOND)
    assert (over.raised, over.alert.id, over.alert.count, over.send) == (False, change.alert.id, 2, ("ops",))
    assert watch.tick(111 * SECOND) == []
    assert len(watch.found(RULE, [Finding("a", "anew")], 112 * SECOND)) == 1


def test_alerts_of_a_rule_that_is_gone_are_cleared() -> None:
    watch = Watch(AlertSettings((RULE,), {}))
    watch.found(RULE, [Finding("a", "t")], 0)
    watch.settle(AlertSettings((), {}))
    assert [c.raised for c in watch.tick(1)] == [False]


def test_what_was_raised_before_a_restart_is_not_raised_again() -> None:
    first = Watch(AlertSettings((RULE,), {}))
    (change,) = first.found(RULE, [Finding("a", "t")], 0)
    watch = Watch(AlertSettings((RULE,), {}))
    watch.restore(change.alert)
    assert watch.found(RULE, [Finding("a", "t")], SECOND) == []


def test_a_flood_of_findings_is_bounded_and_counted() -> None:
    watch = Watch(AlertSettings((RULE,), {}))
    raised = watch.found(RULE, [Finding(str(n), "t") for n in range(MAX_ACTIVE + 7)], 0)
    assert (len(raised), len(watch.active), watch.overflow) == (MAX_ACTIVE, MAX_ACTIVE, 7)


def test_counting_looks_back_a_while_and_no_further() -> None:
    counting = Counting(10 * SECOND)
    assert counting.add("a", 3, 0) == 3
    assert counting.add("a", 4, 9 * SECOND) == 7
    assert counting.add("a", 1, 10 * SECOND) == 5
    assert counting.add("b", 1, 10 * SECOND) == 1
    for number in range(MAX_KEYS + 100):
        counting.add(number, 1, 11 * SECOND)
    assert len(counting._seen) <= MAX_KEYS
    assert counting.add(MAX_KEYS + 99, 1, 11 * SECOND) == 2


def test_places_are_counted_once_each() -> None:
    places = Places(10 * SECOND)
    assert places.add("a", 1, 0) == 1
    assert places.add("a", 1, SECOND) == 1
    assert places.add("a", 2, 2 * SECOND) == 2
    assert places.add("a", 3, 11 * SECOND) == 2  # 1 was seen last at 1 s
    assert places.add("b", 1, 11 * SECOND) == 1


def test_places_are_bounded_in_all() -> None:
    places = Places(10 * SECOND)
    for source in range(300):
        for place in range(1001):
            reached = places.add(source, place, SECOND)
        assert reached == MAX_PLACES
    assert places._total == sum(map(len, places._seen.values())) <= MAX_ALL_PLACES
    assert 299 in places._seen


def test_what_is_held_stays_until_it_is_let_go() -> None:
    watch = Watch(AlertSettings((), {}))
    alert = Alert(7, "glass broken", "held", Finding("glass", "t"), 0, 0)
    (raised,) = watch.hold(alert, ("ops",))
    assert (raised.raised, raised.send) == (True, ("ops",))
    assert watch.hold(alert, ("ops",)) == []
    assert watch.tick(10**15) == []
    (over,) = watch.let_go(7, ("ops",))
    assert (over.raised, over.send) == (False, ("ops",))
    assert watch.let_go(7, ("ops",)) == []
