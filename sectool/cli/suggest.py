"""`sectool policy suggest`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sectool.cli.backtest import Since, Store, Until, opened, progress_bar
from sectool.cli.context import Session, session
from sectool.cli.moments import moment_us, show_time
from sectool.cli.output import Format, emit
from sectool.cli.text import escape_block
from sectool.errors import Exit, SectoolError, UsageError

if TYPE_CHECKING:
    from sectool.policy import DocumentSet

SCHEMA = "sectool.policy-suggestion/1"


def suggest(
    ctx: typer.Context,
    since: Since = None,
    until: Until = None,
    store: Store = None,
    for_: Annotated[
        str | None,
        typer.Option(
            "--for", metavar="SELECTOR", help="Only flows from or to who has these labels (app=web)."
        ),
    ] = None,
    base: Annotated[
        list[Path] | None,
        typer.Option("--base", metavar="FILE", help="Policy to add to [default: the one in force]."),
    ] = None,
    anew: Annotated[
        bool, typer.Option("--anew", help="Learn everything, whatever is allowed already.")
    ] = False,
    denied: Annotated[
        bool, typer.Option("--denied", help="Learn also from what was denied because no rule allowed it.")
    ] = False,
    owner: Annotated[
        str, typer.Option("--owner", metavar="NAME", help="Owner of what is suggested.")
    ] = "unassigned",
    output: Annotated[
        Format, typer.Option("--output", "-o", help="Format of the data on stdout.")
    ] = Format.TABLE,
) -> None:
    """Learn from recorded flows what to add to the policy: staged policies with their evidence, and tests.

    What was let through (by audit rules, say) and no other rule allows yet is put into as few sentences as the flows
    bear out. Each says on which flows it rests, and where it is wider than them. The text tells what was left out. The
    same flows give the same text. Nothing is applied.

    Exits 1 when there is nothing to suggest.

    \b
    Examples:
      sectool policy suggest --since 7d > suggested.yaml
      sectool policy suggest --for app=web --owner team-shop
      sectool policy suggest --store /backup/events --base policies/ -o json
    """
    from sectool.policy import DocumentSet
    from sectool.policy.suggest import suggest as learn
    from sectool.policy.suggested import evidence, render
    from sectool.policy.yamlpos import bad_character
    from store.observations import observations
    from store.situations import Window

    at = session(ctx)
    if bad_character(owner) >= 0 or not owner.strip() or len(owner) > 120:
        raise UsageError("--owner is not an owner", "a word of at most 120 characters, for example team-shop")
    selector = _selector(for_)
    known_policy = _base(at, base, store)
    added_to = (
        DocumentSet(guardrails=known_policy.guardrails, networks=known_policy.networks)
        if anew
        else known_policy
    )
    window = Window(moment_us(since) if since else None, moment_us(until) if until else None)
    with opened(at, store) as history, progress_bar(at, "reading history"):
        seen = observations(history, window, selector=selector, denied=denied)
        warnings = list(history.warnings)
    found = learn(seen.flows, seen.known, added_to, time.time_ns() // 1000, left_out=seen.left_out)
    if output in (Format.TABLE, Format.WIDE):
        sys.stdout.write(escape_block(render(found, known_policy, owner)))
        at.say(f"{len(found.rules)} rules from {found.flows} flows")
    else:
        rows: list[dict[str, Any]] = [
            {
                "rule": str(rule.sentence),
                "flows": rule.evidence.flows,
                "first": show_time(rule.evidence.first, precise=True),
                "last": show_time(rule.evidence.last, precise=True),
                "pairs_seen": rule.pairs,
                "pairs_covered": rule.covered,
                "wider": list(rule.wider),
                "evidence": evidence(rule),
            }
            for rule in found.rules
        ]
        extra = {
            "flows": found.flows,
            "left_out": dict(found.left_out),
            "networks": [{"name": n.name, "cidrs": list(map(str, n.spec.cidrs))} for n in found.networks],
            "text": render(found, known_policy, owner),
            "warnings": warnings,
        }
        emit(rows, (), output, SCHEMA, extra=extra)
    for warning in warnings:
        at.warn(warning)
    if warnings:
        raise typer.Exit(int(Exit.PARTIAL))
    if not found.rules:
        raise typer.Exit(int(Exit.DENIED))


def _base(at: Session, files: list[Path] | None, store: Path | None) -> DocumentSet:
    """The policy that is to be added to; with another host's history and no files, none."""
    from sectool.cli.revisions import in_force
    from sectool.policy import DocumentSet, load

    if files:
        return load(files)
    if store is not None:
        return DocumentSet()
    try:
        return in_force(at)[1]
    except SectoolError:
        at.say("no policy in force is known here; everything is learned")
        return DocumentSet()


def _selector(text: str | None) -> Any:
    """The label selector of --for, or None. Raises DocumentError."""
    if text is None:
        return None
    from sectool.policy.selector import Labels, parse_selector
    from sectool.policy.tokens import Reader
    from sectool.policy.yamlpos import Scalar

    reader = Reader(Scalar.whole(text, "--for"))
    selector = parse_selector(reader, "who is meant")
    if reader.token.kind != "end":
        raise reader.unexpected("the end")
    if not isinstance(selector, Labels):
        raise UsageError("--for takes labels", "for example --for app=web,env=prod")
    return selector
