"""What every command knows: the folders, the manners of output, and how to reach the daemon."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from sectool.api.paths import Paths
from sectool.cli.text import escape_block

if TYPE_CHECKING:
    import typer

    from sectool.api.client import Client


class Color(StrEnum):
    """What `--color` takes."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Session:
    """One run of the command line. Kept as `ctx.obj`."""

    paths: Paths = field(default_factory=Paths.resolve)
    color_mode: Color = Color.AUTO
    quiet: bool = False
    offline: bool = False  # --store: the files of a folder or bundle, never a daemon

    @property
    def color(self) -> bool:
        """Whether stdout gets colour: asked for, or a terminal without NO_COLOR."""
        if self.color_mode is not Color.AUTO:
            return self.color_mode is Color.ALWAYS
        return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"

    def say(self, text: str) -> None:
        """Talk: to stderr, and not at all with `-q`."""
        if not self.quiet:
            sys.stderr.write(escape_block(text) + "\n")

    def warn(self, text: str) -> None:
        """A warning: to stderr, `-q` or not."""
        sys.stderr.write("warning: " + escape_block(text) + "\n")

    def control(self, timeout: float = 10.0) -> Client:
        """A client of the running daemon's control socket."""
        from sectool.api.client import Client

        return Client(self.paths.control_socket, timeout=timeout)


def session(ctx: typer.Context) -> Session:
    """The Session of this run."""
    found = ctx.find_root().obj
    return found if isinstance(found, Session) else Session()


def require_root(what: str, instead: str = "") -> None:
    """Raise PrivilegeError unless we are root. `instead` names what works without."""
    if os.geteuid() != 0:
        from sectool.errors import PrivilegeError

        hint = f"run it with sudo{'; without root you can use ' + instead if instead else ''}"
        raise PrivilegeError(f"{what} needs root (CAP_NET_ADMIN and write access to the state folder)", hint)
