"""Conditions: quantities, comparisons over time, refusals."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectool.errors import DocumentError
from sectool.policy.condition import DAY, Condition, instant_us, parse_conditions, quantity
from sectool.policy.tokens import Reader
from sectool.policy.yamlpos import Scalar

NOW = int(datetime(2026, 6, 1, tzinfo=UTC).timestamp()) * 1_000_000


def parse(text: str) -> tuple[Condition, ...]:
    reader = Reader(Scalar.whole(text, "c"))
    conditions = parse_conditions(reader)
    assert reader.token.kind == "end"
    return conditions


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("7", "number", Decimal(7)),
        ("007", "number", Decimal(7)),
        ("2.50", "number", Decimal("2.5")),
        ("7d", "duration", Decimal(7 * DAY)),
        ("1w", "duration", Decimal(7 * DAY)),
        ("1d12h", "duration", Decimal(DAY * 3 // 2)),
        ("90m", "duration", Decimal(5400 * 1_000_000)),
        ("0s", "duration", Decimal(0)),
        ("2026-06-01", "date", Decimal(NOW)),
        ("2026-06-01T02:00:00+02:00", "date", Decimal(NOW)),
        ("2026-06-01T00:00:00.000001Z", "date", Decimal(NOW + 1)),
        ("1969-12-31T23:59:59Z", "date", Decimal(-1_000_000)),
    ],
)
def test_quantities(text: str, kind: str, amount: Decimal) -> None:
    found = quantity(text)
    assert found is not None
    assert (found.kind, found.amount) == (kind, amount)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "7y",
        "d",
        "1.",
        ".5",
        "-1",
        "1e3",
        "2026-02-30",
        "0000-01-01",
        "2026-6-1",
        "2026-06-01T00:00:00",
        "٧",
    ],
)
def test_not_quantities(text: str) -> None:
    assert quantity(text) is None


@given(st.text())
def test_any_text_is_an_instant_or_none(text: str) -> None:
    instant = instant_us(text)
    assert instant is None or isinstance(instant, int)


@pytest.mark.parametrize(
    ("operator", "before", "at", "after"),
    [
        (">", False, False, True),
        (">=", False, True, True),
        ("<", True, False, False),
        ("<=", True, True, False),
    ],
)
@pytest.mark.parametrize("mirrored", [False, True])
def test_an_age_flips_when_it_says(
    operator: str, before: bool, at: bool, after: bool, mirrored: bool
) -> None:
    (condition,) = parse(f"source.since {operator} 7d")
    labels = {"since": "2026-05-25"}
    destination: dict[str, str] = {}
    if mirrored:
        swapped = operator.translate(str.maketrans("<>", "><"))
        (condition,) = parse(f"destination.limit {swapped} source.since")
        destination = {"limit": "7d"}
    for moment, expected in (
        (NOW - DAY, before),
        (NOW - 1, before),
        (NOW, at),
        (NOW + 1, after),
        (NOW + DAY, after),
    ):
        holds, flip = condition.holds(labels, destination, moment)
        assert holds == expected
        if flip is None:
            assert expected == after
        else:
            assert flip > moment
            assert condition.holds(labels, destination, flip - 1)[0] == holds
            assert condition.holds(labels, destination, flip)[0] != holds


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("source.zone != destination.zone", None),
        ("source.zone!=destination.zone", "source.zone != destination.zone"),
        ("source.a == b", "source.a = b"),
        ('source.a = "b"', "source.a = b"),
        ('source.a = ""', None),
        ('source.a = "source.b"', None),
        ('source.a = "and"', None),
        ('source.n > "7d"', "source.n > 7d"),
        ("source.k8s.io/app = destination.x and destination.n <= 2026-01-01", None),
    ],
)
def test_spelling(text: str, canonical: str | None) -> None:
    assert " and ".join(map(str, parse(text))) == (canonical or text)


@pytest.mark.parametrize(
    ("text", "column", "message", "hint"),
    [
        ("", 1, "expected source.KEY or destination.KEY, found the end", ""),
        ("zone = a", 1, "expected source.KEY or destination.KEY, found 'zone'", "source.zone"),
        ("src.zone = a", 1, "expected source.KEY", ""),
        ("source. = a", 8, "label key ''", ""),
        ("source.zone", 12, "expected one of = != < > <= >=", ""),
        ("source.zone in (a)", 13, "expected one of = != < > <= >=", ""),
        ("source.zone =", 14, "expected a value", ""),
        ("source.zone = and", 15, "expected a value", ""),
        ("source.zone = source.zone", 15, "compared with itself", ""),
        ("source.zone = a*", 15, "value 'a*'", ""),
        ("source.n > high", 12, "has no order", "7d"),
        ("source.n > 7y", 12, "has no order", ""),
        ("source.a = b or source.c = d", 14, "cannot be joined by 'or'", "'and'"),
        ("source.a = b, source.c = d", 13, "cannot be joined by ','", ""),
        ("source.a = b and", 17, "expected source.KEY", ""),
        ("source.a = b and source.a = b", 18, "given twice", ""),
        (" and ".join(f"source.a{i} = b" for i in range(17)), 295, "more than 16", ""),
    ],
)
def test_refusals(text: str, column: int, message: str, hint: str) -> None:
    with pytest.raises(DocumentError) as caught:
        parse(text)
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.where == f"c:1:{column}"
