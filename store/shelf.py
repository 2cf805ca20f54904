"""Sealed segments and what a dead store left: opened, sealed, set aside when damaged, retired when old."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import duckdb

from sectool.errors import StoreError
from store import compaction, index, migration, segment
from store.catalog import Catalog
from store.numbers import Numbers
from store.segment import NOT_NOW, Damage, Summary

log = logging.getLogger("store")

RETRY_S = 5.0


class Shelf:
    """The segments of `events` beside the live one. Marks in `run` which one it is opening."""

    def __init__(self, events: Path, run: Path) -> None:
        self._events = events
        self._marker = run / ".store.opening"
        self._suspicion = run / ".store.suspect"
        self.unopened: set[str] = set()  # sound, perhaps, but not to be opened when it was tried
        self._tried = 0.0
        self._damaged = False
        self._compacting: duckdb.DuckDBPyConnection | None = None

    @property
    def incomplete(self) -> bool:
        """Whether rows that were here cannot be seen: what they have given out (numbers, ids) is not known."""
        return bool(self.unopened) or self._damaged

    def open_all(self, catalog: Catalog) -> list[Damage]:
        """Mend the chain, seal what a dead store left, attach everything; what was damaged."""
        found: list[Damage] = []
        with contextlib.suppress(OSError):
            found += segment.mend_chain(self._events)
            compaction.settle(self._events)
        found += self._suspect()
        known = segment.sealed(self._events)
        for path in segment.segment_files(self._events):
            with contextlib.suppress(OSError):
                self._marker.write_text(path.name)
            found += self._open(catalog, path, sealed=path.name in known)
        for marker in (self._marker, self._suspicion):
            with contextlib.suppress(OSError):
                marker.unlink(missing_ok=True)
        catalog.remake_views()
        self._tried = time.monotonic()
        self._damaged = self._damaged or bool(found)
        return found

    def open_index(self, catalog: Catalog, newest_seq: int) -> None:
        """Attach the index and have it fit the segments; one that cannot be read is made anew. Never raises for it."""
        path = index.index_file(self._events)
        for again in (True, False):
            try:
                catalog.attach_index(read_only=False)
                if catalog.index is not None:
                    catalog.index.settle(map(index.stem, catalog.segments), newest_seq)
            except (duckdb.Error, OSError, ValueError) as error:
                log.warning("%s cannot be used: %s", path.name, str(error).strip().partition("\n")[0])
                catalog.drop_index()
                if not again or (isinstance(error, duckdb.Error) and not segment.damaged_by(error)):
                    return
                for file in (path, segment.wal_of(path)):
                    with contextlib.suppress(OSError):
                        file.unlink(missing_ok=True)
            else:
                return

    def modernise(self, catalog: Catalog) -> None:
        """Convert segments of older versions, which could not be opened, and open them in their place."""
        old = [self._events / name for name in sorted(self.unopened)]
        old = [path for path in old if path.exists() and migration.version_of(path) == migration.OLDEST]
        if not old:
            return
        with contextlib.closing(catalog.cursor()) as cursor:
            numbers = Numbers(cursor, catalog)
        for path in old:
            self.unopened.discard(path.name)
            try:
                made = migration.migrate(self._events, path, numbers)
            except (duckdb.Error, OSError, StoreError) as error:
                log.error("%s cannot be converted: %s", path.name, error)
                self.unopened.add(path.name)
                continue
            self._open(catalog, made, sealed=True)
        catalog.in_order()

    def extend_index(self, catalog: Catalog, live: str | None, next_seq: int) -> bool:
        """Index one more stretch; whether there was one to index. Raises duckdb.Error."""
        if catalog.index is None:
            return False
        names = {index.stem(name): name for name in catalog.segments}
        live = None if live is None else index.stem(live)
        due = catalog.index.due(names, live, next_seq)
        if due is None:
            return False
        name, first = due
        return catalog.index.extend(catalog.alias(names[name]), name, first, sealed=name != live)

    def retry(self, catalog: Catalog) -> list[Damage]:
        """Every few seconds, try again what could not be opened: a reader held it, or the disk was full."""
        if not self.unopened or time.monotonic() - self._tried < RETRY_S:
            return []
        found: list[Damage] = []
        known = segment.sealed(self._events)
        for name in sorted(self.unopened):
            path = self._events / name
            if path.exists():
                found += self._open(catalog, path, sealed=name in known)
            else:
                self.unopened.discard(name)
        catalog.remake_views()
        self._tried = time.monotonic()
        self._damaged = self._damaged or bool(found)
        return found

    def _open(self, catalog: Catalog, path: Path, *, sealed: bool) -> list[Damage]:
        """Attach one segment; real damage only. One that cannot be opened now is noted as `unopened`."""
        found = [] if sealed else self._adopt(path)
        if path.exists() and not (found and found[-1].what.startswith(NOT_NOW)):
            damage = catalog.attach_sealed(path)
            if damage is not None:
                found.append(damage)
        late = [damage for damage in found if damage.what.startswith(NOT_NOW)]
        for damage in late:
            if damage.where not in self.unopened:
                log.warning("%s %s", damage.where, damage.what)
        if late:
            self.unopened.add(path.name)
        else:
            self.unopened.discard(path.name)
        real = [damage for damage in found if damage not in late]
        if real and path.exists() and real[-1].where == path.name and not real[-1].kept:
            real[-1] = Damage(path.name, real[-1].what, segment.set_aside(path).name)
        return real

    def _adopt(self, path: Path) -> list[Damage]:
        """Make whole and seal a segment that a dead store left."""
        summary, found = compaction.recover(path) if segment.compact(path) else segment.recover(path)
        if summary is not None:
            try:
                self.seal(path, summary)
            except OSError as error:
                found.append(Damage(path.name, f"{NOT_NOW}: it cannot be sealed: {error.strerror or error}"))
        return found

    def seal(self, path: Path, summary: Summary) -> None:
        """Seal a segment that is not written any more, unless it is already; remove it when nothing is in it."""
        if summary.empty:
            path.unlink(missing_ok=True)
        elif path.name not in segment.sealed(self._events):
            segment.seal(self._events, path, summary)

    def _suspect(self) -> list[Damage]:
        """A segment during whose opening the store died three times in a row is set aside: it takes us along.

        Once or twice is no proof: it may have been killed from outside.
        """
        try:
            name = self._marker.read_text()
        except (OSError, UnicodeError):
            return []
        path = self._events / name
        if path not in segment.segment_files(self._events):
            return []
        before: list[str] = []
        with contextlib.suppress(OSError, UnicodeError):
            before = [line for line in self._suspicion.read_text().splitlines() if line == name]
        if len(before) < 2:
            with contextlib.suppress(OSError):
                self._suspicion.write_text("\n".join([*before, name]))
            return []
        return [Damage(name, "the store died three times while opening it", segment.set_aside(path).name)]

    def retire(self, catalog: Catalog, paths: Sequence[Path]) -> list[str]:
        """Delete sealed segments, in this order, as far as queries let go of them; names. The chain keeps entries."""
        out: list[str] = []
        for path in paths:
            if path.name in catalog.segments and not catalog.detach_when_idle(path, 2.0):
                break
            compaction.retire(self._events, path)
            log.info("%s is retired", path.name)
            out.append(path.name)
        if catalog.index is not None and out:
            try:
                catalog.index.retire(index.stem(name) for name in out)
            except duckdb.Error as error:  # on a full disk; it is opened again, and settled, later
                log.warning("the index is set aside: %s", str(error).strip().partition("\n")[0])
                catalog.drop_index()
        return out

    def compact(self, catalog: Catalog, path: Path) -> Path | None:
        """Put a compact segment in the place of a sealed native one; None when that could not be done now."""
        with contextlib.closing(catalog.cursor()) as cursor:
            self._compacting = cursor
            try:
                made = compaction.write_compact(cursor, catalog.alias(path.name), path)
            finally:
                self._compacting = None
        try:
            if not catalog.replace(path, made, 5.0):
                compaction.remove(made)
                return None
        except BaseException:
            compaction.remove(made)
            raise
        compaction.seal_compact(self._events, path, made)
        path.unlink(missing_ok=True)
        log.info("%s is compact now", made.name)
        return made

    def interrupt_compaction(self) -> None:
        """Have `compact`, which runs in another thread, fail with duckdb.Error unless it has written all."""
        cursor = self._compacting
        if cursor is not None:
            with contextlib.suppress(duckdb.Error):
                cursor.interrupt()
