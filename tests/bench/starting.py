"""How long after its start a workload has its identity: many at once, and one alone. Part of `./dev bench identity`.

Real processes, each with an executable of its own (so each is another workload, and each has to be hashed), in a
network namespace of their own; found, attested and given an SVID by the daemon's own discovery
(sectool.agent.discovery), all in this process. Needs root and a kernel that tells news of processes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
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


class Starting:
    """A host's discovery, and when each workload got its first identity."""

    def __init__(self, host: HostAuthority, folder: Path, count: int) -> None:
        self.programs = _programs(folder, count)
        self.since: dict[str, float] = {}  # perf_counter, by executable
        self.host = host
        self._told = asyncio.Event()
        self._children: list[int] = []
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
        self._told.set()

    async def start(self) -> None:
        """Until what runs already is known and the kernel tells news."""
        await self.discovery.start()
        while self.discovery.busy or not self.discovery.hearing:
            await asyncio.sleep(0.01)

    def spawn(self, program: Path) -> None:
        """Start one program."""
        self._children.append(os.posix_spawn(program, [str(program), "600"], {}))

    async def known(self, programs: list[Path]) -> None:
        """Wait until all of them have an identity."""
        async with asyncio.timeout(PATIENCE_S):
            while not all(str(program) in self.since for program in programs):
                self._told.clear()
                await self._told.wait()

    async def close(self) -> None:
        """End everything."""
        for pid in self._children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
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


async def _together(starting: Starting) -> tuple[float, float]:
    await starting.start()
    try:
        begin = time.perf_counter()
        for program in starting.programs:
            starting.spawn(program)
        spawned = time.perf_counter() - begin
        await starting.known(starting.programs)
        return spawned, max(starting.since[str(p)] for p in starting.programs) - begin
    finally:
        await starting.close()


async def _alone(starting: Starting) -> list[float]:
    await starting.start()
    found = []
    try:
        for program in starting.programs:
            begin = time.perf_counter()
            starting.spawn(program)
            await starting.known([program])
            found.append(time.perf_counter() - begin)
        return sorted(found)
    finally:
        await starting.close()


def together(host: HostAuthority, count: int) -> tuple[float, float]:
    """Seconds from the first start of `count` workloads at once to the last start, and to the last identity."""
    with _place() as folder:
        return asyncio.run(_together(Starting(host, folder, count)))


def alone(host: HostAuthority, count: int) -> list[float]:
    """Seconds from start to identity of `count` workloads, one after the other, ascending."""
    with _place() as folder:
        return asyncio.run(_alone(Starting(host, folder, count)))
