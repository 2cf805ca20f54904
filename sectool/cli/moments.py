"""Times as people give and read them."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime

from sectool.errors import UsageError

_DURATION = re.compile(r"(?:\d{1,9}(?:\.\d{1,3})?(?:ms|[wdhms]))+")
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|[wdhms])")
_SECONDS = {"w": 604_800.0, "d": 86_400.0, "h": 3_600.0, "m": 60.0, "s": 1.0, "ms": 0.001}


def moment_us(text: str, now_us: int | None = None) -> int:
    """UTC microseconds of `10m` (that long ago), `now`, a Unix time, or an ISO 8601 timestamp.

    A timestamp without zone is in local time, as the shell's clock shows it. Raises UsageError.
    """
    now = time.time_ns() // 1000 if now_us is None else now_us
    text = text.strip()
    if text == "now":
        return now
    if _DURATION.fullmatch(text):
        back = sum(float(number) * _SECONDS[unit] for number, unit in _PART.findall(text))
        return max(0, now - round(back * 1_000_000))
    if re.fullmatch(r"\d{9,11}(\.\d{1,6})?", text):
        return round(float(text) * 1_000_000)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(
            f"{text!r} is no time",
            "give a duration back from now (90s, 10m, 2h30m, 1d) or 2026-03-01T02:00:00Z",
        ) from None
    if moment.tzinfo is None:
        moment = moment.astimezone()
    return round(moment.timestamp() * 1_000_000)


def show_time(us: int | None, *, precise: bool = False) -> str:
    """UTC microseconds as `2026-03-01T02:03:04Z` (with milliseconds when `precise`); `-` for none."""
    if not us:
        return "-"
    try:
        moment = datetime.fromtimestamp(us / 1_000_000, UTC)
    except (OverflowError, ValueError, OSError):
        return str(us)
    if precise:
        return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
