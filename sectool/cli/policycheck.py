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
