"""Keeping a child process alive: started at once when it dies, ever later when it keeps dying."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

log = logging.getLogger("sectool.agent")

FIRST_DELAY_S = 0.2
LONGEST_DELAY_S = 5.0
GOOD_LIFE_S = 30.0  # a child that lived this long starts again with a clean record


@dataclass(slots=True)
class Backoff:
    """How long to wait before the next start. The first restart is immediate."""

    delay: float = 0.0

    def after(self, lived_s: float) -> float:
        """Seconds to wait now that a child has died after `lived_s` seconds."""
        if lived_s >= GOOD_LIFE_S:
            self.delay = 0.0
        wait = self.delay
        self.delay = min(LONGEST_DELAY_S, max(FIRST_DELAY_S, self.delay * 2))
        return wait


def bound_to_parent(argv: Sequence[str]) -> list[str]:
    """`argv` such that the kernel ends the program when we die, however we die (util-linux' setpriv).

    A worker or store that outlived us would hold the queue and the event files against our successor.
    """
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", "--", *argv] if setpriv else list(argv)


class Process(Protocol):
    """A child process: asyncio's own, or a forked one (sectool.agent.nursery)."""

    @property
    def pid(self) -> int:
        """Its process id."""

    @property
    def returncode(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""

    async def wait(self) -> int:
        """The exit status, once it has ended."""

    def send_signal(self, number: int, /) -> None:
        """Raises ProcessLookupError when it has ended."""

    def kill(self) -> None:
        """SIGKILL."""


class Child:
    """One supervised program.

    `start` spawns it; `died` hears of every unwanted end, with the exit status (negative: signal) as text.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], Awaitable[Process]],
        died: Callable[[str], None],
    ) -> None:
        self.name = name
        self.restarts = 0
        self.process: Process | None = None
        self._start = start
        self._died = died
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        alive = self.process is not None and self.process.returncode is None
        return self.process.pid if self.process is not None and alive else None

    async def begin(self) -> None:
        """Start it for the first time (errors reach the caller) and keep it alive from then on."""
        self.process = await self._start()
        self._task = asyncio.create_task(self._keep(), name=f"keep {self.name}")

    async def _keep(self) -> None:
        backoff = Backoff()
        born = time.monotonic()
        while True:
            if self.process is not None:
                status = await self.process.wait()
                if self._stopping:
                    return
                why = describe(status)
                log.error("%s (pid %d) %s", self.name, self.process.pid, why)
                self._died(why)
            await asyncio.sleep(backoff.after(time.monotonic() - born))
            if self._stopping:
                return
            born = time.monotonic()
            self.restarts += 1
            try:
                self.process = await self._start()
            except OSError as error:
                self.process = None
                log.error("%s does not start: %s", self.name, error)
                self._died(f"does not start: {error}")

    async def let_go(self) -> None:
        """Neither keep it alive nor end it any more."""
        self._stopping = True
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, then SIGKILL after `grace_s` seconds. Returns when it is gone."""
        self._stopping = True
        process = self.process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), grace_s)
            except TimeoutError:
                log.warning("%s (pid %d) did not stop within %.0f s; killed", self.name, process.pid, grace_s)
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        await self.let_go()


def describe(status: int) -> str:
    """An exit status in words."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"
