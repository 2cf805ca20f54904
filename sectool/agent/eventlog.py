"""The agent's own events: into its ring, with the dictionary entries they and the flows refer to."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sectool.events import Type, now_us
from sectool.ring import RingWriter

log = logging.getLogger("sectool.agent")


class EventLog:
    """Writes blobs `{"type", "ts", …}`. A full ring loses the event, and the ring counts the loss."""

    def __init__(self, ring: Path) -> None:
        self._ring = RingWriter.open_or_create(ring)
        self._known: dict[tuple[Type, int], Mapping[str, Any]] = {}

    def emit(self, kind: Type, /, **fields: Any) -> None:
        """Record one event, now."""
        self._ring.put_blob({"type": str(kind), "ts": now_us(), **fields})

    def define(self, kind: Type, entry: int, /, **fields: Any) -> None:
        """Record what id `entry` stands for, unless exactly that was recorded before."""
        key = (kind, entry)
        if self._known.get(key) == fields:
            return
        self._known[key] = fields
        self.emit(kind, id=entry, **fields)

    @property
    def lost(self) -> int:
        """Events that found the ring full."""
        return int(self._ring.lost)

    def close(self) -> None:
        """Let go of the ring; the store still drains what is in it."""
        self._ring.close()
