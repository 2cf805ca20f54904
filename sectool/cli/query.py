"""`sectool query`: SQL over the events, read-only."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from sectool.cli.context import session
from sectool.cli.flowrow import plain
from sectool.cli.output import Column, Format, emit
from sectool.cli.reading import reading
from sectool.errors import Exit, UsageError

app = typer.Typer(rich_markup_mode=None)

MAX_STDIN = 1 << 20


@app.command()
def query(
    ctx: typer.Context,
    sql: Annotated[str, typer.Argument(metavar="SELECT", help="One SELECT, or - to read it from stdin.")],
    limit: Annotated[
        int, typer.Option("--limit", min=0, max=1_000_000, metavar="N", help="At most N rows.")
    ] = 10_000,
    timeout: Annotated[
        float,
        typer.Option("--timeout", min=0.001, max=600, metavar="SECONDS", help="Stop it after that long."),
    ] = 10.0,
    output: Annotated[
        Format, typer.Option("--output", "-o", help="Format of the data on stdout.")
    ] = Format.TABLE,
) -> None:
    """Ask the event store in SQL (DuckDB's dialect), read-only.

    Views: flows (one row per connection), flow_records, events, identities, labels, workloads, rules; docs/store.md
    describes the columns. Exits 4 when rows were left out.

    \b
    Examples:
      sectool query "SELECT action, count(*) FROM flows GROUP BY action"
      sectool query "SELECT source_labels, destination_port, count(*) AS n FROM flows WHERE action = 'deny'
                     AND event_start > now()::TIMESTAMP - INTERVAL 1 HOUR GROUP BY ALL ORDER BY n DESC" -o csv
    """
    at = session(ctx)
    if sql == "-":
        sql = sys.stdin.read(MAX_STDIN)
    if not sql.strip():
        raise UsageError("there is no query", 'e.g. sectool query "SELECT count(*) FROM flows"')
    with reading(at) as reader:
        result = reader.query(sql, limit=limit, timeout_ms=round(timeout * 1000))
        names = _unique(result.table.column_names)
        values = [[plain(v) for v in column.to_pylist()] for column in result.table.columns]
        rows = [dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]
        columns = [Column(name, lambda r, n=name: "" if r[n] is None else r[n]) for name in names]  # type: ignore[misc]
        emit(rows, columns, output, "sectool.query/1", color=at.color, extra={"truncated": result.truncated})
        if result.truncated:
            at.warn(f"only the first {len(rows)} rows are shown; --limit raises that")
            raise typer.Exit(int(Exit.PARTIAL))


def _unique(names: list[str]) -> list[str]:
    """Column names, made different where SQL lets two be equal."""
    out: list[str] = []
    for name in names:
        candidate, number = name, 2
        while candidate in out:
            candidate, number = f"{name}_{number}", number + 1
        out.append(candidate)
    return out
