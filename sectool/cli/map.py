"""`sectool map`: who talks to whom, by labels."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated, Any

import typer

from sectool.cli.context import session
from sectool.cli.moments import moment_us, show_time
from sectool.cli.output import Column, Format, Row, emit
from sectool.cli.reading import reading, tell_truncated
from sectool.cli.text import size
from sectool.filters import parse_tokens

app = typer.Typer(rich_markup_mode=None)

SCHEMA = "sectool.map/1"


class MapFormat(StrEnum):
    """What `-o` takes here."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"
    CSV = "csv"
    DOT = "dot"
    MERMAID = "mermaid"
    SVG = "svg"


COLUMNS = (
    Column("SOURCE", lambda r: r["source"]),
    Column("DESTINATION", lambda r: r["destination"]),
    Column("SERVICES", lambda r: ",".join(r["services"][:6]) + (",…" if len(r["services"]) > 6 else "")),
    Column("ALLOWED", lambda r: r["allowed"] or "", right=True),
    Column("DENIED", lambda r: r["denied"] or "", style=lambda r: "bad" if r["denied"] else "", right=True),
    Column("ENCRYPTED", lambda r: _share(r), right=True),
    Column("BYTES", lambda r: size(r["bytes"]) if r["bytes"] else "", right=True),
)


def _share(row: Row) -> str:
    return f"{min(1.0, row['encrypted'] / row['allowed']):.0%}" if row["allowed"] and row["encrypted"] else ""


@app.callback()
def group() -> None:
    """Holds the one command of this module."""


@app.command("map", context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def map_(
    ctx: typer.Context,
    at: Annotated[
        str | None, typer.Option("--at", metavar="TIME", help="Only what was open at that moment.")
    ] = None,
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="TIME", help="From then on [default: the last hour on record]."),
    ] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="TIME", help="Up to then.")] = None,
    by: Annotated[
        list[str] | None,
        typer.Option(
            "--by", metavar="KEY", help="Label keys that make a party [default: app and env]; repeatable."
        ),
    ] = None,
    output: Annotated[
        MapFormat, typer.Option("--output", "-o", help="Also dot (Graphviz), mermaid and svg.")
    ] = MapFormat.TABLE,
) -> None:
    """Show who talks to whom, by labels: a table, or a picture for a browser or a document.

    Filters as for `sectool flows`. Parties without labels appear by their address, the less busy ones together.

    \b
    Examples:
      sectool map --since 1d --by app
      sectool map --at 02:00 -o svg > map.svg
      sectool map --verdict deny -o mermaid
      sectool map --by zone -o dot | dot -Tpng > zones.png
    """
    from sectool.cli import drawing

    here = session(ctx)
    with reading(here) as reader:
        document: dict[str, Any] = reader.ask(
            "connectivity",
            at=moment_us(at) if at else None,
            since=moment_us(since) if since else None,
            until=moment_us(until) if until else None,
            by=by or None,
            filter=parse_tokens(ctx.args).to_json(),
        )
        edges = document.pop("edges")
        nodes = document["nodes"]
        match output:
            case MapFormat.DOT:
                sys.stdout.write(drawing.graphviz(nodes, edges))
            case MapFormat.MERMAID:
                sys.stdout.write(drawing.mermaid(nodes, edges))
            case MapFormat.SVG:
                sys.stdout.write(drawing.svg(nodes, edges, _title(document)))
            case _:
                emit(edges, COLUMNS, Format(output.value), SCHEMA, color=here.color, extra=document)
        tell_truncated(here, document["truncated"], len(edges), "filters narrow it")
        if not edges:
            here.say("no connections then; --since looks further back")


def _title(document: dict[str, Any]) -> str:
    if document["at"] is not None:
        return f"Open at {show_time(document['at'])}"
    return f"{show_time(document['since'])} to {show_time(document['until'])}"
