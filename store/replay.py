"""History played back: flows and events in their order, each when its time has come on a clock of the caller's.

    for step in replay(reader, filter, begin, end, speed=10, clock=wall()): show(step)

The clock is a parameter: a screen passes one that can pause and change its mind, a test one that never waits.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from sectool.clock import SECOND
from sectool.errors import UsageError
from sectool.filters import Filter
from store.reader import ALL, Reader

PAGE = 2000  # flows fetched at once
LONGEST_WAIT = 5.0  # seconds; what is quieter for longer is skipped over


class Clock(Protocol):
    """Seconds that only grow, and a way to wait."""

    def now(self) -> float:
        """Seconds since some moment."""

    def wait(self, seconds: float) -> None:
        """Come back after so long, or earlier."""


class WallClock:
    """The clock of this machine."""

    def now(self) -> float:
        """Monotonic seconds."""
        return time.monotonic()

    def wait(self, seconds: float) -> None:
        """Sleep."""
        threading.Event().wait(seconds)


@dataclass(frozen=True, slots=True)
class Step:
    """One thing that happened at `ts` (UTC microseconds): a row of `flows`, or of `events`. `skipped` microseconds
    of quiet before it were not waited for."""

    ts: int
    flow: dict[str, Any] | None = None
    event: dict[str, Any] | None = None
    skipped: int = 0


def replay(
    reader: Reader,
    chosen: Filter = ALL,
    *,
    since: int,
    until: int,
    speed: float = 1.0,
    clock: Clock | None = None,
    events: bool = True,
) -> Iterator[Step]:
    """What began in [since, until), `speed` times as fast as it was. A speed of 0 waits for nothing."""
    if since >= until:
        raise UsageError("the window is empty: it ends before it begins", "give --from an earlier time")
    if not 0 <= speed <= 1_000_000:
        raise UsageError("the speed is a factor from 0 (no waiting) to 1000000")
    clock = clock or WallClock()
    told, begun = since, clock.now()  # what was at `told` is shown at `begun`
    for step in _merged(reader, chosen, since, until, events):
        skipped = 0
        if speed:
            due = begun + (step.ts - told) / SECOND / speed
            quiet = due - clock.now()
            if quiet > LONGEST_WAIT:
                skipped = round((quiet - LONGEST_WAIT) * speed * SECOND)
                begun -= quiet - LONGEST_WAIT
                due = begun + (step.ts - told) / SECOND / speed
            while (left := due - clock.now()) > 0:
                clock.wait(left)
        yield Step(step.ts, step.flow, step.event, skipped)


def _merged(reader: Reader, chosen: Filter, since: int, until: int, events: bool) -> Iterator[Step]:
    flows = _flows(reader, chosen, since, until)
    others = _events(reader, since, until) if events else iter(())
    flow, other = next(flows, None), next(others, None)
    while flow is not None or other is not None:
        if other is None or (flow is not None and flow.ts < other.ts):
            assert flow is not None
            yield flow
            flow = next(flows, None)
        else:
            yield other
            other = next(others, None)


def _flows(reader: Reader, chosen: Filter, since: int, until: int) -> Iterator[Step]:
    """Page by page. Flows that began in the very microsecond a page ends with are in the next one, too."""
    count, seen = PAGE, set[str]()
    while True:
        result = reader.flows(chosen, since=since, until=until, first=count)
        rows = result.table.to_pylist()
        fresh = [row for row in rows if row["event_id"] not in seen]
        for row in fresh:
            yield Step(_us(row["event_start"]), flow=row)
        if not result.truncated:
            return
        last = _us(rows[-1]["event_start"])
        if last == since:
            count *= 2  # more in one microsecond than a page holds
        seen = {row["event_id"] for row in rows if _us(row["event_start"]) == last} | (
            seen if last == since else set()
        )
        since = last


def _events(reader: Reader, since: int, until: int) -> Iterator[Step]:
    count, seen = PAGE, set[int]()
    while True:
        result = reader.events(since=since, until=until, first=count)
        rows = result.table.to_pylist()
        for row in rows:
            if row["seq"] not in seen:
                yield Step(_us(row["ts"]), event=row)
        if not result.truncated:
            return
        last = _us(rows[-1]["ts"])
        if last == since:
            count *= 2
        seen = {row["seq"] for row in rows if _us(row["ts"]) == last} | (seen if last == since else set())
        since = last


def _us(moment: Any) -> int:
    from sectool.clock import from_datetime, to_datetime

    return from_datetime(moment.replace(tzinfo=to_datetime(0).tzinfo))
