"""`sectool revocation`: the signed lists of what is revoked, on this host."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sectool.cli.context import Session, require_root, session
from sectool.cli.moments import moment_us, show_time
from sectool.cli.output import Column, Format, Row, emit
from sectool.cli.text import duration, escape
from sectool.errors import NoDaemonError, UsageError

if TYPE_CHECKING:
    from sectool.identity.lists import Lists

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)

Output = Annotated[Format, typer.Option("--output", "-o", help="Format of the data on stdout.")]
Issuer = Annotated[
    str,
    typer.Argument(metavar="ISSUER", help="Whose list: `root`, a host's name, or the beginning of a key id."),
]


@app.callback()
def revocation() -> None:
    """Signed lists of revoked hosts, workloads and certificates: which this host goes by, and how fresh they are.

    The root's list (sectool ca revoke) speaks for the whole trust domain, a host's own (sectool identity revoke) for
    what it has issued itself. A list that counts is X.509 CRLs in PEM: openssl crl reads it.

    \b
    Examples:
      sectool revocation list
      sectool revocation import revoked.pem
      sectool revocation show root
    """


@app.command("list")
def list_(
    ctx: typer.Context,
    at_: Annotated[
        str | None,
        typer.Option("--at", metavar="TIME", help="As of a moment in the past, e.g. 2h or a timestamp."),
    ] = None,
    output: Output = Format.TABLE,
) -> None:
    """List the revocation lists this host goes by.

    \b
    Examples:
      sectool revocation list
      sectool revocation list --at 2d -o json
    """
    at = session(ctx)
    now = moment_us(at_) if at_ else time.time_ns() // 1000
    rows = _past(at, now) if at_ else _present(at)
    columns = [
        Column("ISSUER", lambda r: r["issuer_name"]),
        Column("TRUST DOMAIN", lambda r: r["trust_domain"]),
        Column("NUMBER", lambda r: r["number"], right=True),
        Column("SERIALS", lambda r: len(r["serials"]), right=True),
        Column("KEYS", lambda r: len(r["keys"]), right=True),
        Column("WORKLOADS", lambda r: len(r["workloads"]), right=True),
        Column(
            "FRESH FOR",
            lambda r: _fresh(r, now),
            style=lambda r: "bad" if r["next_update"] < now else "",
            right=True,
        ),
        Column("ISSUED", lambda r: show_time(r["issued"]), wide=True),
        Column("NEXT UPDATE", lambda r: show_time(r["next_update"]), wide=True),
        Column("KEY ID", lambda r: r["issuer"], wide=True),
    ]
    emit(rows, columns, output, "sectool.revocation-list/1", color=at.color)


@app.command()
def show(ctx: typer.Context, issuer: Issuer, output: Output = Format.TABLE) -> None:
    """Show what one list revokes.

    \b
    Examples:
      sectool revocation show root
      sectool revocation show web-1 -o json
    """
    at = session(ctx)
    found = _one(_present(at), issuer)
    rows = [{"kind": "serial", "what": s, "issued_before": None} for s in found["serials"]]
    rows += [{"kind": "key", "what": k, "issued_before": None} for k in found["keys"]]
    rows += [
        {"kind": "workload", "what": w, "issued_before": b * 1_000_000 if b else None}
        for w, b in found["workloads"].items()
    ]
    columns = [
        Column("KIND", lambda r: r["kind"]),
        Column("REVOKED", lambda r: r["what"]),
        Column("IF IT BEGINS BEFORE", lambda r: show_time(r["issued_before"])),
    ]
    emit(rows, columns, output, "sectool.revocation/1", color=at.color)


@app.command("import")
def import_(
    ctx: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="The list, PEM (- is stdin).")],
    reason: Annotated[str, typer.Option("--reason", "-r", metavar="TEXT", help="Why, for the record.")] = "",
) -> None:
    """Take a list: verified by the roots this host trusts, never replacing a newer one. Live flows are cut at once.

    \b
    Examples:
      sectool revocation import revoked.pem
      ssh ca sectool revocation export root | sectool revocation import -
    """
    require_root("taking a revocation list", "sectool revocation list")
    at = session(ctx)
    take(at, read_input(file), reason)


@app.command()
def export(ctx: typer.Context, issuer: Issuer) -> None:
    """Write one list to stdout, for other hosts to import.

    \b
    Example:
      sectool revocation export root > revoked.pem
    """
    at = session(ctx)
    key = _one(_present(at), issuer)["issuer"]
    try:
        with at.control() as control:
            pem = control.call("revocation.list", issuer=key).payload
    except NoDaemonError:
        pem = _offline(at).known[key].pem
    sys.stdout.write(pem.decode("ascii"))


def take(at: Session, pem: bytes, reason: str) -> None:
    """Have the daemon take a list, or leave it for the next one to find."""
    try:
        with at.control() as control:
            done: Row = control.call("revocation.import", pem, reason=reason).header
    except NoDaemonError:
        taken, changed = _offline(at).take(pem, time.time_ns() // 1000)
        done = {"issuer_name": taken.issuer_name or "root", "number": taken.number, "changed": changed}
        at.say("no daemon is running; it will find the list when it starts")
    what = "is in force" if done["changed"] else "was in force already"
    at.say(f"list {done['number']} of {escape(done['issuer_name'])} {what}")


def read_input(name: str) -> bytes:
    """A file, or stdin for `-`; at most what a list may have, and one byte."""
    from sectool.identity.revocation import MAX_LIST

    if name == "-":
        return sys.stdin.buffer.read(MAX_LIST + 1)
    try:
        with Path(name).open("rb") as file:
            return file.read(MAX_LIST + 1)
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error.strerror}", "check the path") from None


def _offline(at: Session) -> Lists:
    from sectool.agent.federation import TRUST
    from sectool.identity.enrolment import load_host
    from sectool.identity.federation import Federation
    from sectool.identity.lists import Lists

    host = load_host(at.paths.state)
    bundle = Federation(at.paths.state / TRUST, host.trust_domain).added_to(host.bundle)
    lists = Lists(at.paths.state, bundle, time.time_ns() // 1000)
    for name, why in lists.damaged.items():
        at.warn(f"{name} does not count: {why}")
    return lists


def _present(at: Session) -> list[dict[str, Any]]:
    try:
        with at.control() as control:
            rows: list[dict[str, Any]] = control.call("revocation.list")["items"]
            return rows
    except NoDaemonError:
        from sectool.agent.revocation import describe

        return [describe(each) for each in _offline(at).known.values()]


def _past(at: Session, moment: int) -> list[dict[str, Any]]:
    from store.control import ControlHistory

    with ControlHistory(at.paths.control_history, read_only=True) as history:
        return [dict(version.body) for version in history.as_of("revocation", moment)]


def _one(rows: list[dict[str, Any]], issuer: str) -> dict[str, Any]:
    found = [
        r for r in rows if issuer == r["issuer_name"] or (len(issuer) >= 8 and r["issuer"].startswith(issuer))
    ]
    if len(found) != 1:
        known = ", ".join(sorted({r["issuer_name"] for r in rows})) or "none"
        said = "several lists are" if found else "there is no list"
        raise UsageError(
            f"{said} of {issuer[:100]!r}", f"lists here are of: {known}; a key id names one exactly"
        )
    return found[0]


def _fresh(row: Row, now: int) -> str:
    left = (row["next_update"] - now) / 1e6
    return duration(left) if left > 0 else "expired"
