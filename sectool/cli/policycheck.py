"""`sectool policy check`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sectool.cli.context import session
from sectool.cli.output import Format, emit_document
from sectool.cli.text import escape_block
from sectool.errors import Exit, UsageError

SCHEMA = "sectool.policy-check/1"


def check(
    ctx: typer.Context,
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE...", help="Policy files, or folders of *.yaml.")
    ],
    junit: Annotated[
        Path | None, typer.Option("--junit", metavar="FILE", help="Write the findings as JUnit XML, too.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail for every conflict and note, not for grave ones alone.")
    ] = False,
    output: Annotated[
        Format, typer.Option("--output", "-o", help="Format of the data on stdout.")
    ] = Format.TABLE,
) -> None:
    """Parse, lint, look for conflicts and run the tests, as a pipeline does. Needs neither root nor a daemon.

    Exits 2 when a document is not valid; 1 when a test fails, or a rule is unreachable, void or shadowed.

    \b
    Examples:
      sectool policy check policies/
      sectool policy check policies/ --junit policy.xml --strict
    """
    from sectool.events import now_us
    from sectool.policy.checking import check_files

    at = session(ctx)
    checked = check_files(files, now_us())
    if junit is not None:
        from sectool.policy.junit import junit as report

        try:
            junit.write_text(report(checked), encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write {junit}: {error.strerror}", "choose another file") from None
    passed = checked.passed(strict=strict)
    if output in (Format.TABLE, Format.WIDE):
        lines = [line for result in checked.tests if not result.passed for line in result.lines()]
        lines += checked.conflicts.lines()
        sys.stdout.write("".join(escape_block(line) + "\n" for line in lines))
        for note in checked.lint:
            at.warn(note)
        at.say(
            f"{len(checked.documents)} documents; {len(checked.tests) - checked.failed} test lines passed, "
            f"{checked.failed} failed; {len(checked.conflicts.found)} conflicts, {len(checked.grave)} of them grave"
        )
    else:
        emit_document(
            {
                "passed": passed,
                "documents": len(checked.documents),
                "hash": checked.documents.hash,
                "lint": checked.lint,
                "conflicts": [conflict.describe() for conflict in checked.conflicts.found],
                "tests": [
                    {
                        "test": r.test,
                        "flow": r.text,
                        "expected": "allow" if r.allow else "deny",
                        "where": r.where,
                        "passed": r.passed,
                        "message": r.message,
                    }
                    for r in checked.tests
                ],
            },
            output,
            SCHEMA,
        )
    if not passed:
        raise typer.Exit(int(Exit.DENIED))


def conflicts(
    ctx: typer.Context,
    owner: Annotated[
        str | None,
        typer.Option("--owner", metavar="NAME", help="Only those that concern this owner's rules."),
    ] = None,
    at: Annotated[
        str | None, typer.Option("--at", metavar="TIME", help="Of the policy that was in force then.")
    ] = None,
    output: Annotated[
        Format, typer.Option("--output", "-o", help="Format of the data on stdout.")
    ] = Format.TABLE,
) -> None:
    """List what rules of the policy in force make of each other: void, shadowed, unreachable, redundant, overlapping.

    Each conflict comes with an example and names both owners, so that each finds what concerns them. Exits 1 when a
    rule is unreachable, void or shadowed.

    \b
    Examples:
      sectool policy conflicts
      sectool policy conflicts --owner team-shop -o json
    """
    from sectool.cli.moments import moment_us
    from sectool.cli.revisions import in_force
    from sectool.events import now_us
    from sectool.policy import Engine
    from sectool.policy.checking import GRAVE
    from sectool.policy.conflicts import Conflicts, find_conflicts

    here = session(ctx)
    moment = moment_us(at) if at else None
    meta, documents = in_force(here, moment)
    found = find_conflicts(Engine(documents, meta["revision"]), moment or now_us())
    if owner is not None:
        found = Conflicts(
            tuple(c for c in found.found if owner in c.owners),
            tuple(r for r in found.undecided if r.owner == owner),
        )
    if output in (Format.TABLE, Format.WIDE):
        sys.stdout.write("".join(escape_block(line) + "\n" for line in found.lines(most=1000)))
        if not found.found:
            here.say(f"no conflicts in revision {meta['revision']}")
    else:
        emit_document(
            {"revision": meta["revision"], "conflicts": [conflict.describe() for conflict in found.found]},
            output,
            "sectool.policy-conflicts/1",
        )
    if any(conflict.kind in GRAVE and not conflict.pending for conflict in found.found):
        raise typer.Exit(int(Exit.DENIED))
