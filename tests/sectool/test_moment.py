"""Moments as people type them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectool.clock import DAY, HOUR, MINUTE, SECOND, from_datetime, iso, to_datetime
from sectool.errors import UsageError
from sectool.moment import parse_duration, parse_time

NOW = 1_772_330_584_000_000  # 2026-03-01T02:03:04Z


@pytest.fixture(autouse=True)
def _in_berlin() -> Iterator[None]:
    before = os.environ.get("TZ")
    os.environ["TZ"] = "Europe/Berlin"
    time.tzset()
    yield
    os.environ.pop("TZ")
    if before is not None:
        os.environ["TZ"] = before
    time.tzset()


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("now", NOW),
        ("5m", NOW - 5 * MINUTE),
        ("1h30m", NOW - 90 * MINUTE),
        ("1.5h", NOW - 90 * MINUTE),
        ("2d", NOW - 2 * DAY),
        ("250ms", NOW - SECOND // 4),
        ("2026-03-01T02:03:04Z", NOW),
        ("2026-03-01T03:03:04+01:00", NOW),
        ("2026-03-01T03:03:04", NOW),  # local
        ("2026-03-01 03:03:04.5", NOW + SECOND // 2),
        ("2026-03-01", NOW - 3 * HOUR - 3 * MINUTE - 4 * SECOND),
        ("03:03", NOW - 4 * SECOND),
        ("03:04", NOW + MINUTE - 4 * SECOND - DAY),  # not yet today
        ("03:03:04", NOW),
        ("1772330584", NOW),
        ("1772330584.25", NOW + SECOND // 4),
        ("1772330584000", NOW),
        (str(NOW), NOW),
    ],
)
def test_times(text: str, want: int) -> None:
    assert parse_time(text, NOW) == want


def test_clock_times_across_the_change_to_summer_time() -> None:
    now = from_datetime(
        to_datetime(NOW).replace(month=3, day=29, hour=10)
    )  # 12:03:04 in Berlin, +02:00 since 3:00
    assert iso(parse_time("01:30", now)) == "2026-03-29T00:30:00Z"
    assert iso(parse_time("04:30", now)) == "2026-03-29T02:30:00Z"


@pytest.mark.parametrize(
    "text", ["", "yesterday", "25:00", "5x", "-5m", "12:99", "2026-13-01", "99999999999d", "2026", "5m5"]
)
def test_refused(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_time(text, NOW)
    assert refused.value.hint


@given(text=st.text("0123456789:-TZ.+smhdw ", max_size=20) | st.text(max_size=20))
def test_any_text_is_a_moment_or_refused(text: str) -> None:
    """Invariant: microseconds within the years DuckDB and datetime can print, or UsageError."""
    try:
        moment = parse_time(text, NOW)
    except UsageError:
        return
    to_datetime(moment)


def test_durations() -> None:
    assert parse_duration("1w2d") == 9 * DAY
    with pytest.raises(UsageError):
        parse_duration("now")
