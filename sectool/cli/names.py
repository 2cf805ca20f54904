"""`sectool names`: which host names this host was told for which addresses."""

from __future__ import annotations

import sys
import time
from typing import Annotated

import typer

from sectool.cli.context import session
from sectool.cli.moments import show_time
from sectool.cli.output import Column, Format, emit
from sectool.cli.text import duration

app = typer.Typer(rich_markup_mode=None)


@app.callback()
def group() -> None:
    """Holds the one command of this module."""


@app.command()
def names(
    ctx: typer.Context,
    output: Annotated[
        Format, typer.Option("--output", "-o", help="Format of the data on stdout.")
    ] = Format.TABLE,
) -> None:
    """List the host names that addresses are known by: what fqdn rules go by.

    Names come from the answers of the host's resolvers, for as long as those say, and from /etc/hosts if a rule
    speaks of them.

    \b
    Examples:
      sectool names
      sectool names -o json
    """
    at = session(ctx)
    with at.control() as control:
        answer = control.call("names.list")
    rows = answer["items"]
    now = time.time_ns() // 1000
    columns = [
        Column("NAME", lambda r: r["name"]),
        Column("IN POLICY", lambda r: "yes" if r["in_policy"] else "-"),
        Column(
            "EXPIRES IN", lambda r: duration((r["expires"] - now) / 1e6) if r["expires"] else "-", right=True
        ),
        Column("SOURCE", lambda r: r["resolver"]),
        Column("ADDRESSES", lambda r: ",".join(r["addresses"])),
        Column("UNTIL", lambda r: show_time(r["expires"]), wide=True),
    ]
    emit(rows, columns, output, "sectool.name/1", color=at.color)
    if answer["more"] and not at.quiet:
        sys.stderr.write(f"{answer['more']} more names are known\n")
