"""`sectool top`: the console for incidents."""

from __future__ import annotations

import os
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
    serve: Annotated[
        bool, typer.Option("--serve", help="In a browser on this host instead, at an address with a token.")
    ] = False,
    listen: Annotated[
        str,
        typer.Option("--listen", metavar="[HOST:]PORT", help="Where --serve listens: loopback; 0: any free."),
    ] = "127.0.0.1:0",
) -> None:
    """Watch and mend: what is denied right now, why, since when, and what was changed just before.

    Keys: `?` lists them, `w` explains the chosen connection, `q` leaves. Works over SSH and in tmux, from 80x24 up,
    in 16 colours and with NO_COLOR. Who may read, sees everything; what you may not change is struck out.

    --serve shows the same in a browser. Its address has a token that counts once; nobody else on this host gets in,
    and nothing but this host can reach it: from elsewhere, `ssh -L 8000:127.0.0.1:8000 HOST` and --listen 8000.

    \b
    Examples:
      sudo sectool top
      sectool top --read-only
      sectool top --store /backup/var/lib/sectool
      sudo sectool top --serve
    """
    paths = session(ctx).paths
    if serve:
        from tui.serve import serve as in_browser

        where = ["--state", str(paths.state), "--run", str(paths.run)]
        wanted = ["--store", str(store.absolute())] if store is not None else []
        in_browser([*where, "top", *wanted, *(["--read-only"] if read_only else [])], listen)
        return
    from_browser = os.environ.get("TEXTUAL_DRIVER", "").startswith("textual.drivers.web_driver")
    if not from_browser and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise UsageError(
            "the console needs a terminal", "for scripts: sectool flows, events, status with -o json"
        )
    from tui.app import Console
    from tui.pace import quicken
    from tui.settings import Settings, default_path
    from tui.source import Source

    source = Source.of_store(store) if store is not None else Source(paths, read_only=read_only)
    quicken()
    try:
        Console(source, settings=Settings.load(default_path())).run()
    finally:
        source.close()
