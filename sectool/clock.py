"""Time as this project counts it: integers of UTC microseconds since 1970, never a naive datetime.

Functions that depend on the time take it as `now_us`; only the outermost callers read the wall clock
(`sectool.events.now_us`). Certificates count whole seconds: the conversions here are exact.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

SECOND = 1_000_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
DAY = 24 * HOUR
YEAR = 365 * DAY

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def to_datetime(us: int) -> datetime:
    """The aware UTC datetime of `us`; OverflowError beyond the years 1 to 9999."""
    return _EPOCH + timedelta(microseconds=us)


def from_datetime(moment: datetime) -> int:
    """UTC microseconds of an aware datetime."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def iso(us: int) -> str:
    """`us` as people and logs read it: 2026-03-01T02:03:04Z (whole seconds, rounded down)."""
    return to_datetime(us // SECOND * SECOND).strftime("%Y-%m-%dT%H:%M:%SZ")
