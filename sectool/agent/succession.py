"""Waiting until a daemon that was asked to restart is back as its successor."""

from __future__ import annotations

import contextlib
import os
import select
import time
from typing import Any

from sectool.api.client import Client
from sectool.api.paths import Paths
from sectool.errors import SectoolError

_PAUSE_S = 0.05


def wait_succeeded(paths: Paths, pid: int, started: int, timeout_s: float) -> dict[str, Any]:
    """The status of the daemon that began after `started`, once it enforces.

    Raises SectoolError when process `pid` has ended instead, or after `timeout_s` seconds.
    """
    deadline = time.monotonic() + timeout_s
    with contextlib.ExitStack() as stack:
        try:
            handle = os.pidfd_open(pid)
            stack.callback(os.close, handle)
        except ProcessLookupError:
            raise _ended(paths) from None
        while time.monotonic() < deadline:
            if select.select([handle], [], [], _PAUSE_S)[0]:
                raise _ended(paths)
            status = _status(paths)
            if status.get("started", started) != started and status["state"] != "starting":
                return status
    raise SectoolError(
        f"the daemon has not come back within {timeout_s:.0f} s", f"see {paths.log_file} and `sectool status`"
    )


def _status(paths: Paths) -> dict[str, Any]:
    try:
        with Client(paths.control_socket, timeout=5.0) as client:
            return dict(client.call("status").header)
    except SectoolError:
        return {}  # between the two


def _ended(paths: Paths) -> SectoolError:
    return SectoolError(
        "the daemon has ended: the installed program did not come up; the kernel rules stay, nothing new passes",
        f"see {paths.log_file} (or the journal of its service), then `sectool up`",
    )
