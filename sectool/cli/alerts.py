"""`sectool alerts`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from sectool.cli.context import require_root, session
from sectool.cli.moments import moment_us, show_time
from sectool.cli.output import Column, Format, emit
from sectool.cli.reading import reading, tell_truncated
from sectool.errors import Exit

app = typer.Typer(rich_markup_mode=None)

SCHEMA = "sectool.alert/1"
COUNT = 50

Output = Annotated[Format, typer.Option("--output", "-o", help="Format of the data on stdout.")]


@app.callback(invoke_without_command=True)
def alerts(
    ctx: typer.Context,
    since: Annotated[
        str | None,
        typer.Option(
            "--since", metavar="TIME", help="Also those that are over: from then on (24h, or a timestamp)."
        ),
    ] = None,
    last: Annotated[
        int, typer.Option("--last", "-n", min=1, metavar="N", help="At most the newest N.")
    ] = COUNT,
    output: Output = Format.TABLE,
) -> None:
    """List the alerts that are raised now, or with --since what was raised and cleared.

    What is worth an alert, and where alerts are sent, stands in alerts.yaml in the state folder (docs/alerts.md). Exits
    1 when an alert is raised now.

    \b
    Examples:
      sectool alerts
      sectool alerts --since 24h
      sectool alerts test ops
    """
    if ctx.invoked_subcommand is not None:
        return
    here = session(ctx)
    if since is None:
        with here.control() as control:
            answer = control.call("alerts.list")
        rows: list[dict[str, Any]] = [{**row, "state": "raised"} for row in answer["items"]][-last:]
        if not rows:
            watched = ", ".join(rule["name"] for rule in answer["rules"]) or "nothing"
            here.say(f"no alert is raised; watched for: {watched}")
        if answer["overflow"]:
            here.warn(f"{answer['overflow']} findings beyond the bound were not raised one by one")
    else:
        with reading(here) as reader:
            result = reader.events(["alert.*"], since=moment_us(since), last=last)
            rows = [_told(row) for row in result.table.to_pylist()]
            tell_truncated(here, result.truncated, len(rows), "--last N shows more")
    columns = [
        Column("SINCE", lambda r: show_time(r["raised"])),
        Column("STATE", lambda r: r["state"], style=lambda r: "bad" if r["state"] == "raised" else ""),
        Column("ALERT", lambda r: r["alert"]),
        Column("WHAT", lambda r: r["text"]),
        Column("OWNERS", lambda r: ", ".join(r.get("owners", ()))),
        Column("FOUND", lambda r: r.get("count", r.get("found", "")), right=True, wide=True),
    ]
    emit(rows, columns, output, SCHEMA, color=here.color)
    if since is None and rows:
        raise typer.Exit(int(Exit.DENIED))


def _told(row: dict[str, Any]) -> dict[str, Any]:
    try:
        body = json.loads(row["body"])
    except (TypeError, ValueError):
        body = {}
    state = row["type"].removeprefix("alert.")
    blank = {"id": 0, "alert": "", "text": "", "subject": "", "owners": [], "raised": 0}
    return {**blank, **{k: v for k, v in body.items() if k not in ("type", "ts")}, "state": state}


@app.command("test")
def test(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="TARGET", help="A name under `send:` in alerts.yaml.")],
) -> None:
    """Send a test message to a target. Whether it arrived shows there, and in `sectool status` when it did not.

    \b
    Example:
      sectool alerts test ops
    """
    require_root("sending a test alert", "alerts")
    here = session(ctx)
    with here.control() as control:
        control.call("alerts.test", name=name)
    here.say(f"a test message is on its way to {name}; sectool status tells when it cannot be delivered")
