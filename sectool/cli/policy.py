"""`sectool policy …`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from sectool.cli.backtest import Store, backtest
from sectool.cli.changes import tell_change
from sectool.cli.context import session
from sectool.cli.effective import show as show_effective
from sectool.cli.explain import explain
from sectool.cli.export import export
from sectool.cli.moments import moment_us, show_time
from sectool.cli.output import Column, Format, emit, emit_document
from sectool.cli.policycheck import check, conflicts
from sectool.cli.policystaged import promote, staged_report
from sectool.cli.revisions import documents_of, fetch_history, fetch_revision, in_force
from sectool.cli.suggest import suggest
from sectool.cli.text import escape_block
from sectool.errors import Exit, UsageError

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)

Output = Annotated[Format, typer.Option("--output", "-o", help="Format of the data on stdout.")]
Files = Annotated[list[Path], typer.Argument(metavar="FILE...", help="Policy files, or folders of *.yaml.")]


@app.callback()
def policy() -> None:
    """Apply, test, explain, compare and roll back policy.

    \b
    Examples:
      sectool policy test shop.yaml
      sectool policy apply shop.yaml --reason "web may reach db"
      sectool policy diff 3 4
      sectool policy rollback 3 --reason "outage"
    """


@app.command("apply")
def apply_(
    ctx: typer.Context,
    files: Files,
    reason: Annotated[
        str, typer.Option("--reason", "-r", metavar="TEXT", help="Why; kept with the revision.")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would change, change nothing.")
    ] = False,
    output: Output = Format.TABLE,
) -> None:
    """Make these files the policy of this host, as a new revision.

    The files are the whole policy: what is not in them is no longer in force. All workers switch at once, and live
    connections that became denied are cut. Rules that others make void, shadowed or redundant are told with an
    example. Root may change everything, members of groups with a role (setting `roles`) their owners' documents.
    Exits 1 when a worker did not switch.

    \b
    Examples:
      sectool policy apply shop.yaml --reason "web may reach db"
      sectool policy apply policies/ --dry-run
    """
    from sectool.policy import load

    documents = load(files)  # a mistake is reported with its place before anybody is asked
    at = session(ctx)
    op = "policy.check" if dry_run else "policy.apply"
    with at.control(timeout=60.0) as control:
        answer = control.call(op, documents.text.encode(), reason=reason)
    tell_change(at, answer.header, output, dry_run=dry_run)


@app.command("list")
def list_(ctx: typer.Context, output: Output = Format.TABLE) -> None:
    """List the documents of the policy in force.

    \b
    Example:
      sectool policy list -o json
    """
    at = session(ctx)
    meta, documents = in_force(at)
    rows = [
        {
            "kind": str(document.kind),
            "name": document.name,
            "owner": document.owner,
            "mode": str(getattr(document, "mode", "")),
            "rules": len(getattr(document, "rules", ())),
            "where": document.where,
        }
        for document in documents.documents()
    ]
    columns = [
        Column("KIND", lambda r: r["kind"]),
        Column("NAME", lambda r: r["name"]),
        Column("OWNER", lambda r: r["owner"]),
        Column("MODE", lambda r: r["mode"]),
        Column("RULES", lambda r: r["rules"] or "", right=True),
        Column("WHERE", lambda r: r["where"], wide=True),
    ]
    emit(
        rows,
        columns,
        output,
        "sectool.policy-document/1",
        color=at.color,
        extra={"revision": meta["revision"]},
    )


@app.command()
def show(
    ctx: typer.Context,
    rev: Annotated[int | None, typer.Option("--rev", metavar="N", help="This revision.")] = None,
    at: Annotated[
        str | None,
        typer.Option("--at", metavar="TIME", help="The revision in force then (10m, or a timestamp)."),
    ] = None,
    output: Output = Format.TABLE,
) -> None:
    """Show the policy in force, an earlier revision, or what was in force at a time, as it was written.

    \b
    Examples:
      sectool policy show
      sectool policy show --rev 3 -o json
      sectool policy show --at 2026-03-01T02:00:00Z
    """
    here = session(ctx)
    if rev is not None and at is not None:
        raise UsageError("--rev and --at exclude each other")
    meta, text = fetch_revision(here, rev, moment_us(at) if at else None)
    if output in (Format.JSON, Format.JSONL, Format.YAML):
        emit_document({**meta, "text": text}, output, "sectool.policy-revision/1")
        return
    by = f"by {meta['author']}" + (f": {meta['reason']}" if meta["reason"] else "")
    here.say(f"revision {meta['revision']}, applied {show_time(meta['applied'])} {by}")
    sys.stdout.write(escape_block(text if text.endswith("\n") else text + "\n"))


@app.command()
def test(ctx: typer.Context, files: Files, output: Output = Format.TABLE) -> None:
    """Run the Test documents in these files against the rules in them. Needs neither root nor a daemon.

    Exits 1 when a test fails, 2 when a document is not valid.

    \b
    Example:
      sectool policy test policies/
    """
    from sectool.policy import load, run_tests

    at = session(ctx)
    results = run_tests(load(files))
    failed = sum(not r.passed for r in results)
    rows = [
        {"test": r.test, "flow": r.text, "where": r.where, "passed": r.passed, "message": r.message}
        for r in results
    ]
    if output in (Format.TABLE, Format.WIDE):
        for result in results:
            if not result.passed or output is Format.WIDE:
                sys.stdout.write("".join(escape_block(line) + "\n" for line in result.lines()))
        if not results:
            at.warn("there is no Test document in these files; the documents themselves are valid")
        else:
            at.say(f"{len(results) - failed} passed, {failed} failed")
    else:
        emit(
            rows,
            (),
            output,
            "sectool.policy-test/1",
            extra={"passed": len(results) - failed, "failed": failed},
        )
    if failed:
        raise typer.Exit(int(Exit.DENIED))


app.command("explain")(explain)
app.command("check")(check)
app.command("conflicts")(conflicts)
app.command("promote")(promote)
app.command("staged-report")(staged_report)
app.command("backtest")(backtest)
app.command("suggest")(suggest)
app.command("export")(export)


@app.command()
def history(ctx: typer.Context, output: Output = Format.TABLE) -> None:
    """List the revisions, newest first: when, by whom, why.

    \b
    Example:
      sectool policy history
    """
    at = session(ctx)
    rows = fetch_history(at)
    columns = [
        Column("REV", lambda r: r["revision"], right=True),
        Column("", lambda r: "*" if r["active"] else ""),
        Column("APPLIED", lambda r: show_time(r["applied"])),
        Column("AUTHOR", lambda r: r["author"]),
        Column("ROLES", lambda r: ",".join(r.get("roles", ())), wide=True),
        Column("HASH", lambda r: r["hash"][:12]),
        Column("DOCS", lambda r: r["documents"], right=True),
        Column("REASON", lambda r: r["reason"]),
    ]
    emit(rows, columns, output, "sectool.policy-revision/1", color=at.color)


@app.command("diff")
def diff_(
    ctx: typer.Context,
    old: Annotated[str, typer.Argument(metavar="OLD", help="A revision number, or a file.")],
    new: Annotated[
        str | None, typer.Argument(metavar="[NEW]", help="A revision number, or a file [default: in force].")
    ] = None,
    effective: Annotated[
        bool,
        typer.Option("--effective", help="What differs in effect: who may call whom, not how it is written."),
    ] = False,
    store: Store = None,
    output: Output = Format.TABLE,
) -> None:
    """Show what differs in meaning between two revisions or files. Exits 1 when something does.

    With --effective: which pairs of known workloads (those in the history), and which flows that could ever be, get
    another verdict, on which services.

    \b
    Examples:
      sectool policy diff 3 4
      sectool policy diff 4 shop.yaml
      sectool policy diff --effective 4 shop.yaml
    """
    from sectool.policy import diff

    at = session(ctx)
    before = documents_of(at, old)
    after = documents_of(at, new) if new is not None else in_force(at)[1]
    if effective:
        if show_effective(at, before, after, store, output):
            raise typer.Exit(int(Exit.DENIED))
        return
    changes = diff(before, after)
    if output in (Format.TABLE, Format.WIDE):
        for change in changes:
            sys.stdout.write("".join(escape_block(line) + "\n" for line in change.lines()))
        if not changes:
            at.say("no difference in meaning")
    else:
        rows = [
            {
                "change": str(c.verb),
                "kind": str(c.kind),
                "name": c.name,
                "owner": c.owner,
                "field": c.field,
                "old": c.old,
                "new": c.new,
            }
            for c in changes
        ]
        emit(rows, (), output, "sectool.policy-diff/1")
    if changes:
        raise typer.Exit(int(Exit.DENIED))


@app.command()
def rollback(
    ctx: typer.Context,
    revision: Annotated[int, typer.Argument(metavar="REV", help="The revision to return to.")],
    reason: Annotated[
        str, typer.Option("--reason", "-r", metavar="TEXT", help="Why; kept with the new revision.")
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would change, change nothing.")
    ] = False,
    output: Output = Format.TABLE,
) -> None:
    """Return to an earlier revision. History only grows: this makes a new revision with the old text.

    \b
    Example:
      sectool policy rollback 3 --reason "outage"
    """
    at = session(ctx)
    with at.control(timeout=60.0) as control:
        if dry_run:
            text = control.call("policy.show", rev=revision).payload
            answer = control.call("policy.check", text, reason=reason)
        else:
            answer = control.call("policy.rollback", revision=revision, reason=reason)
    tell_change(at, answer.header, output, dry_run=dry_run)
