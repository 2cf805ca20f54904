"""The agent's own events: into its ring, with the dictionary entries they and the flows refer to."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sectool.events import Type, now_us
from sectool.ring import RingWriter

log = logging.getLogger("sectool.agent")

AGAIN_S = 3600.0
MAX_KNOWN = 65_536


class EventLog:
    """Writes blobs `{"type", "ts", …}`. A full ring loses the event, and the ring counts the loss."""

    def __init__(self, ring: Path) -> None:
        self._ring = RingWriter.open_or_create(ring)
        self._known: dict[tuple[Type, int], tuple[Mapping[str, Any], float]] = {}

    def emit(self, kind: Type, /, **fields: Any) -> bool:
        """Record one event, now; False when it was lost."""
        return self._ring.put_blob({"type": str(kind), "ts": now_us(), **fields})

    def define(self, kind: Type, entry: int, /, **fields: Any) -> None:
        """Record what id `entry` stands for, unless exactly that was recorded within the last hour.

        It is told again now and then because old segments, and the entries in them, are removed some day.
        """
        key, now = (kind, entry), time.monotonic()
        known = self._known.get(key)
        if known is not None and known[0] == fields and now - known[1] < AGAIN_S:
            return
        if self.emit(kind, id=entry, **fields):
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[key] = (fields, now)

    @property
    def lost(self) -> int:
        """Events that found the ring full."""
        return int(self._ring.lost)

    def close(self) -> None:
        """Let go of the ring; the store still drains what is in it."""
        self._ring.close()
