"""`sectool doctor`: what is wrong with this host, and what to do about it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from sectool.cli.context import session
from sectool.cli.output import Format, emit_document, paint
from sectool.cli.text import escape
from sectool.errors import Exit

app = typer.Typer(rich_markup_mode=None)

SIGNS = {"good": ("ok", "good"), "note": ("note", "dim"), "warning": ("warn", "warn"), "bad": ("BAD", "bad")}


@app.callback()
def group() -> None:
    """Holds the one command of this module."""


@app.command()
def doctor(
    ctx: typer.Context,
    everything: Annotated[bool, typer.Option("--all", "-a", help="Show what is in order, too.")] = False,
    output: Annotated[Format, typer.Option("--output", "-o", help="table, json or yaml.")] = Format.TABLE,
) -> None:
    """Look for what keeps this host from enforcing well: kernel, other firewalls, clock, files, daemon.

    Each finding comes with its remedy. Nothing is changed. Exits 1 when something is bad.

    \b
    Examples:
      sudo sectool doctor
      sudo sectool doctor --all
      sudo sectool doctor -o json | jq '.items[] | select(.level == "bad")'
    """
    from sectool.agent.doctor import Level, examine, worst

    at = session(ctx)
    findings = examine(at.paths)
    if output in (Format.JSON, Format.JSONL, Format.YAML):
        items = [
            {"area": f.area, "check": f.check, "level": f.level, "message": f.message, "hint": f.hint}
            for f in findings
        ]
        emit_document({"items": items}, output, "sectool.doctor/1")
    else:
        shown = [f for f in findings if everything or f.level is not Level.GOOD]
        for f in shown:
            sign, style = SIGNS[f.level]
            text = escape(f"{f.area}: {f.check}: {f.message}")
            sys.stdout.write(f"{paint(f'{sign:<4}', style, at.color)}  {text}\n")
            if f.hint and f.level is not Level.GOOD:
                sys.stdout.write(f"      {escape(f.hint)}\n")
        bad = sum(f.level is Level.BAD for f in findings)
        warnings = sum(f.level is Level.WARNING for f in findings)
        at.say(f"{len(findings)} findings: {bad} bad, {warnings} warnings")
    if worst(findings) is Level.BAD:
        raise typer.Exit(int(Exit.DENIED))
