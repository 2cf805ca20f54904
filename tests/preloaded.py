"""`sectool`, `python -m nfq` and `python -m store` in processes that have their imports behind them.

Tests run the command line hundreds of times, and most of what a short command costs is Python reading modules. So one
process per test process imports them once and forks for every command: arguments, environment, folder, network
namespace and standard streams are as for a command started anew. `sectool up --background` forks its daemon, and that
its packet workers and store: these have their imports behind them, too. What is about the start itself (a signal, a
closed stream, `python -m sectool`) starts a real one.

Run as a program this is that process: it listens on the Unix socket whose descriptor it is given.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nfq import cgroup

REPOSITORY = Path(__file__).parents[1]
STREAMS = 3  # stdin, stdout, stderr
LONGEST = 256 * 1024  # bytes of a question
CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str


class Forked:
    """A packet worker or store that runs: what subprocess.Popen is to a program, as far as tests ask."""

    def __init__(self, sock: socket.socket, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._sock = sock

    def poll(self) -> int | None:
        """Its exit status if it has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, negative for a signal."""
        if self.returncode is None:
            if not select.select([self._sock], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired([str(self.pid)], timeout or 0)
            told = self._sock.recv(64)
            assert told, "the process that waits for it has gone"
            self.returncode = int(told)
            self._sock.close()
        return self.returncode

    def kill(self) -> None:
        """End it as the kernel would."""
        self.send_signal(signal.SIGKILL)

    def send_signal(self, number: int) -> None:
        """Any signal; none to one that has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # its status is on its way
                os.kill(self.pid, number)


class Preloaded:
    """The process that forks, from the side of the tests."""

    def __init__(self) -> None:
        self.address = f"\0sectool-preloaded-{os.getpid()}-{os.urandom(4).hex()}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(self.address)
            listener.listen(64)
            told, self._kept = os.pipe()  # EOF tells it that the tests are over, however they ended
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.preloaded", str(listener.fileno()), str(told)],
                pass_fds=(listener.fileno(), told),
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
            )
            os.close(told)
        atexit.register(self._process.kill)

    def run(
        self,
        args: list[str],
        environment: Mapping[str, str],
        cwd: Path | str = "/",
        stdin: str = "",
        netns: Path | None = None,
        timeout: float = 60,
    ) -> Done:
        """Run `sectool ARGS`. Raises subprocess.TimeoutExpired when it takes longer than `timeout` seconds."""
        with contextlib.ExitStack() as stack:
            streams = [os.memfd_create(name) for name in ("in", "out", "err")]
            for fd in streams:
                stack.callback(os.close, fd)
            os.write(streams[0], stdin.encode())
            os.lseek(streams[0], 0, os.SEEK_SET)
            sock, pid = self._ask(args, environment, cwd, netns, streams, timeout)
            stack.enter_context(sock)
            try:
                told = sock.recv(64)
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(["sectool", *args], timeout) from None
            assert told, "the process that runs commands for the tests has gone"
            return Done(int(told), *(_text(fd) for fd in streams[1:]))

    def begin(
        self, program: str, args: list[str], output: int, netns: Path | None, fds: Sequence[int]
    ) -> Forked:
        """A process that goes on; see the function of that name."""
        with Path(os.devnull).open() as nothing:
            streams = [nothing.fileno(), output, output, *fds]
            sock, pid = self._ask(args, os.environ, "/", netns, streams, 60, program)
        sock.settimeout(None)
        return Forked(sock, pid)

    def _ask(
        self,
        args: list[str],
        environment: Mapping[str, str],
        cwd: Path | str,
        netns: Path | None,
        streams: list[int],
        timeout: float,
        program: str = "sectool",
    ) -> tuple[socket.socket, int]:
        """The line on which the exit status will be told, and the process id."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LONGEST)
        sock.connect(self.address)
        sock.settimeout(timeout)
        question = {
            "program": program,
            "args": args,
            "environment": dict(environment),
            "cwd": str(cwd),
            "netns": str(netns) if netns else None,
            "cgroup": str(_own_cgroup()),
        }
        socket.send_fds(sock, [json.dumps(question).encode()], streams)
        return sock, int(sock.recv(64) or b"0")


def _own_cgroup() -> Path:
    """Where the tests are now, and their command is to be."""
    own = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    return cgroup.mount() / own.removeprefix("0::").lstrip("/")


def _text(fd: int) -> str:
    os.lseek(fd, 0, os.SEEK_SET)
    with os.fdopen(os.dup(fd), encoding="utf-8") as file:
        return file.read()


_PRELOADED: list[Preloaded] = []


def start() -> None:
    """Start it, unless that has been done: before any test has gone to a namespace or cgroup of its own."""
    if not _PRELOADED:
        _PRELOADED.append(Preloaded())


def sectool(args: list[str], environment: Mapping[str, str], **more: Any) -> Done:
    """Run a command through this test process's own Preloaded."""
    return _PRELOADED[0].run(args, environment, **more)


def begin(
    program: str, args: list[str], output: int, netns: Path | None = None, fds: Sequence[int] = ()
) -> Forked:
    """Start `python -m nfq` or `python -m store` through this test process's own Preloaded.

    It writes to `output` and has the file descriptors `fds`, of which each `{}` of its arguments is the next number.
    """
    return _PRELOADED[0].begin(program, args, output, netns, fds)


# -- the process that forks --------------------------------------------------------------------------------------------


def _serve(listener: socket.socket, over: int) -> None:
    """Fork for each question until the tests have ended."""
    import gc
    import selectors

    import sectool.agent.__main__
    import sectool.cli.daemon
    import sectool.cli.main
    import sectool.cli.output
    import store.__main__  # noqa: F401  (DuckDB and Arrow; they start their threads when they are used)

    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        sectool.cli.main.main(["--version"])  # builds the tree of commands once
    gc.collect()
    gc.freeze()  # pages that collections do not write to stay shared
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait
    with selectors.DefaultSelector() as ready:
        ready.register(listener, selectors.EVENT_READ)
        ready.register(over, selectors.EVENT_READ)
        while all(key.fd != over for key, _ in ready.select()):
            sock, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                os.close(over)
                _wait_for(sock)
            sock.close()


def _wait_for(sock: socket.socket) -> None:
    """Fork the command and tell its exit code, negative for a signal."""
    data, streams, _, _ = socket.recv_fds(sock, LONGEST, STREAMS + 1)
    question = json.loads(data)
    pid = os.fork()
    if pid == 0:
        sock.close()
        _become(question, streams)
    for fd in streams:
        os.close(fd)
    with contextlib.suppress(BrokenPipeError):
        sock.send(str(pid).encode())
        _, status = os.waitpid(pid, 0)
        sock.send(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


def _become(question: dict[str, Any], streams: list[int]) -> None:
    """Be the command."""
    code = 1
    try:
        for number, fd in enumerate(streams[:STREAMS]):
            os.dup2(fd, number)
            os.close(fd)
        procs = Path(question["cgroup"], "cgroup.procs")
        if os.access(procs, os.W_OK):
            procs.write_text("0")
        os.environ.clear()
        os.environ.update(question["environment"])
        time.tzset()
        os.chdir(question["cwd"])
        if question["netns"]:
            there = os.open(question["netns"], os.O_RDONLY)
            if ctypes.CDLL(None, use_errno=True).setns(there, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"cannot enter {question['netns']}")
            os.close(there)
        program, args = question["program"], question["args"]
        sys.argv = [program, *args]
        if program != "sectool":
            numbers = iter(streams[STREAMS:])
            args = [str(next(numbers)) if arg == "{}" else arg for arg in args]
            code = importlib.import_module(f"{program}.__main__").main(args)
            return
        from sectool.cli.main import main

        code = main(args)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as given:
        _serve(given, int(sys.argv[2]))
