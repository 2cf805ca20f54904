"""The asking end of the local API, blocking: for the CLI, tests and scripts."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from sectool.api import wire
from sectool.errors import Exit, NoDaemonError, PrivilegeError, SectoolError, StoreError, UsageError

READ_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class Answer:
    """A good answer: its header and payload."""

    header: dict[str, Any]
    payload: bytes

    def __getitem__(self, name: str) -> Any:
        return self.header[name]

    def get(self, name: str, default: Any = None) -> Any:
        """A header field, or `default`."""
        return self.header.get(name, default)


class Client:
    """One connection to a daemon's socket, made at the first call. `timeout` is seconds per message."""

    def __init__(self, path: Path, *, timeout: float | None = 10.0) -> None:
        self.path = path
        self.timeout = timeout
        self._sock: socket.socket | None = None
        self._aborted = False
        self._decoder = wire.Decoder()
        self._frames: deque[wire.Frame] = deque()

    def call(self, op: str, payload: bytes = b"", **fields: Any) -> Answer:
        """Ask once. Raises the error the daemon answered with, NoDaemonError when there is none."""
        return self._receive(self._send(op, payload, fields))

    def stream(self, op: str, payload: bytes = b"", **fields: Any) -> Iterator[Answer]:
        """Ask once and yield every frame until the one with `end` (which is yielded too)."""
        sock = self._send(op, payload, fields)
        while True:
            answer = self._receive(sock)
            yield answer
            if answer.get("end"):
                return

    def _send(self, op: str, payload: bytes, fields: dict[str, Any]) -> socket.socket:
        sock = self._connect()
        try:
            sock.sendall(wire.encode({**fields, "op": op}, payload))
        except BrokenPipeError:
            pass  # a refusal may have been sent before the question was out: read it
        except OSError as error:
            raise self._gone(error) from None
        return sock

    def _receive(self, sock: socket.socket) -> Answer:
        try:
            while not self._frames:
                data = sock.recv(READ_BYTES)
                if not data:
                    raise self._gone(None)
                self._frames.extend(self._decoder.feed(data))
        except TimeoutError:
            raise SectoolError(
                f"the daemon at {self.path} does not answer within {self.timeout} s",
                "see agent.log in the run folder",
            ) from None
        except OSError as error:
            raise self._gone(error) from None
        frame = self._frames.popleft()
        if frame.header.get("ok") is False:
            raise error_from(frame.header)
        return Answer(frame.header, frame.payload)

    def _connect(self) -> socket.socket:
        if self._sock is None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(self.timeout)
            try:
                sock.connect(str(self.path))
            except OSError as error:
                sock.close()
                raise self._unreachable(error) from None
            self._sock = sock
            if self._aborted:  # between the question of `abort` and ours
                raise self._gone(None)
        return self._sock

    def _unreachable(self, error: OSError) -> SectoolError:
        if error.errno in (errno.EACCES, errno.EPERM):
            return PrivilegeError(
                f"no permission to talk to the daemon at {self.path}",
                "run it with sudo, or join the group named by socket_group in sectool.yaml; "
                "policy test and explain --file work without the daemon",
            )
        if isinstance(error, TimeoutError) or error.errno == errno.EAGAIN:
            return SectoolError(f"the daemon at {self.path} is too busy to answer", "try again in a moment")
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR):
            return NoDaemonError(
                f"no daemon answers at {self.path}",
                "start it with `sectool up`, or name its folder with --run",
            )
        return SectoolError(f"cannot reach {self.path}: {error.strerror or error}")

    def _gone(self, error: OSError | None) -> SectoolError:
        self.close()
        why = f" ({error})" if error is not None and str(error) else ""
        return NoDaemonError(
            f"the daemon at {self.path} ended the conversation{why}", "see agent.log in the run folder"
        )

    def abort(self) -> None:
        """Hang up for good, from any thread: whoever waits for an answer here gets NoDaemonError at once."""
        self._aborted = True
        sock = self._sock
        if sock is not None:
            with contextlib.suppress(OSError):  # it has ended already
                sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Hang up."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


_BY_EXIT: dict[int, type[SectoolError]] = {
    int(Exit.USAGE): UsageError,
    int(Exit.NO_DAEMON): NoDaemonError,
    int(Exit.PARTIAL): StoreError,
}


def error_from(header: dict[str, Any]) -> SectoolError:
    """The error a daemon answered with, as one of our family."""
    kind = _BY_EXIT.get(header.get("exit", 1), SectoolError)
    return kind(str(header.get("error", "the daemon refused")), str(header.get("hint", "")))
