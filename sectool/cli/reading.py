"""Opening the event store for a command: live when the daemon runs, from the files when it does not, and saying so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import typer

from sectool.cli.context import Session
from sectool.errors import Exit, NoDaemonError, PrivilegeError

if TYPE_CHECKING:
    from store.reader import Reader


@contextlib.contextmanager
def reading(at: Session) -> Iterator[Reader]:
    """A reader of this host's events. What it had to leave out is told, and makes the exit code 4 (partial)."""
    from store.reader import open_reader

    try:
        if not at.paths.events_socket.exists() and not at.paths.events.is_dir():
            raise NoDaemonError(
                f"no daemon answers at {at.paths.run}, and there are no events in {at.paths.events}",
                "start it with `sectool up`, or name its folders with --state and --run",
            )
    except PermissionError:
        raise PrivilegeError(
            f"no permission to read {at.paths.events}",
            "run it with sudo, or join the group named by socket_group",
        ) from None
    reader = open_reader(at.paths.state, at.paths.run)
    try:
        if not reader.live and not at.offline:
            at.say(f"no daemon is running; reading the files in {at.paths.events}")
        yield reader
        for warning in reader.warnings:
            at.warn(warning)
        if reader.warnings:
            raise typer.Exit(int(Exit.PARTIAL))
    finally:
        reader.close()


def tell_truncated(at: Session, truncated: bool, shown: int, hint: str) -> None:
    """Say that there is more than what was shown."""
    if truncated:
        at.say(f"these are {shown}; there are more ({hint})")
