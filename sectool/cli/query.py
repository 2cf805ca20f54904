"""`sectool query`: SQL over the events, read-only."""

from __future__ import annotations

import csv
import io
import sys
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, TextIO

import typer

from sectool.cli.context import session
from sectool.cli.flowrow import plain
from sectool.cli.outfile import check_target, new_file
from sectool.cli.output import Column, Format, emit
from sectool.cli.reading import reading
from sectool.cli.text import escape, escape_block
from sectool.errors import Exit, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

    from store.query import Result

app = typer.Typer(rich_markup_mode=None)

MAX_STDIN = 1 << 20
DEFAULT_ROWS = 10_000
MAX_ROWS = 1_000_000
SCHEMA = "sectool.query/1"


class Output(StrEnum):
    """What `-o` takes here: the formats of every command, and two that are read by programs alone."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"
    JSONL = "jsonl"
    CSV = "csv"
    YAML = "yaml"
    ARROW = "arrow"
    PARQUET = "parquet"


BINARY = (Output.ARROW, Output.PARQUET)
SUFFIXES = {
    ".arrow": Output.ARROW,
    ".parquet": Output.PARQUET,
    ".csv": Output.CSV,
    ".jsonl": Output.JSONL,
    ".json": Output.JSON,
}


@app.command()
def query(
    ctx: typer.Context,
    sql: Annotated[str, typer.Argument(metavar="SELECT", help="One SELECT, or - to read it from stdin.")],
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            min=0,
            max=MAX_ROWS,
            metavar="N",
            help=f"At most N rows [default: {DEFAULT_ROWS}; with --to {MAX_ROWS}].",
        ),
    ] = None,
    timeout: Annotated[
        float,
        typer.Option("--timeout", min=0.001, max=600, metavar="SECONDS", help="Stop it after that long."),
    ] = 10.0,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="FILE", help="Write to FILE (.parquet, .arrow, .csv, .json, .jsonl)."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Let --to write over a file.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show the plan instead; nothing is run.")
    ] = False,
    analyze: Annotated[
        bool, typer.Option("--analyze", help="Run it and show the plan with each step's rows and time.")
    ] = False,
    output: Annotated[
        Output | None, typer.Option("--output", "-o", help="Format of the data [default: table].")
    ] = None,
) -> None:
    """Ask the event store in SQL (DuckDB's dialect), read-only.

    Views: flows (one row per connection), flow_records, events, identities, labels, workloads, rules; docs/store.md
    describes the columns. An answer has at most a million rows and 128 MiB; exits 4 when rows were left out. A file is
    there whole or not at all, readable by its owner alone. `-o arrow` gives an Arrow stream, a file an Arrow file.

    \b
    Examples:
      sectool query "SELECT action, count(*) FROM flows GROUP BY action"
      sectool query "SELECT source_labels, destination_port, count(*) AS n FROM flows WHERE action = 'deny'
                     AND event_start > now()::TIMESTAMP - INTERVAL 1 HOUR GROUP BY ALL ORDER BY n DESC" -o csv
      sectool query "FROM flows_between(now()::TIMESTAMP - INTERVAL 1 DAY, now()::TIMESTAMP)" --to day.parquet
      sectool query --analyze "SELECT count(*) FROM flows WHERE destination_port = 5432"
    """
    at = session(ctx)
    if sql == "-":
        sql = sys.stdin.read(MAX_STDIN)
    if not sql.strip():
        raise UsageError("there is no query", 'e.g. sectool query "SELECT count(*) FROM flows"')
    timeout_ms = round(timeout * 1000)
    if explain or analyze:
        if to is not None or output not in (None, Output.TABLE):
            raise UsageError("a plan is text", "leave --to and --output out")
        with reading(at) as reader:
            sys.stdout.write(escape_block(reader.explain(sql, analyze=analyze, timeout_ms=timeout_ms)))
        return
    form = _format(to, output)
    if to is not None:
        check_target(to, force=force)
    elif form in BINARY and sys.stdout.isatty():
        raise UsageError(f"{form} is nothing for a terminal", f"write it to a file: --to FILE.{form}")
    if limit is None:
        limit = DEFAULT_ROWS if to is None else MAX_ROWS
    with reading(at) as reader:
        result = reader.query(sql, limit=limit, timeout_ms=timeout_ms)
        if to is not None:
            with new_file(to, force=force) as out:
                _write(result, form, out)
            at.say(f"{result.table.num_rows} rows are in {to}")
        elif form in BINARY:
            _write(result, form, sys.stdout.buffer, streamed=True)
            sys.stdout.buffer.flush()
        else:
            _emit(result, Format(form), sys.stdout, at.color)
        if result.truncated:
            at.warn(_left_out(result, limit))
            raise typer.Exit(int(Exit.PARTIAL))


def _format(to: Path | None, output: Output | None) -> Output:
    """What is written: what `-o` says, else what the file's name says. Raises UsageError."""
    if output is not None:
        if to is not None and output in (Output.TABLE, Output.WIDE):
            raise UsageError(
                f"-o {output} is for people", "leave it out: the name of the file says the format"
            )
        return output
    if to is None:
        return Output.TABLE
    form = SUFFIXES.get(to.suffix.lower())
    if form is None:
        raise UsageError(
            f"the name of {to} does not say its format",
            f"end it in {', '.join(SUFFIXES)}, or give the format with -o",
        )
    return form


def _write(result: Result, form: Output, out: IO[bytes], *, streamed: bool = False) -> None:
    from store.tablefile import write_arrow, write_arrow_stream, write_parquet

    if form is Output.PARQUET:
        write_parquet(result.table, out)
    elif form is Output.ARROW:
        (write_arrow_stream if streamed else write_arrow)(result.table, out)
    else:
        text = io.TextIOWrapper(out, encoding="utf-8", newline="\n")
        _emit(result, Format(form), text)
        text.detach()  # flushes; the file is its maker's to close


def _emit(result: Result, form: Format, out: TextIO, color: bool = False) -> None:
    names, rows = _rows(result.table)
    if form is Format.CSV and not rows:  # the writer takes its header from the first row
        csv.writer(out, lineterminator="\n").writerow([escape(name) for name in names])
        return
    columns = [Column(name, lambda r, n=name: "" if r[n] is None else r[n]) for name in names]  # type: ignore[misc]
    extra: dict[str, Any] = {"truncated": result.truncated}
    if result.limited:
        extra["limited"] = result.limited
    emit(rows, columns, form, SCHEMA, color=color, extra=extra, out=out)


def _rows(table: pa.Table) -> tuple[list[str], list[dict[str, Any]]]:
    from store.tablefile import unique, values

    names = unique(table.column_names)
    cells = [[plain(v) for v in values(column)] for column in table.columns]
    return names, [dict(zip(names, row, strict=True)) for row in zip(*cells, strict=True)]


def _left_out(result: Result, limit: int) -> str:
    rows = result.table.num_rows
    if result.limited == "bytes":
        return (
            f"these are the first {rows} rows: an answer holds 128 MiB; ask for less at once, by time or by fewer"
            " columns"
        )
    more = "--limit raises that" if limit < MAX_ROWS else "ask for less at once, by time"
    return f"these are the first {rows} rows; {more}"
