"""Labels from the host's surroundings: its cloud, its operating system; told once and kept while the machine runs.

The cloud is asked before the kernel rules are there, so that no policy is needed for it; a daemon that starts anew
behind its rules takes what was found since the machine booted (state/context.json).
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from sectool.agent.aside import aside
from sectool.context import system
from sectool.context.cloud import Place, ask
from sectool.errors import SectoolError
from sectool.events import now_us
from sectool.identity.extensions import LabelConstraints
from sectool.identity.files import write_atomic
from sectool.origins import Origin, Source

log = logging.getLogger("sectool.agent")

FILE: Final = "context.json"
START_S: Final = 1.5  # for which a start waits for the cloud; what comes later counts from then on
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class Surroundings:
    """What is known of them. `wanted`: which of KINDS make labels; none: nobody is asked."""

    def __init__(self, state: Path, wanted: tuple[str, ...], changed: Callable[[], None]) -> None:
        self.place: Place | None = None
        self.asked_us = 0
        self.system = system.labels() if "os" in wanted else {}
        self._path = state / FILE
        self._wanted = wanted
        self._changed = changed
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Ask, and wait a moment for the answer."""
        if "cloud" not in self._wanted:
            return
        asked = self._recall()
        self._task = asyncio.create_task(self._ask(), name="ask the cloud")
        if not asked:  # else nobody waits: after a crash nothing new passes until we are there
            await asyncio.wait([self._task], timeout=START_S)

    async def _ask(self) -> None:
        try:
            found = await aside(ask)
        except (SectoolError, OSError) as error:
            log.warning("the cloud's metadata service cannot be asked: %s", error)
            return
        self.asked_us = now_us()
        if found is None and self.place is not None:
            return  # behind our own rules, perhaps: what was found since the machine booted stays
        try:
            place = asdict(found) if found is not None else None
            write_atomic(self._path, json.dumps({"boot": _boot(), "place": place}).encode())
        except SectoolError as error:
            log.warning("%s", error.message)
        if found is not None and found != self.place:
            self.place = found
            log.info("in %s, region %s, zone %s", found.cloud, found.region or "?", found.zone or "?")
            self._changed()

    def _recall(self) -> bool:
        """Whether it was asked since this machine booted, and what it said. A copy of its disk is another machine."""
        try:
            known: dict[str, Any] = json.loads(self._path.read_text(encoding="utf-8"))
            if known["boot"] != _boot():
                return False
            place = known["place"]
            if place is not None and all(isinstance(value, str) for value in place.values()):
                self.place = Place(**place)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        return True

    async def close(self) -> None:
        """Ask no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def source(self, allowed: LabelConstraints) -> Source:
        """The labels, as far as this host may vouch for them."""
        found = {**self.system, **(self.place.labels() if self.place is not None else {})}
        labels = {key: value for key, value in found.items() if allowed.permits(key, value)}
        name = f"{self.place.cloud} metadata" if self.place is not None else "operating system"
        return Source(Origin.CONTEXT, labels, name)


def _boot() -> str:
    return BOOT_ID.read_text(encoding="ascii").strip()
