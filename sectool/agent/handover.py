"""A restart in place: the daemon's process becomes the program installed now, and its packet workers go on meanwhile.

    the installed program is tried              it cannot even read its settings: nothing happens
    everything but the workers ends in order    events wait in the rings, the control socket is gone for a moment
    exec                                        same process id; the workers' lines and the namespace's lock stay open
    the new daemon starts as always, and each of its workers, once it stands by, takes over from its predecessor

If the new daemon does not come up it ends, and with it the old workers: the kernel rules stay, so nothing new passes.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from sectool import __version__
from sectool.api import wire
from sectool.api.paths import Paths
from sectool.errors import SectoolError

VARIABLE: Final = "SECTOOL_HANDOVER"
TRIAL_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Given:
    """A packet worker that goes on: its number, process id, and our end of its line (a file descriptor)."""

    number: int
    pid: int
    line: int


@dataclass(frozen=True, slots=True)
class Handover:
    """What the program before leaves: version, workers, how packets are led to them, and the namespace's lock."""

    version: str
    workers: tuple[Given, ...]
    steering: tuple[int, int, int]  # first queue, number of workers, mask
    lock: int

    def become(self) -> None:
        """Turn this process into the installed program; does not return."""
        for fd in (self.lock, *(worker.line for worker in self.workers)):
            os.set_inheritable(fd, True)
        environment = {**os.environ, VARIABLE: json.dumps(asdict(self))}
        # The words this process was started with, which root chose: no shell, nothing from outside.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)  # noqa: S606


def taken() -> Handover | None:
    """What was handed to this process, once; None: it was started afresh."""
    text = os.environ.pop(VARIABLE, None)
    if text is None:
        return None
    said = json.loads(text)
    workers = tuple(Given(**worker) for worker in said["workers"])
    handover = Handover(said["version"], workers, tuple(said["steering"]), said["lock"])
    for fd in (handover.lock, *(worker.line for worker in workers)):
        os.set_inheritable(fd, False)
    return handover


class Predecessor:
    """A packet worker of the program before, as far as its end is concerned."""

    def __init__(self, given: Given) -> None:
        self.number = given.number
        self._pid = given.pid
        self._line = socket.socket(fileno=given.line)

    async def stop(self, grace_s: float) -> None:
        """Have it let go of its queues, flows and events; returns when it has. Killed after `grace_s` seconds."""
        await asyncio.to_thread(self._stop, grace_s)

    def _stop(self, grace_s: float) -> None:
        with self._line as line:
            line.settimeout(grace_s)
            try:
                line.sendall(wire.encode({"t": "stop"}))
                while line.recv(1 << 16):
                    pass
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._pid, signal.SIGKILL)
                self._reap()
                return
            except OSError:
                pass  # it has ended already
        threading.Thread(target=self._reap, name=f"reap worker {self.number}", daemon=True).start()

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


async def try_installed(paths: Paths) -> str:
    """Have the installed program read its settings; its version. Raises SectoolError with its own words."""
    process = await asyncio.create_subprocess_exec(
        *(
            sys.executable,
            "-m",
            "sectool.agent",
            "--state",
            str(paths.state),
            "--run",
            str(paths.run),
            "--try",
        ),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), TRIAL_S)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise SectoolError(f"the installed program did not answer within {TRIAL_S:.0f} s") from None
    said = _said(out)
    if process.returncode or "version" not in said:
        lines = err.decode("utf-8", "replace").strip().splitlines()
        why = str(said.get("error") or (lines[-1] if lines else f"status {process.returncode}"))
        raise SectoolError(
            f"the installed program does not start: {why}",
            str(said.get("hint") or "nothing has been changed: the daemon goes on as it is"),
        )
    return str(said["version"])


def _said(out: bytes) -> Mapping[str, Any]:
    try:
        said = json.loads(out)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def trial(paths: Paths) -> dict[str, object]:
    """What `try_installed` runs: everything a start needs, imported and read; nothing touched."""
    for module in ("nfq.worker", "store.__main__", "sectool.agent.daemon"):
        importlib.import_module(module)
    from sectool.agent.settings import load_settings
    from sectool.identity.enrolment import load_host

    try:
        load_settings(paths.settings)
        load_host(paths.state)
    except SectoolError as error:
        return {"error": error.message, "hint": error.hint}
    return {"version": __version__}
