"""Moments as people type them, for --since, --until and --at."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

from sectool.clock import DAY, HOUR, MINUTE, SECOND, from_datetime, to_datetime
from sectool.errors import UsageError

_UNITS = {"ms": 1000, "s": SECOND, "m": MINUTE, "h": HOUR, "d": DAY, "w": 7 * DAY}
_DURATION = re.compile(r"(?:[0-9]{1,9}(?:\.[0-9]{1,6})?(?:ms|s|m|h|d|w))+")
_PART = re.compile(r"([0-9.]+)(ms|s|m|h|d|w)")
_UNIX = re.compile(r"[0-9]{9,16}(?:\.[0-9]{1,6})?")
_CLOCK = re.compile(r"([0-9]{1,2}):([0-9]{2})(?::([0-9]{2}))?")
_LAST = from_datetime(datetime.fromisoformat("9999-12-31T00:00:00+00:00"))


def parse_duration(text: str) -> int:
    """Microseconds of `90s`, `1h30m`, `2d`, `1.5h`. Raises UsageError."""
    if not _DURATION.fullmatch(text):
        raise UsageError(f"{text!r} is not a duration", "write for example 90s, 5m, 2h, 1d or 1h30m")
    return sum(round(float(number) * _UNITS[unit]) for number, unit in _PART.findall(text))


def parse_time(text: str, now_us: int) -> int:
    """UTC microseconds of a moment: how long ago (`5m`, `2h`, `1d`), RFC 3339, `HH:MM`, unix seconds, or `now`.

    Times without an offset are local. `HH:MM` is the latest such moment that is not in the future. Unix times of
    13 digits are milliseconds, of 16 microseconds. Raises UsageError.
    """
    text = text.strip()
    try:
        moment = _parse(text, now_us)
    except (ValueError, OverflowError, OSError):
        moment = None
    if moment is None or not 0 <= moment <= _LAST:
        raise UsageError(
            f"{text!r} is not a time",
            "write how long ago (5m, 2h), a clock time (14:30), a full time (2026-03-01T14:30:00Z) or unix seconds",
        )
    return moment


def _parse(text: str, now_us: int) -> int | None:
    if text == "now":
        return now_us
    if _DURATION.fullmatch(text):
        return now_us - parse_duration(text)
    if clock := _CLOCK.fullmatch(text):
        hour, minute, second = (int(part or 0) for part in clock.groups())
        now = to_datetime(now_us).astimezone()
        day = now.replace(hour=hour, minute=minute, second=second, microsecond=0, tzinfo=None)
        moment = from_datetime(day.astimezone())  # the offset in force then, not now
        return moment if moment <= now_us else from_datetime((day - timedelta(days=1)).astimezone())
    if _UNIX.fullmatch(text):
        whole, _, fraction = text.partition(".")
        scale = {13: 1000, 16: 1}.get(len(whole), SECOND)
        return int(whole) * scale + (int(fraction.ljust(6, "0")) if fraction and scale == SECOND else 0)
    if not re.match(r"[0-9]{4}-", text):
        return None
    return from_datetime(datetime.fromisoformat(text).astimezone())
