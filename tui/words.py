"""Numbers and times as people read them, and pictures of numbers in one line."""

from __future__ import annotations

from collections.abc import Sequence

from sectool.clock import DAY, HOUR, MINUTE, SECOND, to_datetime

_BARS = " ▁▂▃▄▅▆▇█"


def count(number: int) -> str:
    """At most five columns: `999`, `12.3k`, `4.5M`."""
    if number < 10_000:
        return str(number)
    for unit, scale in (("k", 1_000), ("M", 1_000_000), ("G", 1_000_000_000)):
        value = number / scale
        if value < 999.5 or unit == "G":
            return f"{value:.1f}{unit}" if value < 99.95 else f"{value:.0f}{unit}"
    return str(number)


def plural(number: int, what: str) -> str:
    """`1 flow`, `2 flows`, `12.3k flows`."""
    return f"{count(number)} {what}{'' if number == 1 else 's'}"


def ago(us: int, now_us: int) -> str:
    """How long ago, in its largest unit: `3s`, `12m`, `4h`, `9d`."""
    past = max(0, now_us - us)
    for unit, scale in (("d", DAY), ("h", HOUR), ("m", MINUTE)):
        if past >= scale:
            return f"{past // scale}{unit}"
    return f"{past // SECOND}s"


def left(us: int, now_us: int) -> str:
    """How long until then: `in 4h`, or `expired`."""
    return f"in {ago(now_us, us)}" if us > now_us else "expired"


def clock(us: int) -> str:
    """`02:03:04` in UTC."""
    return to_datetime(us).strftime("%H:%M:%S")


def day_clock(us: int) -> str:
    """`03-01 02:03:04` in UTC."""
    return to_datetime(us).strftime("%m-%d %H:%M:%S")


def octets(number: int) -> str:
    """`512B`, `1.5K`, `3.2G`: binary units, at most six columns."""
    value = float(number)
    for unit in "BKMGT":
        if value < 1000 or unit == "T":
            return f"{int(value)}{unit}" if unit == "B" else f"{value:.1f}{unit}"
        value /= 1024
    return str(number)


def sparkline(values: Sequence[int], columns: int) -> str:
    """The values as a row of bars; more than fit are summed up, none is as high as a blank."""
    if columns <= 0:
        return ""
    if len(values) > columns:
        values = [
            sum(values[i * len(values) // columns : (i + 1) * len(values) // columns]) for i in range(columns)
        ]
    top = max(values, default=0)
    if not top:
        return "▁" * len(values)
    return "".join(_BARS[max(2, -(-value * 8 // top))] if value else _BARS[1] for value in values)
