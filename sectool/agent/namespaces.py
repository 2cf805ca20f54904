"""Enforcing inside other network namespaces, from outside: containers and named namespaces that the settings choose.

    discovery finds a process elsewhere ─► chosen by `enforce_inside`? ─► a packet worker joins that namespace
        its queues, sockets and rules are made inside; identities, policy and store are this daemon's

Opt-in, because who enforces inside a container decides for it. The worker comes first and the rules then, as on the
host. When the last process inside has ended the worker ends, and the namespace with it; `down` takes the rules away;
after a crash they stay, and what runs inside opens no connection until a daemon is back. Host names are known as on the
host: a container that asks a resolver of its own needs that one in `resolvers`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fnmatch
import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from nfq import netns, rules
from sectool.agent.worker import Setup, Worker
from sectool.errors import SectoolError

if TYPE_CHECKING:
    from sectool.agent.daemon import Daemon
    from sectool.agent.processes import Process
    from sectool.identity.containers import Container

log = logging.getLogger("sectool.agent")

T = TypeVar("T")

NAMED: Final = Path("/run/netns")
FIRST_NUMBER: Final = 1000  # of their workers, in messages
EMPTY_S: Final = 3.0  # without a process before a namespace is given up
AGAIN_S: Final = 5.0  # before one that was not chosen, or failed, is looked at again
WORKER_START_S: Final = 20.0
WORKER_GRACE_S: Final = 3.0
MAX_OTHERS: Final = 4096


@dataclass(slots=True)
class Space:
    """A namespace that is enforced in; `fd` keeps it while we need it."""

    inode: int
    name: str
    fd: int
    folder: Path
    number: int
    lock: netns.NamespaceLock
    seen: float  # when a process was in it (monotonic seconds)
    worker: Worker | None = None
    installed: bool = False
    left: bool = False  # rules of a daemon before are inside

    @property
    def path(self) -> str:
        """The namespace as a file, for us and our children."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"


@dataclass(slots=True)
class Choice:
    """What the settings choose: `container:NAME`, `pod:NAMESPACE/NAME`, `netns:NAME`, each with * and ?."""

    patterns: tuple[str, ...] = ()

    def of_container(self, found: Container) -> str:
        """How the container is called here if it is chosen, else ''."""
        for kind, pattern in self._of("container", "pod"):
            name = found.name or found.ref.id[:12]
            if kind == "container" and any(
                fnmatch.fnmatchcase(each, pattern) for each in (found.name, found.ref.id) if each
            ):
                return f"container {name}"
            if kind == "pod" and found.pod and fnmatch.fnmatchcase(f"{found.namespace}/{found.pod}", pattern):
                return f"pod {found.namespace}/{found.pod}"
        return ""

    def of_name(self, inode: int, folder: Path = NAMED) -> str:
        """The same of a namespace that has a name in /run/netns."""
        for _, pattern in self._of("netns"):
            with contextlib.suppress(OSError):
                for path in sorted(folder.iterdir()):
                    if fnmatch.fnmatchcase(path.name, pattern) and path.stat().st_ino == inode:
                        return f"namespace {path.name}"
        return ""

    def _of(self, *kinds: str) -> list[tuple[str, str]]:
        pairs = (pattern.partition(":") for pattern in self.patterns)
        return [(kind, pattern) for kind, _, pattern in pairs if kind in kinds]


@dataclass(slots=True)
class Namespaces:
    """All that this daemon enforces in, beside its own."""

    daemon: Daemon
    spaces: dict[int, Space] = field(default_factory=dict)
    _others: dict[int, float] = field(default_factory=dict)  # not now, by inode: until when
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _next: int = FIRST_NUMBER
    _closing: bool = False

    @property
    def choice(self) -> Choice:
        """What the settings say."""
        return Choice(self.daemon.settings.enforce_inside)

    def consider(self, process: Process) -> None:
        """A process in a namespace that is not enforced in was found."""
        inode, now = process.netns, time.monotonic()
        if self._closing or not self.choice.patterns or inode in self.spaces:
            return
        if self._others.get(inode, 0.0) > now:
            return
        if len(self._others) >= MAX_OTHERS:
            self._others.clear()
        self._others[inode] = now + AGAIN_S
        if name := self.choice.of_name(inode):
            self._begin(process, name)
            return

        def then(found: Container | None) -> None:
            if found is not None and (called := self.choice.of_container(found)):
                self._begin(process, called)

        self.daemon.discovery.container(process.cgroup, then)

    def _begin(self, process: Process, name: str) -> None:
        if self._closing or process.netns in self.spaces:
            return
        try:
            fd = os.open(f"/proc/{process.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return  # it has ended
        if os.fstat(fd).st_ino != process.netns:
            os.close(fd)
            return
        run = self.daemon.paths.run
        space = Space(
            process.netns,
            name,
            fd,
            run / f"ns-{process.netns}",
            self._next,
            netns.NamespaceLock(run),
            time.monotonic(),
        )
        self._next += 1
        self.spaces[space.inode] = space
        task = asyncio.create_task(self._start(space), name=f"enforce in {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _start(self, space: Space) -> None:
        daemon, what = self.daemon, f"enforcing in {space.name}"
        try:
            space.folder.mkdir(mode=0o700, exist_ok=True)
            space.left = await asyncio.to_thread(_inside, space, rules.present)
            await asyncio.to_thread(_inside, space, lambda: _lock(space))
            worker = Worker(
                space.number,
                Setup(lambda: self._config(space), daemon.bundle, daemon.policy_text, daemon.revoked.to_wire),
                identify=daemon.identify,
                changed=lambda why: self._changed(space, why),
                nursery=daemon.nursery,
            )
            space.worker = worker
            await worker.begin(WORKER_START_S)
            async with daemon.activation:  # a policy that came meanwhile would be missed otherwise
                text = daemon.policy_text()
                if worker.revision != text.revision:
                    await worker.activate(text, daemon.settings.activation_timeout_s)
                await asyncio.to_thread(_inside, space, lambda: rules.install(self._rules(), space.folder))
                space.installed = True
                # What may have changed since the start, while it was none of those that are told.
                worker.send({"t": "mode", **daemon.modes.told()})
                worker.resettle()
                daemon.tell_trust(worker)
                daemon.workers.append(worker)
        except (SectoolError, OSError) as error:
            text_of = error.message if isinstance(error, SectoolError) else str(error)
            log.error("not %s: %s", what, text_of)
            daemon.health.raise_(what, text_of)
            await self._end(space, remove=True)
            return
        daemon.health.clear(what)
        daemon.discovery.inside(space.inode, space.path)
        log.info("%s (network namespace %d)", what, space.inode)

    def _rules(self) -> rules.RulesConfig:
        return replace(self.daemon.mode_rules, workers=1)

    async def follow_mode(self) -> None:
        """Have the kernel rules inside be as the mode wants them. Raises SectoolError once all have been tried."""
        failed = []
        for space in list(self.spaces.values()):
            if not space.installed:
                continue
            try:
                await asyncio.to_thread(_inside, space, partial(rules.install, self._rules(), space.folder))
            except (SectoolError, OSError) as error:
                if space.inode in self.spaces:  # else it has gone meanwhile, with its rules
                    failed.append(
                        f"{space.name}: {error.message if isinstance(error, SectoolError) else error}"
                    )
        if failed:
            raise SectoolError("; ".join(failed), "choose the mode again")

    def _config(self, space: Space) -> dict[str, Any]:
        """The host's, but for where its files are and that it is alone."""
        keys = self.daemon.keys
        return {
            **self.daemon.worker_config(0),
            "workers": 1,
            "netns": space.path,
            "run_dir": str(space.folder),
            "ring": str(self.daemon.paths.run / f"ring-ns-{space.inode}"),
            "journal": str(keys / f"flows-ns-{space.inode}"),
            "journals": [],
            "adopt": not space.installed and not space.left,
        }

    def _changed(self, space: Space, why: str) -> None:
        if self._closing or space.inode not in self.spaces or not space.installed:
            return
        what = f"enforcing in {space.name}"
        if why:
            self.daemon.health.raise_(what, why)
        else:
            self.daemon.health.clear(what)

    def sweep(self) -> None:
        """Give up namespaces in which nothing runs any more, and those that are not chosen any more."""
        lived_in = {process.netns for process, _ in self.daemon.discovery.inventory.processes()}
        now = time.monotonic()
        for space in list(self.spaces.values()):
            if space.inode in lived_in or self.choice.of_name(space.inode):
                space.seen = now
            elif space.installed and now - space.seen > EMPTY_S:
                log.info("nothing runs in %s any more", space.name)
                task = asyncio.create_task(self._end(space, remove=True))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
                space.seen = now

    async def _end(self, space: Space, *, remove: bool) -> None:
        """Stop the worker, first taking the rules away if `remove`, and let go of the namespace."""
        daemon = self.daemon
        daemon.discovery.outside(space.inode)
        if remove:
            with contextlib.suppress(SectoolError, OSError):
                await asyncio.to_thread(_inside, space, lambda: rules.remove(space.folder))
        if space.worker is not None:
            if space.worker in daemon.workers:
                daemon.workers.remove(space.worker)
            await space.worker.stop(WORKER_GRACE_S)
        with contextlib.suppress(OSError):
            space.lock.release()
        if remove:
            shutil.rmtree(space.folder, ignore_errors=True)
            for path in (
                daemon.paths.run / f"ring-ns-{space.inode}",
                *daemon.keys.glob(f"flows-ns-{space.inode}*"),
            ):
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            os.close(space.fd)
        self.spaces.pop(space.inode, None)

    async def close(self) -> None:
        """Stop all. Rules inside stay unless the daemon takes its own away, too."""
        self._closing = True
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for space in list(self.spaces.values()):
            await self._end(space, remove=self.daemon.remove_rules)

    def describe(self) -> list[dict[str, Any]]:
        """For `status`."""
        return [
            {
                "namespace": space.inode,
                "name": space.name,
                "enforcing": space.installed and space.worker is not None and space.worker.enforcing,
                "pid": space.worker.child.pid if space.worker is not None else None,
            }
            for space in self.spaces.values()
        ]


def _inside(space: Space, work: Callable[[], T]) -> T:
    """Do something in the namespace; for a thread of its own."""
    with netns.enter(space.path):
        return work()


def _lock(space: Space) -> None:
    """Keep other daemons out. What runs inside could hold the name, too, and must not keep us out by that."""
    try:
        space.lock.acquire()
    except SectoolError as error:
        log.warning("%s: %s; going on", space.name, error.message)


def clean(run: Path, proc: Path = Path("/proc")) -> list[str]:
    """Take the rules of a dead daemon out of the namespaces it enforced in; what was removed, in words."""
    left = {int(f.name[3:]): f for f in run.glob("ns-*") if f.name[3:].isdecimal()}
    removed = []
    for entry in proc.iterdir() if left else ():
        with contextlib.suppress(OSError, SectoolError):
            inode = (entry / "ns" / "net").stat().st_ino if entry.name.isdecimal() else 0
            if inode in left:
                folder = left.pop(inode)
                with netns.enter(int(entry.name)):
                    rules.remove(folder)
                removed.append(f"kernel rules in network namespace {inode}")
                shutil.rmtree(folder, ignore_errors=True)
    for folder in left.values():
        shutil.rmtree(folder, ignore_errors=True)
    for path in run.glob("ring-ns-*"):
        path.unlink(missing_ok=True)
    return removed
