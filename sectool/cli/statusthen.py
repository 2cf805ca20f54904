"""`sectool status --at`: how the host stood at a moment, by what is on record."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import typer

from sectool.cli.context import Session
from sectool.cli.moments import show_time
from sectool.cli.output import Format, emit_document, paint
from sectool.cli.reading import reading
from sectool.cli.text import escape
from sectool.errors import Exit

SCHEMA = "sectool.status-then/1"


def status_then(here: Session, moment: int, output: Format) -> None:
    """Show it; exits 1 when nothing was enforced then."""
    with reading(here) as reader:
        document = reader.ask("state", at=moment)
        for warning in document["warnings"]:
            here.warn(warning)
        if output in (Format.JSON, Format.JSONL, Format.YAML):
            emit_document(document, output, SCHEMA)
        else:
            sys.stdout.write("".join(line + "\n" for line in _lines(document, here.color)))
    if document["enforcer"]["state"] != "enforcing":
        raise typer.Exit(int(Exit.DENIED))


def _lines(document: dict[str, Any], color: bool) -> Iterator[str]:
    def row(title: str, text: str, style: str = "") -> str:
        return f"{title:<12} {paint(escape(text), style, color)}"

    enforcer = document["enforcer"]
    since = f" since {show_time(enforcer['since'])}" if enforcer["since"] else ""
    yield row("as of", show_time(document["at"]), "bold")
    yield row("state", f"{enforcer['state']}{since}", "good" if enforcer["state"] == "enforcing" else "bad")
    for what, why in enforcer["problems"].items():
        yield row("problem", f"{what}: {why}", "bad")
    for active in document["activation"]:
        revision: dict[str, Any] = next(
            (r for r in document["policy"] if r["key"] == str(active["revision"])), {}
        )
        reason = f" ({revision['reason']})" if revision.get("reason") else ""
        author = f" by {revision['author']}" if revision.get("author") else ""
        since = show_time(active["since"])
        yield row("policy", f"revision {active['revision']}{author} on {active['key']} since {since}{reason}")
    if not document["activation"]:
        yield row("policy", "none that is on record: every connection was denied", "warn")
    yield row("flows", f"{document['flows_open']} open")
    yield row("identities", str(len(document["identity"])))
    yield row("workloads", str(len(document["workload"])))
    yield row("trusted", ", ".join(r["key"] for r in document["trust"]) or "-")
