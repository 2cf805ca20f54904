"""`sectool mode` and `sectool break-glass`: whether what policy denies is denied."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, Any

import typer

from sectool.cli.context import session
from sectool.cli.moments import show_time
from sectool.cli.output import Format, emit_document
from sectool.cli.text import duration, escape
from sectool.errors import Exit, NoDaemonError, SectoolError, UsageError
from sectool.policy.condition import SECOND, quantity

app = typer.Typer(rich_markup_mode=None)

MODES = ("enforce", "observe")

Output = Annotated[Format, typer.Option("--output", "-o", help="table, json or yaml.")]


@app.command()
def mode(
    ctx: typer.Context,
    wanted: Annotated[
        str | None,
        typer.Argument(metavar="enforce|observe", help="The mode from now on; none: say which it is."),
    ] = None,
    reason: Annotated[str, typer.Option("--reason", "-r", metavar="TEXT", help="Why, for the record.")] = "",
    output: Output = Format.TABLE,
) -> None:
    """Show whether anything is denied, or begin or stop denying.

    In mode observe every connection is judged and recorded as always, and identities are shown where the handshake
    succeeds, but nothing is denied or reset: what would have been is recorded with its reason, as `would-deny` in
    `sectool flows`. Going back to enforce cuts the connections that policy denies. The mode stays until it is changed,
    across restarts and upgrades; without a daemon it is the mode of the next start. To change it takes root or the role
    security.

    Exits 0 when denial is in force, 1 when it is not.

    \b
    Examples:
      sectool mode
      sectool mode observe --reason "first week on this host"
      sectool flows --verdict audit
      sectool mode enforce --reason "back-test clean, CHG-1234"
    """
    at = session(ctx)
    if wanted is None:
        with at.control() as control:
            told = control.call("status").header
    elif wanted not in MODES:
        raise UsageError(f"there is no mode {wanted!r}", f"modes are {', '.join(MODES)}")
    else:
        try:
            with at.control(timeout=60.0) as control:
                told = control.call("mode.set", mode=wanted, reason=reason).header
        except NoDaemonError:
            told = _for_next_start(ctx, wanted, reason)
    document = _document(told)
    if output in (Format.JSON, Format.JSONL, Format.YAML):
        emit_document(document, output, "sectool.mode/1")
    else:
        sys.stdout.write(escape(_sentence(document)) + "\n")
    if document["observing"] and wanted is None:
        raise typer.Exit(int(Exit.DENIED))


def _for_next_start(ctx: typer.Context, wanted: str, reason: str) -> dict[str, Any]:
    """No daemon runs: root says how the next one begins."""
    from dataclasses import replace

    from sectool.agent.mode import Chosen, Mode, load, save
    from sectool.cli.context import require_root
    from sectool.events import now_us

    require_root("choosing the mode of the next start", "sectool mode, sectool status")
    at = session(ctx)
    before = Chosen()
    with contextlib.suppress(SectoolError):  # what cannot be read enforces, and is written anew
        before = load(at.paths.state)
    chosen = replace(before, mode=Mode(wanted), since_us=now_us(), by="root", reason=reason)
    save(at.paths.state, chosen)
    at.say("no daemon is running: this is how the next one starts")
    return {
        "mode": wanted,
        "observing": wanted == "observe",
        "mode_since": chosen.since_us,
        "mode_by": chosen.by,
        "mode_reason": reason,
    }


def _document(told: Any) -> dict[str, Any]:
    names = ("mode", "observing", "mode_since", "mode_by", "mode_reason", "break_glass")
    return {name: told.get(name) for name in names}


def _sentence(told: dict[str, Any]) -> str:
    from sectool.cli.status import suspended

    if said := suspended(told):
        return said
    by = f", chosen by {told['mode_by']} {show_time(told['mode_since'])}" if told.get("mode_since") else ""
    return f"enforce: what policy does not allow is denied{by}"


@app.command("break-glass")
def break_glass(
    ctx: typer.Context,
    for_: Annotated[
        str | None,
        typer.Option("--for", metavar="TIME", help="How long, such as 90s, 10m or 2h; at most 24h."),
    ] = None,
    reason: Annotated[str, typer.Option("--reason", "-r", metavar="TEXT", help="Why, for the record.")] = "",
    end: Annotated[bool, typer.Option("--end", help="Deny again now.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """Suspend denial for a while in an emergency, on record and with an alert.

    Everything is judged, recorded and authenticated as always, but nothing is denied until the time is over: by
    itself, whatever happens to the daemon meanwhile. What was let through is recorded as `would-deny`, and cut at the
    end. It cannot be extended, only ended and begun anew, both of which are events with user and reason; an alert is
    raised, and sent to every target of alerts.yaml, until it is over. Bounds against floods, and other protocols than
    TCP, UDP and ICMP, stay as they are. It takes root or the role security.

    \b
    Examples:
      sectool break-glass --for 10m --reason "INC-4711: checkout down, guardrail suspected"
      sectool status
      sectool break-glass --end --reason "INC-4711: was DNS"
    """
    at = session(ctx)
    if end == (for_ is not None):
        raise UsageError(
            "say either --for TIME or --end", 'e.g. sectool break-glass --for 10m --reason "INC-4711"'
        )
    with at.control() as control:
        if end:
            told = control.call("break_glass", end=True, reason=reason).header
        else:
            told = control.call("break_glass", seconds=_seconds(for_ or ""), reason=reason).header
    document = {**_document(told), **({"began_by": told["began_by"]} if end else {})}
    if output in (Format.JSON, Format.JSONL, Format.YAML):
        emit_document(document, output, "sectool.mode/1")
        return
    if end:
        at.say(f"denial is in force again (suspended by {document['began_by']})")
    else:
        broken = document["break_glass"]
        at.warn(
            f"NOTHING IS DENIED for {duration(broken['left_s'])}, until {show_time(broken['until'])}:"
            " recorded, and alerted until it is over (sectool break-glass --end)"
        )


def _seconds(text: str) -> int:
    found = quantity(text)
    if found is None or found.kind != "duration":
        raise UsageError(f"{text!r} is not a time", "e.g. --for 90s, 10m or 2h")
    return int(found.amount // SECOND)
