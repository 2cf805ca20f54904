"""What a change of policy came to, told after apply, rollback, promote and their dry runs."""

from __future__ import annotations

import sys
from typing import Any

import typer

from sectool.cli.context import Session
from sectool.cli.output import Format, emit_document
from sectool.cli.text import escape_block
from sectool.errors import Exit

SCHEMA = "sectool.policy-change/1"


def tell_change(at: Session, header: dict[str, Any], output: Format, *, dry_run: bool = False) -> None:
    """Show the daemon's answer; exit 1 when a worker did not switch."""
    result = {k: v for k, v in header.items() if k not in ("ok", "payload", "conflict_lines")}
    if output in (Format.JSON, Format.JSONL, Format.YAML):
        emit_document(result, output, SCHEMA)
    else:
        if result.get("unchanged"):
            at.say(f"unchanged: this is revision {result['revision']}, which is in force already")
        else:
            sys.stdout.write("".join(escape_block(line) + "\n" for line in result.get("changes", ())))
        for line in header.get("conflict_lines", ()):
            at.say(line)
        for note in result.get("lint", ()):
            at.warn(note)
        if dry_run:
            if result.get("refused"):
                at.warn(f"you may not do this: {result['refused']}")
            at.say("nothing was changed (dry run)")
        elif not result.get("unchanged"):
            cut = result.get("cut", 0)
            at.say(
                f"revision {result['revision']} is in force"
                + (f"; cut {cut} live connections" if cut else "")
            )
    problems = result.get("problems") or []
    for problem in problems:
        at.warn(problem)
    if problems:
        raise typer.Exit(int(Exit.DENIED))
