"""`sectool policy export`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sectool.cli.context import session
from sectool.cli.output import Format, dumps, emit, yaml_text
from sectool.cli.revisions import in_force
from sectool.errors import Exit, UsageError

SCHEMA = "sectool.policy-export/1"


def export(
    ctx: typer.Context,
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE...]", help="Policy files [default: what is in force]."),
    ] = None,
    network_policy: Annotated[
        bool,
        typer.Option("--network-policy", help="As NetworkPolicies of Kubernetes (networking.k8s.io/v1)."),
    ] = False,
    output: Annotated[
        Format, typer.Option("--output", "-o", help="Format of the data on stdout.")
    ] = Format.TABLE,
) -> None:
    """Write the intents in another language, as far as it can say them, and tell what it cannot.

    Exits 1 when something had to be left out.

    \b
    Example:
      sectool policy export --network-policy shop.yaml > netpol.yaml
    """
    from sectool.policy import load
    from sectool.policy.netpolexport import export as write

    if not network_policy:
        raise UsageError("say into what", "sectool policy export --network-policy FILES")
    at = session(ctx)
    found = write(load(files) if files else in_force(at)[1])
    if output in (Format.TABLE, Format.WIDE, Format.YAML):
        sys.stdout.write("---\n".join(yaml_text(document) for document in found.documents))
    elif output is Format.JSONL:
        sys.stdout.writelines(dumps(document) + "\n" for document in found.documents)
    else:
        left = [{"document": one.document, "rule": one.rule, "why": one.why} for one in found.left_out]
        emit([dict(d) for d in found.documents], (), output, SCHEMA, extra={"left_out": left})
    for one in found.left_out:
        at.warn(f"{one.where}: left out: {one.rule}: {one.why}")
    if not found.documents:
        at.say("there is nothing that NetworkPolicies can say")
    if found.left_out:
        raise typer.Exit(int(Exit.DENIED))
