"""From a socket to the workload's facts, as far as the kernel attests them.

    sock_diag: 4-tuple ─► socket: uid, inode, cgroup v2 id        (fixed by the kernel when the socket was made)
    cgroup.procs       ─► the processes that may own it
    one executable?    ─► that one. Else: who holds the inode among their /proc/PID/fd
    nobody, or several executables ─► 'ambiguous': uid and cgroup only, no executable

`outgoing` and `incoming` give a small key, equal for equal facts, for which the worker keeps credentials; the facts
(nfq.attestation) are for the first time only. Executables are told apart by device, inode and ctime, so that a program
that is replaced on disk is another one from then on.

What cannot be attested, and is not claimed:
- A socket handed to another process (SCM_RIGHTS, inherited over exec, socket activation) keeps the uid and cgroup it
  was made with. If its holders in that cgroup run different executables it is ambiguous; a holder outside is not seen:
  a systemd-activated listener counts as systemd's.
- Programs of one user in one cgroup can act for each other (ptrace, LD_PRELOAD, exec after connect): the executable is
  a fact about the process, not proof of intent. Separate users or cgroups are the boundary.
- Between the packet and the look at /proc a process may exec or end; ending gives 'ambiguous'. In a cgroup of more than
  FEW processes, what all of them run is believed for BELIEVED_S while the list of them stays the same: an exec in one
  of them that follows a connection within that time, and connects itself, is taken for what ran before.
- In a mixed cgroup the holder of a socket is remembered for REMEMBERED_S, verified each time; that another program has
  got the socket as well is seen after that time.
- Looking is bounded, in one lookup and per cgroup and second; beyond it, and where /proc must not be read, the answer
  is 'ambiguous'. No question raises.
"""
# A Path costs as much as the system call, and this runs for every new connection.
# ruff: noqa: PTH115, PTH116

from __future__ import annotations

import errno
import os
import resource
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from nfq.attestation import AMBIGUOUS, Attestor, Executable
from nfq.attestation import Attributed as Attributed
from nfq.cgroup import Cgroups
from nfq.sockdiag import SockDiag, Socket, TcpState
from sectool.errors import SectoolError
from sectool.identity.workload import Facts

REMEMBERED_S: Final = 5.0
BELIEVED_S: Final = 0.05
FEW: Final = 4  # processes of a cgroup that are all looked at every time
_PAGE: Final = 4096
_MEMBERS_LIMIT: Final = 16 * _PAGE  # bytes of cgroup.procs; a larger cgroup stays ambiguous
_LOOKS: Final = 4096  # at processes and descriptors, for one socket
_LOOKS_PER_S: Final = 32_768  # at descriptors, for one cgroup
_HOLDERS_LIMIT: Final = 4096
_UNIFORM_LIMIT: Final = 1024
_FDS_LIMIT: Final = 256  # cgroup.procs files kept open
_LOOPBACK: Final = 1  # index of the loopback device, in every network namespace
_GONE: Final = (errno.ENOENT, errno.ESRCH)


class _UndecidedError(Exception):
    """Who it is cannot be told within the limits."""


class _Uniform(NamedTuple):
    """What all processes of a cgroup were found to run: the answer of `_owner`."""

    members: bytes
    answer: tuple[int, int, Executable]
    until: float  # time.monotonic


@dataclass(frozen=True, slots=True)
class _Holder:
    """Who was found to hold a socket."""

    cgroup_id: int
    pid: int
    sole: bool
    fd: str
    started: bytes
    executable: Executable
    until: float  # time.monotonic


class Attributor:
    """Owners of local sockets. Keeps files and caches, all bounded; for one thread and one network namespace.

    `undecided` counts answers that are ambiguous for want of permission, descriptors or time to look.
    """

    def __init__(
        self, sockdiag: SockDiag, cgroups: Cgroups | None = None, proc: Path = Path("/proc")
    ) -> None:
        self._sockdiag = sockdiag
        self._cgroups = Cgroups() if cgroups is None else cgroups
        self._proc = os.fspath(proc)
        self._attestor = Attestor(self._cgroups, self._proc)
        self._procs: OrderedDict[int, int] = OrderedDict()  # cgroup id -> cgroup.procs, open
        self._holders: OrderedDict[tuple[int, int], _Holder] = OrderedDict()  # by inode and cookie
        self._uniform: dict[int, _Uniform] = {}  # by cgroup id
        self._spent: dict[int, int] = {}  # looks by cgroup, in the present second
        self._second = 0
        self.undecided = 0

    def close(self) -> None:
        """Close the files kept open; facts not yet there will not come."""
        for fd in self._procs.values():
            os.close(fd)
        self._procs.clear()
        self._attestor.close()
        self._cgroups.close()

    # -- facts -------------------------------------------------------------------------------------------------

    @property
    def fd(self) -> int:
        """Readable when facts asked for with `facts_later` are there: call `completed`."""
        return self._attestor.background.fd

    def facts_later(self, what: Attributed, done: Callable[[dict[str, Any] | None], None]) -> None:
        """Have `done` called with the facts, at once if they are known, else by `completed`.

        None: the owner has gone or changed, or too much is under way; the packet that comes again asks again.
        """

        def plain(facts: Facts | None) -> None:
            done(None if facts is None else facts.attested())

        self._attestor.later(what, plain)

    def completed(self) -> int:
        """Hand on the facts that have come; how many. Never blocks."""
        return self._attestor.background.completed()

    # -- asking ------------------------------------------------------------------------------------------------

    def outgoing(
        self, local: bytes, local_port: int, remote: bytes, remote_port: int, ifindex: int = 0
    ) -> Attributed | None:
        """Owner of the connecting socket that a SYN is from; `ifindex`: device it leaves by. None: no such socket.

        Only a socket in SYN-SENT sends one: a SYN forged under the addresses of another connection has no owner.
        """
        found = self._lookup(TcpState.SYN_SENT, local, local_port, remote, remote_port, ifindex)
        if found is None or found.state != TcpState.SYN_SENT:
            return None
        return self.of(found)

    def incoming(
        self, local: bytes, local_port: int, remote: bytes, remote_port: int, ifindex: int = 0
    ) -> Attributed | None:
        """Owner of the listener that a SYN from remote is meant for; `ifindex`: device it came by. None: none listens.

        A connection with these addresses (half open, not accepted yet, in TIME-WAIT, or long forgotten by the other
        side) shadows the listener, who takes the SYN that comes once it is gone: the answer is the listener's owner.
        """
        found = self._lookup(TcpState.LISTEN, local, local_port, remote, remote_port, ifindex)
        if found is not None and found.state != TcpState.LISTEN:
            found = self._sockdiag.listener(local, local_port, ifindex)
        return None if found is None else self.of(found)

    def _lookup(
        self, state: TcpState, local: bytes, local_port: int, remote: bytes, remote_port: int, ifindex: int
    ) -> Socket | None:
        found = self._sockdiag.lookup(local, local_port, remote, remote_port, ifindex)
        if found is None and ifindex == _LOOPBACK:
            found = self._sockdiag.bound_elsewhere(local, local_port, remote, remote_port, state)
        return found

    def host(self) -> Attributed:
        """The host itself, for what no socket sends or takes: user root, no executable, in the root cgroup."""
        try:
            root = self._cgroups.id_of("/")
        except SectoolError:
            root = 0
        return Attributed((root, 0, *AMBIGUOUS), 0, 0, root, 0, self._attestor.now)

    def of(self, sock: Socket) -> Attributed:
        """Owner of a socket that the kernel has told of."""
        try:
            pid, witness, executable = self._owner(sock)
        except _UndecidedError:
            self.undecided += 1
            pid, witness, executable = 0, 0, AMBIGUOUS
        key = (sock.cgroup_id, sock.uid, *executable)
        return Attributed(key, pid, sock.uid, sock.cgroup_id, witness, self._attestor.now)

    # -- who is it ---------------------------------------------------------------------------------------------

    def _owner(self, sock: Socket) -> tuple[int, int, Executable]:
        """Process (0 if several are possible), a process with that executable, and the executable."""
        before = self._members(sock.cgroup_id)
        if not before:
            return 0, 0, AMBIGUOUS
        pids = before.split()
        known = self._uniform.get(sock.cgroup_id)
        if (
            known is not None
            and len(pids) > FEW
            and known.members == before
            and time.monotonic() < known.until
        ):
            return known.answer
        if len(pids) > _LOOKS:
            raise _UndecidedError
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
        answer = (witness if len(pids) == 1 else 0), witness, first
        if len(pids) <= FEW:
            return answer
        if len(self._uniform) >= _UNIFORM_LIMIT:
            self._uniform.clear()
        self._uniform[sock.cgroup_id] = _Uniform(before, answer, time.monotonic() + BELIEVED_S)
        return answer

    def _members(self, cgroup_id: int) -> bytes:
        """cgroup.procs; b'' when the cgroup is gone or is threaded, or cannot be read."""
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
        else:
            self._procs.move_to_end(cgroup_id)
        try:
            data = os.pread(fd, _PAGE, 0)
            if len(data) > _PAGE - 16:  # a line more might not have fitted
                parts = [data]
                offset = len(data)
                while more := os.pread(fd, _PAGE, offset):
                    parts.append(more)
                    offset += len(more)
                    if offset > _MEMBERS_LIMIT:
                        raise _UndecidedError
                data = b"".join(parts)
        except OSError:  # ENODEV: removed
            os.close(self._procs.pop(cgroup_id))
            return b""
        return data

    def _executable(self, pid: bytes | int) -> Executable | None:
        """What a process runs; None when it has ended or is a kernel thread."""
        name = pid.decode() if isinstance(pid, bytes) else pid
        try:
            st = os.stat(f"{self._proc}/{name}/exe")
        except OSError as e:
            if e.errno in _GONE:
                return None
            raise _UndecidedError from None
        return st.st_dev, st.st_ino, st.st_ctime_ns

    def _holder(self, sock: Socket, pids: list[bytes]) -> tuple[int, int, Executable]:
        """Look for the socket's inode among the open files of all these processes.

        All of them, whatever their user: one that gave up root after making the socket has another uid than it. And
        to the end, since a second holder that runs something else makes it ambiguous.
        """
        if not sock.inode:
            return 0, 0, AMBIGUOUS
        wanted = f"socket:[{sock.inode}]"
        name = sock.inode, sock.cookie
        known = self._holders.get(name)
        if known is not None and self._still(known, sock, wanted, pids):
            return (known.pid if known.sole else 0), known.pid, known.executable
        found = self._search(sock, wanted, pids)
        if not found or any(each.executable != found[0].executable for each in found):
            self._holders.pop(name, None)
            return 0, 0, AMBIGUOUS
        self._holders[name] = found[0]
        self._holders.move_to_end(name)
        if len(self._holders) > _HOLDERS_LIMIT:
            self._holders.popitem(last=False)
        return (found[0].pid if len(found) == 1 else 0), found[0].pid, found[0].executable

    def _still(self, known: _Holder, sock: Socket, wanted: str, pids: list[bytes]) -> bool:
        return (
            time.monotonic() < known.until
            and known.cgroup_id == sock.cgroup_id
            and b"%d" % known.pid in pids
            and self._program(known.pid, known.fd, wanted) == (known.started, known.executable)
        )

    def _search(self, sock: Socket, wanted: str, pids: list[bytes]) -> list[_Holder]:
        """All holders; [] when one of them ended or became another program under our eyes."""
        until = time.monotonic() + REMEMBERED_S
        found: list[tuple[int, str, bytes, Executable]] = []
        budget = self._budget(sock.cgroup_id)
        allowed = budget
        try:
            for raw in pids:
                pid = int(raw)
                fd, budget = self._find_fd(pid, wanted, budget)
                if fd is None:
                    continue
                program = self._program(pid, fd, wanted)
                if program is None:
                    return []
                found.append((pid, fd, *program))
        except _UndecidedError:
            budget = 0
            raise
        finally:
            self._spent[sock.cgroup_id] = self._spent.get(sock.cgroup_id, 0) + allowed - max(0, budget)
        sole = len(found) == 1
        return [_Holder(sock.cgroup_id, pid, sole, fd, at, exe, until) for pid, fd, at, exe in found]

    def _budget(self, cgroup_id: int) -> int:
        second = int(time.monotonic())
        if second != self._second:
            self._second = second
            self._spent.clear()
        return min(_LOOKS, _LOOKS_PER_S - self._spent.get(cgroup_id, 0))

    def _program(self, pid: int, fd: str, wanted: str) -> tuple[bytes, Executable] | None:
        """Start time and executable, if it is one process, one program and holds the socket all the while."""
        started, executable = self._started(pid), self._executable(pid)
        try:
            still = os.readlink(f"{self._proc}/{pid}/fd/{fd}") == wanted
        except OSError:
            return None
        if (
            still
            and started is not None
            and executable is not None
            and self._executable(pid) == executable
            and self._started(pid) == started
        ):
            return started, executable
        return None

    def _find_fd(self, pid: int, wanted: str, budget: int) -> tuple[str | None, int]:
        """The descriptor that is the socket, or None; and what is left of the budget."""
        folder = f"{self._proc}/{pid}/fd"
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    budget -= 1
                    if budget < 0:
                        raise _UndecidedError
                    try:
                        if os.readlink(f"{folder}/{entry.name}") == wanted:
                            return entry.name, budget
                    except OSError as e:
                        if e.errno not in _GONE:
                            raise
        except OSError as e:
            if e.errno not in _GONE:
                raise _UndecidedError from None
        return None, budget

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


def raise_descriptor_limit() -> int:
    """Let this process open as many files as its hard limit allows (RLIMIT_NOFILE); the limit now. Never raises."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):
            return soft
    return hard
