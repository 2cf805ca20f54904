"""What the daemon says about itself: to stderr in the foreground, to run/agent.log in the background. Never a key."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time

log = logging.getLogger("sectool.agent")


class _Line(logging.Formatter):
    """`2026-03-01T02:03:04.567Z level message`, one line whatever the message holds."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        safe = text.encode("ascii", "backslashreplace").decode().replace("\n", "\n    ")
        safe = "".join(c if c.isprintable() or c == "\n" else f"\\x{ord(c):02x}" for c in safe)
        return f"{moment}.{int(record.msecs):03d}Z {record.levelname.lower()} {safe}"


def start_logging(verbose: bool) -> None:
    """Send the agent's log to stderr (which the background start has pointed at run/agent.log)."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Line())
    root = logging.getLogger("sectool")
    root.handlers[:] = [handler]
    root.setLevel(logging.DEBUG if verbose else logging.INFO)
    root.propagate = False


class Announcer:
    """Tells whoever started the daemon, once, that it enforces or why not.

    A background start waits on a pipe for one JSON line; systemd (Type=notify) on the socket in NOTIFY_SOCKET.
    """

    def __init__(self, fd: int | None) -> None:
        self._fd = fd

    def enforcing(self, **facts: object) -> None:
        """Everything is in place."""
        self._tell({"ok": True, **facts})
        self._notify(b"READY=1")

    def alive(self) -> None:
        """The agent's loop turns: what systemd's watchdog waits for (sd_notify(3)), if there is one."""
        if "WATCHDOG_USEC" in os.environ:
            self._notify(b"WATCHDOG=1")

    def _notify(self, state: bytes) -> None:
        address = os.environ.get("NOTIFY_SOCKET")
        if not address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as notify:
            try:
                notify.sendto(state, "\0" + address[1:] if address.startswith("@") else address)
            except OSError as error:
                log.warning("cannot tell systemd %s: %s", state.decode(), error)

    def failed(self, error: str, hint: str, code: int) -> None:
        """It did not come up."""
        self._tell({"ok": False, "error": error, "hint": hint, "exit": code})

    def _tell(self, message: dict[str, object]) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            try:
                with os.fdopen(fd, "wb") as pipe:
                    pipe.write(json.dumps(message).encode() + b"\n")
            except OSError as error:
                log.warning("nobody waits for our start any more: %s", error)
