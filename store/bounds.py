"""What queries may do to the store process at most, where the engine's own limits do not reach.

DuckDB counts the memory of its operators and hears an interrupt between two steps. A single call of a function is
neither counted nor interrupted: `repeat('x', 4000000000)`, `levenshtein` of two long texts. So the process may have
only so much memory: beyond it an allocation fails, and with it the query that asked for it, while ingest tries its
batch again (store.process). And a query that goes on long after it was told to stop ends the process, which its agent
starts again and which loses nothing.
"""

from __future__ import annotations

import logging
import os
import resource
from pathlib import Path

log = logging.getLogger("store")

ROOM = 3 << 30  # bytes for queries and ingest, above what the process has when it begins to serve
LEAST_ROOM = 3 << 29  # the engine's own limit is 1 GB, and the stacks of 64 clients' threads count
STUCK_S = 30.0  # for so long a query may go on after it was told to stop
STUCK_EXIT = 75  # EX_TEMPFAIL


def limit_memory(room: int | None = None) -> int:
    """Let this process have `room` bytes more than it has now, by default half of the host's up to ROOM; the limit.

    Counted is memory of its own that it may write to, used or not (RLIMIT_DATA, setrlimit(2)).
    """
    if room is None:
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        room = min(ROOM, max(LEAST_ROOM, host // 2))
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[5])  # data and stack
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    limit = pages * os.sysconf("SC_PAGE_SIZE") + room
    if most != resource.RLIM_INFINITY:
        limit = min(limit, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, most))
    return limit


def give_up() -> None:
    """End the process at once, because a query does not stop. What is committed is safe, the rest is in the rings."""
    log.critical("a query cannot be stopped (see who asked, above): the store starts anew, nothing is lost")
    os._exit(STUCK_EXIT)
