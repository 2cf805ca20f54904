"""From a socket to what the kernel attests about its owner.

The socket gives uid, inode and cgroup v2 id. The executable comes from the processes of that cgroup: when all of
them run the same file there is nothing to search; else the one holding the socket's inode among its file
descriptors is it. If holders run different files, or none is found, the executable stays unknown (''): a workload is
never given another's executable. What this cannot see: a socket handed to another process of the same cgroup and
uid after it was opened, and an exec between two looks at /proc.
"""

from __future__ import annotations

import hashlib
import os
import pwd
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from nfq.cgroup import Paths
from nfq.sockdiag import SockDiag, Socket
from sectool.identity.workload import Facts, systemd_unit

_HASHES = 4096
_UNKNOWN = (0, 0, 0)  # no executable: device, inode, ctime


@dataclass(frozen=True, slots=True)
class Attributed:
    """A socket's owner. `key` is equal while cgroup, uid and executable file are the same."""

    key: Hashable
    pid: int
    uid: int
    cgroup_id: int
    _source: Attributor

    def facts(self) -> Facts:
        """Everything attested; reads /proc and hashes the executable (cached)."""
        return self._source.facts(self)


class Attributor:
    """Looks sockets up in this network namespace and their owners in /proc."""

    def __init__(self, sockdiag: SockDiag, cgroups: Paths | None = None) -> None:
        self._sockdiag = sockdiag
        self._cgroups = cgroups or Paths()
        self._hashes: OrderedDict[tuple[int, ...], str] = OrderedDict()

    def outgoing(self, src: bytes, sport: int, dst: bytes, dport: int) -> Attributed | None:
        """Owner of the connecting socket `src`:`sport` -> `dst`:`dport` (4- or 16-byte addresses)."""
        return self._attribute(self._sockdiag.lookup(src, sport, dst, dport))

    def incoming(self, dst: bytes, dport: int, src: bytes, sport: int) -> Attributed | None:
        """Owner of the listener (or socket) that a SYN from `src`:`sport` to `dst`:`dport` would reach."""
        return self._attribute(self._sockdiag.lookup(dst, dport, src, sport))

    def _attribute(self, sock: Socket | None) -> Attributed | None:
        if sock is None:
            return None
        pid, exe = self._owner(sock)
        return Attributed((sock.cgroup_id, sock.uid, *exe), pid, sock.uid, sock.cgroup_id, self)

    def _owner(self, sock: Socket) -> tuple[int, tuple[int, int, int]]:
        path = self._cgroups.path(sock.cgroup_id)
        if path is None:
            return 0, _UNKNOWN
        running: dict[int, tuple[int, int, int]] = {}
        for pid in _processes(self._cgroups.directory(path)):
            exe = _executable(pid)
            if exe is not None:
                running[pid] = exe
        files = set(running.values())
        if len(files) == 1:
            return next(iter(running)), files.pop()
        return self._holder(sock, running)

    def _holder(
        self, sock: Socket, candidates: dict[int, tuple[int, int, int]]
    ) -> tuple[int, tuple[int, int, int]]:
        name = f"socket:[{sock.inode}]"
        holders = {pid: exe for pid, exe in candidates.items() if _holds(pid, name)}
        if len(set(holders.values())) != 1:
            return 0, _UNKNOWN
        pid, exe = next(iter(holders.items()))
        return (pid, exe) if _executable(pid) == exe else (0, _UNKNOWN)

    def facts(self, who: Attributed) -> Facts:
        """See Attributed.facts."""
        path = self._cgroups.path(who.cgroup_id) or ""
        executable = digest = ""
        if who.pid:
            executable, digest = self._file(who)
        return Facts(
            uid=who.uid,
            user=_user(who.uid),
            executable=executable,
            sha256=digest,
            cgroup=path,
            unit=systemd_unit(path) if path else "",
            pid=who.pid,
        )

    def _file(self, who: Attributed) -> tuple[str, str]:
        """Path and SHA-256 of the executable, read through /proc/PID/exe: the very image that runs, even if deleted."""
        link = Path(f"/proc/{who.pid}/exe")
        try:
            name = str(link.readlink())
            fd = os.open(link, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return "", ""
        try:
            s = os.fstat(fd)
            assert isinstance(who.key, tuple)
            if (s.st_dev, s.st_ino, s.st_ctime_ns) != who.key[2:]:
                return "", ""  # another program by now
            stamp = (s.st_dev, s.st_ino, s.st_mtime_ns, s.st_ctime_ns, s.st_size)
            known = self._hashes.get(stamp)
            if known is None:
                with os.fdopen(os.dup(fd), "rb") as f:
                    known = hashlib.file_digest(f, "sha256").hexdigest()
                self._hashes[stamp] = known
                if len(self._hashes) > _HASHES:
                    self._hashes.popitem(last=False)
            return name, known
        finally:
            os.close(fd)


def _processes(folder: Path) -> list[int]:
    try:
        fd = os.open(folder / "cgroup.procs", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        data = b""
        while piece := os.read(fd, 65_536):
            data += piece
    except OSError:
        return []
    finally:
        os.close(fd)
    return [int(p) for p in data.split()]


def _executable(pid: int) -> tuple[int, int, int] | None:
    try:
        s = os.stat(f"/proc/{pid}/exe")  # noqa: PTH116 (on the connection path; Path costs as much as the call)
    except OSError:
        return None
    return s.st_dev, s.st_ino, s.st_ctime_ns


def _holds(pid: int, name: str) -> bool:
    try:
        with os.scandir(f"/proc/{pid}/fd") as entries:
            for entry in entries:
                try:
                    if os.readlink(entry.path) == name:  # noqa: PTH115
                        return True
                except OSError:
                    continue
    except OSError:
        pass
    return False


@lru_cache(maxsize=4096)
def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
