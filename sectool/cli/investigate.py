"""`sectool investigate`: everything on record about one thing, as a report."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import typer

from sectool.cli.context import session
from sectool.cli.moments import moment_us
from sectool.cli.output import dumps, yaml_text
from sectool.cli.reading import reading
from sectool.errors import UsageError

app = typer.Typer(rich_markup_mode=None)

SCHEMA = "sectool.investigation/1"


class ReportFormat(StrEnum):
    """What `-o` takes here."""

    TABLE = "table"
    MARKDOWN = "markdown"
    HTML = "html"
    JSON = "json"
    YAML = "yaml"


@app.callback()
def group() -> None:
    """Holds the one command of this module."""


@app.command()
def investigate(
    ctx: typer.Context,
    about: Annotated[
        str,
        typer.Argument(
            metavar="THING", help="Address, spiffe://…, k=v, workload, policy, or a flow's event.id."
        ),
    ],
    since: Annotated[
        str | None,
        typer.Option("--since", metavar="TIME", help="From then on [default: the last hour on record]."),
    ] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="TIME", help="Up to then.")] = None,
    at: Annotated[
        str | None, typer.Option("--at", metavar="TIME", help="Half an hour before and after.")
    ] = None,
    output: Annotated[
        ReportFormat, typer.Option("--output", "-o", help="Also markdown, and html with plots in one file.")
    ] = ReportFormat.TABLE,
) -> None:
    """Gather what is on record about one thing: timeline, peers, denied attempts, policy, processes, blast radius.

    The blast radius is what it could reach, directly and through others, by the policy of that time and by the newest,
    judged by the engine that enforces, among the workloads on record.

    \b
    Examples:
      sectool investigate app=web --since 2h
      sectool investigate 10.0.0.7 --at 02:10 -o html > report.html
      sectool --store case-17 investigate 019aab3c-7f52-7c11-8e0a-3d2f5b6a7c88 -o markdown
    """
    from sectool.cli import investigated

    here = session(ctx)
    if at and (since or until):
        raise UsageError("--at and --since/--until exclude each other")
    half = 30 * 60 * 1_000_000
    with reading(here) as reader:
        document = reader.ask(
            "investigate",
            about=about,
            since=moment_us(at) - half if at else moment_us(since) if since else None,
            until=moment_us(at) + half if at else moment_us(until) if until else None,
        )
        for warning in document["warnings"]:
            here.warn(warning)
        match output:
            case ReportFormat.JSON:
                sys.stdout.write(dumps({"schema": SCHEMA, **document}, indent=2) + "\n")
            case ReportFormat.YAML:
                sys.stdout.write(yaml_text({"schema": SCHEMA, **document}))
            case ReportFormat.MARKDOWN:
                sys.stdout.write(investigated.markdown(document))
            case ReportFormat.HTML:
                sys.stdout.write(investigated.html(document))
            case _:
                sys.stdout.write(investigated.plain(document, here.color))
