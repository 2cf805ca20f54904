"""`sectool timeline`: all kinds of events in one order."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from sectool.cli.context import session
from sectool.cli.moments import moment_us, show_time
from sectool.cli.output import Format, Row, emit, paint
from sectool.cli.reading import reading, tell_truncated
from sectool.cli.text import duration, escape
from sectool.moment import parse_duration

app = typer.Typer(rich_markup_mode=None)

SCHEMA = "sectool.timeline/1"

Output = Annotated[Format, typer.Option("--output", "-o", help="Format of the data on stdout.")]


@app.callback()
def group() -> None:
    """Holds the one command of this module."""


@app.command()
def timeline(
    ctx: typer.Context,
    at: Annotated[
        str | None,
        typer.Option("--at", metavar="TIME", help="Around this moment: 02:00, 10m (ago), a timestamp."),
    ] = None,
    around: Annotated[
        str | None,
        typer.Option("--around", metavar="DURATION", help="So long before and after --at [default: 5m]."),
    ] = None,
    since: Annotated[str | None, typer.Option("--since", metavar="TIME", help="From then on.")] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="TIME", help="Up to then.")] = None,
    about: Annotated[
        str,
        typer.Option(
            "--for",
            metavar="THING",
            help="Only what concerns it: address, spiffe://…, k=v, workload, policy, or a flow's event.id.",
        ),
    ] = "",
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", "-k", metavar="KIND", help="Only these: flow, policy, identity, workload, …"),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, max=5000, metavar="N", help="At most so many lines.")
    ] = 200,
    output: Output = Format.TABLE,
) -> None:
    """Tell what happened, all kinds of events merged: connections, policy, identities, workloads, the enforcer.

    Connections that say the same are one line with a count; changes of policy are told with what they changed.
    Without a time: the last hour on record, or the whole life of one connection. Works without a daemon.

    \b
    Examples:
      sectool timeline --at 02:00 --around 10m
      sectool timeline --since 1h --for app=web
      sectool timeline --for 019aab3c-7f52-7c11-8e0a-3d2f5b6a7c88
      sectool timeline --since 1d --kind policy --kind identity -o json
      sectool --store case-17 timeline --for 10.0.0.7
    """
    here = session(ctx)
    with reading(here) as reader:
        document = reader.ask(
            "timeline",
            at=moment_us(at) if at else None,
            around=parse_duration(around) if around else None,
            since=moment_us(since) if since else None,
            until=moment_us(until) if until else None,
            about=about,
            kinds=kind or [],
            limit=limit,
        )
        for warning in document["warnings"]:
            here.warn(warning)
        entries = document.pop("entries")
        if output in (Format.TABLE, Format.WIDE):
            for line in timeline_lines(entries, here.color):
                sys.stdout.write(line + "\n")
            if not entries:
                here.say(
                    f"nothing is on record from {show_time(document['since'])} to {show_time(document['until'])}"
                )
        else:
            emit([_row(entry) for entry in entries], (), output, SCHEMA, extra=document)
        tell_truncated(
            here, document["truncated"], len(entries), "a shorter window, --kind or --limit shows the rest"
        )


def timeline_lines(entries: list[dict[str, Any]], color: bool) -> list[str]:
    """The entries for people: time, kind, sentence; the day once, what a change says indented below it."""
    out: list[str] = []
    day = ""
    for entry in entries:
        moment = show_time(entry["ts"], precise=True)
        if moment[:10] != day:
            day = moment[:10]
            out.append(paint(day, "bold", color))
        many = ""
        if entry["count"] > 1:
            many = f" x{entry['count']}"
            lasted = (entry["until"] - entry["ts"]) / 1e6
            many += f" in {duration(lasted)}" if lasted >= 1 else ""
        text = paint(escape(entry["text"]), entry["severity"], color)
        out.append(f"{moment[11:]}  {entry['kind']:<9} {text}{paint(many, 'bold', color)}")
        out += [f"{'':24} {paint(escape(line), 'dim', color)}" for line in entry["more"]]
    return out


def _row(entry: Row) -> dict[str, Any]:
    return {
        **entry,
        "ts": show_time(entry["ts"], precise=True),
        "until": show_time(entry["until"], precise=True),
    }
