"""`sectool flows` and `sectool events`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sectool.cli.context import Session, session
from sectool.cli.flowrow import COLUMNS, SCHEMA, flow_row, plain
from sectool.cli.moments import moment_us
from sectool.cli.output import Column, CsvWriter, Format, Row, Table, dumps, emit, json_line
from sectool.cli.reading import reading, tell_truncated
from sectool.errors import NoDaemonError, UsageError
from sectool.filters import FLAGS, Filter, parse_tokens

if TYPE_CHECKING:
    from store.reader import Reader

app = typer.Typer(rich_markup_mode=None)

DEFAULT_COUNT = 50
EVENT_SCHEMA = "sectool.event/1"

Output = Annotated[Format, typer.Option("--output", "-o", help="Format of the data on stdout.")]
Since = Annotated[
    str | None,
    typer.Option("--since", metavar="TIME", help="From then on: 10m (ago), 14:30, or a timestamp."),
]
Until = Annotated[str | None, typer.Option("--until", metavar="TIME", help="Up to then.")]
Last = Annotated[
    int | None,
    typer.Option("--last", "-n", min=0, metavar="N", help=f"The newest N [default: {DEFAULT_COUNT}]."),
]
First = Annotated[int | None, typer.Option("--first", min=0, metavar="N", help="The oldest N.")]


def _filter_help() -> str:
    lines = [
        f"  --{flag.name + ('' if flag.implied else ' VALUE'):<22} {flag.help}" for flag in FLAGS.values()
    ]
    return "\n".join(lines)


FLOWS_HELP = f"""List or follow the connections seen on this host, with verdict and reason, oldest first.

The same filter given again widens (OR), different filters narrow (AND), --not turns around the next one alone.
Without a daemon the stored events are read from the files.

\b
Examples:
  sectool flows --verdict deny --since 10m
  sectool flows --from-label app=web --to-port 5432 --not --to-label env=prod
  sectool flows -f -o jsonl | jq '."drop_reason"'
  sectool flows --at 02:00            what was open then

\b
Filters:
{_filter_help()}
  --not                    turn around the next filter
"""


@app.command(help=FLOWS_HELP, context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def flows(
    ctx: typer.Context,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new ones as they come.")] = False,
    since: Since = None,
    until: Until = None,
    at: Annotated[
        str | None,
        typer.Option("--at", metavar="TIME", help="Only connections that were open then, as known then."),
    ] = None,
    last: Last = None,
    first: First = None,
    output: Output = Format.TABLE,
) -> None:
    here = session(ctx)
    chosen = parse_tokens(ctx.args)
    _exclusive(first, last)
    if follow and (until or at or first is not None):
        raise UsageError("--follow goes on into the future", "leave out --until, --at and --first")
    with reading(here) as reader:
        if follow:
            _follow(here, reader, chosen, moment_us(since) if since else None, last, output)
            return
        result = reader.flows(
            chosen,
            since=moment_us(since) if since else None,
            until=moment_us(until) if until else None,
            at=moment_us(at) if at else None,
            first=first,
            last=_count(first, last),
        )
        rows = [flow_row(row) for row in result.table.to_pylist()]
        emit(rows, COLUMNS, output, SCHEMA, color=here.color, extra={"truncated": result.truncated})
        tell_truncated(here, result.truncated and first is last is None, len(rows), "--last N shows more")


def _exclusive(first: int | None, last: int | None) -> None:
    if first is not None and last is not None:
        raise UsageError("--first and --last exclude each other")


def _count(first: int | None, last: int | None) -> int | None:
    return DEFAULT_COUNT if first is None and last is None else last


def _follow(
    here: Session, reader: Reader, chosen: Filter, since: int | None, last: int | None, output: Format
) -> None:
    if not reader.live:
        raise NoDaemonError("no daemon runs, so there is nothing to follow", "start it with `sectool up`")
    write = flow_writer(here, output)
    frames = iter(reader.tail(chosen))
    next(frames)  # it follows from here on: what is listed below cannot fall into a gap
    shown: set[str] = set()
    wanted = DEFAULT_COUNT if since is not None and last is None else last or 0
    if wanted:
        for stored in reader.flows(chosen, since=since, last=wanted).table.to_pylist():
            row = flow_row(stored)
            shown.add(row["event.id"])
            write(row)
    sys.stdout.flush()
    for frame in frames:
        if frame.gap:
            here.warn(f"too slow to follow: {frame.gap} events were skipped (they are stored; see --since)")
        for stored in frame.table.to_pylist() if frame.table is not None else ():
            row = flow_row(stored)
            if row["event.id"] not in shown:
                write(row)
        sys.stdout.flush()
    raise NoDaemonError("the daemon has stopped", "without --follow the stored events can still be read")


def flow_writer(here: Session, output: Format) -> Callable[[Row], None]:
    """What shows flows one by one, as they come or are played back."""
    match output:
        case Format.TABLE | Format.WIDE:
            table = Table(COLUMNS, wide=output is Format.WIDE, color=here.color)
            table.header()
            return table.row
        case Format.CSV:
            return CsvWriter().row
        case _:  # one object a line: a document that never ends could not be read
            return lambda row: _say_line(json_line(row, SCHEMA))


def _say_line(line: str) -> None:
    sys.stdout.write(line + "\n")


@app.command()
def events(
    ctx: typer.Context,
    type_: Annotated[
        list[str] | None,
        typer.Option("--type", "-t", metavar="TYPE", help="Only these, e.g. policy.*; repeatable."),
    ] = None,
    since: Since = None,
    until: Until = None,
    last: Last = None,
    first: First = None,
    output: Output = Format.TABLE,
) -> None:
    """List what else happened: workloads, identities, policy changes, the enforcer's own state, losses.

    \b
    Examples:
      sectool events --since 1h
      sectool events --type 'policy.*' --type enforcer.degraded -o json
    """
    here = session(ctx)
    _exclusive(first, last)
    with reading(here) as reader:
        result = reader.events(
            type_ or (),
            since=moment_us(since) if since else None,
            until=moment_us(until) if until else None,
            first=first,
            last=_count(first, last),
        )
        rows = list(_event_rows(result.table.to_pylist()))
        columns = [
            Column("TIME", lambda r: r["ts"][:23] + "Z"),
            Column("TYPE", lambda r: r["type"], style=_event_style),
            Column("WHAT", lambda r: _details(r["data"])),
        ]
        emit(rows, columns, output, EVENT_SCHEMA, color=here.color, extra={"truncated": result.truncated})
        tell_truncated(here, result.truncated and first is last is None, len(rows), "--last N shows more")


def _event_rows(stored: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    for row in stored:
        try:
            body = json.loads(row["body"])
        except (TypeError, ValueError):
            body = {"unreadable": row["body"]}
        data = (
            {k: v for k, v in body.items() if k not in ("type", "ts")}
            if isinstance(body, dict)
            else {"value": body}
        )
        yield {"seq": row["seq"], "ts": plain(row["ts"]), "type": row["type"], "data": data}


def _details(data: dict[str, Any]) -> str:
    return " ".join(
        f"{key}={value if isinstance(value, str) else dumps(value)}"
        for key, value in data.items()
        if value not in (None, "", [])
    )


def _event_style(row: Row) -> str:
    kind = row["type"]
    if kind in ("enforcer.degraded", "events.lost", "store.damaged", "identity.revoked", "alert.raised"):
        return "bad"
    return "warn" if kind.startswith("policy.") else ""
