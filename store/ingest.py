"""Ring batches into the live segment: one transaction per batch, exactly once.

    read ring ─► Arrow ─► BEGIN; INSERT … SELECT; note ring position; COMMIT ─► confirm to the ring

A store killed before COMMIT reads the same slots again; killed after it, it finds the position it had noted in the
segment, in the same transaction as the rows, and skips them. A failed insert changes nothing and is tried again.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from sectool.events import Type, now_us
from sectool.ring import RingReader
from store.catalog import Catalog
from store.columns import dictionary_row, dictionary_table, events_table, records_table
from store.numbers import Given, Numbers
from store.schema import DICTIONARIES, RECORD_COLUMNS, SEGMENT_VERSION, segment_ddl
from store.segment import next_name

# A little more than a row group: a transaction that fills one is written compressed at once, not by way of the log.
MAX_SLOTS = 65_536
_RECORD_NAMES = ", ".join(name for name, _ in RECORD_COLUMNS)


@dataclass(slots=True)
class Counters:
    """What was taken in since this process started."""

    records: int = 0
    events: int = 0
    lost: int = 0
    damaged_slots: int = 0
    batches: int = 0
    failures: int = 0
    insert_ms: deque[float] = field(default_factory=lambda: deque(maxlen=4096))  # of the latest batches


@dataclass(slots=True)
class Live:
    """The segment being written."""

    path: Path
    alias: str
    started_us: int
    first_seq: int
    rows: int = 0
    unsaved: int = 0  # rows since the last checkpoint


@dataclass(slots=True)
class Ingest:
    """Writes batches into the live segment of `catalog`. Used by one thread."""

    catalog: Catalog
    next_seq: int
    positions: dict[int, tuple[int, int]]  # ring id to (position behind the last durable slot, losses noted)
    counters: Counters = field(default_factory=Counters)
    live: Live = field(init=False)
    _cursor: duckdb.DuckDBPyConnection = field(init=False)
    _ids: Numbers = field(init=False)
    _number: int = 0

    def __post_init__(self) -> None:
        self._cursor = self.catalog.cursor()
        self._ids = Numbers(self._cursor, self.catalog)

    def leave_room(self) -> None:
        """Give out no id that a segment which cannot be seen may have given out."""
        self._ids.skip()

    def begin_segment(self, now: int) -> Live:
        """Make a segment and write to it from now on. Dictionary entries still in use go along."""
        events = self.catalog.events
        self._number += 1
        path = events / next_name(events, now, self._number)
        try:
            alias = self.catalog.attach(path, make=lambda alias: self._make(path, alias, now))
        except duckdb.Error:
            path.unlink(missing_ok=True)
            raise
        self.catalog.remake_views()
        self.live = Live(path, alias, now, self.next_seq)
        return self.live

    def _make(self, path: Path, alias: str, now: int) -> None:
        """The tables of a new segment, and what it begins with. Raises duckdb.Error."""
        path.chmod(0o640)
        self._cursor.execute("BEGIN")
        try:
            for statement in segment_ddl(alias):
                self._cursor.execute(statement)
            self._cursor.execute(
                f"INSERT INTO {alias}.meta VALUES (?, make_timestamp(?), ?, ?)",  # noqa: S608
                [SEGMENT_VERSION, now, self.next_seq, self._ids.next],
            )
            for table in DICTIONARIES:
                # An identity that has expired can be on no new flow; the segment it came in still has it.
                only = " WHERE not_after > make_timestamp(?)" if table == "identities" else ""
                self._cursor.execute(
                    f"INSERT INTO {alias}.{table} SELECT * FROM {table}{only}",  # noqa: S608
                    [now - 86_400_000_000] if only else [],
                )
            for ring, (position, lost) in self.positions.items():
                self._note_position(alias, ring, position, lost)
            self._cursor.execute("COMMIT")
        except duckdb.Error:
            self._rollback()
            raise

    def take(self, ring: RingReader, name: str) -> int:
        """Move one batch from `ring` into the segment; how many slots it had.

        Raises duckdb.Error when it could not be written (nothing is lost: it comes again), RingDamagedError.
        """
        if ring.ring_id in self.positions:
            ring.skip_to(self.positions[ring.ring_id][0])
        noted = self.positions.get(ring.ring_id, (0, 0))[1]
        batch = ring.read(MAX_SLOTS)
        lost = ring.lost
        slots = batch.end - batch.first
        if not slots and lost <= noted:
            return 0
        extra: list[dict[str, Any]] = []
        if lost > noted:
            extra.append(
                _lost(f"ring {name}", lost - noted, "the ring was full: the store was away or too slow")
            )
        if batch.damaged:
            extra.append(_lost(f"ring {name}", batch.damaged, "slots of the ring that hold no event"))
        began = time.perf_counter()
        try:
            rows, events = self.write(batch.blobs + extra, batch.records, (ring.ring_id, batch.end, lost))
        except BaseException:
            ring.rewind()
            raise
        ring.commit()
        self.counters.insert_ms.append((time.perf_counter() - began) * 1000)
        self.positions[ring.ring_id] = (batch.end, lost)
        self.counters.records += rows
        self.counters.events += events
        self.counters.lost += max(0, lost - noted) + batch.damaged
        self.counters.damaged_slots += batch.damaged
        self.counters.batches += 1
        return slots

    def note(self, blob: dict[str, Any]) -> None:
        """Write one event of the store itself. Raises duckdb.Error."""
        self.counters.events += self.write([blob], None, None)[1]

    def write(
        self, blobs: list[dict[str, Any]], records: Any, position: tuple[int, int, int] | None
    ) -> tuple[int, int]:
        """One transaction: dictionary entries, events, records, ring position. Counts of records and events."""
        with self._ids.giving() as given:
            return self._write(given, blobs, records, position)

    def _write(
        self, given: Given, blobs: list[dict[str, Any]], records: Any, position: tuple[int, int, int] | None
    ) -> tuple[int, int]:
        events = self._sort(given, blobs)
        tables: list[tuple[str, str, pa.Table]] = []
        seq = self.next_seq
        if events:
            tables.append(("events", "*", events_table(events, seq)))
            seq += len(events)
        count = 0 if records is None else len(records)
        if count:
            tables.append(("flow_records", _RECORD_NAMES, records_table(records, seq, given.number)))
            seq += count
        additions = [(name, dictionary_table(name, list(rows.values()))) for name, rows in given.rows.items()]
        for name, table in additions:  # names are known before the first row that needs them can be seen
            self._insert(name, "*", table, " OR REPLACE")
        cursor = self._cursor
        cursor.execute("BEGIN")
        try:
            for name, table in additions:
                self._insert(f"{self.live.alias}.{name}", "*", table)
            for name, columns, table in tables:
                self._insert(f"{self.live.alias}.{name}", columns, table)
            if position is not None:
                self._note_position(self.live.alias, *position)
            cursor.execute("COMMIT")
        except BaseException:
            self.counters.failures += 1
            self._rollback()
            raise
        self.live.rows += seq - self.next_seq
        self.live.unsaved += seq - self.next_seq
        self.next_seq = seq
        return count, len(events)

    def _sort(self, given: Given, blobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Enter dictionary entries not known yet; the events among `blobs`."""
        events = []
        for blob in blobs:
            entry = dictionary_row(blob)
            if entry is None:
                events.append(blob)
            else:
                given.enter(*entry)
        return events

    def _insert(self, target: str, columns: str, table: pa.Table, how: str = "") -> None:
        self._cursor.register("batch", table)
        try:
            self._cursor.execute(f"INSERT{how} INTO {target} SELECT {columns} FROM batch")  # noqa: S608
        finally:
            with contextlib.suppress(duckdb.Error):
                self._cursor.unregister("batch")

    def _note_position(self, alias: str, ring: int, position: int, lost: int) -> None:
        self._cursor.execute(f"INSERT INTO {alias}.positions VALUES (?, ?, ?)", [ring, position, lost])  # noqa: S608

    def _rollback(self) -> None:
        with contextlib.suppress(duckdb.Error):
            self._cursor.execute("ROLLBACK")


def _lost(where: str, count: int, why: str) -> dict[str, Any]:
    return {"type": str(Type.EVENTS_LOST), "ts": now_us(), "where": where, "count": count, "why": why}
