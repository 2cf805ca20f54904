"""The agent's end of one packet worker: spawn, configure, listen.

Frames of sectool.api.wire over a socketpair, each with `t`:

    to the worker    config, go, policy, credential, flush_workloads, relabel, bundle, revoked, settings,
                     mode, stats, stop
    from the worker  standing_by, ready, identify, stats, policy_active, revoked, mode, fatal

A worker is configured from scratch at every start, so one that died comes back with the present policy revision
and an empty memory of workloads; what it has to remember of flows is in its journal, not here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from sectool.agent.children import Child, Process
from sectool.agent.handover import Given, Predecessor
from sectool.agent.nursery import Nursery, Program
from sectool.api import wire
from sectool.errors import SectoolError

log = logging.getLogger("sectool.agent")

Key = Hashable  # a socket's workload key: the worker's own, opaque here
READ_BYTES = 65_536
PREDECESSOR_GRACE_S = 3.0
FLUSH_S = 1.0


@dataclass(frozen=True, slots=True)
class PolicyText:
    """What a worker compiles: the documents' text as stored, its revision number and hash."""

    revision: int
    hash: str
    text: str


@dataclass(frozen=True, slots=True)
class Activation:
    """A worker's answer to a policy: how many live flows it cut, and the microseconds it took."""

    revision: int
    cut: int
    us: int


@dataclass(frozen=True, slots=True)
class Setup:
    """What every start of a worker needs, asked for anew each time."""

    config: Callable[[], dict[str, Any]]
    bundle: Callable[[], bytes]
    policy: Callable[[], PolicyText]
    revoked: Callable[[], bytes] = bytes  # sectool.identity.revocation.Revocations.to_wire


class Worker:
    """One packet worker through all its lives."""

    def __init__(
        self,
        number: int,
        setup: Setup,
        *,
        identify: Callable[[Worker, Key, Mapping[str, Any]], None],
        changed: Callable[[str], None],
        nursery: Nursery,
    ) -> None:
        """`identify` is called for each question; `changed` whenever enforcing starts or stops (with the reason)."""
        self.number = number
        self.stats: dict[str, Any] = {}
        self.revision: int | None = None
        self.ready = False
        self.heard = 0.0  # when it last said anything (monotonic seconds)
        self.fatal: SectoolError | None = None
        self.child = Child(f"worker {number}", self._start, self._died)
        self._setup = setup
        self._identify = identify
        self._changed = changed
        self._nursery = nursery
        self._writer: asyncio.StreamWriter | None = None
        self._pump: asyncio.Task[None] | None = None
        self._activations: dict[int, asyncio.Future[Activation]] = {}
        self._became_ready: asyncio.Event = asyncio.Event()
        self._predecessor: Predecessor | None = None  # still at work; it is to stop when we stand by
        self._stands_by: asyncio.Event = asyncio.Event()
        self.gap_ms: float | None = None  # between a predecessor's last packet and our first, at most
        self._heard_stats: asyncio.Event = asyncio.Event()

    @property
    def enforcing(self) -> bool:
        """Whether it takes packets under a policy revision."""
        return self.ready and self.revision is not None

    async def begin(
        self, timeout_s: float, patience_s: float = 0.0, predecessor: Predecessor | None = None
    ) -> None:
        """Start it and wait until it enforces. Raises SectoolError when it cannot.

        For `patience_s` seconds a refusal is not taken for final: what a predecessor that was killed still holds
        (its queue, its ring) comes free a moment after. A `predecessor` goes on until this one stands by.
        """
        deadline = time.monotonic() + patience_s
        self._predecessor = predecessor
        await self.child.begin()
        try:
            async with asyncio.timeout(timeout_s):
                if predecessor is not None:
                    await self._take_over(predecessor)
                await self._became_ready.wait()
                while self.fatal is not None and time.monotonic() < deadline:
                    self._became_ready.clear()
                    await self._became_ready.wait()
        except TimeoutError:
            raise SectoolError(
                f"packet worker {self.number} was not ready within {timeout_s:.0f} s",
                "see agent.log in the run folder",
            ) from None
        if self.fatal is not None:
            raise self.fatal

    async def _take_over(self, predecessor: Predecessor) -> None:
        await self._stands_by.wait()
        began = time.monotonic()
        await predecessor.stop(PREDECESSOR_GRACE_S)
        self._predecessor = None
        self.send({"t": "go"})
        await self._became_ready.wait()
        self.gap_ms = 1000 * (time.monotonic() - began)

    async def _start(self) -> Process:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                fd = theirs.fileno()
                process = await self._nursery.bear(Program.WORKER, ["--config-fd", str(fd)], [fd])
            except OSError:
                ours.close()
                raise
        reader, writer = await asyncio.open_connection(sock=ours)
        self._writer = writer
        self._pump = asyncio.create_task(self._listen(reader), name=f"listen to worker {self.number}")
        standby = self._predecessor is not None
        self.send({"t": "config", "standby": standby, **self._setup.config()}, self._setup.bundle())
        self.send({"t": "revoked"}, self._setup.revoked())
        self._send_policy(self._setup.policy())
        return process

    def _died(self, why: str) -> None:
        self.ready = False
        self.revision = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        for waiting in self._activations.values():
            if not waiting.done():
                waiting.set_exception(SectoolError(f"packet worker {self.number} {why}"))
        self._activations.clear()
        said = f": {self.fatal.message}" if self.fatal is not None else ""
        self._changed(f"packet worker {self.number} {why}{said}")

    def resettle(self) -> None:
        """Tell it the settings as they are now."""
        self.send({"t": "settings", **self._setup.config()})

    def send(self, header: Mapping[str, Any], payload: bytes = b"") -> None:
        """Queue one frame; nothing happens while the worker is down (it is configured anew when it comes back)."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(wire.encode(header, payload))

    def _send_policy(self, policy: PolicyText) -> None:
        self.send({"t": "policy", "revision": policy.revision, "hash": policy.hash}, policy.text.encode())

    async def activate(self, policy: PolicyText, timeout_s: float) -> Activation:
        """Switch the worker to `policy`. Raises SectoolError when it refuses, dies, or takes too long."""
        waiting = asyncio.get_running_loop().create_future()
        self._activations[policy.revision] = waiting
        self._send_policy(policy)
        try:
            return await asyncio.wait_for(waiting, timeout_s)
        except TimeoutError:
            raise SectoolError(
                f"packet worker {self.number} did not switch to revision {policy.revision} within {timeout_s:.0f} s"
            ) from None
        finally:
            self._activations.pop(policy.revision, None)

    async def fresh_stats(self, timeout_s: float) -> dict[str, Any]:
        """Counters as of now, or the last ones heard when the worker does not answer in time."""
        if self.ready:
            self._heard_stats.clear()
            self.send({"t": "stats"})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._heard_stats.wait(), timeout_s)
        return self.stats

    def check(self, silence_s: float) -> None:
        """Kill a worker that has been silent for `silence_s` seconds (it tells its counters every second)."""
        process = self.child.process
        if self.ready and process is not None and time.monotonic() - self.heard > silence_s:
            log.error(
                "worker %d (pid %d) has been silent for %.0f s; killed", self.number, process.pid, silence_s
            )
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    async def stop(self, grace_s: float) -> None:
        """Let it write its last events and end."""
        self.send({"t": "stop"})
        await self.child.stop(grace_s)
        if self._pump is not None:
            self._pump.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._pump
        if self._writer is not None:
            self._writer.close()

    async def give_away(self) -> Given | None:
        """Let it go on without us: what a successor of ours needs to end it. None when it does not run."""
        pid, writer = self.child.pid, self._writer
        if pid is None or writer is None:
            return None
        await self.child.let_go()
        if self._pump is not None:
            self._pump.cancel()
        try:
            async with asyncio.timeout(FLUSH_S):
                while writer.transport.get_write_buffer_size():
                    await asyncio.sleep(0.001)
        except TimeoutError:  # a successor's word would come in the middle of a message: it will kill it
            log.warning("worker %d does not listen", self.number)
        return Given(self.number, pid, os.dup(writer.get_extra_info("socket").fileno()))

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            decoder = wire.Decoder()
            while data := await reader.read(READ_BYTES):
                for frame in decoder.feed(data):
                    self.heard = time.monotonic()
                    try:
                        self._hear(frame.header)
                    except Exception:  # one odd message must not make us deaf to the next
                        log.exception("worker %d: message %s", self.number, frame.header.get("t"))
        except (SectoolError, OSError) as error:
            log.error("worker %d: unreadable message: %s", self.number, error)

    def _hear(self, header: Mapping[str, Any]) -> None:
        match header.get("t"):
            case "standing_by":
                self._stands_by.set()
            case "ready":
                self.ready = True
                self._maybe_enforcing()
            case "identify":
                self._identify(self, _key(header.get("key")), header.get("facts") or {})
            case "stats":
                self.stats = {k: v for k, v in header.items() if k not in {"t", "payload"}}
                self._heard_stats.set()
            case "policy_active":
                self._policy_active(header)
            case "revoked":
                ended, cut = header.get("sessions"), header.get("cut")
                if ended or cut:
                    log.info(
                        "worker %d: revocation ended %s sessions, cut %s live flows", self.number, ended, cut
                    )
            case "mode":
                log.info("worker %d: denial is in force, cut %s live flows", self.number, header.get("cut"))
            case "fatal":
                self.fatal = SectoolError(
                    str(header.get("error", "the packet worker failed")), str(header.get("hint", ""))
                )
                log.error("worker %d: %s", self.number, self.fatal.message)
                self._became_ready.set()
            case other:
                log.warning("worker %d: message of unknown type %r ignored", self.number, other)

    def _policy_active(self, header: Mapping[str, Any]) -> None:
        revision = int(header.get("revision", 0))
        waiting = self._activations.get(revision)
        if error := header.get("error"):
            log.error("worker %d refuses revision %d: %s", self.number, revision, error)
            if waiting is not None and not waiting.done():
                waiting.set_exception(
                    SectoolError(f"packet worker {self.number} refuses the policy: {error}")
                )
            return
        self.revision = revision
        if waiting is not None and not waiting.done():
            waiting.set_result(Activation(revision, int(header.get("cut", 0)), int(header.get("us", 0))))
        self._maybe_enforcing()

    def _maybe_enforcing(self) -> None:
        if self.enforcing:
            self.fatal = None
            self._became_ready.set()
            self._changed("")


def _key(value: Any) -> Key:
    """JSON lists as tuples, so that a key can be looked up."""
    return tuple(map(_key, value)) if isinstance(value, list) else value
