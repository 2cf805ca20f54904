"""What the store does to sealed history of its own accord, by the setting of store.retention: deletes, makes compact.

Deleting is told by an event, with the reason. Segments are made compact one at a time in a thread of their own, never
while events wait: one that is being made is thrown away when the rings fill up, and tried again later.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb

from sectool.errors import StoreError
from sectool.events import Type, now_us
from store import retention, segment
from store.retention import Retention, WhenFull

if TYPE_CHECKING:
    from store.process import Store

log = logging.getLogger("store")

REST = 2  # times as long as the last segment took, before the next one is made compact
RETRY_S = 60.0
ROOM_S = 10.0  # what was deleted shows as room by then, unless somebody else holds it open
MARGIN = 8 << 20  # bytes beyond the reserve that are made free at once
MAX_NAMES = 100
AGAIN_S = 60.0  # how soon what is old is looked for again while nothing new was sealed


class Upkeep:
    """The upkeep of one store's sealed segments. `mind` is for the maintenance thread, which holds `_busy`."""

    def __init__(self, store: Store, state: Path) -> None:
        self._store = store
        self._state = state
        self._lock = threading.Lock()
        self._chosen = Retention()
        self._thread: threading.Thread | None = None
        self._rests = self._made_room = self._again = 0.0
        self._seen: tuple[Retention, tuple[int, int]] | None = None  # of what was looked at last
        self._gave_way = False
        self._left: set[str] = set()  # could not be made compact

    # --- the setting -----------------------------------------------------------------------------------------

    def load(self) -> None:
        """Take up what was chosen last. While that cannot be read nothing is deleted, and the store is degraded."""
        try:
            self._chosen = retention.load(self._state)
        except StoreError as error:
            self._chosen = Retention(since_us=1)
            self._store.degrade("retention", f"{error.message}; nothing is deleted until then: {error.hint}")

    @property
    def setting(self) -> Retention:
        """What counts now."""
        limits = self._store.limits
        return retention.bounded(self._chosen, limits.keep_bytes, limits.keep_us)

    def choose(self, request: Mapping[str, Any], actor: str) -> Retention:
        """Change the setting, on disk first, and have it told; what counts now.

        Raises UsageError for a request that makes no sense, StoreError when it cannot be written.
        """
        with self._lock:
            before = self.setting
            chosen = retention.changed(before, request, actor, now_us())
            retention.save(self._state, chosen)
            self._chosen = chosen
            self._store.degraded.pop("retention", None)
            self._store.note(
                Type.STORE_RETENTION,
                actor=actor,
                reason=chosen.reason,
                setting=chosen.document(),
                before=before.document(),
            )
        log.info("%s chose what is kept: %s", actor, retention.words(chosen))
        return chosen

    # --- deleting --------------------------------------------------------------------------------------------

    def mind(self) -> None:
        """Delete what is beyond the setting, make room if that is allowed, begin to make a segment compact."""
        setting = self.setting
        if setting.plain:
            return
        if setting.when_full is WhenFull.DROP_OLDEST:
            self._make_room(setting)
        # The chain of a year has ten thousand entries: they are read when there are new ones, else now and then.
        seen = (setting, _stamp(self._store.events / segment.CHAIN))
        if seen == self._seen and time.monotonic() < self._again:
            return
        self._seen, self._again = seen, time.monotonic() + AGAIN_S
        if setting.keep_bytes is not None or setting.keep_us is not None:
            self.prune(setting.keep_bytes, setting.keep_us if self._store.sober() else None)
        self._compact(setting)

    def prune(self, keep_bytes: int | None, keep_us: int | None, actor: str = "") -> list[str]:
        """Delete the oldest sealed segments beyond what is kept; their names. An `actor` asked for it."""
        now, events = now_us(), self._store.events
        paths = segment.beyond(events, keep_bytes, keep_us, now)
        if not paths:
            return []
        known = segment.sealed(events)
        old = [p for p in paths if keep_us is not None and int(known[p.name]["last_us"]) < now - keep_us]
        gone = self._retire(old, "asked" if actor else "age", actor)
        if len(gone) == len(old):
            gone += self._retire(paths[len(old) :], "asked" if actor else "size", actor)
        return gone

    def _make_room(self, setting: Retention) -> None:
        """Give up the oldest segments for room: so many as are missing bytes, then wait for it to show."""
        missing = self._store.missing_room()
        if not missing or not self._store.sober() or time.monotonic() - self._made_room < ROOM_S:
            return
        known = segment.sealed(self._store.events)
        youngest = now_us() - setting.spare_us
        chosen: list[Path] = []
        for path in segment.segment_files(self._store.events):
            entry = known.get(path.name)
            if missing <= 0 or entry is None or int(entry["last_us"]) >= youngest:
                break
            chosen.append(path)
            missing -= segment.size_of(path)
        if chosen:
            self._made_room = time.monotonic()
            self._retire(chosen, "room", "")

    def _retire(self, paths: Sequence[Path], why: str, actor: str) -> list[str]:
        known = segment.sealed(self._store.events)
        sizes = {path.name: segment.size_of(path) for path in paths}
        gone = self._store.shelf.retire(self._store.catalog, paths)
        if gone:
            about = [known[name] for name in gone]
            self._store.note(
                Type.STORE_PRUNED,
                segments=gone[:MAX_NAMES],
                count=len(gone),
                bytes=sum(sizes[name] for name in gone),
                first_us=min(int(entry["first_us"]) for entry in about),
                last_us=max(int(entry["last_us"]) for entry in about),
                why=why,
                actor=actor,
            )
        return gone

    # --- making compact --------------------------------------------------------------------------------------

    def give_way(self) -> None:
        """Stop making a segment compact when events wait for it. Called all the time."""
        if self._thread is not None and self._thread.is_alive() and self._store.rings.fullest > 0.5:
            self._gave_way = True
            self._store.shelf.interrupt_compaction()

    def _compact(self, setting: Retention) -> None:
        older_us = setting.compact_us
        if older_us is None or (self._thread is not None and self._thread.is_alive()):
            return
        if time.monotonic() < self._rests:
            self._again = min(self._again, self._rests)
            return
        if (
            "disk" in self._store.degraded
            or self._store.rings.fullest > 0.25
            or not self._store.due_for_compaction(older_us, self._left)
        ):
            return
        self._gave_way = False
        self._thread = threading.Thread(
            target=self._compact_one, args=(older_us,), name="compaction", daemon=True
        )
        self._thread.start()

    def _compact_one(self, older_us: int) -> None:
        began = time.monotonic()
        try:
            self._store.compact_next(older_us, self._left, patient=False)
        except StoreError as error:
            self._rests = time.monotonic() + RETRY_S
            if self._gave_way:
                log.info("making a segment compact gave way to events")
                return
            log.warning("%s", error.message)
            due = self._store.due_for_compaction(older_us, self._left)
            if due and error.hint != "try again in a moment":
                self._left.add(due[0].name)
        except (duckdb.Error, OSError) as error:  # the store is ending, or begins anew
            self._rests = time.monotonic() + RETRY_S
            log.warning("compaction: %s", str(error).strip().partition("\n")[0])
        else:
            self._rests = time.monotonic() + REST * (time.monotonic() - began)

    def stop(self) -> None:
        """End what is being made; nothing of it stays."""
        thread = self._thread
        while thread is not None and thread.is_alive():
            self._gave_way = True
            self._store.shelf.interrupt_compaction()
            thread.join(0.05)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except OSError:
        return (0, 0)
    return stat.st_size, stat.st_mtime_ns
