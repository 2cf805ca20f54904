"""Starting the daemon in the background: returns when it enforces, or with the reason why it does not.

It is forked from the command that starts it, which has read a good part of its code already.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sectool.agent.forking import apart, flush, keep_only, streams
from sectool.api.client import error_from
from sectool.api.paths import Paths
from sectool.errors import SectoolError

START_TIMEOUT_S = 60.0


def prepare_run_folder(paths: Paths) -> None:
    """Make the run folder (0755, so that the socket's group can reach the socket)."""
    try:
        paths.run.mkdir(parents=True, exist_ok=True, mode=0o755)
    except OSError as error:
        raise SectoolError(
            f"cannot make {paths.run}: {error.strerror}", "choose another with --run"
        ) from None


def start(
    paths: Paths,
    *,
    verbose: bool = False,
    timeout_s: float = START_TIMEOUT_S,
    policy: Sequence[Path] = (),
    mode: str | None = None,
) -> dict[str, Any]:
    """Start `sectool up` in a session of its own and wait for its word. Returns what it announced.

    Raises the error it failed with; SectoolError when it ends or stays silent without one.
    """
    prepare_run_folder(paths)
    reading, writing = os.pipe()
    log = os.open(paths.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    offset = os.fstat(log).st_size
    args = [
        *("--state", str(paths.state), "--run", str(paths.run), "--announce-fd", str(writing)),
        *(["--verbose"] if verbose else []),
        *(["--mode", mode] if mode else []),
        *(word for file in policy for word in ("--policy", str(file.absolute()))),
    ]
    try:
        flush()
        pid = os.fork()
        if pid == 0:
            apart(lambda: _be_the_daemon(args, writing, log))
    finally:
        os.close(writing)
        os.close(log)
    with os.fdopen(reading, "rb") as pipe:
        line = _line(pipe.fileno(), timeout_s)
    if line is None:
        raise SectoolError(
            f"the daemon (pid {pid}) has not said within {timeout_s:.0f} s whether it enforces",
            f"see {paths.log_file}; stop it with `sectool down`",
        )
    try:
        message: dict[str, Any] = json.loads(line)
    except ValueError:
        status = _status(pid, 5)
        raise SectoolError(
            f"the daemon ended with status {status} before it enforced: {_tail(paths, offset)}",
            f"the whole story is in {paths.log_file}",
        ) from None
    if not message.get("ok"):
        _status(pid, 10)
        raise error_from(message)
    return message  # it outlives us: not waiting for it is the point


def _be_the_daemon(args: list[str], announce: int, log: int) -> int:
    """What `python -m sectool.agent` with these arguments is, and what `restart` starts again."""
    os.setsid()
    os.chdir("/")
    streams(log)
    keep_only([announce])
    sys.orig_argv = [sys.executable, "-m", "sectool.agent", *args]
    sys.argv = sys.orig_argv[2:]
    from sectool.agent.__main__ import main

    return main(args)


def _status(pid: int, timeout_s: float) -> str:
    """With what our child has ended, in words of a sentence; waits that long for it."""
    ending = os.pidfd_open(pid)
    try:
        if not select.select([ending], [], [], timeout_s)[0]:
            return "unknown"
    finally:
        os.close(ending)
    return str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def _line(fd: int, timeout_s: float) -> bytes | None:
    """Everything up to a line's end or the end of the pipe; None when time is up."""
    deadline = time.monotonic() + timeout_s
    data = b""
    while not data.endswith(b"\n"):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([fd], [], [], left)[0]:
            return None
        more = os.read(fd, 4096)
        if not more:
            break
        data += more
    return data


def _tail(paths: Paths, offset: int) -> str:
    """The last line this start wrote into the log."""
    try:
        with paths.log_file.open("rb") as log:
            log.seek(offset)
            lines = log.read(65536).decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return "no log"
    return lines[-1] if lines else "it said nothing"
