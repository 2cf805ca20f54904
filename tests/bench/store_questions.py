"""What questions about a long past cost: the store's own way, plain SQL on one DuckDB table, and SQLite.

The past is made by `tests.bench.store_history`: SECTOOL_BENCH_EVENTS of them (default 2,000,000) over
SECTOOL_BENCH_DAYS (default 4), in SECTOOL_BENCH_HISTORY if that is given (made there when it is not, and kept), else in
a temporary folder. Each question is asked once unmeasured, then once a round. SQLite is left out beyond
SECTOOL_BENCH_SQLITE events (default 2,000,000): loading it takes longer than all the rest.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import duckdb

from sectool.clock import DAY, HOUR
from sectool.events import Action, Phase
from sectool.filters import parse_text
from store.flowidsql import low_half
from store.query import run
from store.reader import LocalReader
from store.recorded import find_flow
from store.segment import segment_files
from tests.bench.rows import Row, compare, row
from tests.bench.store_history import T0, write

EVENTS, DAYS, SQLITE = 2_000_000, 4.0, 2_000_000
NOTE = (
    "store: questions are asked of the segments' files, warm; their ratios are to plain SQL on one DuckDB table and"
    " to SQLite"
)
_SIGNED = (
    1 << 63
) - 1  # the last half of an event id without its highest bit: what SQLite, too, takes for a number
_LET_THROUGH = f"action IN ({Action.ALLOW:d}, {Action.AUDIT:d})"


@dataclass(frozen=True, slots=True)
class Question:
    """One question, asked of the store, and as SQL over one table of the same records."""

    name: str
    ask: Callable[[LocalReader], int]
    sql: str
    values: tuple[Any, ...]


def questions(reader: LocalReader, days: float) -> list[Question]:
    """The questions, about flows and pairs that are really there."""
    moment = T0 + int(days * DAY * 0.6)
    hour = (moment - HOUR, moment)
    half = int(days * DAY / 2)
    days_two = (T0 + half, T0 + 2 * half)
    some = run(
        reader.catalog,
        f"SELECT event_id, source_ip, destination_ip FROM flows_between(make_timestamp({moment}),"
        f" make_timestamp({moment + HOUR})) LIMIT 1",
    ).table.to_pylist()[0]
    pairs = _pairs(reader)
    out = [
        Question(
            "flows open at T",
            lambda r: r.flows(at=moment).table.num_rows,
            f"SELECT v.* FROM records v WHERE phase = {Phase.VERDICT:d} AND {_LET_THROUGH} AND start <= ?"
            f" AND NOT EXISTS (SELECT 1 FROM records e WHERE e.phase = {Phase.END:d} AND e.event_id = v.event_id"
            " AND e.end_us <= ?)"
            " ORDER BY start DESC LIMIT 1000",
            (moment, moment),
        ),
        Question(
            "policy that decided flow X",
            lambda r: int(find_flow(r, some["event_id"])["policy_revision"]),
            "SELECT policy_revision, rule FROM records WHERE event_id = ? ORDER BY seq LIMIT 1",
            (low_half(UUID(some["event_id"])) & _SIGNED,),
        ),
        Question(
            "one hour grouped by pair",
            lambda r: len(r.ask("connectivity", since=hour[0], until=hour[1])["edges"]),
            "SELECT source_labels, destination_labels, destination_port, count(*), sum(bytes) FROM records"
            " WHERE start >= ? AND start < ? GROUP BY 1, 2, 3",
            hour,
        ),
        Question(
            "diff of two days",
            lambda r: int(
                r.ask("changes", before=days_two[0], after=days_two[1], window=half)["traffic"]["new"][
                    "count"
                ]
            ),
            "SELECT source_labels, destination_labels, transport, destination_port, count(*) FILTER"
            f" (WHERE start < {days_two[0]}), count(*) FROM records WHERE phase = {Phase.VERDICT:d} AND start >= ?"
            " AND start < ? GROUP BY 1, 2, 3, 4",
            (T0, days_two[1]),
        ),
    ]
    for which, (source, destination, *numbers) in pairs.items():
        filter_ = parse_text(f"from-ip={source} to-ip={destination}")
        out.insert(
            2,
            Question(
                f"last 200 for a pair ({which})",
                lambda r, f=filter_: r.flows(f, last=200).table.num_rows,  # type: ignore[misc]
                f"SELECT * FROM records WHERE phase = {Phase.VERDICT:d} AND source_ip_lo = ? AND destination_ip_lo = ?"
                " ORDER BY start DESC LIMIT 200",
                tuple(numbers),
            ),
        )
    return out


def _pairs(reader: LocalReader) -> dict[str, tuple[Any, ...]]:
    """A pair that talks all the time, one now and then, and one that hardly ever does."""
    with reader.catalog.reading() as cursor:
        rows = cursor.execute(
            "SELECT ip_text(source_ip_hi, source_ip_lo), ip_text(destination_ip_hi, destination_ip_lo),"
            " source_ip_lo, destination_ip_lo FROM"
            " (SELECT source_ip_hi, source_ip_lo, destination_ip_hi, destination_ip_lo, sum(allowed + denied) AS n"
            " FROM idx.talks GROUP BY ALL ORDER BY n DESC)"
        ).fetchall()
    return {"busy": rows[0], "middling": rows[len(rows) // 20], "rare": rows[-1]}


def rows(rounds: int) -> list[Row]:
    """Each question of the store, of DuckDB and of SQLite, in milliseconds."""
    events = int(os.environ.get("SECTOOL_BENCH_EVENTS", EVENTS))
    days = float(os.environ.get("SECTOOL_BENCH_DAYS", DAYS))
    with _history(events, days) as (state, made):
        with contextlib.closing(LocalReader(state / "events")) as reader:
            asked = questions(reader, days)
            case = f"{events:,} events"
            ours = {q.name: _timed(lambda q=q: q.ask(reader), rounds) for q in asked}  # type: ignore[misc]
            records = int(reader.stats()["flow_records"])
        out = [row("store", case, name, unit, [value]) for name, unit, value in made]
        segments = [path for path in (state / "events").iterdir() if path.name.startswith("flows-")]
        index = state / "events" / "index.duckdb"
        size = sum(path.stat().st_size for path in segments)
        out.append(row("store", case, "segments", "bytes/event", [size / records]))
        out.append(row("store", case, "index", "bytes/event", [index.stat().st_size / records]))
        with tempfile.TemporaryDirectory(prefix="sectool-bench-", dir=state) as folder:
            others = [_duckdb(state, Path(folder), asked, rounds)]
            if records <= int(os.environ.get("SECTOOL_BENCH_SQLITE", SQLITE)) * 1.1:
                others.append(_sqlite(Path(folder), asked, rounds))
        for question in asked:
            mine = row("store", case, question.name, "ms", ours[question.name])
            bases = [row("store", name, question.name, "ms", times[question.name]) for name, times in others]
            out += [compare(mine, base) for base in bases] + bases
    return out


@contextlib.contextmanager
def _history(events: int, days: float) -> Iterator[tuple[Path, list[tuple[str, str, float]]]]:
    given = os.environ.get("SECTOOL_BENCH_HISTORY")
    with contextlib.ExitStack() as stack:
        folder = Path(given or stack.enter_context(tempfile.TemporaryDirectory(prefix="sectool-bench-")))
        state = folder / "state"
        made: list[tuple[str, str, float]] = []
        if not (state / "events").is_dir():
            written = write(state, events, days=days)
            made = [
                ("written", "events/s", written.events / (written.seconds - written.index_seconds)),
                ("indexed", "events/s", written.events / written.index_seconds),
            ]
        yield state, made


def _timed(ask: Callable[[], Any], rounds: int) -> list[float]:
    ask()
    out = []
    for _ in range(rounds):
        start = time.perf_counter()
        ask()
        out.append((time.perf_counter() - start) * 1000)
    return out


_SELECT = (
    "SELECT seq, phase, action, transport, source_ip_lo, destination_ip_lo, source_port, destination_port,"
    f" (event_id & {_SIGNED})::BIGINT AS event_id, epoch_us(event_start) AS start, epoch_us(event_end) AS end_us,"
    " source_labels, destination_labels, rule, policy_revision, source_bytes + destination_bytes AS bytes"
)


def _duckdb(
    state: Path, folder: Path, asked: list[Question], rounds: int
) -> tuple[str, dict[str, list[float]]]:
    """One table of all records, in order of arrival, with the columns that the questions need."""
    with duckdb.connect(str(folder / "plain.duckdb"), config={"memory_limit": "4GB"}) as plain:
        parts = []
        for n, path in enumerate(segment_files(state / "events")):
            plain.execute(f"ATTACH '{path}' AS s{n} (READ_ONLY)")
            parts.append(f"{_SELECT} FROM s{n}.flow_records")
        plain.execute(f"CREATE TABLE records AS {' UNION ALL '.join(parts)}")
        plain.execute("CHECKPOINT")
        times = {
            q.name: _timed(lambda q=q: plain.execute(q.sql, list(q.values)).fetchall(), rounds)  # type: ignore[misc]
            for q in asked
        }
    return "one DuckDB table", times


def _sqlite(folder: Path, asked: list[Question], rounds: int) -> tuple[str, dict[str, list[float]]]:
    """The same table with the indexes that anybody would give it."""
    database = sqlite3.connect(folder / "plain.sqlite")
    with (
        contextlib.closing(database),
        duckdb.connect(str(folder / "plain.duckdb"), read_only=True) as plain,
    ):
        names = [column[0] for column in plain.execute("DESCRIBE records").fetchall()]
        database.execute("PRAGMA journal_mode = OFF")
        database.execute(f"CREATE TABLE records ({', '.join(names)})")
        source = plain.execute("SELECT * FROM records")
        while batch := source.fetchmany(50_000):
            database.executemany(
                f"INSERT INTO records VALUES ({', '.join('?' * len(names))})",
                batch,
            )
        for columns in ("event_id", "start", "source_ip_lo, destination_ip_lo, start"):
            database.execute(f"CREATE INDEX by_{columns.partition(',')[0]} ON records ({columns})")
        database.execute("ANALYZE")
        times = {
            q.name: _timed(lambda q=q: database.execute(q.sql, q.values).fetchall(), rounds)  # type: ignore[misc]
            for q in asked
        }
    return "SQLite", times
