"""From a socket to the workload's facts, as far as the kernel attests them.

    sock_diag: 4-tuple ─► socket: uid, inode, cgroup v2 id        (fixed by the kernel when the socket was made)
    cgroup.procs       ─► the processes that may own it
    one executable?    ─► that one. Else: who holds the inode among their /proc/PID/fd
    nobody, or several executables ─► 'ambiguous': uid and cgroup only, no executable

`outgoing` and `incoming` give a small key, equal for equal facts, for which the worker keeps credentials; `facts()` is
for the first time only. Executables are told apart by device, inode and ctime, so that a program that is replaced on
disk is another one from then on.

What cannot be attested, and is not claimed:
- A socket handed to another process (SCM_RIGHTS, inherited over exec, socket activation) keeps the uid and cgroup it
  was made with. If its holders in that cgroup run different executables it is ambiguous; a holder outside is not seen:
  a systemd-activated listener counts as systemd's.
- Programs of one user in one cgroup can act for each other (ptrace, LD_PRELOAD, exec after connect): the executable is
  a fact about the process, not proof of intent. Separate users or cgroups are the boundary.
- Between the packet and the look at /proc a process may exec or end; ending gives 'ambiguous'.
"""
# A Path costs as much as the system call, and this runs for every new connection.
# ruff: noqa: PTH115, PTH116, PTH208

from __future__ import annotations

import hashlib
import os
import pwd
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TypeAlias

from nfq.cgroup import Cgroups
from nfq.sockdiag import SockDiag, Socket, TcpState
from sectool.identity.workload import Facts, systemd_unit

Executable: TypeAlias = tuple[int, int, int]  # device, inode, ctime in ns
AMBIGUOUS: Final[Executable] = (0, 0, 0)

Key: TypeAlias = tuple[int, int, int, int, int]  # cgroup id, uid, executable

_PAGE: Final = 4096
_MAX_FDS: Final = 65_536  # looked at for one socket; beyond it stays ambiguous
_HASH_LIMIT: Final = 1024
_FDS_LIMIT: Final = 1024  # cgroup.procs files kept open


@dataclass(frozen=True, slots=True)
class Attributed:
    """A socket's owner. `pid` is 0 where several processes of one executable may be it; uid is the socket's."""

    key: Key
    pid: int
    uid: int
    cgroup_id: int
    witness: int  # a process that runs the executable, 0 when ambiguous
    compute: Callable[[Attributed], Facts | None]

    @property
    def ambiguous(self) -> bool:
        """Whether no single executable can be named."""
        return self.key[2:] == AMBIGUOUS

    def attest(self) -> Facts | None:
        """All facts; None when the witness or the cgroup has gone or changed since: ask again for the socket."""
        return self.compute(self)

    def facts(self) -> dict[str, Any] | None:
        """The facts as plain values, for the agent."""
        found = self.attest()
        return None if found is None else asdict(found)


class Attributor:
    """Owners of local sockets. Keeps files and caches, all bounded; for one thread and one network namespace."""

    def __init__(
        self, sockdiag: SockDiag, cgroups: Cgroups | None = None, proc: Path = Path("/proc")
    ) -> None:
        self._sockdiag = sockdiag
        self._cgroups = Cgroups() if cgroups is None else cgroups
        self._proc = os.fspath(proc)
        self._procs: OrderedDict[int, int] = OrderedDict()  # cgroup id -> cgroup.procs, open
        self._hashes: OrderedDict[tuple[int, ...], str] = OrderedDict()

    def close(self) -> None:
        """Close the files kept open."""
        for fd in self._procs.values():
            os.close(fd)
        self._procs.clear()
        self._cgroups.close()

    # -- asking ------------------------------------------------------------------------------------------------

    def outgoing(
        self, local: bytes, local_port: int, remote: bytes, remote_port: int, ifindex: int = 0
    ) -> Attributed | None:
        """Owner of the connecting socket that a SYN is from; `ifindex`: device it leaves by. None: no such socket.

        Only a socket in SYN-SENT sends one: a SYN forged under the addresses of another connection has no owner.
        """
        found = self._sockdiag.lookup(local, local_port, remote, remote_port, ifindex)
        if found is None or found.state != TcpState.SYN_SENT:
            return None
        return self._of(found)

    def incoming(
        self, local: bytes, local_port: int, remote: bytes, remote_port: int, ifindex: int = 0
    ) -> Attributed | None:
        """Owner of the listener that a SYN from remote is meant for; `ifindex`: device it came by. None: none listens.

        A connection with these addresses (half open, not accepted yet, in TIME-WAIT, or long forgotten by the other
        side) shadows the listener, who takes the SYN that comes once it is gone: the answer is the listener's owner.
        """
        found = self._sockdiag.lookup(local, local_port, remote, remote_port, ifindex)
        if found is not None and found.state != TcpState.LISTEN:
            found = self._sockdiag.listener(local, local_port, ifindex)
        return None if found is None else self._of(found)

    def _of(self, sock: Socket) -> Attributed:
        pid, witness, executable = self._owner(sock)
        key = (sock.cgroup_id, sock.uid, *executable)
        return Attributed(key, pid, sock.uid, sock.cgroup_id, witness, self._attest)

    # -- who is it ---------------------------------------------------------------------------------------------

    def _owner(self, sock: Socket) -> tuple[int, int, Executable]:
        """Process (0 if several are possible), a process with that executable, and the executable."""
        before = self._members(sock.cgroup_id)
        if not before:
            return 0, 0, AMBIGUOUS
        pids = before.split()
        first: Executable | None = None
        witness = 0
        for raw in pids:
            executable = self._executable(raw)
            if executable is None:
                continue  # a kernel thread, or gone
            if first is None:
                first, witness = executable, int(raw)
            elif executable != first:
                return self._holder(sock, pids)
        # A process id that was freed and taken again between our looks belongs to another cgroup now, most likely;
        # if it belongs to this one, the executables are equal anyway or the list has changed.
        if first is None or self._members(sock.cgroup_id) != before:
            return self._holder(sock, self._members(sock.cgroup_id).split())
        return (witness if len(pids) == 1 else 0), witness, first

    def _members(self, cgroup_id: int) -> bytes:
        """cgroup.procs; b'' when the cgroup is gone or is threaded."""
        fd = self._procs.get(cgroup_id)
        if fd is None:
            folder = self._cgroups.folder(cgroup_id)
            if folder is None:
                return b""
            try:
                fd = os.open(folder / "cgroup.procs", os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                return b""
            self._procs[cgroup_id] = fd
            if len(self._procs) > _FDS_LIMIT:
                os.close(self._procs.popitem(last=False)[1])
        try:
            data = os.pread(fd, _PAGE, 0)
            if len(data) > _PAGE - 16:  # a line more might not have fitted
                parts = [data]
                offset = len(data)
                while more := os.pread(fd, _PAGE, offset):
                    parts.append(more)
                    offset += len(more)
                data = b"".join(parts)
        except OSError:  # ENODEV: removed
            os.close(self._procs.pop(cgroup_id))
            return b""
        return data

    def _executable(self, pid: bytes | str | int) -> Executable | None:
        name = pid.decode() if isinstance(pid, bytes) else pid
        try:
            st = os.stat(f"{self._proc}/{name}/exe")
        except OSError:
            return None
        return st.st_dev, st.st_ino, st.st_ctime_ns

    def _holder(self, sock: Socket, pids: list[bytes]) -> tuple[int, int, Executable]:
        """Look for the socket's inode among the open files of all these processes.

        All of them, whatever their user: one that gave up root after making the socket has another uid than it. And
        to the end, since a second holder that runs something else makes it ambiguous.
        """
        if not sock.inode:
            return 0, 0, AMBIGUOUS
        wanted = f"socket:[{sock.inode}]"
        found: list[tuple[int, Executable]] = []
        budget = _MAX_FDS
        for raw in pids:
            pid = int(raw)
            fd, looked = self._find_fd(pid, wanted, budget)
            budget -= looked
            if budget <= 0:
                return 0, 0, AMBIGUOUS
            if fd is None:
                continue
            executable = self._executable_of_holder(pid, fd, wanted)
            if executable is None:
                return 0, 0, AMBIGUOUS  # it ended or became another program under our eyes
            found.append((pid, executable))
        if not found or any(executable != found[0][1] for _, executable in found):
            return 0, 0, AMBIGUOUS
        pid, executable = found[0]
        return (pid if len(found) == 1 else 0), pid, executable

    def _executable_of_holder(self, pid: int, fd: str, wanted: str) -> Executable | None:
        """What a process runs, if it is one process, one program and holds the socket all the while."""
        started, executable = self._started(pid), self._executable(pid)
        try:
            still = os.readlink(f"{self._proc}/{pid}/fd/{fd}") == wanted
        except OSError:
            return None
        if (
            still
            and started is not None
            and self._executable(pid) == executable
            and self._started(pid) == started
        ):
            return executable
        return None

    def _find_fd(self, pid: int, wanted: str, budget: int) -> tuple[str | None, int]:
        """The descriptor that is the socket, or None; and how many were looked at."""
        folder = f"{self._proc}/{pid}/fd"
        looked = 0
        try:
            for name in os.listdir(folder):
                looked += 1
                if looked > budget:
                    break
                try:
                    if os.readlink(f"{folder}/{name}") == wanted:
                        return name, looked
                except OSError:
                    continue
        except OSError:
            pass
        return None, looked

    def _started(self, pid: int) -> bytes | None:
        """Start time of a process: with its id it names one process for ever (proc_pid_stat(5), field 22)."""
        try:
            fd = os.open(f"{self._proc}/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            data = os.read(fd, 4096)
        except OSError:
            return None
        finally:
            os.close(fd)
        fields = data.rpartition(b") ")[2].split()  # the name may hold anything, even parentheses
        return fields[19] if len(fields) > 19 else None

    # -- facts -------------------------------------------------------------------------------------------------

    def _attest(self, what: Attributed) -> Facts | None:
        path = self._cgroups.path(what.cgroup_id)
        if path is None:
            return None
        executable = digest = ""
        if not what.ambiguous:
            read = self._read_executable(what.witness, what.key[2:])
            if read is None:
                return None
            executable, digest = read
        return Facts(
            uid=what.uid,
            user=user_name(what.uid),
            executable=executable,
            sha256=digest,
            cgroup=path,
            unit=systemd_unit(path),
            pid=what.pid or what.witness,
        )

    def _read_executable(self, pid: int, expected: tuple[int, ...]) -> tuple[str, str] | None:
        """Path as the process sees it, and SHA-256 of the running image; None if it is not the expected one."""
        link = f"{self._proc}/{pid}/exe"
        try:
            fd = os.open(link, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            st = os.fstat(fd)
            if (st.st_dev, st.st_ino, st.st_ctime_ns) != expected:
                return None
            path = os.readlink(link)
            stamp = (st.st_dev, st.st_ino, st.st_mtime_ns, st.st_ctime_ns, st.st_size)
            digest = self._hashes.get(stamp)
            if digest is None:
                with open(fd, "rb", closefd=False) as image:
                    digest = hashlib.file_digest(image, "sha256").hexdigest()
                self._hashes[stamp] = digest
                if len(self._hashes) > _HASH_LIMIT:
                    self._hashes.popitem(last=False)
            return _text(path), digest
        except OSError:
            return None
        finally:
            os.close(fd)


def _text(path: str) -> str:
    """File names are bytes; what is not UTF-8 is shown as backslash escapes, so that it can be stored and sent."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


@lru_cache(maxsize=4096)
def user_name(uid: int) -> str:
    """The account's name, '' if it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return ""
