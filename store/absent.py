"""Whoever hangs up gets no answer, so nothing goes on for them: their query is interrupted.

One thread watches the connections of all who wait. Only a connection that is closed both ways counts: who merely says
that no more questions follow (shutdown of its sending side) still wants the answer.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Callable, Iterator

AGAIN_S = (
    0.05  # an interrupt between two steps of a query goes unheard: it is repeated until the query has ended
)


class Absent:
    """`interrupt` stops what a thread (by its identifier) has the engine do; it may be called again and again."""

    def __init__(self, interrupt: Callable[[int], None]) -> None:
        self._interrupt = interrupt
        self._poll = select.epoll()
        self._waiting: dict[int, int] = {}  # connection to the thread that works for it
        self._lock = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="absent clients", daemon=True).start()

    @contextlib.contextmanager
    def noticed(self, client: socket.socket) -> Iterator[None]:
        """While inside, this thread's queries end when `client` hangs up."""
        number = client.fileno()
        with self._lock:
            self._waiting[number] = threading.get_ident()
            self._poll.register(number, 0)  # EPOLLHUP is told of unasked, EPOLLRDHUP is not
        try:
            yield
        finally:
            with self._lock:
                del self._waiting[number]
                self._poll.unregister(number)

    def _watch(self) -> None:
        while not self._closed.is_set():
            try:
                gone = self._poll.poll(1.0)
            except (OSError, ValueError):
                return  # closed
            with self._lock:
                for number, _ in gone:
                    thread = self._waiting.get(number)
                    if thread is not None:
                        self._interrupt(thread)
            if gone:
                self._closed.wait(AGAIN_S)

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()
