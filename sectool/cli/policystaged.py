"""`sectool policy promote` and `sectool policy staged-report`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sectool.cli.changes import tell_change
from sectool.cli.context import session
from sectool.cli.flowrow import plain
from sectool.cli.moments import moment_us
from sectool.cli.output import Column, Format, emit
from sectool.cli.reading import reading
from sectool.errors import Exit

REPORT_SCHEMA = "sectool.staged-report/1"
MAX_GROUPS = 1000

Output = Annotated[Format, typer.Option("--output", "-o", help="Format of the data on stdout.")]


def promote(
    ctx: typer.Context,
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="Staged documents: NAME, or KIND/NAME.")
    ],
    reason: Annotated[
        str, typer.Option("--reason", "-r", metavar="TEXT", help="Why; kept with the revision.")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would change, change nothing.")
    ] = False,
    output: Output = Format.TABLE,
) -> None:
    """Enforce documents that are staged now, as a new revision. Nothing else in the policy changes.

    `sectool policy staged-report` shows beforehand which recorded connections would get another verdict.

    \b
    Examples:
      sectool policy promote shop-next --dry-run
      sectool policy promote shop-next --reason "a week without surprises"
    """
    at = session(ctx)
    with at.control(timeout=60.0) as control:
        answer = control.call("policy.promote", names=names, reason=reason, dry_run=dry_run)
    tell_change(at, answer.header, output, dry_run=dry_run)


def staged_report(
    ctx: typer.Context,
    since: Annotated[
        str, typer.Option("--since", metavar="TIME", help="From then on: 24h (ago), or a timestamp.")
    ] = "24h",
    until: Annotated[str | None, typer.Option("--until", metavar="TIME", help="Up to then.")] = None,
    output: Output = Format.TABLE,
) -> None:
    """List the recorded connections that staged documents would decide differently, grouped.

    Each connection carries the verdict that was enforced and the one that staged documents of that time would have
    made. Exits 1 when something would change.

    \b
    Examples:
      sectool policy staged-report
      sectool policy staged-report --since 7d -o json
    """
    from store.staged import staged_changes

    here = session(ctx)
    with reading(here) as reader:
        report = staged_changes(
            reader,
            moment_us(since),
            moment_us(until) if until else None,
            limit=MAX_GROUPS,
        )
        rows: list[dict[str, Any]] = [
            {**group, "first": plain(group["first"]), "last": plain(group["last"])} for group in report.groups
        ]
        columns = [
            Column("NOW", lambda r: r["enforced"]),
            Column("STAGED", lambda r: r["pending"], style=lambda r: "bad" if r["pending"] == "deny" else ""),
            Column("SOURCE", lambda r: r["source"]),
            Column("DESTINATION", lambda r: r["destination"]),
            Column("SERVICE", lambda r: r["service"]),
            Column("FLOWS", lambda r: r["flows"], right=True),
            Column("LAST", lambda r: r["last"][:19] + "Z"),
            Column("STAGED RULE", lambda r: r["pending_rule"] or "default"),
            Column("EXAMPLE", lambda r: r["example"], wide=True),
        ]
        emit(
            rows,
            columns,
            output,
            REPORT_SCHEMA,
            color=here.color,
            extra={"judged": report.judged, "changed": report.changed, "truncated": report.truncated},
        )
        if not report.judged:
            here.say("no connection in that time was judged by staged documents")
        else:
            here.say(f"{report.changed} of {report.judged} connections would get another verdict")
        if report.truncated:
            here.warn(f"only the {MAX_GROUPS} largest groups are shown")
    if report.changed:
        raise typer.Exit(int(Exit.DENIED))
