"""Looks after the kernel rules: a firewall that reloads may flush them, and then connections pass unseen.

What was opened meanwhile was judged by nobody; once the rules are back its packets belong to no known flow, and drop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from sectool.agent.health import Health
from sectool.errors import SectoolError

CHECK_S: Final = 3.0  # both families' rules are listed as often as this
PROBLEM: Final = "kernel rules"

log = logging.getLogger(__name__)


class RuleWatch:
    """`whole` tells whether all rules are in place, `put_back` installs them; both may raise SectoolError and block."""

    def __init__(self, health: Health, whole: Callable[[], bool], put_back: Callable[[], None]) -> None:
        self._health = health
        self._whole = whole
        self._put_back = put_back
        self._due = time.monotonic() + CHECK_S

    async def check(self) -> None:
        """Look, when it is time, and put back what is gone. The next look tells whether it stayed."""
        if time.monotonic() < self._due:
            return
        try:
            await self._look()
        except SectoolError as error:
            self._health.raise_(PROBLEM, f"cannot be put back: {error.message}")
        finally:
            self._due = time.monotonic() + CHECK_S

    async def _look(self) -> None:
        if await asyncio.to_thread(self._whole):
            self._health.clear(PROBLEM)
            return
        why = "somebody flushed or changed them; put back, but connections passed unseen for up to 3 s"
        log.error("%s: %s", PROBLEM, why)
        await asyncio.to_thread(self._put_back)
        self._health.raise_(PROBLEM, why)
