"""`sectool workload`: the workloads seen on this host."""

from __future__ import annotations

from typing import Annotated

import typer

from sectool.cli.context import session
from sectool.cli.moments import show_time
from sectool.cli.output import Column, Format, emit

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)


@app.callback()
def workload() -> None:
    """The workloads seen on this host.

    \b
    Example:
      sectool workload list
    """


@app.command("list")
def list_(
    ctx: typer.Context,
    output: Annotated[
        Format, typer.Option("--output", "-o", help="Format of the data on stdout.")
    ] = Format.TABLE,
) -> None:
    """List the workloads of this host: what the kernel attests of them, and the labels they get for it.

    A workload is listed from its first connection on, a program of `sectool run` from its start.

    \b
    Examples:
      sectool workload list
      sectool workload list -o wide
    """
    at = session(ctx)
    with at.control() as control:
        rows = control.call("workload.list")["items"]
    columns = [
        Column("NAME", lambda r: r["name"]),
        Column("LABELS", lambda r: ",".join(f"{k}={v}" for k, v in r["labels"].items())),
        Column("USER", lambda r: r.get("user") or r["uid"]),
        Column("EXECUTABLE", lambda r: r.get("executable", "-")),
        Column("SINCE", lambda r: show_time(r.get("since"))),
        Column("UNIT", lambda r: r.get("unit", ""), wide=True),
        Column("CGROUP", lambda r: r["cgroup"], wide=True),
        Column("SHA-256", lambda r: r.get("sha256", ""), wide=True),
    ]
    emit(rows, columns, output, "sectool.workload/1", color=at.color)
