"""Sending alerts: webhook, syslog or a command; with retries, within bounds, and never in the way of anything else.

Each target has a queue of its own. What does not fit into it, or was tried five times, is counted and told with the
next one that arrives. No more than 30 are sent in ten minutes; the last of them says so, and the record has all.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import os
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final
from urllib.parse import urlsplit

from sectool.alerts.rules import How, Target
from sectool.errors import SectoolError

log = logging.getLogger("sectool.agent")

TRIES: Final = 5
FIRST_WAIT_S: Final = 2.0
TIMEOUT_S: Final = 10.0
COMMAND_S: Final = 30.0
QUEUE: Final = 256
MOST: Final = 30  # messages per target in BOUND_S
BOUND_S: Final = 600.0
SCHEMA: Final = "sectool.alert/1"
_FACILITY: Final = 10  # authpriv
_LEVELS: Final = {"raised": 4, "cleared": 5, "test": 6}
_ENVIRONMENT: Final = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}

Message = dict[str, Any]
Send = Callable[[Target, Message], Awaitable[None]]


class DeliveryError(SectoolError):
    """A message did not arrive; the text says why."""


class Delivery:
    """One target's queue. `changed(why)` hears of failure, and of success after it (with an empty text)."""

    def __init__(
        self,
        target: Target,
        changed: Callable[[str], None],
        *,
        send: Send | None = None,
        first_wait_s: float = FIRST_WAIT_S,
    ) -> None:
        self.target = target
        self.lost = 0  # messages that were given up, since the last that arrived
        self._changed = changed
        self._send = send or deliver
        self._wait = first_wait_s
        self._queue: asyncio.Queue[Message] = asyncio.Queue(QUEUE)
        self._sent: deque[float] = deque()
        self._task = asyncio.create_task(self._run(), name=f"alerts to {target.name}")

    def put(self, message: Message) -> None:
        """Send it when its turn comes."""
        try:
            self._queue.put_nowait(message)
        except asyncio.QueueFull:
            self.lost += 1

    async def close(self) -> None:
        """Stop; what waits still is not sent (it is on record)."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _run(self) -> None:
        while True:
            message = await self._queue.get()
            if not self._within_bounds():
                self.lost += 1
                continue
            await self._deliver(message)

    def _within_bounds(self) -> bool:
        now = asyncio.get_running_loop().time()
        while self._sent and self._sent[0] <= now - BOUND_S:
            self._sent.popleft()
        if len(self._sent) >= MOST:
            return False
        self._sent.append(now)
        return True

    async def _deliver(self, message: Message) -> None:
        if len(self._sent) == MOST:
            message = {**message, "more": "further alerts of these ten minutes are in the record only"}
        if self.lost:
            message = {**message, "not_sent": self.lost}
        wait = self._wait
        for attempt in range(1, TRIES + 1):
            try:
                await self._send(self.target, message)
            except DeliveryError as error:
                log.warning("alert not sent to %s (try %d): %s", self.target.name, attempt, error.message)
                self._changed(error.message)
                if attempt == TRIES:
                    self.lost += 1
                    return
                await asyncio.sleep(wait)
                wait *= 4
            else:
                self.lost = 0
                self._changed("")
                return


async def deliver(target: Target, message: Message) -> None:
    """Send one message once. Raises DeliveryError."""
    data = json.dumps({"schema": SCHEMA, **message}, ensure_ascii=True, sort_keys=True).encode()
    try:
        match target.how:
            case How.WEBHOOK:
                await asyncio.wait_for(asyncio.to_thread(_post, target.to[0], data), 2 * TIMEOUT_S)
            case How.SYSLOG:
                await asyncio.to_thread(_syslog, target.to[0], message)
            case How.COMMAND:
                await _command(target.to, data)
    except TimeoutError:
        raise DeliveryError(f"no answer within {TIMEOUT_S:.0f} s") from None
    except (OSError, http.client.HTTPException, ssl.SSLError) as error:
        raise DeliveryError(str(error) or type(error).__name__) from None


def _post(url: str, data: bytes) -> None:
    """POST; follows nothing, so that a secret goes nowhere else."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(
            parts.hostname, parts.port, timeout=TIMEOUT_S, context=ssl.create_default_context()
        )
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=TIMEOUT_S)
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("POST", path, data, {"Content-Type": "application/json", "User-Agent": "sectool"})
        status = connection.getresponse().status
    finally:
        connection.close()
    if not 200 <= status < 300:
        raise DeliveryError(f"{parts.hostname} answered {status}")


def _syslog(where: str, message: Message) -> None:
    """One datagram (RFC 3164 without the time, which the receiver adds)."""
    text = f"{message.get('state', 'alert')}: {message.get('alert', '')}: {message.get('text', '')}"
    if message.get("owners"):
        text += f" (owners: {', '.join(message['owners'])})"
    clean = "".join(c if c.isprintable() else "?" for c in text)
    line = f"<{_FACILITY << 3 | _LEVELS.get(message.get('state', ''), 4)}>sectool[{os.getpid()}]: {clean}"
    data = line.encode()[:2000]
    if where == "local":
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.settimeout(TIMEOUT_S)
            sock.sendto(data, "/dev/log")
        return
    parts = urlsplit(where)
    assert parts.hostname is not None
    assert parts.port is not None
    family, kind, proto, _, address = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_DGRAM)[
        0
    ]
    with socket.socket(family, kind, proto) as sock:
        sock.sendto(data, address)


async def _command(argv: tuple[str, ...], data: bytes) -> None:
    """Run a program with the message on its standard input; it has 30 s, and a session of its own."""
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env=_ENVIRONMENT,
        cwd="/",
        start_new_session=True,
    )
    try:
        await asyncio.wait_for(process.communicate(data), COMMAND_S)
    except TimeoutError:
        raise DeliveryError(f"{argv[0]} did not end within {COMMAND_S:.0f} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            await process.wait()
    if process.returncode:
        raise DeliveryError(f"{argv[0]} ended with status {process.returncode}")
