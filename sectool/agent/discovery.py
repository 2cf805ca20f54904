"""Finding the workloads of this host while they run, so that each has its identity before its first connection.

    proc connector ─► look at /proc ─► facts (hash in the background) ─► container's metadata ─► workload ─► SVID
    a look at all of /proc now and then ─┘                                          in small steps between other work

The kernel tells forks, execs, changes of user and ends. It does not tell that a process moved to another cgroup, and
where the connector is out of reach it tells nothing: so all of /proc is looked through again now and then, as often as
costs SHARE of the time. What is found here decides nothing: a connection is attributed by the packet path when it opens
(nfq.attribution), from facts as they are then. This is for the SVID to be ready, and for people.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from nfq.attestation import Attestor, Attributed
from nfq.cgroup import Cgroups
from sectool.agent.inventory import Inventory
from sectool.agent.kubernetes import Kubernetes
from sectool.agent.listeners import Listeners
from sectool.agent.packages import Packages
from sectool.agent.processes import Looker, Process
from sectool.agent.procevents import ProcEvents
from sectool.agent.runtimes import Places, Runtimes
from sectool.errors import SectoolError
from sectool.events import now_us
from sectool.identity.containers import Container, ContainerRef, container_of
from sectool.identity.workload import Facts

if TYPE_CHECKING:
    from sectool.agent.identities import Identities
    from sectool.agent.inventory import Turn

log = logging.getLogger("sectool.agent")

STEP_S: Final = 0.004  # of work before others get their turn
GATHER_S: Final = 0.01  # news of processes are read that often at most
TURN_S: Final = 0.25  # starts and ends are told that often
LISTENERS_S: Final = 2.0
SHARE: Final = 50  # what looks at everything is repeated when that many times its duration have passed
LOOK_S: Final = 1.0  # the shortest time between two of them without news from the kernel, and
LOOK_HEARING_S: Final = 3.0  # with them
POSTPONED_S: Final = 3.0  # at most, while processes that the kernel told of wait to be looked at
ATTESTING: Final = 128  # executables being hashed at once
CONTAINERS: Final = 4096  # remembered
ASK_AGAIN_S: Final = 5.0  # for a container that nobody knew


class Discovery:
    """The workloads of this host's network namespace. Lives in the agent's event loop."""

    def __init__(
        self,
        identities: Identities,
        cgroups: Cgroups,
        told: Callable[[Turn], None],
        moved: Callable[[tuple[int, ...], int, int], None] = lambda key, before, now: None,
        *,
        runtimes: Runtimes | None = None,
        kubernetes: Kubernetes | None = None,
        packages: Packages | None = None,
        ours: Callable[[Process], bool] | None = None,
        proc: Path = Path("/proc"),
    ) -> None:
        """`told` hears of starts, changes and ends; `ours`: no workload (default: this process and its children).

        `moved` hears of socket keys (nfq.attestation.Key) that are another workload's than was found before.
        """
        self.inventory = Inventory()
        self.elsewhere: Callable[[Process], None] = lambda _: None  # hears of processes in other namespaces
        # Network namespaces by inode, with the path to enter them by; '' for the one we are in.
        self._namespaces = {os.stat(proc / "self/ns/net").st_ino: ""}  # noqa: PTH116
        self.hearing = False
        self.look_s = 0.0  # what the last look at everything took
        self._identities = identities
        self._told = told
        self._moved = moved
        self._looker = Looker(cgroups, proc)
        self._cgroups = cgroups
        self._attestor = Attestor(cgroups, os.fspath(proc))
        self._runtimes = runtimes or Runtimes(Places(cgroups=cgroups.mount), kubernetes or Kubernetes())
        self._packages = packages or Packages()
        self._containers: OrderedDict[str, tuple[Container, float]] = OrderedDict()
        self._asking: dict[str, asyncio.Future[Container]] = {}
        self._made: object = None  # containers by cgroup, when they were last compared with what runs
        self._next_packages = 0.0  # monotonic seconds
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="runtimes")
        self._changed: OrderedDict[int, None] = OrderedDict()  # processes to look at
        self._ready: deque[tuple[Process, Facts]] = deque()
        self._attesting = 0
        self._working = False
        self._closing = False
        self._listeners = Listeners(proc)
        self._news: ProcEvents | None = None
        self._tasks: list[asyncio.Task[None]] = []
        own = os.getpid()
        self._ours = ours or (lambda process: own in (process.pid, process.parent))

    # -- life -------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Find what runs, and go on from there. Returns at once; `settled` waits for the first look."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._attestor.background.fd, self._attested)
        try:
            self._news = ProcEvents()
            loop.add_reader(self._news.fd, self._hear)
        except SectoolError as error:
            log.info("%s; looking at /proc every second instead", error.message)
        self._runtimes.kubernetes.look()
        self._changed.update(dict.fromkeys(self._looker.pids()))
        self._work_soon()
        self._tasks.append(asyncio.create_task(self._watch(), name="watch workloads"))

    async def close(self) -> None:
        """Look no more; what is known stays readable."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._attestor.background.fd)
        if self._news is not None:
            loop.remove_reader(self._news.fd)
            self._news.close()
        self._attestor.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    @property
    def busy(self) -> bool:
        """Whether processes wait to be looked at, attested or given an identity."""
        return bool(self._changed or self._ready or self._attesting or self._asking)

    def see(self, pids: Iterable[int]) -> None:
        """Something happened to these processes."""
        self._changed.update(dict.fromkeys(pids))
        self._work_soon()

    def resolve_again(self) -> None:
        """What makes a workload of facts has changed: documents, labels, programs."""
        self._ready.extend((process, running.facts) for process, running in self.inventory.processes())
        self._work_soon()

    def inside(self, inode: int, path: str) -> None:
        """This network namespace is ours, too; `path` is to enter it by."""
        self._namespaces[inode] = path
        self.see(self._looker.pids())

    def outside(self, inode: int) -> None:
        """It is ours no more."""
        self._namespaces.pop(inode, None)

    def connected(self, number: int) -> None:
        """The workload behind this identity has a connection."""
        entry = self._identities.by_workload.get(number)
        if entry is not None:
            self.inventory.connected(number, entry.workload, entry.facts, now_us())

    # -- news -------------------------------------------------------------------------------------------------

    def _hear(self) -> None:
        """Not for each of a thousand forks: the kernel keeps the news for us."""
        loop = asyncio.get_running_loop()
        assert self._news is not None
        loop.remove_reader(self._news.fd)
        loop.call_later(GATHER_S, self._read_news)

    def _read_news(self) -> None:
        if self._closing or self._news is None:
            return
        try:
            news = self._news.read()
        except OSError as error:
            log.warning("no more news of processes from the kernel: %s", error.strerror)
            self._news.close()
            self._news, self.hearing = None, False
            return
        self.hearing = self._news.heard
        self.see(self._looker.pids() if news.lost else news.changed | news.ended)
        loop = asyncio.get_running_loop()
        if news.more:
            loop.call_soon(self._read_news)
        else:
            loop.add_reader(self._news.fd, self._hear)

    async def _watch(self) -> None:
        next_look = next_listeners = time.monotonic()
        looked = False
        while True:
            await asyncio.sleep(TURN_S)
            try:
                now = time.monotonic()
                if now >= next_listeners:
                    self.inventory.listening(self._listeners.look(self.inventory, self._namespaces.values()))
                    await self._find_packages()
                    next_listeners = now + LISTENERS_S
                self._told(self.inventory.due(now_us(), complete=looked and not self.busy))
                if now >= next_look and (not self._changed or now >= next_look + POSTPONED_S):
                    await self._look_at_all()
                    looked = True
                    pause = LOOK_HEARING_S if self.hearing else LOOK_S
                    next_look = time.monotonic() + max(pause, SHARE * self.look_s)
            except Exception:  # one bad turn must not end discovery for good
                log.exception("looking for workloads failed")

    async def _look_at_all(self) -> None:
        spent, began = 0.0, time.perf_counter()
        pids = set(self._looker.pids())
        known = {process.pid for process, _ in self.inventory.processes()}
        for pid in [*pids, *(known - pids)]:
            self._look(pid)
            if time.perf_counter() - began > STEP_S:
                spent += time.perf_counter() - began
                await asyncio.sleep(0)
                began = time.perf_counter()
        self._look_at_containers()
        self.look_s = spent + time.perf_counter() - began

    def _look_at_containers(self) -> None:
        """A runtime may tell of a container only after its first process runs: ask again for those it did not know."""
        if self._runtimes.kubernetes.look():
            self._containers = OrderedDict(
                (identity, kept) for identity, kept in self._containers.items() if not kept[0].ref.pod_uid
            )
        made = self._runtimes.by_cgroup()
        new = made is not self._made
        self._made = made
        for process, running in list(self.inventory.processes()):
            identity = dict(running.facts.more).get("container.id")
            if identity is None:
                again = new and self._container_ref(process.cgroup) is not None
            else:
                known = self._containers.get(identity)
                again = known is None or (not known[0].told_by and time.monotonic() >= known[1])
            if again:
                self._attest(process)

    # -- from a process to its workload -----------------------------------------------------------------------

    def _work_soon(self) -> None:
        if not self._working and not self._closing:
            self._working = True
            asyncio.get_running_loop().call_soon(self._work)

    def _work(self) -> None:
        """A few milliseconds of work; identities first, since they are what somebody may wait for."""
        self._working = False
        if self._closing:
            return
        until = time.perf_counter() + STEP_S
        while time.perf_counter() < until:
            if self._ready:
                process, facts = self._ready.popleft()
                self._place(process, facts)
            elif self._changed and self._attesting < ATTESTING:
                self._look(self._changed.popitem(last=False)[0])
            else:
                return
        self._work_soon()

    def _look(self, pid: int) -> None:
        process = self._looker.look(pid)
        if process is None or self._ours(process):
            self.inventory.remove(pid, now_us())
        elif process.netns not in self._namespaces:
            self.inventory.remove(pid, now_us())
            self.elsewhere(process)
        elif self.inventory.process(pid) != process:
            self._attest(process)

    def _attest(self, process: Process) -> None:
        what = Attributed(
            process.key, process.pid, process.uid, process.cgroup_id, process.pid, self._attestor.now
        )
        self._attesting += 1

        def done(facts: Facts | None) -> None:
            self._attesting -= 1
            if facts is not None:
                self.with_container(facts, lambda full: self._attested_as(process, full))

        self._attestor.later(what, done)

    def _attested(self) -> None:
        self._attestor.background.completed()
        self._work_soon()

    def _attested_as(self, process: Process, facts: Facts) -> None:
        self._ready.append((process, facts))
        self._work_soon()

    def _place(self, process: Process, facts: Facts) -> None:
        """The process belongs to this workload now, which has an identity from now on."""
        found = self._identities.resolve(facts)
        if isinstance(found, SectoolError):
            log.warning("no workload for process %d (%s): %s", process.pid, facts.executable, found.message)
            self.inventory.remove(process.pid, now_us())
            return
        number, workload = found
        before = self.inventory.home(process.pid)
        running = self.inventory.place(process, number, workload, facts, now_us())
        try:
            self._identities.ahead(number, workload, facts)
            running.problem = ""
            if before is not None and before.number != number:
                self._moved(process.key, before.number, number)
        except SectoolError as error:
            if running.problem != error.message:
                log.warning("no identity for %s: %s", workload.name, error.message)
            running.problem = error.message

    # -- containers -------------------------------------------------------------------------------------------

    def with_container(self, facts: Facts, then: Callable[[Facts], None]) -> None:
        """Call `then` with these facts and those of the container behind them: at once, or once it is asked for."""
        self.container(
            facts.cgroup,
            lambda found: then(facts if found is None else replace(facts, more=found.facts())),
        )

    def container(self, cgroup: str, then: Callable[[Container | None], None]) -> None:
        """Call `then` with the container that a cgroup belongs to: at once, or when its runtime has answered."""
        ref = self._container_ref(cgroup)
        if ref is None:
            then(None)
            return
        known = self._containers.get(ref.id)
        if known is not None and (known[0].told_by or time.monotonic() < known[1]):
            then(known[0])
            return
        asking = self._asking.get(ref.id)
        if asking is None:
            asking = asyncio.get_running_loop().run_in_executor(self._threads, self._runtimes.read, ref)
            self._asking[ref.id] = asking
            asking.add_done_callback(lambda _: self._asking.pop(ref.id, None))

        def answered(answer: asyncio.Future[Container]) -> None:
            if answer.cancelled() or self._closing:
                return
            error = answer.exception()
            if error is not None:
                log.warning("container %s: %s", ref.id[:12], error)
            found = Container(ref) if error is not None else answer.result()
            self._remember(found)
            then(found)

        asking.add_done_callback(answered)

    def _container_ref(self, cgroup: str) -> ContainerRef | None:
        by_name = container_of(cgroup)
        if by_name is not None:
            return by_name
        made = self._runtimes.by_cgroup()
        path = cgroup.rstrip("/")
        while made and path:
            try:
                found = made.get(self._cgroups.id_of(path))
            except SectoolError:
                found = None
            if found is not None:
                return found
            path = path.rpartition("/")[0]
        return None

    def _remember(self, found: Container) -> None:
        self._containers[found.ref.id] = found, time.monotonic() + ASK_AGAIN_S
        self._containers.move_to_end(found.ref.id)
        while len(self._containers) > CONTAINERS:
            self._containers.popitem(last=False)

    @property
    def problem(self) -> str:
        """What an operator should know of the file of namespaces; '' when all is well."""
        return self._runtimes.kubernetes.problem

    def containers(self) -> list[Container]:
        """Those with a process that runs."""
        ids = {dict(r.facts.more).get("container.id") for r in self.inventory.by_id.values()}
        return [found for found, _ in self._containers.values() if found.ref.id in ids]

    # -- packages --------------------------------------------------------------------------------------------------

    async def _find_packages(self) -> None:
        missing = self.inventory.missing_packages()
        known = {path: owner for path in missing if (owner := self._packages.known(path)) is not None}
        self.inventory.owned(known)
        missing -= known.keys()
        if missing and time.monotonic() >= self._next_packages:
            began = time.monotonic()
            self.inventory.owned(await asyncio.to_thread(self._packages.owners, missing))
            took = time.monotonic() - began
            self._next_packages = began + SHARE * took  # all lists are read, however few the files
