"""`sectool ends`: both ends of the flows between hosts, compared."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from sectool.cli.context import session
from sectool.cli.moments import moment_us
from sectool.cli.output import Column, Format, Row, emit
from sectool.errors import Exit, UsageError

app = typer.Typer(rich_markup_mode=None)

SCHEMA = "sectool.ends/1"


@app.callback()
def group() -> None:
    """Holds the one command of this module."""


@app.command()
def ends(
    ctx: typer.Context,
    store: Annotated[
        list[str],
        typer.Option(
            "--store", metavar="[NAME=]DIR", help="A host's state folder or case bundle; give two or more."
        ),
    ],
    since: Annotated[str, typer.Option("--since", metavar="TIME", help="Flows from then on.")] = "1d",
    until: Annotated[str, typer.Option("--until", metavar="TIME", help="Up to then.")] = "now",
    output: Annotated[
        Format, typer.Option("--output", "-o", help="Format of the data on stdout.")
    ] = Format.TABLE,
) -> None:
    """Join both ends of connections between hosts by community id: what only one end saw, and where they disagree.

    A connection that its initiator records and its responder does not was lost on the way, or the responder's enforcer
    did not run. Exits 1 when anything is one-sided or disagrees, 4 when there were too many to look at.

    \b
    Examples:
      sectool ends --store web=/cases/web-1 --store db=/cases/db-1 --since 1h
      sectool ends --store case-a --store case-b --since 2026-03-01T02:00:00Z --until 2026-03-01T03:00:00Z -o json
    """
    from store.ends import join_ends
    from store.reader import LocalReader

    here = session(ctx)
    named = [_named(text) for text in store]
    if len(named) < 2 or len({name for name, _ in named}) < len(named):
        raise UsageError("two or more stores with different names are needed", "--store a=DIR --store b=DIR")
    with contextlib.ExitStack() as stack:
        readers = []
        for name, folder in named:
            reader = LocalReader(folder / "events")
            stack.callback(reader.close)
            for warning in reader.warnings:
                here.warn(f"{name}: {warning}")
            readers.append((name, reader))
        found = join_ends(readers, moment_us(since), moment_us(until))
    rows: list[Row] = [{"kind": "one-sided", "what": _missing(row), **row} for row in found.lonely] + [
        {"kind": "disagree", "what": "; ".join(row["differences"]), **row} for row in found.unlike
    ]
    columns = [
        Column("TIME", lambda r: r["time"]),
        Column("KIND", lambda r: r["kind"], style=lambda r: "bad" if r["kind"] == "disagree" else "warn"),
        Column("SOURCE", lambda r: r["source"]),
        Column("DESTINATION", lambda r: r["destination"]),
        Column("PROTOCOL", lambda r: r["transport"]),
        Column("WHAT", lambda r: r["what"]),
        Column("COMMUNITY ID", lambda r: r["community_id"], wide=True),
    ]
    counts = {k: v for k, v in asdict(found).items() if k in ("both", "elsewhere", "truncated")}
    emit(rows, columns, output, SCHEMA, color=here.color, extra=counts)
    here.say(
        f"{found.both} connections seen from both ends, {len(found.lonely)} from one,"
        f" {len(found.unlike)} disagree, {found.elsewhere} have their other end elsewhere"
    )
    if found.truncated:
        here.warn("there were more connections than could be looked at; give a shorter window")
        raise typer.Exit(int(Exit.PARTIAL))
    if rows:
        raise typer.Exit(int(Exit.DENIED))


def _named(text: str) -> tuple[str, Path]:
    name, equals, folder = text.partition("=")
    path = Path(folder if equals else name).absolute()
    return (name if equals else path.name), path


def _missing(row: Row) -> str:
    why = "" if row["covered"] else " (nothing of that time is on record there)"
    said = f"{row['action']} {row['reason'] or ''}".strip()
    return f"{said} at {row['host']}, unknown at {row['missing_at']}{why}"
