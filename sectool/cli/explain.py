"""`sectool explain`, also known as `sectool policy explain`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sectool.cli.context import session
from sectool.cli.moments import moment_us
from sectool.cli.output import Format, emit_document
from sectool.cli.revisions import in_force
from sectool.cli.text import escape_block
from sectool.errors import Exit, UsageError

app = typer.Typer(rich_markup_mode=None)

Output = Annotated[Format, typer.Option("--output", "-o", help="Format of the data on stdout.")]


@app.command()
def explain(
    ctx: typer.Context,
    flow: Annotated[
        str,
        typer.Argument(
            metavar="FLOW", help="A connection: 'LABELS -> LABELS SERVICE'; also ip:, net:, fqdn:."
        ),
    ],
    file: Annotated[
        list[Path] | None,
        typer.Option("--file", "-f", metavar="FILE", help="Ask these files instead of the policy in force."),
    ] = None,
    at: Annotated[
        str | None, typer.Option("--at", metavar="TIME", help="Ask the policy that was in force then.")
    ] = None,
    output: Output = Format.TABLE,
) -> None:
    """Why a connection is allowed or denied, which rule decides, who owns it, and what would allow it.

    The answer comes from the code that decides. Exits 0 for allowed, 1 for denied.

    \b
    Examples:
      sectool explain 'app=web -> app=db tcp/5432'
      sectool explain 'ip:198.51.100.7 -> app=web tcp/443' --at 2h
      sectool policy explain 'app=web -> app=db tcp/5432' --file shop.yaml
    """

    from sectool.events import Action, now_us
    from sectool.policy import Engine, load, parse_flow
    from sectool.policy import explain as explain_request

    here = session(ctx)
    if file and at:
        raise UsageError("--file and --at exclude each other", "--at asks the history of this host")
    spec = parse_flow(flow)
    now = moment_us(at) if at else now_us()
    if file:
        documents, revision = load(file), 0
    else:
        meta, documents = in_force(here, now if at else None)
        revision = meta["revision"]
    networks = {doc.name: doc.spec for doc in documents.networks}
    request = spec.request(networks)
    answer = explain_request(Engine(documents, revision), request, now)
    allowed = answer.decision.action in (Action.ALLOW, Action.AUDIT)
    if output in (Format.TABLE, Format.WIDE):
        sys.stdout.write("".join(escape_block(line) + "\n" for line in answer.lines()))
    else:
        emit_document(_explanation(flow, answer), output, "sectool.explanation/1")
    if not allowed:
        raise typer.Exit(int(Exit.DENIED))


def _explanation(flow: str, answer: Any) -> dict[str, Any]:
    decision = answer.decision
    near = answer.nearest_allow
    return {
        "flow": flow,
        "verdict": decision.action.name.lower(),
        "reason": decision.reason.name.lower(),
        "revision": answer.revision or None,
        "rule": _rule(decision.rule),
        "encrypted": decision.encrypt,
        "pending_verdict": decision.pending_action.name.lower(),
        "pending_rule": _rule(decision.pending_rule),
        "applied": [_rule(r) for r in answer.applied],
        "staged": [_rule(r) for r in answer.staged],
        "nearest_allow": _rule(near.rule) if near else None,
        "missing": [{"part": m.part, "clause": m.clause, "found": m.found} for m in near.misses]
        if near
        else [],
        "remedy": str(answer.remedy),
        "sentence": answer.sentence,
    }


def _rule(rule: Any) -> dict[str, Any] | None:
    if rule is None:
        return None
    return {
        "id": rule.id,
        "kind": rule.kind,
        "policy": rule.policy,
        "owner": rule.owner,
        "index": rule.index,
        "text": rule.text,
        "where": rule.where,
    }
