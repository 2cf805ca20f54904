"""Numbers and times for people."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tui.words import ago, count, left, octets, sparkline


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (9999, "9999"), (12_345, "12.3k"), (999_999, "1.0M"), (123_456, "123k"), (4_500_000, "4.5M")],
)
def test_counts(number: int, text: str) -> None:
    assert count(number) == text


@given(st.integers(0, 10**12))
def test_counts_are_short(number: int) -> None:
    assert len(count(number)) <= 6


def test_times() -> None:
    assert [ago(0, s * 1_000_000) for s in (5, 125, 7200, 900_000)] == ["5s", "2m", "2h", "10d"]
    assert left(3_600_000_000, 0) == "in 1h"
    assert left(0, 1) == "expired"


def test_octets() -> None:
    assert [octets(n) for n in (0, 999, 2048, 5 << 30)] == ["0B", "999B", "2.0K", "5.0G"]


@given(st.lists(st.integers(0, 10**9), max_size=200), st.integers(0, 100))
def test_sparklines_fit(values: list[int], room: int) -> None:
    assert len(sparkline(values, room)) == min(len(values), room)


def test_the_least_is_seen() -> None:
    assert sparkline([0, 1, 1000], 3) == "▁▂█"
