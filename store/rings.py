"""The rings of a run folder: found, opened, watched for being replaced."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from sectool.ring import RingDamagedError, RingReader
from store.ingest import MAX_SLOTS
from store.segment import Damage

log = logging.getLogger("store")

GATHER = MAX_SLOTS  # slots that are not left to wait for more


class Rings:
    """Readers of every `ring-*` in `run`, by name."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self.readers: dict[str, RingReader] = {}
        self._bad: dict[
            str, tuple[int, int]
        ] = {}  # file a damaged ring was: looked at again when it is another

    def look(self) -> list[Damage]:
        """Open rings that appeared or were replaced, drop those that went away; damage that is new."""
        found: list[Damage] = []
        seen = set()
        for path in sorted(self._run.glob("ring-*")):
            name = path.name.removeprefix("ring-")
            try:
                stat = path.lstat()
            except OSError:
                continue
            seen.add(name)
            file = (stat.st_dev, stat.st_ino)
            ring = self.readers.get(name)
            if ring is not None and (ring.file == file or ring.pending):
                continue
            if ring is not None:
                self.readers.pop(name).close()
            if self._bad.get(name) == file:
                continue
            try:
                self.readers[name] = RingReader(path)
            except RingDamagedError as error:
                self._bad[name] = file
                found.append(Damage(path.name, error.message))
            except OSError as error:
                log.warning("%s: %s", path, error)
        for name in [n for n, ring in self.readers.items() if n not in seen and not ring.pending]:
            self.readers.pop(name).close()
        return found

    def drop(self, name: str, error: RingDamagedError) -> Damage:
        """Stop reading a ring that became damaged, until its producer replaces it."""
        ring = self.readers.pop(name)
        self._bad[name] = ring.file
        ring.close()
        return Damage(f"ring-{name}", error.message)

    def waiting(self, noted: Mapping[int, tuple[int, int]]) -> tuple[bool, bool]:
        """Whether there are events or losses to take in, and whether so many that it should be now.

        `noted` has the losses already told, by ring id.
        """
        waiting = urgent = False
        for ring in self.readers.values():
            pending = ring.pending
            urgent = urgent or pending >= min(GATHER, ring.capacity // 2)
            waiting = waiting or bool(pending) or ring.lost > noted.get(ring.ring_id, (0, 0))[1]
        return waiting, urgent

    @property
    def present(self) -> set[int]:
        """Ids of the open rings."""
        return {ring.ring_id for ring in self.readers.values()}

    @property
    def fullest(self) -> float:
        """How full the fullest ring is, from 0 to 1."""
        return max((ring.pending / ring.capacity for ring in list(self.readers.values())), default=0.0)

    @property
    def drained(self) -> bool:
        """Whether nothing is left in any ring."""
        return not any(ring.pending for ring in self.readers.values())

    def close(self) -> None:
        """Let go of all rings."""
        for ring in self.readers.values():
            ring.close()
        self.readers.clear()
