"""One process as /proc shows it: what tells it apart from others, read so that a reused process id is noticed."""
# A Path costs as much as the system call, and this runs for every process.
# ruff: noqa: PTH116

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final, NamedTuple

from nfq.attestation import Executable
from nfq.cgroup import Cgroups
from sectool.errors import SectoolError

_KERNEL_THREAD: Final = 0x00200000  # PF_KTHREAD (include/linux/sched.h)
_TICKS: Final = os.sysconf("SC_CLK_TCK")


class Process(NamedTuple):
    """A process. `started`: clock ticks since boot, with the id its name for ever; `uid`: its file system one."""

    pid: int
    started: int
    parent: int
    uid: int
    netns: int  # inode of its network namespace
    cgroup: str
    cgroup_id: int
    executable: Executable

    @property
    def key(self) -> tuple[int, int, int, int, int]:
        """What the packet path knows its sockets by (nfq.attestation.Key)."""
        return (self.cgroup_id, self.uid, *self.executable)

    @property
    def started_us(self) -> int:
        """When it began, UTC microseconds, as exact as the kernel tells (a clock tick)."""
        boot = time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        return (boot + self.started * 1_000_000_000 // _TICKS) // 1000


class Looker:
    """Reads processes from /proc; remembers ids of cgroups."""

    def __init__(self, cgroups: Cgroups, proc: Path = Path("/proc")) -> None:
        self._cgroups = cgroups
        self._proc = os.fspath(proc)

    def pids(self) -> list[int]:
        """All process ids there are."""
        return [int(name) for name in os.listdir(self._proc) if name.isdecimal()]  # noqa: PTH208

    def look(self, pid: int) -> Process | None:
        """The process; None when it has ended, is a kernel thread, or changed while being looked at."""
        folder = f"{self._proc}/{pid}"
        try:
            before = self._stat(folder)
            if before is None:
                return None
            exe = os.stat(f"{folder}/exe")
            uid = _fsuid(_read(f"{folder}/status"))
            netns = os.stat(f"{folder}/ns/net").st_ino
            cgroup = _cgroup(_read(f"{folder}/cgroup"))
            identity = self._cgroups.id_of(cgroup)
            if self._stat(folder) != before or os.stat(f"{folder}/exe")[:3] != exe[:3]:
                return None
        except (OSError, ValueError, IndexError, SectoolError):
            return None
        stamp = exe.st_dev, exe.st_ino, exe.st_ctime_ns
        return Process(pid, before[1], before[0], uid, netns, cgroup, identity, stamp)

    @staticmethod
    def _stat(folder: str) -> tuple[int, int] | None:
        """Parent and start time; None for kernel threads and what has ended (proc_pid_stat(5))."""
        fields = _read(f"{folder}/stat").rpartition(b") ")[2].split()
        if fields[0] in (b"Z", b"X") or int(fields[6]) & _KERNEL_THREAD:
            return None
        return int(fields[1]), int(fields[19])


def _read(path: str) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 8192)
    finally:
        os.close(fd)


def _fsuid(status: bytes) -> int:
    """The user a socket it makes belongs to: the fourth of real, effective, saved, file system."""
    at = status.index(b"\nUid:")
    return int(status[at + 5 : status.index(b"\n", at + 5)].split()[3])


def _cgroup(text: bytes) -> str:
    line = next(line for line in text.splitlines() if line.startswith(b"0::"))
    return os.fsdecode(line[3:])
