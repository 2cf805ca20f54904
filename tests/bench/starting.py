"""How long after its start a workload has its identity: many at once, and one alone. Part of `./dev bench identity`.

Real processes, each with an executable of its own (so each is another workload, and each has to be hashed), in a
network namespace of their own; found, attested and given an SVID by the daemon's own discovery
(sectool.agent.discovery) in this process. Another process starts them, as on a host; both have the same clock. Needs
root and a kernel that tells news of processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from nfq import netns
from nfq.cgroup import Cgroups
from sectool.agent.discovery import Discovery
from sectool.agent.identities import Identities, Issued
from sectool.agent.runtimes import Places, Runtimes
from sectool.events import now_us
from sectool.identity.authority import HostAuthority
from sectool.identity.credential import Credential
from sectool.identity.workload import Facts, Workload, resolve

PATIENCE_S = 60.0
# Starts what it is told to, one path a line; says when each began and when the last was started; ends all at the end.
STARTER = """
import os, signal, sys, time
children = []
for line in sys.stdin:
    begun = []
    for path in line.split():
        begun.append(time.perf_counter())
        children.append(os.posix_spawn(path, [path, "600"], {}))
    print(*begun, time.perf_counter(), flush=True)
for pid in children:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
"""


class Starting:
    """A host's discovery, and when each workload got its first identity."""

    def __init__(self, host: HostAuthority, folder: Path, count: int) -> None:
        self.programs = _programs(folder, count)
        self.since: dict[str, float] = {}  # perf_counter, by executable
        self.host = host
        self.cpu_s = 0.0  # what finding them all took of this process
        self._waiting: set[str] = set()
        self._told = asyncio.Event()
        self._starter = subprocess.Popen(
            [sys.executable, "-ISc", STARTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.discovery = Discovery(
            Identities(self._resolve, self._issue, self._issued),
            Cgroups(),
            lambda _: None,
            ours=lambda _: False,
            runtimes=Runtimes(Places(sockets=(), bundles=(), storage=(), states=())),
        )

    def _resolve(self, facts: Facts) -> Workload:
        return resolve(facts, (), {}, host=self.host.host_name, host_labels={"env": "prod"})

    def _issue(self, workload: Workload) -> Credential:
        return self.host.issue(workload.path, workload.labels, now_us())

    def _issued(self, entry: Issued, before: Credential | None) -> None:
        self.since[entry.facts.executable] = time.perf_counter()
        self._waiting.discard(entry.facts.executable)
        if not self._waiting:
            self._told.set()

    async def start(self) -> None:
        """Until what runs already is known and the kernel tells news."""
        await self.discovery.start()
        while self.discovery.busy or not self.discovery.hearing:
            await asyncio.sleep(0.01)

    async def started(self, programs: list[Path]) -> list[float]:
        """Start programs and wait until all have an identity: when each began, and when the last had been started."""
        paths = [str(program) for program in programs]
        self._waiting.update(paths)
        self._told.clear()
        assert self._starter.stdin is not None
        assert self._starter.stdout is not None
        cpu = time.process_time()
        self._starter.stdin.write(" ".join(paths) + "\n")
        self._starter.stdin.flush()
        async with asyncio.timeout(PATIENCE_S):
            await self._told.wait()
        self.cpu_s = time.process_time() - cpu
        line = await asyncio.to_thread(self._starter.stdout.readline)
        return [float(word) for word in line.split()]

    async def close(self) -> None:
        """End everything."""
        await asyncio.to_thread(self._starter.communicate)
        await self.discovery.close()


def _programs(folder: Path, count: int) -> list[Path]:
    made = []
    for number in range(count):
        path = folder / f"program-{number}"
        shutil.copy("/usr/bin/sleep", path)
        with path.open("ab") as file:
            file.write(number.to_bytes(4, "big"))
        made.append(path)
    return made


@contextlib.contextmanager
def _place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder, netns.throwaway():
        yield Path(folder)


async def _together(starting: Starting) -> tuple[float, float, float]:
    await starting.start()
    try:
        begun = await starting.started(starting.programs)
        return begun[-1] - begun[0], max(starting.since.values()) - begun[0], starting.cpu_s
    finally:
        await starting.close()


async def _alone(starting: Starting) -> list[float]:
    await starting.start()
    found = []
    try:
        for program in starting.programs:
            begun = await starting.started([program])
            found.append(starting.since[str(program)] - begun[0])
        return sorted(found)
    finally:
        await starting.close()


def together(host: HostAuthority, count: int) -> tuple[float, float, float]:
    """Seconds from the first start of `count` workloads at once to the last start and last identity; CPU seconds."""
    with _place() as folder:
        return asyncio.run(_together(Starting(host, folder, count)))


def alone(host: HostAuthority, count: int) -> list[float]:
    """Seconds from start to identity of `count` workloads, one after the other, ascending."""
    with _place() as folder:
        return asyncio.run(_alone(Starting(host, folder, count)))
