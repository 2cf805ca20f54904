"""`sectool query`: SQL over the events, read-only."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, TextIO

import typer

from sectool.cli.context import session
from sectool.cli.flowrow import plain
from sectool.cli.outfile import check_target, new_file
from sectool.cli.output import Column, CsvWriter, Format, emit, json_line
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
            help=f"At most N rows [default: {DEFAULT_ROWS}; with --to all].",
        ),
    ] = None,
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            min=0.001,
            max=600,
            metavar="SECONDS",
            help="Stop it after that long [default: 10; with --to 600].",
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option("--to", metavar="FILE", help="Write all rows to FILE (.parquet, .arrow, .csv, .jsonl)."),
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
    describes the columns. What is shown has at most a million rows and 128 MiB; exits 4 when rows were left out. A file
    has all rows, is there whole or not at all, and is its owner's alone to read. `-o arrow` gives an Arrow stream.

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
    timeout_ms = round((timeout or (10.0 if to is None else 600.0)) * 1000)
    if explain or analyze:
        if to is not None or output not in (None, Output.TABLE):
            raise UsageError("a plan is text", "leave --to and --output out")
        with reading(at) as reader:
            sys.stdout.write(escape_block(reader.explain(sql, analyze=analyze, timeout_ms=timeout_ms)))
        return
    form = _format(to, output)
    if to is not None:
        check_target(to, force=force)
        with reading(at) as reader, new_file(to, force=force) as out:
            told, more = write_rows(reader.stream(sql, timeout_ms=timeout_ms), form, out, limit)
        at.say(f"{told} rows are in {to}")
        if more:
            at.warn(f"these are the first {told} rows; --limit was given")
            raise typer.Exit(int(Exit.PARTIAL))
        return
    if form in BINARY and sys.stdout.isatty():
        raise UsageError(f"{form} is nothing for a terminal", f"write it to a file: --to FILE.{form}")
    limit = DEFAULT_ROWS if limit is None else limit
    with reading(at) as reader:
        result = reader.query(sql, limit=limit, timeout_ms=timeout_ms)
        if form in BINARY:
            write_rows(iter([result.table]), form, sys.stdout.buffer, streamed=True)
            sys.stdout.buffer.flush()
        else:
            _emit(result, Format(form), at.color)
        if result.truncated:
            at.warn(_left_out(result, limit))
            raise typer.Exit(int(Exit.PARTIAL))


def _format(to: Path | None, output: Output | None) -> Output:
    """What is written: what `-o` says, else what the file's name says. Raises UsageError."""
    if output is not None:
        if to is not None and output not in SUFFIXES.values():
            raise UsageError(
                f"-o {output} is not for files", "leave it out: the name of the file says the format"
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


def write_rows(
    tables: Iterator[pa.Table],
    form: Output,
    out: IO[bytes],
    limit: int | None = None,
    *,
    streamed: bool = False,
) -> tuple[int, bool]:
    """Write tables of one schema, one after the other; how many rows, and whether `limit` left some out."""
    from store.tablefile import ArrowFile, ParquetFile

    file: ArrowFile | ParquetFile | _Lines
    if form is Output.PARQUET:
        file = ParquetFile(out)
    elif form is Output.ARROW:
        file = ArrowFile(out, streamed=streamed)
    else:
        file = _Lines(out, form)
    told, more = 0, False
    for table in tables:
        more = limit is not None and told + table.num_rows > limit
        rows = table.slice(0, limit - told) if limit is not None and more else table
        file.write(rows)
        told += rows.num_rows
        if more:
            break
    file.close()
    return told, more


class _Lines:
    """CSV or JSON lines."""

    def __init__(self, out: IO[bytes], form: Output) -> None:
        self._text = io.TextIOWrapper(out, encoding="utf-8", newline="\n")
        self._csv = CsvWriter(self._text) if form is Output.CSV else None
        self._begun = False

    def write(self, table: pa.Table) -> None:
        """Append the rows of `table`."""
        names, rows = _rows(table)
        if self._csv is not None and not self._begun:
            _csv_header(names, self._text)
            self._csv.keys = names
        self._begun = True
        for row in rows:
            if self._csv is not None:
                self._csv.row(row)
            else:
                self._text.write(json_line(row, SCHEMA) + "\n")

    def close(self) -> None:
        """Write what is left. The file itself is its maker's to close."""
        self._text.detach()


def _csv_header(names: list[str], out: TextIO) -> None:
    csv.writer(out, lineterminator="\n").writerow([escape(name) for name in names])


def _emit(result: Result, form: Format, color: bool) -> None:
    names, rows = _rows(result.table)
    if form is Format.CSV and not rows:  # the writer takes its header from the first row
        _csv_header(names, sys.stdout)
        return
    columns = [Column(name, lambda r, n=name: "" if r[n] is None else r[n]) for name in names]  # type: ignore[misc]
    extra: dict[str, Any] = {"truncated": result.truncated}
    if result.limited:
        extra["limited"] = result.limited
    emit(rows, columns, form, SCHEMA, color=color, extra=extra)


def _rows(table: pa.Table) -> tuple[list[str], list[dict[str, Any]]]:
    from store.tablefile import unique, values

    names = unique(table.column_names)
    cells = [[plain(v) for v in values(column)] for column in table.columns]
    return names, [dict(zip(names, row, strict=True)) for row in zip(*cells, strict=True)]


def _left_out(result: Result, limit: int) -> str:
    rows = result.table.num_rows
    if result.limited == "bytes":
        return (
            f"these are the first {rows} rows: what is shown holds 128 MiB; --to FILE writes all, or ask for less, by"
            " time or by fewer columns"
        )
    more = "--limit raises that" if limit < MAX_ROWS else "--to FILE writes all"
    return f"these are the first {rows} rows; {more}"
