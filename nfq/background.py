"""Slow work beside the packet path: a few threads, and a descriptor for the loop that waits for their results.

Work comes in steps, each some milliseconds long and in C code that lets other threads run. The next step is always one
of the work with the least left to do, so that a giant does not keep small things waiting.
"""

from __future__ import annotations

import heapq
import os
import threading
from collections import deque
from collections.abc import Callable, Generator
from typing import Any, Final, Generic, TypeAlias, TypeVar

T = TypeVar("T")
Steps: TypeAlias = Generator[int, None, T]  # yields how much is left to do (any unit), returns the result

_THREADS: Final = 2
_LIMIT: Final = 256


class Background(Generic[T]):
    """`start` and `completed` are for one thread, which also runs what is to be done with the results.

    Bounded: beyond `limit` the largest work that waits gives way. Threads are started with the first work.
    """

    def __init__(self, threads: int = _THREADS, limit: int = _LIMIT) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # readable when results are there
        self.refused = 0
        self.failed = 0
        self._count, self._limit = threads, limit
        self._threads: list[threading.Thread] = []
        self._waiting: list[tuple[int, int, Steps[T], Callable[[T | None], None]]] = []
        self._results: deque[tuple[Callable[[T | None], None], T | None]] = deque()
        self._change = threading.Condition()
        self._number = 0  # keeps the order of equals, and generators from being compared
        self._pending = 0
        self._closing = False

    def start(self, size: int, steps: Steps[T], done: Callable[[T | None], None]) -> bool:
        """Have work done; `completed` calls `done` with its result, None if it failed or had to give way.

        False: there is too much already, and none of it larger than this.
        """
        if len(self._threads) < self._count:
            thread = threading.Thread(target=self._run, name="background", daemon=True)
            self._threads.append(thread)
            thread.start()
        with self._change:
            if self._pending >= self._limit and not self._displace(size):
                self.refused += 1
                return False
            self._pending += 1
            self._put(size, steps, done)
        return True

    def _displace(self, size: int) -> bool:
        largest = max(self._waiting, default=None)
        if largest is None or largest[0] <= size:
            return False
        self._waiting.remove(largest)
        heapq.heapify(self._waiting)
        self.refused += 1
        self._finish(largest[3], None)
        largest[2].close()
        return True

    def _finish(self, done: Callable[[T | None], None], result: T | None) -> None:
        self._results.append((done, result))
        self._pending -= 1
        os.eventfd_write(self.fd, 1)

    def _put(self, size: int, steps: Steps[T], done: Callable[[T | None], None]) -> None:
        self._number += 1
        heapq.heappush(self._waiting, (size, self._number, steps, done))
        self._change.notify()

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._waiting and not self._closing:
                    self._change.wait()
                if self._closing:
                    return
                _, _, steps, done = heapq.heappop(self._waiting)
            result: T | None = None
            try:
                left = next(steps)
            except StopIteration as e:
                result = e.value
            except Exception:  # a thread that ends would keep all the others' work waiting
                self.failed += 1
            else:
                with self._change:
                    self._put(left, steps, done)
                continue
            with self._change:
                if not self._closing:
                    self._finish(done, result)

    def completed(self) -> int:
        """Do what is to be done with the results there are; how many. Never blocks; for when `fd` is readable."""
        try:
            os.eventfd_read(self.fd)
        except BlockingIOError:
            return 0
        ran = 0
        while self._results:
            done, result = self._results.popleft()
            ran += 1
            done(result)
        return ran

    def close(self) -> None:
        """Give up what is not done; nothing is called any more. Waits for a step under way, at most a second."""
        with self._change:
            self._closing = True
            self._change.notify_all()
        for thread in self._threads:
            thread.join(1.0)
        with self._change:
            os.close(self.fd)
            left: list[Any] = [steps for _, _, steps, _ in self._waiting]
            self._waiting.clear()
        for steps in left:
            steps.close()
