"""The store process: drains every ring of the run folder into segments, and answers questions on events.sock.

    main thread          rings ─► Ingest (one transaction per batch), new segments
    maintenance thread   checkpoints beside the inserts, seals what was rolled
    one thread a client  queries on cursors of their own (store.serve)

Nothing here may end the process but a signal: a damaged file is set aside, a full disk leaves the events in the
rings (which count what no longer fits), and every such state is `degraded` with a reason until it is over.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from sectool.clock import HOUR, SECOND
from sectool.errors import StoreError
from sectool.events import Type, now_us
from sectool.ring import RingDamagedError
from store import segment
from store.catalog import Catalog
from store.ingest import Counters, Ingest, Live
from store.rings import Rings
from store.schema import ROW_GROUP
from store.segment import Damage
from store.shelf import Shelf
from store.upkeep import MARGIN, Upkeep

log = logging.getLogger("store")

CHECKPOINT_S = 60.0
CHECKPOINT_ROWS = ROW_GROUP
TIDY_S = 1.0
LOOK_S = 0.5  # how often new rings, the disk and the age of the segment are looked at
GATHER_S = 0.06
REST = 10  # a trickle of events is gathered this many times as long as the last transaction took: packets come first
GATHER_MOST_S = 0.65
DRAIN_S = 8.0
INDEX_REST = 4  # times as long as the last stretch took, before the next one is indexed
INDEX_RETRY_S = 60.0
SEGMENT_US = HOUR
SEGMENT_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class Limits:
    """When a new segment is begun, and how much room is left to others on the disk (bytes)."""

    segment_us: int = SEGMENT_US
    segment_bytes: int = SEGMENT_BYTES
    checkpoint_s: float = CHECKPOINT_S  # a log this old is written out, one of CHECKPOINT_ROWS at once
    keep_bytes: int | None = None  # of sealed segments; None: all
    keep_us: int | None = None  # how old the newest row of a segment may get; None: any age
    reserve: int | None = None  # None: 2 % of the file system, from 8 to 256 MiB


class Store:
    """One running store over a state and a run folder."""

    def __init__(self, state: Path, run: Path, limits: Limits | None = None) -> None:
        self.events = state / "events"
        self.run = run
        self.limits = limits or Limits()
        self.degraded: dict[str, str] = {}
        self.committed = threading.Condition()  # notified when rows were added
        self.counters = Counters()
        self.rings = Rings(run)
        self.shelf = Shelf(self.events, run)
        self._to_seal: list[Live] = []
        self._busy = threading.Lock()  # maintenance, and closing the catalog, exclude each other
        self._compacting = threading.Lock()
        self._began = (now_us(), time.monotonic())
        self._stop = threading.Event()
        self._looked = self._tidied = self._index_rests = 0.0
        self._notes: list[dict[str, Any]] = []  # to be told by an event, from whatever thread
        self.upkeep = Upkeep(self, state)
        self._locks: list[int] = []
        self.catalog: Catalog
        self._ingest: Ingest | None = None
        self._next_seq = 1
        self._missing = 0  # bytes that are missing on the disk to the reserve

    # --- opening ---------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Take the folders, mend what a crash left, open everything. Raises StoreError when another store runs."""
        try:
            self.events.mkdir(mode=0o750, parents=True, exist_ok=True)
            self.run.mkdir(mode=0o755, parents=True, exist_ok=True)
            self._locks = [_lock(self.events / ".lock"), _lock(self.run / ".store.lock")]
        except OSError as error:
            raise StoreError(
                f"cannot use {self.events}: {error.strerror or error}", "the store runs as root"
            ) from None
        self.upkeep.load()
        self._open_catalog()

    def _open_catalog(self) -> None:
        self.catalog = Catalog(self.events)
        self._ingest = None
        self._report(self.shelf.open_all(self.catalog))
        self.shelf.modernise(self.catalog)
        # Numbers that a segment not to be opened now has taken are below the clock's microseconds: none is used twice.
        unknown = now_us() if self.shelf.unopened else 0
        last = self._last_seq()
        self._next_seq = max(self._next_seq, last + 1, unknown)
        self.shelf.open_index(self.catalog, last)
        self._report(self.rings.look())
        self._ensure_live()

    def _last_seq(self) -> int:
        last = 0
        try:
            with contextlib.closing(self.catalog.cursor()) as cursor:
                for table in ("flow_records", "events"):
                    found = segment.one(cursor, f"SELECT coalesce(max(seq), 0) FROM {table}")  # noqa: S608
                    last = max(last, int(found[0]))
        except duckdb.Error as error:
            self._report([Damage("a segment", f"its rows cannot be read: {_line(error)}")])
            return now_us()  # above all numbers that were given out
        return last

    def _positions(self) -> dict[int, tuple[int, int]]:
        """How far each present ring was taken in, by what the newest segments noted."""
        present = self.rings.present
        out: dict[int, tuple[int, int]] = {}
        with contextlib.closing(self.catalog.cursor()) as cursor:
            for name in reversed(self.catalog.segments):
                if out.keys() >= present:
                    break
                alias = self.catalog.alias(name)
                try:
                    noted = cursor.execute(
                        f"SELECT ring, max(next), max(lost) FROM {alias}.positions GROUP BY ring"  # noqa: S608
                    ).fetchall()
                except duckdb.Error as error:  # the rest of it may be whole
                    self._report([Damage(name, f"its positions cannot be read: {_line(error)}")])
                    continue
                for ring, position, lost in noted:
                    if ring in present and ring not in out:
                        out[ring] = (position, lost)
        return out

    def _ensure_live(self) -> bool:
        """Have a segment to write to; False, and degraded, while none can be made."""
        if self._ingest is not None:
            return True
        if not self._room():
            return False
        ingest = Ingest(self.catalog, self._next_seq, self._positions(), self.counters)
        if self.shelf.incomplete:
            ingest.leave_room()
        try:
            ingest.begin_segment(now_us())
        except (duckdb.Error, OSError) as error:
            self.degrade("segment", f"no segment can be made: {_line(error)}")
            return False
        self.degraded.pop("segment", None)
        self._ingest = ingest
        return True

    # --- running ---------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask `serve` to end. Not for signal handlers: one that interrupts `serve` may wait for a lock it holds."""
        self._stop.set()

    def serve(self) -> None:
        """Take events in until `stop`, then drain and seal."""
        maintenance = threading.Thread(target=self._maintain, name="maintenance", daemon=True)
        maintenance.start()
        idle, since, gather = 0.001, 0.0, GATHER_S
        while not self._stop.is_set():
            now = time.monotonic()
            if now - self._looked > LOOK_S:
                self._attend(now)
            waiting, urgent = self._waiting()
            if not waiting:
                since, idle = 0.0, min(0.02, idle * 1.5)
                self._stop.wait(idle)
                continue
            since, idle = since or now, 0.001
            if urgent or now - since >= gather:
                self.step()
                since = 0.0
                gather = min(GATHER_MOST_S, max(GATHER_S, REST * (time.monotonic() - now)))
                if self.degraded:
                    self._stop.wait(0.1)
            else:
                self._stop.wait(0.02)
        maintenance.join()
        self.upkeep.stop()
        self._drain()

    def _attend(self, now: float) -> None:
        self._looked = now
        self._report(self.rings.look())
        self._room()
        self._roll_if_due()

    def _waiting(self) -> tuple[bool, bool]:
        """Whether there is something to do, and whether it should be now.

        A transaction costs some milliseconds however small it is: events are gathered for `GATHER_S` first.
        """
        if self._ingest is None:
            return True, False
        waiting, urgent = self.rings.waiting(self._ingest.positions)
        return waiting or bool(self._notes), urgent

    def step(self) -> int:
        """Take in what is in the rings now; slots taken."""
        if time.monotonic() - self._looked > LOOK_S:
            self._attend(time.monotonic())
        if not self._ensure_live() or "disk" in self.degraded:
            return 0
        ingest = self._ingest
        assert ingest is not None
        taken = 0
        try:
            self._tell(ingest)
        except (duckdb.Error, OSError, MemoryError) as error:
            self._failed(error)
            return 0
        for name, ring in list(self.rings.readers.items()):
            try:
                taken += ingest.take(ring, name)
            except RingDamagedError as error:
                self._report([self.rings.drop(name, error)])
            except (duckdb.Error, OSError, MemoryError) as error:
                self._failed(error)
                break
            else:
                self.degraded.pop("write", None)
        if self._next_seq != ingest.next_seq:
            self._next_seq = ingest.next_seq
            with self.committed:
                self.committed.notify_all()
        return taken

    def _failed(self, error: Exception) -> None:
        """A batch could not be written. It stays in the ring; make what room we can and try again."""
        self.degrade("write", f"events cannot be written: {_line(error)}")
        if isinstance(error, duckdb.OutOfMemoryException | MemoryError):
            self.catalog.interrupt_queries()
        if isinstance(error, duckdb.FatalException | duckdb.InternalException) or "invalidated" in str(error):
            self._reopen()
        self._stop.wait(0.2)

    def _reopen(self) -> None:
        """Begin anew with a fresh instance of the engine, after an error from which the old one does not recover."""
        log.error("the database engine is started anew")
        with self._busy:
            self._to_seal.clear()  # they are adopted and sealed when they are opened again
            self.catalog.interrupt_queries()
            self.catalog.close()
            self._open_catalog()

    def degrade(self, what: str, why: str) -> None:
        """Say that something is wrong, until `degraded` is rid of it."""
        if what not in self.degraded:
            log.error("%s", why)
        self.degraded[what] = why

    def _report(self, found: Iterable[Damage]) -> None:
        """Log damage now, and have an event made of it with the next batch."""
        for damage in found:
            kept = f" (kept as {damage.kept})" if damage.kept else ""
            log.error("%s: %s%s", damage.where, damage.what, kept)
            self.note(Type.STORE_DAMAGED, where=damage.where, what=damage.what, kept=damage.kept)

    def note(self, type_: Type, **fields: Any) -> None:
        """Have an event of the store itself written with the next batch."""
        self._notes.append({"type": str(type_), "ts": now_us(), **fields})

    def _tell(self, ingest: Ingest) -> None:
        """Make events of what was noted."""
        while self._notes:
            ingest.note(self._notes[0])
            self._notes.pop(0)

    def _room(self) -> bool:
        try:
            disk = os.statvfs(self.events)
        except OSError as error:
            self.degrade("disk", f"{self.events}: {error.strerror}")
            return False
        size, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
        reserve = self.limits.reserve
        if reserve is None:
            reserve = min(256 << 20, max(8 << 20, size // 50))
        self._missing = max(0, reserve - free)
        if free < reserve:
            self.degrade(
                "disk",
                f"the disk of {self.events} is full: {free >> 20} MiB left, {reserve >> 20} are kept free;"
                f" {self.upkeep.setting.for_room}",
            )
            return False
        if self.degraded.pop("disk", None):
            log.warning("the disk of %s has room again", self.events)
        return True

    def _roll_if_due(self) -> None:
        ingest = self._ingest
        if ingest is None or not ingest.live.rows:
            return
        live = ingest.live
        size = _size(live.path) + _size(segment.wal_of(live.path))
        if now_us() - live.started_us < self.limits.segment_us and size < self.limits.segment_bytes:
            return
        present = self.rings.present
        ingest.positions = {ring: value for ring, value in ingest.positions.items() if ring in present}
        try:
            ingest.begin_segment(now_us())
        except (duckdb.Error, OSError) as error:
            self.degrade("segment", f"no new segment can be made: {_line(error)}")
            return
        self.degraded.pop("segment", None)
        self._to_seal.append(live)

    # --- maintenance -----------------------------------------------------------------------------------------

    def _maintain(self) -> None:
        last = time.monotonic()
        while not self._stop.wait(0.1):
            self.upkeep.give_way()
            live = self._ingest.live if self._ingest is not None else None
            # Inserts wait while rows are written out: many small waits, which the rings bridge, not a long one.
            full = live is not None and live.unsaved >= CHECKPOINT_ROWS
            due = full or time.monotonic() - last >= self.limits.checkpoint_s
            if due:
                last = time.monotonic()
            elif not self._to_seal and time.monotonic() - self._tidied < TIDY_S:
                continue
            with self._busy:
                try:
                    if due:
                        self.checkpoint()
                    self.tidy()
                except (duckdb.Error, OSError) as error:
                    log.warning("maintenance: %s", _line(error))
                    self._stop.wait(1.0)

    def checkpoint(self) -> None:
        """Write the live segment's log into the segment proper."""
        ingest = self._ingest
        if ingest is None or not ingest.live.unsaved:
            return
        live, unsaved = ingest.live, ingest.live.unsaved
        with contextlib.closing(self.catalog.cursor()) as cursor:
            cursor.execute(f"CHECKPOINT {live.alias}")
        live.unsaved -= unsaved

    def tidy(self) -> None:
        """Take in segments that could not be opened before; seal those that are full; retire those that are old."""
        self._tidied = time.monotonic()
        self._report(self.shelf.retry(self.catalog))
        while self._to_seal:
            done = self._to_seal[0]
            with contextlib.closing(self.catalog.cursor()) as cursor:
                cursor.execute(f"CHECKPOINT {done.alias}")
                summary = segment.summarise(cursor, done.alias)
            # No longer written, so its bytes are final; detaching it changes none of them.
            self.shelf.seal(done.path, summary)
            if not self.catalog.reopen_read_only(done.path, 2.0):
                return
            self._to_seal.pop(0)
        self._index()
        self.upkeep.mind()

    def _index(self) -> None:
        """Index a stretch, now and then: it may take a fifth of one processor beside the packets."""
        began = time.monotonic()
        if began < self._index_rests or "disk" in self.degraded:
            return
        live = self._ingest.live.path.name if self._ingest is not None else None
        if self.catalog.index is None:  # a reader held it, perhaps
            self._index_rests = began + INDEX_RETRY_S
            self.shelf.open_index(self.catalog, self._next_seq)
            return
        try:
            self.shelf.extend_index(self.catalog, live, self._next_seq)
        except (duckdb.Error, OSError, ValueError) as error:
            log.warning("the index is not made: %s", _line(error))
            self._index_rests = began + INDEX_RETRY_S
        else:
            self._index_rests = time.monotonic() + INDEX_REST * (time.monotonic() - began)

    def missing_room(self) -> int:
        """Bytes to be made free; 0 while the disk is not full."""
        return 0 if self._room() else self._missing + MARGIN

    def sober(self) -> bool:
        """Whether the wall clock went as time did since the start: after a jump nothing is deleted for its age."""
        wall = now_us() - self._began[0]
        return abs(wall - round((time.monotonic() - self._began[1]) * SECOND)) < HOUR

    def prune(self, keep_bytes: int | None, keep_us: int | None, actor: str = "") -> list[str]:
        """Retire the oldest sealed segments beyond what is kept, now, as `actor` asked; their names."""
        with self._busy:
            return self.upkeep.prune(keep_bytes, keep_us, actor or "somebody")

    def due_for_compaction(self, older_us: int, without: Collection[str] = ()) -> list[Path]:
        """Native sealed segments that are `older_us` old, oldest first."""
        known = segment.sealed(self.events)
        return [
            path
            for path in segment.segment_files(self.events)
            if path.name in known
            and path.name in self.catalog.segments
            and path.name not in {live.path.name for live in self._to_seal}
            and path.name not in without
            and not segment.compact(path)
            and int(known[path.name]["last_us"]) <= now_us() - older_us
        ]

    def compact_next(
        self, older_us: int, without: Collection[str] = (), *, patient: bool = True
    ) -> tuple[str | None, int]:
        """Make the oldest native sealed segment compact that is `older_us` old; its name, and how many wait.

        Raises StoreError when its compact form cannot be made; it stays as it is then. One at a time: who is not
        `patient` does not wait for another, but does nothing.
        """
        with contextlib.ExitStack() as held:
            if not self._compacting.acquire(blocking=patient):
                return None, 0
            held.callback(self._compacting.release)
            due = self.due_for_compaction(older_us, without)
            if not due:
                return None, 0
            try:
                made = self.shelf.compact(self.catalog, due[0])
            except (duckdb.Error, OSError) as error:
                raise StoreError(
                    f"{due[0].name} cannot be made compact: {_line(error)}",
                    "it stays as it is; is there room on the disk?",
                ) from None
            if made is None:
                raise StoreError("the segment was queried or deleted meanwhile", "try again in a moment")
            return made.name, len(due) - 1

    # --- ending ----------------------------------------------------------------------------------------------

    def _drain(self) -> None:
        deadline = time.monotonic() + DRAIN_S
        self._report(self.rings.look())
        while (self._notes or not self.rings.drained) and time.monotonic() < deadline:
            if not self.step():
                break

    def close(self) -> None:
        """Seal the live segment and let go of everything."""
        with self._busy:
            live = self._ingest.live if self._ingest is not None else None
            self._ingest = None
            self.catalog.interrupt_queries()
            self.rings.close()
            try:
                if live is not None:
                    self._to_seal.append(live)
                for done in self._to_seal:
                    with contextlib.closing(self.catalog.cursor()) as cursor:
                        cursor.execute(f"CHECKPOINT {done.alias}")
                        summary = segment.summarise(cursor, done.alias)
                        self.catalog.detach(done.path)
                    self.shelf.seal(done.path, summary)
            except (duckdb.Error, OSError) as error:
                log.error("the last segment is sealed at the next start: %s", _line(error))
            self._to_seal.clear()
            self.catalog.close()
        for fd in self._locks:
            os.close(fd)
        self._locks = []

    # --- what others ask -------------------------------------------------------------------------------------

    @property
    def next_seq(self) -> int:
        """Sequence number the next row gets: all below are committed."""
        return self._next_seq

    def recent(self, seq: int) -> str:
        """The narrowest relation that holds all flow records from number `seq` on."""
        ingest = self._ingest
        if ingest is not None and seq >= ingest.live.first_seq:
            return f"{ingest.live.alias}.flow_records"
        return "flow_records"

    def stats(self) -> dict[str, Any]:
        """Counters since the start of the process, rings, segments, and what is wrong."""
        counters = self.counters
        files = segment.segment_files(self.events)
        return {
            "ingested": counters.records + counters.events,
            "flow_records": counters.records,
            "events": counters.events,
            "lost": counters.lost,
            "damaged_slots": counters.damaged_slots,
            "batches": counters.batches,
            "failed_batches": counters.failures,
            "insert_p50_ms": _quantile(counters.insert_ms, 0.5),
            "insert_p99_ms": _quantile(counters.insert_ms, 0.99),
            "next_seq": self._next_seq,
            "rings": {
                name: {"pending": ring.pending, "capacity": ring.capacity, "lost": ring.lost}
                for name, ring in list(self.rings.readers.items())
            },
            "segments": len(files),
            "unopened_segments": sorted(self.shelf.unopened),
            "bytes": sum(segment.size_of(path) + _size(segment.wal_of(path)) for path in files),
            "degraded": "; ".join(list(self.degraded.values())),
            "retention": self.upkeep.setting.document(),
        }


def _lock(path: Path) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise StoreError(
            f"another store runs on {path.parent}",
            "stop the other daemon, or give this one folders of its own",
        ) from None
    return fd


def _quantile(values: Iterable[float], q: float) -> float | None:
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(q * len(ordered)))], 3) if ordered else None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
