"""`sectool top`: the console for incidents."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sectool.cli.context import session
from sectool.errors import UsageError

app = typer.Typer(rich_markup_mode=None)


@app.command()
def top(
    ctx: typer.Context,
    store: Annotated[
        Path | None,
        typer.Option("--store", metavar="DIR", help="Look at a state folder or case instead of this host."),
    ] = None,
    read_only: Annotated[bool, typer.Option("--read-only", help="Change nothing, whoever you are.")] = False,
) -> None:
    """Watch and mend: what is denied right now, why, since when, and what was changed just before.

    Keys: `?` lists them, `w` explains the chosen connection, `q` leaves. Works over SSH and in tmux, from 80x24 up,
    in 16 colours and with NO_COLOR. Without root everything can be read and nothing changed.

    \b
    Examples:
      sudo sectool top
      sectool top --read-only
      sectool top --store /backup/var/lib/sectool
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError(
            "the console needs a terminal", "for scripts: sectool flows, events, status with -o json"
        )
    from tui.app import Console
    from tui.settings import Settings, default_path
    from tui.source import Source

    paths = session(ctx).paths
    source = Source.of_store(store) if store is not None else Source(paths, read_only=read_only)
    try:
        Console(source, settings=Settings.load(default_path())).run()
    finally:
        source.close()
