"""Processes that are forked and then are something else, as if they had been started anew."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NoReturn


def apart(work: Callable[[], int]) -> NoReturn:
    """Do `work` and end with the exit status it returns, with nothing of what our caller would still do."""
    code = 1
    try:
        code = work()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        flush()
        os._exit(code)


def flush() -> None:
    """Write out what is buffered: before a fork, or it would be written twice."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def keep_only(fds: Collection[int]) -> None:
    """Close all file descriptors but these and the standard streams."""
    for entry in list(Path("/proc/self/fd").iterdir()):
        fd = int(entry.name)
        if fd > 2 and fd not in fds:
            with contextlib.suppress(OSError):  # that of the list itself
                os.close(fd)


def streams(output: int) -> None:
    """Nothing on stdin; stdout and stderr where the file descriptor `output` goes."""
    nothing = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(nothing, 0)
    os.close(nothing)
    for number in (1, 2):
        os.dup2(output, number)
