"""What runs on this host: processes by workload, when each workload began and ended, what it listens on.

No I/O, and the clock is a parameter. A workload is *announced* (an event, a row in the control history) when it is
worth it: at once if a document or `sectool run` named it, if it is a container's, or has a connection or listens;
otherwise when it has lived for SETTLE_US. So shells and the programs they run for a moment leave no trail. It has
*ended* when its last process has been gone for LINGER_US: a program that is restarted at once goes on.

     place ──► running ──(last process gone)──► lingering ──(LINGER_US)──► ended
                  ▲                                 │
                  └──────────── place ──────────────┘

A process that becomes another program (exec) of the same name, by a document or `sectool run`, changes the workload; it
does not end it and begin another: a service that is started by way of a shell has neither started nor ended twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sectool.agent.processes import Process
from sectool.identity.workload import Facts, Workload

SETTLE_US = 1_000_000
LINGER_US = 1_000_000
CHANGES_US = 10_000_000  # changes of one workload are told that often at most
MAX_ENDED = 256  # ended workloads remembered for listings


@dataclass(slots=True)
class Running:
    """A workload with its processes. Times in UTC microseconds, 0 for never."""

    number: int  # workload id
    workload: Workload
    facts: Facts
    since_us: int
    pids: dict[int, Process] = field(default_factory=dict)
    last_us: int = 0  # when its last process was gone
    ended_us: int = 0
    announced: bool = False
    changed: bool = False  # since it was announced
    connected: bool = False  # a connection of it was seen
    ports: tuple[str, ...] = ()  # it listens on, as `tcp/80`
    package: str | None = None  # that owns its executable, '' for none; None: not looked for yet
    problem: str = ""  # why it has no identity
    before: int | None = (
        None  # the workload that its processes were, until rules, their user, cgroup or program changed
    )
    became: int | None = None
    noted: dict[str, Any] = field(default_factory=dict)  # as it was when last looked at
    told: dict[str, Any] = field(default_factory=dict)  # as it is on record
    told_us: int = 0

    @property
    def worth_a_word(self) -> bool:
        """Whether it is announced at once."""
        return self.connected or bool(self.ports) or bool(self.facts.more) or not self.workload.automatic

    def body(self) -> dict[str, Any]:
        """What the control history keeps of it."""
        return {
            "name": self.workload.name,
            "path": self.workload.path,
            "labels": dict(self.workload.labels),
            "origins": {key: str(origin) for key, origin in self.workload.origins.items()},
            "named_by": self.workload.named_by,
            "automatic": self.workload.automatic,
            "left_out": [
                {"label": f"{o.key}={o.value}", "from": o.name or str(o.origin), "by": str(o.by)}
                for o in self.workload.left_out
            ],
            "uid": self.facts.uid,
            "user": self.facts.user,
            "executable": self.facts.executable,
            "sha256": self.facts.sha256,
            "unit": self.facts.unit,
            "cgroup": self.facts.cgroup,
            "package": self.package or "",
            "ports": list(self.ports),
            "container": dict(self.facts.more),
            "problem": self.problem,
        }


@dataclass(frozen=True, slots=True)
class Turn:
    """What has become due: workloads to announce, whose record changed, that ended."""

    began: list[Running]
    changed: list[Running]
    ended: list[Running]
    complete: bool = False  # all that runs has been looked at


class Inventory:
    """All workloads that run, and the last that ended."""

    def __init__(self) -> None:
        self.by_id: dict[int, Running] = {}
        self.ended: dict[int, Running] = {}
        self._home: dict[int, int] = {}  # workload id by process id
        self._touched: dict[int, None] = {}

    def home(self, pid: int) -> Running | None:
        """The workload of the process under this id."""
        return self.by_id.get(self._home.get(pid, 0))

    def process(self, pid: int) -> Process | None:
        """The process placed under this id."""
        home = self.home(pid)
        return home.pids.get(pid) if home is not None else None

    def processes(self) -> Iterator[tuple[Process, Running]]:
        """All that are placed."""
        for running in self.by_id.values():
            for process in running.pids.values():
                yield process, running

    def place(self, process: Process, number: int, workload: Workload, facts: Facts, now_us: int) -> Running:
        """This process is of this workload now; what it was before it is no longer."""
        before = self.by_id.get(self._home.get(process.pid, 0))
        same = before is not None and before.pids.get(process.pid) == process
        running = self.by_id.get(number)
        if running is None:
            running = Running(number, workload, facts, min(process.started_us, now_us))
            again = self.ended.pop(number, None)
            if again is not None:
                running.package = again.package
            if same and before is not None:  # it goes on under another name
                running.since_us = now_us
            self.by_id[number] = running
        if before is not None and before is not running:
            if before.announced and (same or _goes_on(before, process, workload)):
                if not running.announced:
                    running.before, running.told = before.number, before.noted
                before.became = running.number
            self.remove(process.pid, now_us)
        running.pids[process.pid] = process
        running.workload, running.facts, running.last_us, running.became = workload, facts, 0, None
        self._home[process.pid] = number
        self._touched[number] = None
        return running

    def remove(self, pid: int, now_us: int) -> None:
        """The process has ended, or is no workload of this host any more."""
        running = self.by_id.get(self._home.pop(pid, 0))
        if running is None:
            return
        running.pids.pop(pid, None)
        if not running.pids:
            running.last_us = now_us
            self._touched[running.number] = None

    def connected(self, number: int, workload: Workload, facts: Facts, now_us: int) -> Running:
        """A connection of this workload was seen; its process may be gone already, or not be told apart."""
        running = self.by_id.get(number)
        if running is None:
            running = Running(number, workload, facts, now_us)
            running.last_us = now_us
            self.by_id[number] = running
        elif not running.pids:
            running.last_us = now_us
        running.connected = True
        self._touched[number] = None
        return running

    def listening(self, ports: dict[int, tuple[str, ...]]) -> None:
        """These are the listening ports of all workloads, by id."""
        for number, running in self.by_id.items():
            found = ports.get(number, ())
            if found != running.ports:
                running.ports = found
                self._touched[number] = None

    def owned(self, packages: dict[str, str]) -> None:
        """These executables are of these packages."""
        for number, running in self.by_id.items():
            found = packages.get(running.facts.executable)
            if found is not None and found != running.package:
                running.package = found
                self._touched[number] = None

    def due(self, now_us: int, *, complete: bool = False) -> Turn:
        """What is to be told now."""
        turn = Turn([], [], [], complete)
        for number in list(self._touched):
            running = self.by_id.get(number)
            if running is None or self._settled(running, now_us, turn):
                del self._touched[number]
        return turn

    def _settled(self, running: Running, now_us: int, turn: Turn) -> bool:
        """Tell what is due of this workload; whether it needs no look until something happens to it."""
        if not running.pids and not running.facts.executable and self._lived_in(running.facts.cgroup):
            running.last_us = now_us  # nobody can tell which of those in the cgroup it is
        if not running.pids and now_us - running.last_us >= LINGER_US:
            running.ended_us = running.last_us
            del self.by_id[running.number]
            if running.announced:
                turn.ended.append(running)
                self._remember(running)
            return True
        if not running.announced:
            if not running.worth_a_word and now_us - running.since_us < SETTLE_US:
                return False
            if not running.pids and not running.connected:
                return False
            running.announced, running.told_us = True, now_us
            running.noted = running.body()
            turn.began.append(running)
        elif (body := running.body()) != running.noted:
            if running.changed and now_us - running.told_us < CHANGES_US:
                return False  # it may change back
            running.noted, running.told_us, running.changed = body, now_us, True
            turn.changed.append(running)
        return bool(running.pids)

    def _lived_in(self, cgroup: str) -> bool:
        return any(process.cgroup == cgroup for process, _ in self.processes())

    def wanted(self, number: int) -> bool:
        """Whether the workload runs: its identity is kept fresh."""
        return number in self.by_id

    def _remember(self, running: Running) -> None:
        self.ended[running.number] = running
        while len(self.ended) > MAX_ENDED:
            del self.ended[next(iter(self.ended))]

    def missing_packages(self) -> set[str]:
        """Executables whose package has not been looked for."""
        return {
            r.facts.executable
            for r in self.by_id.values()
            if not r.package and r.facts.executable.startswith("/")
        }


def _goes_on(before: Running, process: Process, workload: Workload) -> bool:
    """Whether the only process of `before` is another program now, by the same name."""
    known = before.pids.get(process.pid)
    return (
        known is not None
        and known.started == process.started
        and len(before.pids) == 1
        and before.workload.path == workload.path
    )


def with_ports(found: Iterable[tuple[int, str]]) -> dict[int, tuple[str, ...]]:
    """Pairs of workload id and port as what `Inventory.listening` takes."""
    ports: dict[int, set[str]] = {}
    for number, port in found:
        ports.setdefault(number, set()).add(port)
    return {number: tuple(sorted(names, key=_by_number)) for number, names in ports.items()}


def _by_number(port: str) -> tuple[str, int]:
    protocol, _, number = port.partition("/")
    return protocol, int(number)
