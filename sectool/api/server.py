"""The serving end of the local API on asyncio: peers known by SO_PEERCRED, each request checked and logged."""

from __future__ import annotations

import asyncio
import contextlib
import grp
import logging
import os
import pwd
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sectool.api import wire
from sectool.errors import Exit, PrivilegeError, SectoolError, UsageError

log = logging.getLogger("sectool.agent")

MAX_CONNECTIONS = 128
IDLE_S = 300.0
READ_BYTES = 1 << 16
_SO_PEERGROUPS = 59  # include/uapi/asm-generic/socket.h


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of the socket, by the kernel's word (unix(7), SO_PEERCRED; SO_PEERGROUPS)."""

    pid: int
    uid: int
    gid: int
    groups: tuple[int, ...] = ()  # supplementary ones, as the process had them when it connected

    @classmethod
    def of(cls, sock: socket.socket) -> Peer:
        """Ask the kernel."""
        pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        try:
            packed = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1024)
        except OSError:  # more than 256: none of them counts, which refuses rather than permits
            packed = b""
        return cls(pid, uid, gid, tuple(sorted(struct.unpack(f"{len(packed) // 4}I", packed))))

    @property
    def name(self) -> str:
        """User name, or `uid N`."""
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return f"uid {self.uid}"


@dataclass(frozen=True, slots=True)
class Request:
    """One request: its header's fields, its payload and who asks."""

    op: str
    fields: Mapping[str, Any]
    payload: bytes
    peer: Peer

    def text(self, name: str, default: str = "") -> str:
        """A string field; UsageError when it is something else."""
        value = self.fields.get(name, default)
        if not isinstance(value, str):
            raise UsageError(f"{self.op}: {name} has to be text")
        return value

    def number(self, name: str, default: int | None = None) -> int | None:
        """A whole number or None; UsageError when it is something else."""
        value = self.fields.get(name, default)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise UsageError(f"{self.op}: {name} has to be a whole number")
        return value


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: header fields beside `ok`, and a payload."""

    fields: Mapping[str, Any]
    payload: bytes = b""


@dataclass(frozen=True, slots=True)
class Operation:
    """What `op` does. Those that write are for root alone."""

    handle: Callable[[Request], Awaitable[Reply]]
    writes: bool


class Server:
    """Serves `operations` on a unix socket of mode 0660 that belongs to root and `group`."""

    def __init__(self, path: Path, operations: Mapping[str, Operation], group: str | None = None) -> None:
        self.path = path
        self._operations = operations
        self._group = group
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Bind and listen. A stale socket of a dead daemon is replaced (the namespace lock keeps out live ones)."""
        gid = _group_id(self._group)
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(self.path.lstat().st_mode):
                self.path.unlink()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        before = os.umask(0o177)  # closed until owner and mode are right
        try:
            sock.bind(str(self.path))
        except OSError as error:
            sock.close()
            raise SectoolError(f"cannot listen on {self.path}: {error.strerror or error}") from None
        finally:
            os.umask(before)
        os.chown(self.path, 0 if os.geteuid() == 0 else -1, gid if gid is not None else -1)
        self.path.chmod(0o660)
        self._server = await asyncio.start_unix_server(self._accept, sock=sock)

    async def close(self) -> None:
        """Stop listening, end connections, remove the socket."""
        if self._server is not None:
            self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._connections) >= MAX_CONNECTIONS:
            writer.close()
            return
        self._connections.add(task)
        try:
            peer = Peer.of(writer.get_extra_info("socket"))
            await self._converse(peer, reader, writer)
        except (OSError, EOFError, TimeoutError, asyncio.CancelledError):
            log.debug("a client of the local API went away")
        finally:
            self._connections.discard(task)
            writer.close()

    async def _converse(self, peer: Peer, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder = wire.Decoder()
        while data := await asyncio.wait_for(reader.read(READ_BYTES), IDLE_S):
            try:
                frames = list(decoder.feed(data))
            except SectoolError as error:  # not our framing: nothing after it can be understood
                writer.write(_refusal(error))
                await writer.drain()
                return
            for frame in frames:
                writer.write(await self._answer(peer, frame.header, frame.payload))
                await writer.drain()

    async def _answer(self, peer: Peer, header: Mapping[str, Any], payload: bytes) -> bytes:
        op = header.get("op")
        operation = self._operations.get(op) if isinstance(op, str) else None
        if operation is None or not isinstance(op, str):
            log.warning("%s (pid %d) asks for unknown operation %r", peer.name, peer.pid, op)
            return _refusal(
                UsageError(f"the daemon knows no operation {op!r}", "client and daemon may differ in version")
            )
        try:
            if operation.writes and peer.uid != 0:
                raise PrivilegeError(
                    f"{op} is for root; you are {peer.name}", "run it with sudo; reading works without it"
                )
            if operation.writes:
                log.info("%s by %s (pid %d)", op, peer.name, peer.pid)
            reply = await operation.handle(Request(op, header, payload, peer))
        except SectoolError as error:
            log.info("%s by %s (pid %d) refused: %s", op, peer.name, peer.pid, error.message)
            return _refusal(error)
        except OSError as error:
            log.exception("%s by %s failed", op, peer.name)
            return _refusal(
                SectoolError(f"{op} failed in the daemon: {error}", "see agent.log in the run folder")
            )
        except Exception as error:  # a defect in one operation must not end the daemon
            log.exception("%s by %s hit a defect", op, peer.name)
            return _refusal(
                SectoolError(
                    f"{op} failed in the daemon: {type(error).__name__}", "see agent.log in the run folder"
                )
            )
        return wire.encode({"ok": True, **reply.fields}, reply.payload)


def _refusal(error: SectoolError) -> bytes:
    return wire.encode(
        {"ok": False, "error": error.message, "hint": error.hint, "exit": int(error.exit_code or Exit.DENIED)}
    )


def _group_id(name: str | None) -> int | None:
    if name is None:
        return None
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise UsageError(
            f"there is no group {name!r} on this host",
            f"create it (groupadd --system {name}) or remove socket_group",
        ) from None
