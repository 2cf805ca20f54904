"""`sectool vuln`: known vulnerabilities, as scanners report them, joined to workloads."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sectool.cli.context import Session, require_root, session
from sectool.cli.moments import show_time
from sectool.cli.output import Column, Format, Row, emit
from sectool.cli.text import duration, escape
from sectool.errors import UsageError

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)

SEVERITIES = ("critical", "high", "medium", "low")
STYLES = {"critical": "bad", "high": "bad", "medium": "warn"}

Output = Annotated[Format, typer.Option("--output", "-o", help="Format of the data on stdout.")]


@app.callback()
def vuln() -> None:
    """Known vulnerabilities, as scanners report them, joined to workloads.

    Reports of Trivy and Grype give workloads the labels vuln=critical|high|medium|low|none and vuln-age, since when
    the oldest of the gravest is known here. Policy uses them:

    \b
      deny vuln=critical to call net:internet where source.vuln-age > 7d

    \b
    Examples:
      trivy rootfs --format json / | sectool vuln import -
      sectool vuln list --severity critical
      sectool vuln show CVE-2026-1234
    """


@app.command("import")
def import_(
    ctx: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="Report in JSON; - is stdin.")],
) -> None:
    """Take a report of Trivy or Grype: what it does not repeat of an earlier one on the same subject is fixed.

    A report on an image counts for the containers of that image, by digest; one on a file system for the programs of
    this host, by path or by the package that owns them. Labels follow at once.

    \b
    Examples:
      trivy image --format json -o nginx.json nginx:1.25 && sectool vuln import nginx.json
      grype -o json dir:/ | sectool vuln import -
    """
    require_root("importing a vulnerability report", "sectool vuln list")
    at = session(ctx)
    with at.control(timeout=60.0) as control:
        done = control.call("vuln.import", _read(file)).header
    names = done["workloads"]
    at.say(
        f"{escape(done['subject'] or 'this host')}: {done['open']} open, {done['new']} of them new, "
        f"{done['fixed']} fixed; {len(names)} workload{'' if len(names) == 1 else 's'} here with findings"
    )
    if not done["labelled"]:
        at.warn("this host's label constraints do not allow vuln and vuln-age: no workload gets these labels")


@app.command("list")
def list_(
    ctx: typer.Context,
    severity: Annotated[
        list[str] | None,
        typer.Option("--severity", "-s", metavar="LEVEL", help="Only this level; repeatable."),
    ] = None,
    fixed: Annotated[bool, typer.Option("--all", "-a", help="Those that are fixed, too.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """List what is open, the gravest and oldest first, with the workloads it is of.

    \b
    Examples:
      sectool vuln list --severity critical --severity high
      sectool vuln list --all -o json
    """
    at = session(ctx)
    for level in severity or ():
        if level not in SEVERITIES:
            raise UsageError(f"there is no severity {level[:50]!r}", ", ".join(SEVERITIES))
    answer = _ask(at, fixed)
    rows = [row for row in answer["items"] if not severity or row["severity"] in severity]
    emit(rows, _columns(), output, "sectool.vulnerability/1", color=at.color)
    if not answer["subjects"]:
        at.say("no report has been imported yet: sectool vuln import FILE")


@app.command()
def show(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="ID", help="As in the list, e.g. CVE-2026-1234.")],
    output: Output = Format.TABLE,
) -> None:
    """Show one vulnerability: everything it was found in, open or fixed.

    \b
    Example:
      sectool vuln show CVE-2026-1234
    """
    at = session(ctx)
    rows = [row for row in _ask(at, True)["items"] if row["id"] == name]
    if not rows:
        raise UsageError(f"no report here names {name[:100]!r}", "sectool vuln list --all")
    emit(rows, _columns(whole=True), output, "sectool.vulnerability/1", color=at.color)


@app.command()
def forget(
    ctx: typer.Context,
    subject: Annotated[str, typer.Argument(metavar="SUBJECT", help="Its name as in the list, or a digest.")],
) -> None:
    """Let no report on an image or file system count any more, for one that is gone.

    \b
    Example:
      sectool vuln forget nginx:1.25
    """
    require_root("forgetting a vulnerability report", "sectool vuln list")
    at = session(ctx)
    with at.control() as control:
        control.call("vuln.forget", subject=subject)
    at.say(f"forgotten: {escape(subject)}")


def _read(name: str) -> bytes:
    from sectool.context.vulnreport import MAX_REPORT

    try:
        if name == "-":
            return sys.stdin.buffer.read(MAX_REPORT + 1)
        with Path(name).open("rb") as file:
            return file.read(MAX_REPORT + 1)
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error.strerror}", "check the path") from None


def _ask(at: Session, every: bool) -> dict[str, Any]:
    with at.control(timeout=30.0) as control:
        return dict(control.call("vuln.list", all=every).header)


def _columns(*, whole: bool = False) -> list[Column]:
    now = time.time_ns() // 1000
    return [
        Column("SEVERITY", lambda r: r["severity"], style=lambda r: STYLES.get(r["severity"], "")),
        Column("ID", lambda r: r["id"]),
        Column("PACKAGE", lambda r: r["path"] or r["package"]),
        Column("VERSION", lambda r: r["version"] or "-"),
        Column("FIXED IN", lambda r: r["fixed_in"] or "-"),
        Column("AGE", lambda r: duration((now - r["first_seen"]) / 1e6), right=True),
        Column("STATE", lambda r: f"fixed {show_time(r['fixed'])}" if r["fixed"] else "open", wide=not whole),
        Column("SUBJECT", lambda r: r["subject"] or "this host"),
        Column("WORKLOADS", _workloads),
        Column("SINCE", lambda r: show_time(r["first_seen"]), wide=not whole),
    ]


def _workloads(row: Row) -> str:
    return ",".join(row["workloads"]) or "-"
