"""What makes questions about millions of flows quick: an index over the segments, made beside ingest.

    events/index.duckdb      one file for all segments; derived: deleted at will, it is made again from them

Rows are indexed in stretches of `STRETCH` in order of arrival. A flow mostly begins and ends in one stretch. Those
that do not are few, and the index has them apart, so that a question reads the stretches of its time and nothing else:

    stretches   which rows, when the flows begin whose verdict is among them, and of when the later records tell
    crossing    first records of flows still open at the end of the stretch they began in, and when they ended
    late        how those went on: their ends, and of updates the last in each stretch
    talks       who talked to whom by what in a stretch: how often, how much, and which rows say so

Only the process that holds the folder's lock writes it. `store.narrowing` reads it.
"""

# ruff: noqa: S608 -- built from constants of store.schema, aliases of the catalog and numbers

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sectool.events import Action, Encryption, Phase
from store.schema import RECORD_COLUMNS
from store.segment import one

if TYPE_CHECKING:
    import duckdb

INDEX = "index.duckdb"
ALIAS = "idx"
VERSION = 2
STRETCH = 1 << 19  # sequence numbers: rows, and the few events between them
TALK_KEY = (
    "source_labels, destination_labels, source_ip_hi, source_ip_lo, destination_ip_hi, destination_ip_lo,"
    " transport, service"
)
SERVICE = (
    "(CASE WHEN transport IN (1, 58) THEN source_port * 256 + destination_port ELSE destination_port END)"
)
LET_THROUGH = f"action IN ({Action.ALLOW:d}, {Action.AUDIT:d})"
COLUMNS = ", ".join(f'"{name}"' for name, _ in RECORD_COLUMNS)

_RECORD_DDL = ", ".join(f'"{name}" {kind}' for name, kind in RECORD_COLUMNS)
_DDL = (
    "CREATE TABLE {a}.meta (version INTEGER)",
    f"INSERT INTO {{a}}.meta VALUES ({VERSION})",
    "CREATE TABLE {a}.stretches (n INTEGER, stem VARCHAR, first BIGINT, last BIGINT, rows BIGINT, whole BOOLEAN,"
    " first_begin TIMESTAMP, last_begin TIMESTAMP, first_later TIMESTAMP, last_later TIMESTAMP)",
    f"CREATE TABLE {{a}}.crossing (n INTEGER, gone INTEGER, closed TIMESTAMP, {_RECORD_DDL})",
    f"CREATE TABLE {{a}}.late (n INTEGER, {_RECORD_DDL})",
    "CREATE TABLE {a}.talks (n INTEGER, source_labels UINTEGER, destination_labels UINTEGER, source_ip_hi UBIGINT,"
    " source_ip_lo UBIGINT, destination_ip_hi UBIGINT, destination_ip_lo UBIGINT, transport UTINYINT,"
    " service UINTEGER, begun UINTEGER, ended UINTEGER, allowed UBIGINT, denied UBIGINT,"
    " encrypted UBIGINT, bytes HUGEINT, seqs UINTEGER[])",
)
TABLES = ("meta", "stretches", "crossing", "late", "talks")


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rows `first` to `last` (by seq) of a segment. Times are UTC microseconds; None: no such record among them.

    `whole`: the segment has no rows behind it.
    """

    number: int
    stem: str
    first: int
    last: int
    rows: int
    whole: bool
    begins: tuple[int, int] | None
    later: tuple[int, int] | None  # what updates and ends tell of: when written, when ended


def stem(name: str) -> str:
    """A segment's name without its form: native and compact have the same rows."""
    return name.partition(".")[0]


class Index:
    """The index attached to a catalog. `stretches` is replaced as a whole: a reader keeps the ones it took."""

    def __init__(self, cursor: duckdb.DuckDBPyConnection) -> None:
        self._cursor = cursor
        self.stretches: tuple[Stretch, ...] = ()
        self.reload()

    def reload(self) -> None:
        """Learn what the file holds. Raises duckdb.Error when it is none of ours."""
        version = one(self._cursor, f"SELECT max(version) FROM {ALIAS}.meta")[0]
        if version != VERSION:
            raise ValueError(f"index of version {version}")
        rows = self._cursor.execute(
            "SELECT n, stem, first, last, rows, whole, epoch_us(first_begin), epoch_us(last_begin),"
            f" epoch_us(first_later), epoch_us(last_later) FROM {ALIAS}.stretches ORDER BY n"
        ).fetchall()
        for table in TABLES[2:]:
            self._cursor.execute(f"SELECT * FROM {ALIAS}.{table} LIMIT 0").fetchall()
        self.stretches = tuple(
            Stretch(n, name, first, last, count, whole, _pair(b0, b1), _pair(e0, e1))
            for n, name, first, last, count, whole, b0, b1, e0, e1 in rows
        )

    def close(self) -> None:
        """Let go of the cursor."""
        self._cursor.close()

    # --- what is to be done ----------------------------------------------------------------------------------

    def settle(self, stems: Iterable[str], newest_seq: int) -> None:
        """Forget what does not fit the attached segments `stems` (in order) any more.

        A segment that turned up late, before others that are indexed, makes those be indexed again; so does one whose
        newest row (`newest_seq` of all) is older than what the index knows: a damaged log took its rows along.
        """
        attached = list(stems)
        place = {name: i for i, name in enumerate(attached)}
        indexed = [name for name, _ in itertools.groupby(s.stem for s in self.stretches)]
        known = [name for name in indexed if name in place]
        wrong = len(known)
        for i, name in enumerate(known):
            if place[name] != i:
                wrong = i
                break
        bad = next((s.number for s in self.stretches if wrong < len(known) and s.stem == known[wrong]), None)
        beyond = next((s.number for s in self.stretches if s.last > newest_seq), None)
        numbers = [number for number in (bad, beyond) if number is not None]
        if numbers:
            self._forget(min(numbers))

    def _forget(self, number: int) -> None:
        cursor = self._cursor
        cursor.execute("BEGIN")
        try:
            for table in ("stretches", "crossing", "late", "talks"):
                cursor.execute(f"DELETE FROM {ALIAS}.{table} WHERE n >= {number}")
            cursor.execute(f"UPDATE {ALIAS}.crossing SET gone = NULL, closed = NULL WHERE gone >= {number}")
            cursor.execute("COMMIT")
        except BaseException:
            self._rollback()
            raise
        self.reload()

    def retire(self, stems: Iterable[str]) -> None:
        """Forget segments that were deleted. Flows that go on from them into others stay known."""
        names = set(stems)
        numbers = [s.number for s in self.stretches if s.stem in names]
        if not numbers:
            return
        cursor, last = self._cursor, max(numbers)
        cursor.execute("BEGIN")
        try:
            for table in ("stretches", "late", "talks"):
                cursor.execute(f"DELETE FROM {ALIAS}.{table} WHERE n <= {last}")
            cursor.execute(f"DELETE FROM {ALIAS}.crossing WHERE gone <= {last}")
            cursor.execute("COMMIT")
        except BaseException:
            self._rollback()
            raise
        self.reload()

    def due(self, stems: Iterable[str], live: str | None, next_seq: int) -> tuple[str, int] | None:
        """The segment and first row of the next stretch to index; None: nothing to do.

        Of `live`, the one being written (rows below `next_seq` are there), only full stretches.
        """
        done = {s.stem: s for s in self.stretches}
        for name in stems:
            last = done.get(name)
            if last is not None and last.whole:
                continue
            first = last.last + 1 if last is not None else 0
            if name == live and next_seq - first < STRETCH:
                return None
            return name, first
        return None

    # --- making it -------------------------------------------------------------------------------------------

    def extend(self, alias: str, name: str, first: int, *, sealed: bool) -> bool:
        """Index the next stretch of the segment `name` (attached as `alias`), from row `first` on.

        False when there are too few rows yet. Raises duckdb.Error with nothing changed.
        """
        cursor = self._cursor
        low, newest = one(
            cursor,
            f"SELECT coalesce(min(seq), {first}), coalesce(max(seq), -1) FROM {alias}.flow_records"
            f" WHERE seq >= {first}",
        )
        high = low + STRETCH - 1
        whole = sealed and newest <= high
        if newest < high:
            if not sealed:
                return False
            high = max(newest, low - 1)
        number = self.stretches[-1].number + 1 if self.stretches else self._after_retired()
        chunk = f"(SELECT {COLUMNS} FROM {alias}.flow_records WHERE seq BETWEEN {low} AND {high})"
        try:
            self._sort_out(chunk)
            cursor.execute("BEGIN")
            self._write(number, name, low, high, whole=whole, chunk=chunk)
            cursor.execute("COMMIT")
            cursor.execute(f"CHECKPOINT {ALIAS}")
        except BaseException:
            self._rollback()
            raise
        finally:
            for table in ("ix_begun", "ix_later", "ix_foreign", "ix_known", "ix_staying"):
                cursor.execute(f"DROP TABLE IF EXISTS temp.{table}")
        self.reload()
        return True

    def _after_retired(self) -> int:
        return int(one(self._cursor, f"SELECT coalesce(max(n), 0) + 1 FROM {ALIAS}.crossing")[0])

    def _sort_out(self, chunk: str) -> None:
        """Temporary tables: verdicts, later records, those of flows begun before, which of these flows are known, and
        flows that stay open."""
        run = self._cursor.execute
        key = "event_start, event_id"
        run(
            f"CREATE OR REPLACE TEMP TABLE ix_begun AS SELECT {key}, seq, action FROM {chunk}"
            f" WHERE phase = {Phase.VERDICT:d}"
        )
        run(
            f"CREATE OR REPLACE TEMP TABLE ix_later AS SELECT {key}, seq, phase, event_end, action FROM {chunk}"
            f" WHERE phase > {Phase.VERDICT:d}"
        )
        run(
            "CREATE OR REPLACE TEMP TABLE ix_foreign AS SELECT l.* FROM ix_later l ANTI JOIN ix_begun b"
            " ON l.event_start = b.event_start AND l.event_id = b.event_id"
        )
        run(
            f"CREATE OR REPLACE TEMP TABLE ix_known AS SELECT DISTINCT {key} FROM {ALIAS}.crossing c"
            " SEMI JOIN ix_foreign f ON c.event_start = f.event_start AND c.event_id = f.event_id"
        )
        run(
            f"CREATE OR REPLACE TEMP TABLE ix_staying AS SELECT b.* FROM ix_begun b ANTI JOIN"
            f" (SELECT {key} FROM ix_later WHERE phase = {Phase.END:d}) l"
            f" ON l.event_start = b.event_start AND l.event_id = b.event_id WHERE {LET_THROUGH}"
        )

    def _write(self, number: int, name: str, low: int, high: int, *, whole: bool, chunk: str) -> None:
        run = self._cursor.execute
        same = "{0}.event_start = {1}.event_start AND {0}.event_id = {1}.event_id"
        verdict, end = f"phase = {Phase.VERDICT:d}", f"phase = {Phase.END:d}"
        run(
            f"INSERT INTO {ALIAS}.stretches SELECT {number}, ?, {low}, {high}, count(*), {whole},"
            f" min(event_start) FILTER ({verdict}), max(event_start) FILTER ({verdict}),"
            f" min(least(ts, event_end)) FILTER (NOT {verdict}), max(greatest(ts, event_end)) FILTER (NOT {verdict})"
            f" FROM {chunk}",
            [name],
        )
        # Ends of flows that were open, and those of which nothing else is on record: found by that record alone.
        run(
            f"UPDATE {ALIAS}.crossing AS c SET gone = {number}, closed = f.event_end FROM"
            f" (SELECT event_start, event_id, min(event_end) AS event_end FROM ix_foreign WHERE {end} GROUP BY ALL) f"
            f" WHERE c.gone IS NULL AND {same.format('c', 'f')}"
        )
        run(
            f"INSERT INTO {ALIAS}.crossing SELECT {number}, CASE WHEN e.event_id IS NOT NULL THEN {number} END,"
            f" e.event_end, {', '.join(f'r.{c}' for c in COLUMNS.split(', '))} FROM {chunk} r SEMI JOIN ("
            f"   SELECT min(seq) AS seq FROM ix_foreign f ANTI JOIN ix_known k ON {same.format('f', 'k')}"
            f"   WHERE {LET_THROUGH} GROUP BY f.event_start, f.event_id) o ON r.seq = o.seq"
            f" LEFT JOIN (SELECT event_start, event_id, min(event_end) AS event_end FROM ix_foreign WHERE {end}"
            f"   GROUP BY ALL) e ON {same.format('r', 'e')}"
        )
        run(
            f"INSERT INTO {ALIAS}.crossing SELECT {number}, NULL, NULL, {COLUMNS} FROM {chunk} r"
            " SEMI JOIN ix_staying o ON r.seq = o.seq"
        )
        # A verdict that came after its end, of which an earlier stretch had told.
        run(
            f"UPDATE {ALIAS}.crossing AS c SET gone = f.gone, closed = f.closed FROM"
            f" (SELECT event_start, event_id, gone, closed FROM {ALIAS}.crossing WHERE gone IS NOT NULL AND {end}) f"
            f" WHERE c.n = {number} AND c.gone IS NULL AND {same.format('c', 'f')}"
        )
        # Of updates the last tells what the others did.
        run(
            f"INSERT INTO {ALIAS}.late SELECT {number}, {COLUMNS} FROM {chunk} r SEMI JOIN ("
            f" SELECT seq FROM ix_foreign f WHERE {end}"
            f" UNION SELECT max(seq) FROM ix_foreign WHERE NOT {end} GROUP BY event_start, event_id"
            f" UNION SELECT max(l.seq) FROM ix_later l SEMI JOIN ix_staying s ON {same.format('l', 's')}"
            " GROUP BY l.event_start, l.event_id"
            f" UNION SELECT seq FROM ix_foreign f ANTI JOIN ix_known k ON {same.format('f', 'k')}"
            ") o ON r.seq = o.seq"
        )
        run(
            f"INSERT INTO {ALIAS}.talks SELECT {number}, {TALK_KEY}, count(*) FILTER ({verdict}),"
            f" count(*) FILTER ({end} AND f.seq IS NULL),"
            f" coalesce(sum(flow_count) FILTER ({verdict} AND {LET_THROUGH}), 0),"
            f" coalesce(sum(flow_count) FILTER ({verdict} AND NOT {LET_THROUGH}), 0),"
            f" count(*) FILTER ({verdict} AND encryption = {Encryption.ENCRYPTED:d}),"
            f" coalesce(sum(source_bytes + destination_bytes) FILTER ({end} AND f.seq IS NULL), 0),"
            f" list((r.seq - {low})::UINTEGER) FROM (SELECT *, {SERVICE} AS service FROM {chunk}) r"
            f" LEFT JOIN (SELECT DISTINCT seq FROM ix_foreign) f ON r.seq = f.seq GROUP BY {TALK_KEY}"
            f" ORDER BY {TALK_KEY}"
        )

    def _rollback(self) -> None:
        with contextlib.suppress(Exception):
            self._cursor.execute("ROLLBACK")


def make(cursor: duckdb.DuckDBPyConnection) -> None:
    """The tables of an empty index in the database attached as `ALIAS`."""
    for statement in _DDL:
        cursor.execute(statement.format(a=ALIAS))


def index_file(events: Path) -> Path:
    """Where the index of a folder lies."""
    return events / INDEX


def _pair(first: int | None, last: int | None) -> tuple[int, int] | None:
    return None if first is None or last is None else (first, last)
