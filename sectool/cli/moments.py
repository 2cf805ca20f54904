"""Times as people give and read them."""

from __future__ import annotations

import time
from datetime import UTC, datetime


def moment_us(text: str) -> int:
    """UTC microseconds of what `--at`, `--since` and `--until` take. Raises UsageError."""
    from sectool.moment import parse_time

    return parse_time(text, time.time_ns() // 1000)


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
