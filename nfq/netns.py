"""Network namespaces: enter one, make a throwaway one, tell which one this is, and hold it for one daemon.

`setns(2)` moves the calling thread only, and only its network namespace: mounts stay, so that /sys/fs/cgroup is what
it was (`ip netns exec` remounts /sys and hides the cgroups). Sockets and child processes made inside belong to the
namespace and keep it after the thread has gone back.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from sectool.errors import PrivilegeError, SectoolError

_CLONE_NEWNET: Final = 0x40000000
_HERE: Final = Path("/proc/thread-self/ns/net")
_LOCK_NAME: Final = "\0sectool/daemon"

_libc = ctypes.CDLL(None, use_errno=True)


class NamespaceId(NamedTuple):
    """What identifies a network namespace while it lives (namespaces(7))."""

    dev: int
    inode: int


def namespace_file(target: Path | str | int) -> Path:
    """The file that stands for a namespace: a path as it is, a process id as /proc/PID/ns/net."""
    return Path(f"/proc/{target}/ns/net") if isinstance(target, int) else Path(target)


def namespace_id(target: Path | str | int = _HERE) -> NamespaceId:
    """Identity of the namespace at a path or of a process; by default the calling thread's. Raises SectoolError."""
    path = namespace_file(target)
    try:
        found = path.stat()
    except OSError as e:
        raise SectoolError(
            f"no network namespace at {path}: {e.strerror}",
            "give a path such as /run/netns/NAME or the id of a running process",
        ) from None
    return NamespaceId(found.st_dev, found.st_ino)


def _check(result: int, what: str) -> None:
    if result == 0:
        return
    code = ctypes.get_errno()
    if code == errno.EPERM:
        raise PrivilegeError(f"{what} is not permitted", "run as root (CAP_SYS_ADMIN)")
    raise SectoolError(f"{what} failed: {os.strerror(code)}", "is it a network namespace, and still there?")


@contextlib.contextmanager
def enter(target: Path | str | int) -> Iterator[None]:
    """Be in the namespace at a path (/run/netns/NAME) or of a process, until the block ends.

    Raises SectoolError or PrivilegeError. Only the calling thread moves.
    """
    path = namespace_file(target)
    try:
        there = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        raise SectoolError(
            f"no network namespace at {path}: {e.strerror}", "`ip netns list` shows names"
        ) from None
    try:
        with _back_home():
            _check(_libc.setns(there, _CLONE_NEWNET), f"entering {path}")
            yield
    finally:
        os.close(there)


def join(target: Path | str) -> None:
    """Be in the namespace at a path for good, this thread and what it starts. Raises SectoolError or PrivilegeError."""
    try:
        there = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        raise SectoolError(
            f"no network namespace at {target}: {e.strerror}", "it has ended meanwhile"
        ) from None
    try:
        _check(_libc.setns(there, _CLONE_NEWNET), f"entering {target}")
    finally:
        os.close(there)


@contextlib.contextmanager
def throwaway() -> Iterator[None]:
    """Be in a new, empty namespace that vanishes with the last thing made in it. Raises PrivilegeError."""
    with _back_home():
        _check(_libc.unshare(_CLONE_NEWNET), "making a network namespace")
        yield


@contextlib.contextmanager
def _back_home() -> Iterator[None]:
    home = os.open(_HERE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            yield
        finally:
            # A thread stranded in another namespace would go on working on the wrong one.
            _check(_libc.setns(home, _CLONE_NEWNET), "returning to the namespace before")
    finally:
        os.close(home)


class NamespaceLock:
    """One daemon per network namespace: a name in the namespace's own list of abstract unix sockets (unix(7)).

    The kernel frees the name when the process ends, however it ends. `run` is the daemon's run folder; it only
    serves to say whose the other daemon is.
    """

    def __init__(self, run: Path | None = None) -> None:
        self._run = run
        self._sock: socket.socket | None = None

    def acquire(self) -> None:
        """Take the namespace. Raises SectoolError naming the other daemon's process id when it is taken."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        try:
            sock.bind(_LOCK_NAME)
        except OSError as e:
            sock.close()
            if e.errno != errno.EADDRINUSE:
                raise SectoolError(f"cannot lock the network namespace: {e.strerror}") from None
            raise self._taken(lock_holder()) from None
        self._sock = sock

    def give_away(self) -> int:
        """A file descriptor that holds the namespace until whoever inherits it says `inherit`."""
        assert self._sock is not None
        return self._sock.detach()

    def inherit(self, fd: int) -> None:
        """Hold the namespace that this process held before it became another program."""
        self._sock = socket.socket(fileno=fd)

    def release(self) -> None:
        """Give it back; safe to repeat."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def _taken(self, pid: int | None) -> SectoolError:
        who = f"process {pid}" if pid else "a process"
        hint = "one daemon serves a network namespace: stop it with `sectool down`"
        if self._run is not None and not self._names(pid):
            hint += f" (it does not use {self._run}: give the --run and --state it was started with)"
        return SectoolError(f"{who} is the sectool daemon of this network namespace already", hint)

    def _names(self, pid: int | None) -> bool:
        """Whether the pid file in our own run folder is that daemon's."""
        try:
            return self._run is not None and (self._run / "agent.pid").read_text().strip() == str(pid)
        except (OSError, UnicodeDecodeError):
            return False

    def __enter__(self) -> NamespaceLock:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock_holder() -> int | None:
    """Process id of the daemon that holds the calling thread's namespace; None when nobody does, 0 if it is not seen.

    Seeing other users' daemons takes root, and one in another process namespace is never seen.
    """
    # Num RefCount Protocol Flags Type St Inode Path (net/unix/af_unix.c); a leading NUL is shown as @
    rows = [
        line.split() for line in Path("/proc/thread-self/net/unix").read_text(errors="replace").splitlines()
    ]
    shown = "@" + _LOCK_NAME[1:]
    inodes = [row[6] for row in rows if len(row) == 8 and row[7] == shown]
    if not inodes:
        return None
    wanted = f"socket:[{inodes[0]}]"
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if any(_target(fd) == wanted for fd in (entry / "fd").iterdir()):
                    return int(entry.name)
    return 0


def _target(link: Path) -> str:
    try:
        return str(link.readlink())
    except OSError:
        return ""
