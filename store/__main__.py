"""`python -m store --state DIR --run DIR`: the store process, as the agent starts it."""

from __future__ import annotations

import argparse
import contextlib
import grp
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from sectool.clock import DAY
from sectool.errors import SectoolError, UsageError
from store import query
from store.bounds import give_up, limit_memory
from store.process import CHECKPOINT_S, SEGMENT_BYTES, SEGMENT_US, Limits, Store
from store.serve import Server

NICE = 5
ENDING = (signal.SIGTERM, signal.SIGINT)


def main(argv: list[str] | None = None) -> int:
    """Run until SIGTERM, SIGINT or the end of `--parent-fd`; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m store", description="drain event rings into DuckDB segments"
    )
    parser.add_argument("--state", type=Path, required=True, help="state folder; segments are in its events/")
    parser.add_argument("--run", type=Path, required=True, help="run folder with ring-* and events.sock")
    parser.add_argument("--group", help="group whose members may read events")
    parser.add_argument("--parent-fd", type=int, help="end when this file descriptor does")
    parser.add_argument("--segment-seconds", type=int, default=SEGMENT_US // 1_000_000)
    parser.add_argument("--segment-bytes", type=int, default=SEGMENT_BYTES)
    parser.add_argument("--checkpoint-seconds", type=float, default=CHECKPOINT_S)
    parser.add_argument(
        "--keep-bytes", type=int, help="sealed segments beyond this are deleted, oldest first"
    )
    parser.add_argument("--keep-days", type=int, help="segments whose newest row is older are deleted")
    parser.add_argument("--reserve-bytes", type=int, help="room on the disk that is left to others")
    options = parser.parse_args(argv)
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s store[%(process)d] %(levelname)s %(message)s",
    )
    # Should a query take all memory of the host, this process is what the kernel ends first: it is started again and
    # loses nothing, which packet workers could not say.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("500")
    # Events may be late, packets and programs may not. The second is for kernels that share time out by session first.
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, NICE)
        Path("/proc/self/autogroup").write_text(str(NICE))
    limits = Limits(
        options.segment_seconds * 1_000_000,
        options.segment_bytes,
        options.checkpoint_seconds,
        options.keep_bytes,
        options.keep_days and options.keep_days * DAY,
        options.reserve_bytes,
    )
    store = Store(options.state.absolute(), options.run.absolute(), limits)
    _stop_when_told(store)
    try:
        store.open()
        server = Server(store, store.run / "events.sock", _group_id(options.group))
    except SectoolError as error:
        print(f"store: {error.message}" + (f"\n  {error.hint}" if error.hint else ""), file=sys.stderr)  # noqa: T201
        return int(error.exit_code)
    if options.parent_fd is not None:
        threading.Thread(target=_watch, args=(options.parent_fd, store), name="parent", daemon=True).start()
    server.start()
    with contextlib.suppress(OSError, ValueError):  # then the kernel's own end of memory is all there is
        limit_memory()
    query.WHEN_STUCK.append(give_up)
    try:
        store.serve()
    finally:
        server.close()
        store.close()
        for number in ENDING:  # all is done: nothing may turn that into a death by signal
            signal.signal(number, signal.SIG_IGN)
    return 0


def _stop_when_told(store: Store) -> None:
    """Have SIGTERM and SIGINT stop it.

    A handler runs in the middle of what the main thread does, which may be to wait for the very event, with its lock
    held: a second signal then stands still for ever. So the handler does nothing, and a thread reads that it ran.
    """
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    for number in ENDING:
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_watch, args=(told, store), name="signals", daemon=True).start()


def _watch(fd: int, store: Store) -> None:
    """Stop it when there is something to read, or nothing any more."""
    try:
        os.read(fd, 1)
    except OSError as error:
        logging.getLogger("store").error("parent-fd %d: %s", fd, error)
    store.stop()


def _group_id(name: str | None) -> int | None:
    if name is None:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise UsageError(
            f"there is no group {name!r} on this host", f"create it: groupadd --system {name}"
        ) from None


if __name__ == "__main__":
    sys.exit(main())
