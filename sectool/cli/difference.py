"""`sectool diff`: what changed between two moments."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from sectool.cli.context import session
from sectool.cli.moments import moment_us, show_time
from sectool.cli.output import Format, emit_document, paint
from sectool.cli.reading import reading
from sectool.cli.text import duration, escape, size
from sectool.errors import Exit
from sectool.filters import parse_tokens
from sectool.moment import parse_duration

app = typer.Typer(rich_markup_mode=None)

SCHEMA = "sectool.diff/1"
_TITLES = {"identity": "identities", "workload": "workloads", "trust": "trust domains", "network": "networks"}


@app.callback()
def group() -> None:
    """Holds the one command of this module."""


@app.command("diff", context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def diff(
    ctx: typer.Context,
    from_: Annotated[
        str, typer.Option("--from", metavar="TIME", help="The earlier moment: 1d (ago), a timestamp.")
    ],
    to: Annotated[str, typer.Option("--to", metavar="TIME", help="The later moment.")] = "now",
    window: Annotated[
        str | None,
        typer.Option(
            "--window",
            metavar="DURATION",
            help="Compare the traffic of so long before each moment [default: the time between them, 1d at most].",
        ),
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", "-n", min=1, max=1000, metavar="N", help="At most N pairs of each sort.")
    ] = 50,
    output: Annotated[Format, typer.Option("--output", "-o", help="table, json or yaml.")] = Format.TABLE,
) -> None:
    """Show what changed between two moments: policy, identities, workloads, trust, and who talks to whom.

    Filters as for `sectool flows` (--from-label, --to-port, …) narrow the traffic. Exits 1 when anything is different,
    0 when nothing is.

    \b
    Examples:
      sectool diff --from 1d
      sectool diff --from 2026-03-01T02:00:00Z --to 2026-03-01T03:00:00Z --window 30m
      sectool diff --from 1h --from-label app=web -o json
    """
    here = session(ctx)
    with reading(here) as reader:
        document = reader.ask(
            "changes",
            before=moment_us(from_),
            after=moment_us(to),
            window=parse_duration(window) if window else None,
            filter=parse_tokens(ctx.args).to_json(),
            limit=limit,
        )
        for warning in document["warnings"]:
            here.warn(warning)
        if output in (Format.TABLE, Format.WIDE):
            lines = list(difference_lines(document, here.color))
            sys.stdout.write("".join(line + "\n" for line in lines))
            if not lines:
                here.say("nothing is different")
        else:
            emit_document(document, output, SCHEMA)
    if different(document):
        raise typer.Exit(int(Exit.DENIED))


def different(document: dict[str, Any]) -> bool:
    """Whether anything changed."""
    policy, traffic = document["policy"], document["traffic"]
    return bool(
        policy["from"] != policy["to"]
        or any(document[kind][how] for kind in _TITLES for how in ("new", "gone", "changed"))
        or any(traffic[how]["count"] for how in ("new", "vanished", "changed"))
    )


def difference_lines(document: dict[str, Any], color: bool) -> Iterator[str]:
    """What changed, for people."""

    def title(text: str) -> str:
        return paint(text, "bold", color)

    policy = document["policy"]
    if policy["from"] != policy["to"]:
        yield title(f"policy: revision {policy['from'] or 'none'} -> {policy['to'] or 'none'}")
        for applied in policy["applied"]:
            yield escape(f"  {show_time(applied['ts'])} {applied['by']}: {applied['reason']}")
        yield from (paint(escape(f"  {line}"), _sign(line), color) for line in policy["changes"])
        if not policy["readable"]:
            yield "  their texts cannot be read"
    for kind, name in _TITLES.items():
        found = document[kind]
        if not any(found.values()):
            continue
        yield title(
            f"{name}: {len(found['new'])} new, {len(found['gone'])} gone, {len(found['changed'])} changed"
        )
        yield from (paint(escape(f"  + {row['name']}"), "good", color) for row in found["new"])
        yield from (paint(escape(f"  - {row['name']}"), "bad", color) for row in found["gone"])
        for row in found["changed"]:
            what = "; ".join(f"{f}: {row['was'][f]} -> {row['is'][f]}" for f in row["fields"])
            yield escape(f"  ~ {row['name']}: {what}")
    yield from _traffic(document, title, color)


def _traffic(document: dict[str, Any], title: Any, color: bool) -> Iterator[str]:
    traffic, seconds = document["traffic"], document["window"] / 1e6
    if not any(traffic[how]["count"] for how in ("new", "vanished", "changed")):
        return
    was, became = traffic["before"], traffic["after"]
    yield title(f"traffic, {duration(seconds)} each: {_rate(was, seconds)} -> {_rate(became, seconds)}")
    for how, mark, style in (("new", "+", "good"), ("vanished", "-", "bad"), ("changed", "~", "")):
        found = traffic[how]
        if found["count"]:
            yield f"  {found['count']} pairs {how}"
        for row in found["pairs"]:
            denied = row["denied_after"] > row["denied_before"]
            text = f"  {mark} {row['source']} -> {row['destination']} {row['service']}: {_counts(row, how)}"
            yield paint(escape(text), "bad" if denied else style, color)
        if found["count"] > len(found["pairs"]):
            yield f"    … {found['count'] - len(found['pairs'])} more (--limit)"


def _rate(counts: dict[str, int], seconds: float) -> str:
    return (
        f"{(counts['allowed'] + counts['denied']) / seconds:.3g} flows/s in {counts['pairs']} pairs,"
        f" {counts['denied']} denied, {size(counts['bytes'])}"
    )


def _counts(row: dict[str, Any], how: str) -> str:
    def words(when: str) -> str:
        parts = [f"{row[f'{what}_{when}']} {what}" for what in ("allowed", "denied") if row[f"{what}_{when}"]]
        return ", ".join(parts) or "ends only"

    if how == "new":
        return words("after")
    return words("before") if how == "vanished" else f"{words('before')} -> {words('after')}"


def _sign(line: str) -> str:
    return {"+": "good", "-": "bad"}.get(line.strip()[:1], "") if line.startswith("  ") else ""
