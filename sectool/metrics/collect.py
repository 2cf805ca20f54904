"""Asking the daemon and the store for their numbers."""

from __future__ import annotations

import threading
import time
from typing import Any

from sectool.api.client import Client
from sectool.api.paths import Paths
from sectool.errors import NoDaemonError, SectoolError
from sectool.metrics.exposition import text
from sectool.metrics.families import families

TIMEOUT_S = 5.0  # for each of the three questions
KEPT_S = 1.0  # an answer serves all who ask within this time


def collect(paths: Paths) -> str:
    """The metrics of the daemon at `paths`, as text. Raises NoDaemonError, PrivilegeError and the like."""
    with Client(paths.control_socket, timeout=TIMEOUT_S) as control:
        status = control.call("status").header
        identities = control.call("identity.list").header
    stats: dict[str, Any] | None = None
    try:
        with Client(paths.events_socket, timeout=TIMEOUT_S) as store:
            stats = store.call("stats").header
    except SectoolError:
        stats = None  # which the metrics say
    return text(families(status, stats, identities))


class Collector:
    """Asks at most once in KEPT_S, however many want to know. Thread-safe."""

    def __init__(self, paths: Paths) -> None:
        self._paths = paths
        self._lock = threading.Lock()
        self._last: tuple[float, str] | None = None

    def __call__(self) -> str:
        """The metrics now. Without a daemon they say so; other failures are raised as SectoolError."""
        with self._lock:
            if self._last is None or time.monotonic() - self._last[0] > KEPT_S:
                try:
                    found = collect(self._paths)
                except NoDaemonError:
                    found = text(families(None, None, None))
                self._last = (time.monotonic(), found)
            return self._last[1]
