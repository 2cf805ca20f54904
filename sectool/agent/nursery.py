"""Where packet workers and the event store are born: forked from a process that has read their code already.

    agent ──fork, with one thread──► nursery        has read the code of the packet path; holds no key, hears no network
      │                                 │ forks one that forks
      └──── parent, by prctl(2) ──── worker, store

Most of what a start costs is Python reading modules: for a worker 0.4 s of a processor during which, after a crash, no
new connection passes. A fork takes some milliseconds, and the memory of the code is shared. The agent itself cannot
fork: it has threads. Who is born is a child of the agent, as if it had started it (it is the subreaper meanwhile), and
the kernel ends it when the agent dies, however it dies.

Without a nursery (it was killed, it does not answer) they are started as programs: `python -m nfq`, `python -m store`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import gc
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Final

from sectool.agent.children import Process, bound_to_parent
from sectool.agent.forking import apart, flush, keep_only, streams

log = logging.getLogger("sectool.agent")

ANSWER_S: Final = 15.0
_LONGEST: Final = 1 << 16  # bytes of a request
_NONE: Final = b"0"  # instead of a process id
_MOST: Final = 8  # file descriptors that go with one
_PDEATHSIG, _NAME, _SUBREAPER = 1, 15, 36  # PR_SET_*
_libc = ctypes.CDLL(None, use_errno=True)


class Program(StrEnum):
    """What is born here, by the name of its module."""

    WORKER = "nfq"
    STORE = "store"


class Born:
    """A forked child: what asyncio's own Process is to a program, as far as sectool.agent.children asks."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = asyncio.Event()
        self._fd = os.pidfd_open(pid)  # ours to wait for, so the number is nobody else's yet
        asyncio.get_running_loop().add_reader(self._fd, self._reap)

    def _reap(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)
        _, status = os.waitpid(self.pid, 0)
        self.returncode = os.waitstatus_to_exitcode(status)
        self._ended.set()

    async def wait(self) -> int:
        """Its exit status, negative for a signal, once it has ended."""
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Raises ProcessLookupError when it has ended."""
        if self.returncode is not None:
            raise ProcessLookupError
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Nursery:
    """The forking process, from the agent's side."""

    def __init__(self) -> None:
        """Fork it: at the very start, before the agent has threads, signal handlers, or anything to keep to itself."""
        agent = os.getpid()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        flush()
        self._pid = os.fork()
        if not self._pid:
            apart(lambda: _nurse(theirs, agent))
        theirs.close()
        ours.settimeout(ANSWER_S)
        self._line: socket.socket | None = ours

    async def bear(self, program: Program, args: Sequence[str], fds: Sequence[int] = ()) -> Process:
        """Start a program with these arguments, which has these of our file descriptors under the same numbers.

        Its output goes where ours goes. Raises OSError.
        """
        if self._line is not None:
            answer = self._ask(self._line, program, args, fds)
            if answer == _NONE:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            if answer:
                return Born(int(answer))
            log.warning("no process can be forked any more: programs are started instead, which takes longer")
            self.close()
        return await asyncio.create_subprocess_exec(
            *bound_to_parent([sys.executable, "-m", program, *args]),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            stderr=sys.stderr.fileno(),
            pass_fds=fds,
            start_new_session=True,  # a Ctrl-C at the terminal is for the agent to handle, in order
        )

    def _ask(self, line: socket.socket, program: Program, args: Sequence[str], fds: Sequence[int]) -> bytes:
        """The child's process id, as text; `_NONE` when there is no room for one, b"" when nobody answers."""
        request = json.dumps({"program": program, "args": list(args), "fds": list(fds)}).encode()
        _libc.prctl(_SUBREAPER, 1, 0, 0, 0)
        try:
            socket.send_fds(line, [request], list(fds))
            return line.recv(64)
        except OSError:
            self._kill()
            # A child lives only once its birth has been told: if it was, the child is there, and ours.
            with contextlib.suppress(OSError):
                return line.recv(64, socket.MSG_DONTWAIT)
            return b""
        finally:
            _libc.prctl(_SUBREAPER, 0, 0, 0, 0)

    def close(self) -> None:
        """End it. Those who were born here go on."""
        if self._line is not None:
            self._line.close()
            self._line = None
            self._kill()

    def _kill(self) -> None:
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)  # nobody but us waits for it, so the number is its own
            os.waitpid(self._pid, 0)
            self._pid = 0


# -- the process that forks, and what it bears -------------------------------------------------------------------------


def _call(name: str) -> None:
    """What `ps -e` and `top` show, instead of the agent's name."""
    _libc.prctl(_NAME, name.encode(), 0, 0, 0)


def _bound(parent: int) -> None:
    """End with our parent, and now if it has gone already."""
    _libc.prctl(_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def _nurse(line: socket.socket, agent: int) -> int:
    """Fork for each request until the line is closed."""
    _bound(agent)
    _call("sectool-nursery")
    os.setsid()
    keep_only([line.fileno()])
    streams(2)
    import nfq.__main__  # noqa: F401

    gc.collect()
    gc.freeze()  # pages that collections do not write to stay shared
    while True:
        data, fds, _, _ = socket.recv_fds(line, _LONGEST, _MOST)
        if not data:
            return 0
        _bear(line, agent, json.loads(data), fds)
        for fd in fds:
            os.close(fd)


def _bear(line: socket.socket, agent: int, request: dict[str, object], fds: list[int]) -> None:
    """Fork a process that forks the child and ends, so that the child is the agent's; tell its process id."""
    told, tell = os.pipe()
    go, begin = os.pipe()
    pid = _NONE
    try:
        between = os.fork()
        if between == 0:
            os.close(begin)
            apart(lambda: _fork_again(tell, lambda: _live(agent, go, request, fds)))
        os.close(tell)
        tell = -1
        pid = os.read(told, 64) or _NONE
        os.waitpid(between, 0)  # now the agent is the child's parent
    except OSError as error:
        print(f"no process can be forked: {error}", file=sys.stderr, flush=True)  # noqa: T201
    finally:
        line.send(pid)
        if pid != _NONE:
            os.write(begin, b"1")
        for fd in (told, go, begin, tell):
            if fd >= 0:
                os.close(fd)


def _fork_again(tell: int, live: Callable[[], int]) -> int:
    """Fork the child, tell its process id, and leave it behind."""
    child = os.fork()
    if child == 0:
        os.close(tell)
        apart(live)
    os.write(tell, str(child).encode())
    return 0


def _live(agent: int, go: int, request: dict[str, object], fds: list[int]) -> int:
    """Be the program, once the agent is told."""
    if not os.read(go, 1):
        return 0
    _bound(agent)
    os.setsid()
    wanted = request["fds"]
    assert isinstance(wanted, list)
    _renumber(fds, wanted)
    keep_only(wanted)
    args = request["args"]
    assert isinstance(args, list)
    program = Program(str(request["program"]))
    sys.argv = [program, *args]
    if program is Program.WORKER:
        _call("sectool-worker")
        from nfq.__main__ import main as worker

        return worker(args)
    _call("sectool-store")
    from store.__main__ import main as store

    return store(args)


def _renumber(fds: Sequence[int], wanted: Sequence[int]) -> None:
    """Have each descriptor under the number it is wanted under, whatever is there now."""
    above = max([*fds, *wanted, 2]) + 1
    for number, fd in enumerate(fds):
        os.dup2(fd, above + number)
    for number, target in enumerate(wanted):
        os.dup2(above + number, target)
