"""`sectool identity`: the identities this host has issued."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from sectool.cli.context import session
from sectool.cli.moments import show_time
from sectool.cli.output import Column, Format, emit
from sectool.cli.text import duration

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)


@app.callback()
def identity() -> None:
    """The identities this host has issued.

    \b
    Example:
      sectool identity list
    """


@app.command("list")
def list_(
    ctx: typer.Context,
    output: Annotated[
        Format, typer.Option("--output", "-o", help="Format of the data on stdout.")
    ] = Format.TABLE,
) -> None:
    """List the identities in use on this host, with what they claim and when they expire.

    \b
    Examples:
      sectool identity list
      sectool identity list -o json
    """
    at = session(ctx)
    with at.control() as control:
        rows = control.call("identity.list")["items"]
    now = time.time_ns() // 1000
    columns = [
        Column("WORKLOAD", lambda r: r["workload"]),
        Column("SPIFFE ID", lambda r: r["spiffe_id"]),
        Column("EXPIRES IN", lambda r: duration((r["not_after"] - now) / 1e6), right=True),
        Column("LABELS", lambda r: ",".join(f"{k}={v}" for k, v in r["labels"].items())),
        Column("ROTATED", lambda r: r["rotations"], wide=True, right=True),
        Column("BYTES", lambda r: r["bytes"], wide=True, right=True),
        Column("NOT AFTER", lambda r: show_time(r["not_after"]), wide=True),
        Column("SERIAL", lambda r: r["serial"], wide=True),
        Column("FINGERPRINT", lambda r: r["fingerprint"], wide=True),
    ]
    emit(rows, columns, output, "sectool.identity/1", color=at.color)
