"""The SPIFFE Workload API's serving end: which process asks is the kernel's word, what it gets is its workload's SVID.

    connect(2)     SO_PEERCRED, SO_PEERPIDFD: who connected, held by a pidfd so that its number cannot be another's
    every answer   the process is looked at again: executable, cgroup, user. Another than at first: the call ends

An answer goes out at once, and again whenever the SVID is renewed, a trust bundle changes, or a list of the revoked.
Whoever passes its socket on, or runs another program over it, loses it at the next look; before that it could have
asked for itself as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import select
import socket
import stat
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sectool.errors import SectoolError
from sectool.identity.workload import Facts
from sectool.spiffe.grpc import GrpcError, Method, ServerConnection, Status
from sectool.spiffe.messages import FETCH_BUNDLES, FETCH_SVID, UNSUPPORTED, bundles_response, svid_response

log = logging.getLogger("sectool.spiffe")

REQUIRED: Final = ("workload.spiffe.io", "true")  # SPIFFE Workload Endpoint, 3
MAX_CONNECTIONS: Final = 2048
MAX_OF_USER: Final = 512
MAX_OF_PROCESS: Final = 8
_SO_PEERPIDFD: Final = 77  # Linux 6.5 (include/uapi/asm-generic/socket.h)


@dataclass(frozen=True, slots=True)
class Svid:
    """What a workload gets: DER all, the chain leaf first."""

    spiffe_id: str
    chain: bytes
    key: bytes
    renew_at_us: int


@dataclass(frozen=True, slots=True)
class Caller:
    """The process at the other end: ids when it connected, and a pidfd that stands for it."""

    pid: int
    uid: int
    pidfd: int

    def alive(self) -> bool:
        """Whether it still runs: what /proc says of its number is of it."""
        return not select.select([self.pidfd], [], [], 0)[0]


def caller_of(sock: socket.socket) -> Caller:
    """Who connected. Raises OSError when it has ended already. The caller closes the pidfd."""
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        pidfd = struct.unpack("i", sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4))[0]
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:  # it has ended: its number may be another's by now
            raise
        pidfd = os.pidfd_open(pid)  # before Linux 6.5: the number is all there is
    return Caller(pid, uid, pidfd)


Attest = Callable[[Caller], Awaitable[Facts]]


class Source:
    """Where SVIDs and bundles come from: the daemon."""

    def __init__(
        self,
        attest: Attest,
        svid: Callable[[Facts], Svid],
        bundles: Callable[[], Mapping[str, bytes]],
        own: Callable[[], str],
        crls: Callable[[], Sequence[bytes]] = tuple,
    ) -> None:
        """`attest` and `svid` raise SectoolError for whom there is no identity; `bundles` gives DER roots by trust
        domain, `own` which of them is ours, and `crls` lists of what is revoked, DER.
        """
        self.attest = attest
        self.svid = svid
        self.bundles = bundles
        self.own = own
        self.crls = crls


class WorkloadApi:
    """The socket and its clients."""

    def __init__(self, path: Path, source: Source, now_us: Callable[[], int]) -> None:
        self.path = path
        self._source = source
        self._now = now_us
        self._server: asyncio.Server | None = None
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._of_user: Counter[int] = Counter()
        self._of_process: Counter[int] = Counter()
        self._methods: dict[str, Method[Caller]] = {
            FETCH_SVID: self._fetch_svid,
            FETCH_BUNDLES: self._fetch_bundles,
            **dict.fromkeys(UNSUPPORTED, _unsupported),
        }

    async def start(self) -> None:
        """Listen, for every user of the host. Raises SectoolError. A stale socket is replaced."""
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(self.path.lstat().st_mode):
                self.path.unlink()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.bind(str(self.path))
            self.path.chmod(0o666)
        except OSError as error:
            sock.close()
            raise SectoolError(f"cannot listen on {self.path}: {error.strerror or error}") from None
        self._server = await asyncio.start_unix_server(self._accept, sock=sock, backlog=512)

    async def close(self) -> None:
        """End all calls and remove the socket."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()

    @property
    def clients(self) -> int:
        """How many are connected."""
        return len(self._tasks)

    def changed(self) -> None:
        """Trust or identities are others now: everybody is told."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            caller = caller_of(writer.get_extra_info("socket"))
        except OSError:
            writer.close()
            return
        self._tasks.add(task)
        self._of_user[caller.uid] += 1
        self._of_process[caller.pid] += 1
        try:
            if (
                len(self._tasks) > MAX_CONNECTIONS
                or self._of_user[caller.uid] > MAX_OF_USER
                or self._of_process[caller.pid] > MAX_OF_PROCESS
            ):
                log.warning("too many connections of process %d (user %d)", caller.pid, caller.uid)
                return
            await ServerConnection(reader, writer, self._methods, caller, REQUIRED).run()
        except asyncio.CancelledError:
            log.debug("the Workload API ends")
        finally:
            self._tasks.discard(task)
            for counter, key in ((self._of_user, caller.uid), (self._of_process, caller.pid)):
                counter[key] -= 1
                if not counter[key]:
                    del counter[key]
            os.close(caller.pidfd)
            writer.close()

    # -- methods -----------------------------------------------------------------------------------------------

    async def _facts(self, caller: Caller) -> Facts:
        try:
            facts = await self._source.attest(caller)
        except SectoolError as error:
            log.info("no identity for process %d: %s", caller.pid, error.message)
            raise GrpcError(Status.PERMISSION_DENIED, f"no identity: {error.message}") from None
        if not caller.alive() or facts.uid != caller.uid:
            raise GrpcError(Status.PERMISSION_DENIED, "the process is not what connected any more")
        return facts

    async def _fetch_svid(self, caller: Caller, request: bytes) -> AsyncIterator[bytes]:
        first: Facts | None = None
        while True:
            changed = self._changed
            facts = await self._facts(caller)
            if first is not None and _who(facts) != _who(first):
                raise GrpcError(Status.PERMISSION_DENIED, "the process has become another since it connected")
            first = facts
            try:
                svid = self._source.svid(facts)
            except SectoolError as error:
                log.info("no SVID for process %d: %s", caller.pid, error.message)
                raise GrpcError(Status.PERMISSION_DENIED, f"no identity: {error.message}") from None
            bundles, own = self._source.bundles(), self._source.own()
            others = {f"spiffe://{name}": der for name, der in bundles.items() if name != own}
            crls = self._source.crls()
            yield svid_response(svid.spiffe_id, svid.chain, svid.key, bundles.get(own, b""), others, crls)
            await self._news(changed, svid.renew_at_us)

    async def _fetch_bundles(self, caller: Caller, request: bytes) -> AsyncIterator[bytes]:
        sent = b""
        while True:
            changed = self._changed
            await self._facts(caller)
            answer = bundles_response(
                {f"spiffe://{name}": der for name, der in self._source.bundles().items()}, self._source.crls()
            )
            if answer != sent:
                sent = answer
                yield answer
            await self._news(changed, None)

    async def _news(self, changed: asyncio.Event, due_us: int | None) -> None:
        """Wait until something has changed, or the SVID is to be renewed."""
        left = None if due_us is None else max(0.0, (due_us - self._now()) / 1e6)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(changed.wait(), left)


def _who(facts: Facts) -> tuple[object, ...]:
    return facts.uid, facts.executable, facts.sha256, facts.cgroup


async def _unsupported(caller: Caller, request: bytes) -> AsyncIterator[bytes]:
    for _ in ():
        yield b""
    raise GrpcError(Status.UNIMPLEMENTED, "only X.509-SVIDs are issued here")
