"""Questions under way, and how they are called off: what a question waits for is ended, not merely forgotten.

    asked ──► answered
      └──call_off──► what it waits for ends ──► CalledOffError in its thread; nobody hears of it

A question runs in a thread of its own. Whatever it waits on (a connection, a cursor) is noted with the way to end it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from sectool.errors import SectoolError

AGAIN_S = 0.05  # a query that is interrupted between two of its steps does not hear it

_mine: ContextVar[Asking | None] = ContextVar("asking", default=None)


class CalledOffError(SectoolError):
    """Nobody waits for this answer any more."""

    def __init__(self) -> None:
        super().__init__("this question was called off", "ask again")


class Asking:
    """One question. `lasting`: it changes something, so it is let finish whatever the screen shows by then."""

    def __init__(self, *, lasting: bool = False) -> None:
        self.lasting = lasting
        self.begun = time.monotonic()
        self.called_off = False
        self._ends: list[Callable[[], object]] = []
        self._change = threading.Condition()

    @property
    def took(self) -> float:
        """Seconds since it was asked."""
        return time.monotonic() - self.begun

    def call_off(self) -> None:
        """End what it waits for, from any thread, without waiting for that."""
        with self._change:
            if self.called_off:
                return
            self.called_off = True
            waits = bool(self._ends)
        if waits:
            threading.Thread(target=self._end, name="calling off", daemon=True).start()

    def _end(self) -> None:
        with self._change:
            while self._ends:
                for end in self._ends:
                    end()
                self._change.wait(AGAIN_S)

    @contextmanager
    def in_this_thread(self) -> Iterator[None]:
        """What this thread waits for meanwhile is waited for by this question."""
        token = _mine.set(self)
        try:
            yield
        finally:
            _mine.reset(token)

    @contextmanager
    def waits(self, end: Callable[[], object]) -> Iterator[None]:
        """While inside, calling off runs `end`, again and again until this is left. Raises CalledOffError."""
        with self._change:
            if self.called_off:
                raise CalledOffError
            self._ends.append(end)
        try:
            yield
        except SectoolError:
            if self.called_off:
                raise CalledOffError from None
            raise
        finally:
            with self._change:
                self._ends.remove(end)
                self._change.notify_all()


@contextmanager
def ended_by(end: Callable[[], object]) -> Iterator[None]:
    """`Asking.waits` of the question that this thread works on; nothing when it works on none."""
    asking = _mine.get()
    if asking is None:
        yield
        return
    with asking.waits(end):
        yield
