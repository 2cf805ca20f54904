"""What the CA service does, in the control history of its host: who was enrolled, renewed, or refused and why."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sectool.errors import SectoolError

QUIET_S = 10.0  # refusals are put on record once in so many seconds: a stranger must not fill the disk


class Recorder:
    """Called with a kind (enrolled, renewed, revoked, refused) and its fields."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self._path, self._say = path, say
        self._refused_s = float("-inf")
        self._skipped = 0

    def __call__(self, kind: str, fields: dict[str, Any]) -> None:
        """Say it and put it on record; a history that cannot be written is said, too, and stops nobody."""
        if kind == "refused":
            now = time.monotonic()
            if now - self._refused_s < QUIET_S:
                self._skipped += 1
                return
            fields = {**fields, "more_like_it": self._skipped}
            self._refused_s, self._skipped = now, 0
        self._say(f"{kind}: " + ", ".join(f"{key} {value}" for key, value in fields.items()))
        from store.control import Actor, ControlHistory

        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with ControlHistory(self._path) as history:
                actor = Actor(os.geteuid(), "sectool ca")
                key = str(fields.get("host", "")) or "nobody"
                history.append("enrolment", key, {"what": kind, **fields}, actor, kind)
        except SectoolError as error:
            self._say(f"not on record: {error.message}")
