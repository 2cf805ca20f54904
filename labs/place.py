"""Where a process of the lab runs (network namespace, cgroup v2, user), and how all of them are ended."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from labs import netns
from sectool.errors import SectoolError

MARK = (
    "SECTOOL_LAB"  # environment variable of everything the lab starts: descendants keep it wherever they move
)


@cache
def cgroup_mount() -> Path:
    """Where cgroup v2 is mounted: /sys/fs/cgroup, or /sys/fs/cgroup/unified on hybrid systems."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise SectoolError("cgroup v2 is not mounted", "mount it: mount -t cgroup2 none /sys/fs/cgroup/unified")


def in_memory() -> Path:
    """Where run folders lie on a tmpfs, as keys of encrypted flows must: /run, or /dev/shm where /run is on a disk."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text(encoding="utf-8").splitlines()]
    tmpfs = {mount[1] for mount in mounts if mount[2] in ("tmpfs", "ramfs")}
    return Path("/run" if "/run" in tmpfs or "/dev/shm" not in tmpfs else "/dev/shm")


def cgroup_of(lab: str, *parts: str) -> Path:
    """The cgroup folder of a lab, of a host in it, or of a service on that host."""
    return cgroup_mount().joinpath("sectool-lab", lab, *parts)


@dataclass(frozen=True, slots=True)
class Place:
    """One spot on one host."""

    lab: str
    host: str
    group: str  # sub-cgroup of the host: `sectool`, `nginx`, `shell`, ...
    user: str = "root"
    own_ipc: bool = False  # System V shared memory of its own, gone with the last process

    def argv(self, command: list[str]) -> list[str]:
        """The command line that runs `command` there: a shell joins the cgroup, then becomes the command."""
        folder = cgroup_of(self.lab, self.host, self.group)
        folder.mkdir(parents=True, exist_ok=True)
        user = (
            []
            if self.user == "root"
            else ["setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--init-groups"]
        )
        ipc = ["unshare", "--ipc"] if self.own_ipc else []
        join = 'echo $$ >"$0"/cgroup.procs && exec "$@"'
        inside = ["nsenter", f"--net={netns.path(self.lab, self.host)}", *ipc, *user]
        return ["sh", "-c", join, str(folder), *inside, *command]

    def environment(self, **more: str) -> dict[str, str]:
        """A small environment of the lab's own; of the caller's, only path and terminal come along."""
        kept = {name: os.environ[name] for name in ("PATH", "TERM", "NO_COLOR") if name in os.environ}
        return {**kept, "LC_ALL": "C.UTF-8", "HOME": "/", MARK: self.lab, **more}


def _groups(lab: str) -> list[Path]:
    """The lab's cgroup folders, deepest first."""
    top = cgroup_of(lab)
    return sorted((Path(folder) for folder, _, _ in os.walk(top)), reverse=True)


def processes(lab: str) -> set[int]:
    """Every process of the lab: in its cgroups, in its namespaces, or carrying its mark. Never this one."""
    found = netns.processes(netns.inodes(lab))
    for group in _groups(lab):
        try:
            found.update(int(pid) for pid in (group / "cgroup.procs").read_text().split())
        except OSError:
            continue
    mark = f"{MARK}={lab}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.add(int(entry.name))
            except OSError:
                continue
    return found - {os.getpid(), os.getppid()}


def end_processes(lab: str, patience: float = 5.0) -> None:
    """SIGTERM, then after `patience` seconds SIGKILL, to every process of the lab.

    Raises SectoolError naming what would not die.
    """
    for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
        end = time.monotonic() + seconds
        for pid in processes(lab):
            _signal(pid, number)
        while left := processes(lab):
            if time.monotonic() > end:
                break
            if number == signal.SIGKILL:
                for pid in left:
                    _signal(pid, number)
            time.sleep(0.02)
        else:
            return
    raise SectoolError(f"these processes of lab {lab} cannot be ended: {sorted(processes(lab))}")


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def remove_cgroups(lab: str) -> None:
    """Remove the lab's cgroup folders, and that of all labs when it was the last. Processes must be gone."""
    end = time.monotonic() + 5.0
    while groups := _groups(lab):
        for group in groups:
            try:
                group.rmdir()
            except OSError:  # the kernel lets go of a dead process a moment after it is gone from /proc
                continue
        if time.monotonic() > end:
            raise SectoolError(f"cgroup {cgroup_of(lab)} cannot be removed; something still runs in it")
        time.sleep(0.01)
    try:
        cgroup_of(lab).parent.rmdir()
    except OSError:  # another lab is up, or there never was one
        return
