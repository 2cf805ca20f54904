"""Taking down what a daemon leaves: its own orderly end, and `sectool down` after a daemon was killed."""

from __future__ import annotations

import contextlib
import os
import select

from sectool.agent import keyfolder
from sectool.api.paths import Paths
from sectool.errors import SectoolError

# Kept by a stop that is no `down`: the successor needs the journals of authorised flows, and the store what is left
# in the rings.
_ALWAYS = ("agent.pid", "control.sock", "events.sock", "workload.sock")
_AT_DOWN = ("ring-agent", "ring-worker-*", "names-worker-*", "*.lock", "agent.log")


def remove_run_files(paths: Paths, *, everything: bool) -> list[str]:
    """Remove pid file and sockets; `everything`: rings, journals, log and the empty folder too. Returns their names."""
    removed: list[str] = []
    for pattern in (*_ALWAYS, *(_AT_DOWN if everything else ())):
        for path in paths.run.glob(pattern):
            with contextlib.suppress(OSError):
                path.unlink()
                removed.append(path.name)
    if everything:
        removed += keyfolder.remove(paths.run)
        with contextlib.suppress(OSError):
            paths.run.rmdir()
    return removed


def clean(paths: Paths) -> list[str]:
    """Undo what a dead daemon left in this network namespace; what was removed, in words.

    Raises SectoolError when a daemon of another run folder enforces here.
    """
    from nfq import cgroup, rules
    from nfq.netns import NamespaceLock
    from sectool.agent import namespaces
    from sectool.agent.programs import forget_programs

    lock = NamespaceLock(paths.run)
    lock.acquire()
    try:
        removed = ["kernel rules"] if rules.installed() else []
        rules.remove(paths.run)
        removed += namespaces.clean(paths.run)
        if paths.run.is_dir():
            forget_programs(cgroup.mount(), paths.programs)
            removed += remove_run_files(paths, everything=True)
    finally:
        lock.release()
    return removed


def wait_gone(pid: int, paths: Paths, timeout_s: float) -> None:
    """Wait for the daemon's end. Raises SectoolError when it takes longer than `timeout_s` seconds."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        ended, _, _ = select.select([handle], [], [], timeout_s)
    finally:
        os.close(handle)
    if not ended:
        raise SectoolError(
            f"the daemon (pid {pid}) has not ended within {timeout_s:.0f} s",
            f"see {paths.log_file}; if it hangs, kill it and run `sectool down` again",
        )
