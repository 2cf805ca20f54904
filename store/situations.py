"""The history as few distinct situations: what policy can tell apart of the recorded flows, each once and counted.

Ten million flows are a few thousand pairs of label sets, places and services. DuckDB groups them where they lie; what
judges or learns then looks at each situation once. Sealed segments are opened by this process itself; what a running
store process still writes is asked of it, with the same statement.
"""

# ruff: noqa: S608 -- SQL is put together from this module's own parts and from numbers

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

import duckdb

from sectool.api.client import Client
from sectool.errors import NoDaemonError, SectoolError, StoreError
from sectool.events import FLAG_ADOPTED, FLAG_COALESCED, Phase
from sectool.labels import LabelError, LabelSet
from sectool.policy.places import FOUR_FIRST, FOUR_LAST, Places
from store.flowidsql import low_half
from store.query import MAX_ROWS, MAX_SQL, MAX_TIMEOUT_MS, small, time_limit
from store.reader import LiveReader, LocalReader
from store.schema import DICTIONARIES
from store.segment import one

ICMPS: Final = "(1, 58)"
_SLICE = 1_000_000  # records read between two reports of progress
_MOST_SLICES = 64

Progress = Callable[[float], None]


class Situation(NamedTuple):
    """What flows have in common. Ids of dictionaries are 0 for none; times are UTC microseconds of event_start."""

    source_labels: int
    destination_labels: int
    source_place: int
    destination_place: int
    source_workload: int
    destination_workload: int
    point: int
    transport: int
    port: int  # ICMP: the type
    code: int  # ICMP only
    action: int
    drop_reason: int
    encrypted: bool
    flags: int  # adopted and coalesced only
    rule: int
    pending_action: int
    span: int  # number of the span of time between the cuts
    records: int
    flows: int
    first: int
    last: int
    example: str  # event id of the first


class RuleEntry(NamedTuple):
    """A rule of the dictionary."""

    text: str
    policy: str
    kind: str
    owner: str


@dataclass(slots=True)
class Words:
    """Dictionary entries by id."""

    labels: dict[int, LabelSet] = field(default_factory=dict)
    rules: dict[int, RuleEntry] = field(default_factory=dict)
    workloads: dict[int, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Window:
    """[since, until) of event_start in UTC microseconds; None: open."""

    since: int | None = None
    until: int | None = None

    def sql(self) -> str:
        """As a condition that follows another."""
        out = ""
        if self.since is not None:
            out += f" AND event_start >= make_timestamp({self.since})"
        if self.until is not None:
            out += f" AND event_start < make_timestamp({self.until})"
        return out


def _tree(column: str, kind: str, starts: Sequence[int], numbers: Sequence[int]) -> str:
    """SQL that finds the number of the interval in which a `column` of type `kind` lies, in logarithmic time."""
    if len(starts) == 1:
        return str(numbers[0])
    middle = len(starts) // 2
    less = _tree(column, kind, starts[:middle], numbers[:middle])
    more = _tree(column, kind, starts[middle:], numbers[middle:])
    return f"CASE WHEN {column} < {starts[middle]}::{kind} THEN {less} ELSE {more} END"


def _tree6(high: str, low: str, starts: Sequence[int], numbers: Sequence[int]) -> str:
    if len(starts) == 1:
        return str(numbers[0])
    middle = len(starts) // 2
    top, bottom = starts[middle] >> 64, starts[middle] & (1 << 64) - 1
    before = f"{high} < {top}::UBIGINT"
    if bottom:
        before = f"({before} OR {high} = {top}::UBIGINT AND {low} < {bottom}::UBIGINT)"
    less = _tree6(high, low, starts[:middle], numbers[:middle])
    more = _tree6(high, low, starts[middle:], numbers[middle:])
    return f"CASE WHEN {before} THEN {less} ELSE {more} END"


def place_sql(places: Places, side: str) -> str:
    """SQL that gives the place of the `source` or `destination` address of a flow record."""
    if len(places) == 1:
        return "0"
    high, low = f"{side}_ip_hi", f"{side}_ip_lo"
    four = _tree(low, "UBIGINT", *places.intervals(FOUR_FIRST, FOUR_LAST))
    six = _tree6(high, low, places.starts, places.numbers)
    return (
        f"CASE WHEN {high} = 0 AND {low} BETWEEN {FOUR_FIRST}::UBIGINT AND {FOUR_LAST}::UBIGINT"
        f" THEN {four} ELSE {six} END"
    )


_COUNTED = ("records", "flows", "first", "last", "example")
_KEYS = tuple(name for name in Situation._fields if name not in _COUNTED)


def statement(places: Places, cuts: Sequence[int], *, by_workload: bool, where: str = "") -> str:
    """One SELECT over flow_records with the columns of Situation.

    `cuts` are the moments (UTC microseconds, in order) at which rules may change their mind.
    """
    icmp = f"transport IN {ICMPS}"
    span = _tree("epoch_us(event_start)", "BIGINT", [0, *cuts], range(len(cuts) + 1)) if cuts else "0"
    workload = ("source_workload", "destination_workload") if by_workload else ("0", "0")
    keys = (
        "source_labels",
        "destination_labels",
        place_sql(places, "source"),
        place_sql(places, "destination"),
        *workload,
        "point",
        "transport",
        f"CASE WHEN {icmp} THEN source_port ELSE destination_port END",
        f"CASE WHEN {icmp} THEN destination_port ELSE 0 END",
        "action",
        "drop_reason",
        "encryption = 2",
        f"flags & {FLAG_ADOPTED | FLAG_COALESCED}",
        "rule",
        "pending_action",
        span,
    )
    types = [*["BIGINT"] * 2, *["INTEGER"] * 2, *["BIGINT"] * 2, *["INTEGER"] * 6]
    types += ["BOOLEAN", "INTEGER", "BIGINT", "INTEGER", "INTEGER"]
    columns = ", ".join(
        f"({key})::{kind} AS {name}" for key, kind, name in zip(keys, types, _KEYS, strict=True)
    )
    return (
        f"SELECT {columns}, count(*)::BIGINT AS records, sum(flow_count)::BIGINT AS flows,"
        " epoch_us(min(event_start)) AS first, epoch_us(max(event_start)) AS last,"
        " event_uuid(min(event_start), arg_min(event_id, event_start))::VARCHAR AS example"
        f" FROM flow_records WHERE phase = {Phase.VERDICT:d}{where} GROUP BY ALL"
    )


_MERGE = (
    f"SELECT {', '.join(_KEYS)}, sum(records)::BIGINT, sum(flows)::BIGINT, min(first) AS first, max(last),"
    " arg_min(example, (first, example)) FROM parts GROUP BY ALL ORDER BY ALL"
)


class History:
    """The flow records of a folder of segments, and of the store process that writes into it if one runs.

    `warnings` tells what had to be left out. Raises StoreError or PrivilegeError when nothing can be read.
    """

    def __init__(self, events: Path, socket: Path | None = None) -> None:
        self._local = LocalReader(events)
        self._live: LiveReader | None = None
        self.warnings: list[str] = list(self._local.warnings)
        if socket is not None:
            self._ask(socket)

    def _ask(self, socket: Path) -> None:
        client = Client(socket, timeout=MAX_TIMEOUT_MS / 1000 + 10)
        try:
            client.call("ping")
        except NoDaemonError:
            client.close()
            return
        self._live = LiveReader(client)
        # What cannot be opened because the store process writes into it is asked of that process.
        self.warnings = [w for w in self.warnings if "lock" not in w.lower()]

    def stop(self) -> None:
        """End, from any thread, what is being asked of it; StoppedError or NoDaemonError there."""
        self._local.stop()
        if self._live is not None:
            self._live.stop()

    def close(self) -> None:
        """Let go of all files."""
        self._local.close()
        if self._live is not None:
            self._live.close()

    def words(self) -> Words:
        """All dictionary entries that speak of labels, rules and workloads."""
        out = Words()
        for number, text in self._both("SELECT id, text FROM labels"):
            try:
                out.labels[number] = LabelSet.parse(text or "")
            except LabelError:
                continue  # a record that names it is not judged, and counted as such
        for number, *entry in self._both("SELECT id, text, policy, kind, owner FROM rules"):
            out.rules[number] = RuleEntry(*(part or "" for part in entry))
        names = [name for name, _ in DICTIONARIES["workloads"]]
        quoted = ", ".join(f'"{name}"' for name in names)
        for row in self._both(f"SELECT {quoted} FROM workloads"):
            workload = dict(zip(names, row, strict=True))
            out.workloads[workload["id"]] = workload
        return out

    def new_and_old(self, sql: str, most: int) -> Iterable[tuple[Any, ...]]:
        """The rows of a statement over flow_records: those of the segments, and of the newest flows if a store runs.

        `sql` has one WHERE. At most `most` rows of the newest are taken, and a warning says so.
        """
        with self._local.catalog.reading() as cursor, time_limit(cursor, MAX_TIMEOUT_MS):
            rows = cursor.execute(sql).fetchall()
            last = one(cursor, "SELECT coalesce(max(seq), 0) FROM flow_records")[0]
        yield from rows
        if self._live is not None:
            newer = sql.replace(" WHERE ", f" WHERE seq > {last} AND ", 1)
            found = self._live.query(newer, limit=most, timeout_ms=MAX_TIMEOUT_MS)
            if found.truncated:
                self.warnings.append("part of the newest flows is left out: they differ in too many ways")
            yield from zip(*(column.to_pylist() for column in found.table.columns), strict=True)

    def _both(self, sql: str) -> Iterable[tuple[Any, ...]]:
        with self._local.catalog.reading() as cursor:
            yield from cursor.execute(sql).fetchall()
        if self._live is not None:
            table = self._live.query(sql, limit=MAX_ROWS, timeout_ms=MAX_TIMEOUT_MS).table
            yield from zip(*(column.to_pylist() for column in table.columns), strict=True)

    def lost(self, window: Window) -> int:
        """Events of the window that were lost before they reached the store."""
        sql = (
            "SELECT coalesce(sum(TRY_CAST(body->>'count' AS BIGINT)), 0)::BIGINT FROM events"
            f" WHERE type = 'events.lost'{window.sql().replace('event_start', 'ts')}"
        )
        if self._live is not None:
            return int(self._live.query(sql).table.column(0)[0].as_py())
        with self._local.catalog.reading() as cursor:
            return int(one(cursor, sql)[0])

    def situations(
        self,
        window: Window,
        places: Places,
        cuts: Sequence[int] = (),
        *,
        by_workload: bool = False,
        progress: Progress | None = None,
    ) -> list[Situation]:
        """All situations of the window, in a fixed order. `progress` hears of fractions done, 0 to 1."""
        build = _Builder(places, cuts, by_workload)
        with self._local.catalog.reading() as cursor, time_limit(cursor, MAX_TIMEOUT_MS):
            cursor.execute(f"CREATE TEMP TABLE parts AS {build('')} LIMIT 0")
            slices = _slices(cursor, window)
            for number, part in enumerate(slices):
                cursor.execute(f"INSERT INTO parts {build(part.sql())}")
                if progress is not None:
                    progress((number + 1) / (len(slices) + bool(self._live)))
            if self._live is not None:
                self._add_live(cursor, build, window)
                if progress is not None:
                    progress(1.0)
            return [Situation(*row) for row in cursor.execute(_MERGE).fetchall()]

    def _add_live(self, cursor: duckdb.DuckDBPyConnection, build: _Builder, window: Window) -> None:
        assert self._live is not None
        last = one(cursor, "SELECT coalesce(max(seq), 0) FROM flow_records")[0]
        sql = build(f" AND seq > {last}{window.sql()}")
        if len(sql) > MAX_SQL:
            self.warnings.append("the newest flows are left out: these policies name too many networks")
            return
        found = self._live.query(sql, limit=MAX_ROWS, timeout_ms=MAX_TIMEOUT_MS)
        if found.truncated:
            self.warnings.append("part of the newest flows is left out: they differ in too many ways")
        columns = [column.to_pylist() for column in found.table.columns]
        if columns and columns[0]:
            marks = ", ".join(f"unnest(${number})" for number in range(1, len(columns) + 1))
            cursor.execute(f"INSERT INTO parts SELECT {marks}", columns)

    def examples(self, wanted: Sequence[tuple[int, str]]) -> dict[str, tuple[str, str]]:
        """Source and destination address of flows, given as (event_start, event id), by event id."""
        out: dict[str, tuple[str, str]] = {}
        for at in range(0, len(wanted), 200):
            chunk = wanted[at : at + 200]
            ids = ", ".join(str(low_half(uuid.UUID(event))) for _, event in chunk)
            starts = ", ".join(f"make_timestamp({start})" for start, _ in chunk)
            sql = (
                "SELECT event_uuid(event_start, event_id)::VARCHAR, ip_text(source_ip_hi, source_ip_lo),"
                " ip_text(destination_ip_hi, destination_ip_lo) FROM flow_records"
                f" WHERE phase = {Phase.VERDICT:d} AND event_start IN ({starts}) AND event_id IN ({ids})"
            )
            out |= {event: (source, destination) for event, source, destination in self._both(sql)}
        return out

    def span(self, window: Window) -> tuple[int, int] | None:
        """First and last event_start of the window; None when nothing lies in it."""
        sql = (
            "SELECT epoch_us(min(event_start)), epoch_us(max(event_start)) FROM flow_records"
            f" WHERE phase = {Phase.VERDICT:d}{window.sql()}"
        )
        found = [(a, b) for a, b in self._both(sql) if a is not None]
        return (min(a for a, _ in found), max(b for _, b in found)) if found else None

    def table(self, sql: str) -> Any:
        """The answer of the opened segments to a statement of this package."""
        with self._local.catalog.reading() as cursor:
            return small(cursor, sql)


class _Builder(NamedTuple):
    places: Places
    cuts: Sequence[int]
    by_workload: bool

    def __call__(self, where: str) -> str:
        return statement(self.places, self.cuts, by_workload=self.by_workload, where=where)


def _slices(cursor: duckdb.DuckDBPyConnection, window: Window) -> list[Window]:
    count, first, last = one(
        cursor,
        "SELECT count(*), epoch_us(min(event_start)), epoch_us(max(event_start)) FROM flow_records"
        f" WHERE phase = {Phase.VERDICT:d}{window.sql()}",
    )
    if not count:
        return []
    number = min(max(1, count // _SLICE), _MOST_SLICES, max(1, last - first))
    edges = [first + (last + 1 - first) * n // number for n in range(number + 1)]
    return [Window(a, b) for a, b in pairwise(edges)]


def open_history(events: Path, socket: Path | None) -> History:
    """The history in a folder; raises StoreError when there is none."""
    if not events.is_dir() and (socket is None or not socket.exists()):
        raise StoreError(
            f"there is no history in {events}",
            "start the daemon with `sectool up`, or name a folder with --store",
        )
    try:
        return History(events, socket)
    except duckdb.Error as error:
        raise SectoolError(f"the history in {events} cannot be opened: {error}") from None
