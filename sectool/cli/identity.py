"""`sectool identity`: the identities this host has issued."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from sectool.cli.context import Session, require_root, session
from sectool.cli.moments import moment_us, show_time
from sectool.cli.output import Column, Format, Row, emit, emit_document
from sectool.cli.text import duration, escape
from sectool.errors import CredentialError, Exit, NoDaemonError, UsageError

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)

Output = Annotated[Format, typer.Option("--output", "-o", help="Format of the data on stdout.")]
At = Annotated[
    str | None,
    typer.Option("--at", metavar="TIME", help="As of a moment in the past, e.g. 2h or a timestamp."),
]
Which = Annotated[str, typer.Argument(metavar="WORKLOAD", help="Its name, SPIFFE ID or serial number.")]


@app.callback()
def identity() -> None:
    """The identities this host has issued: look at them, verify, renew and revoke them.

    \b
    Examples:
      sectool identity list
      sectool identity show web
      sectool identity show web --pem | openssl x509 -noout -text
      sectool identity verify chain.pem
      sectool identity revoke spiffe://shop.example/host/web-1/wl/web --reason "key leaked"
    """


@app.command("list")
def list_(ctx: typer.Context, at_: At = None, output: Output = Format.TABLE) -> None:
    """List the identities in use on this host, with what they claim and when they expire.

    \b
    Examples:
      sectool identity list
      sectool identity list -o json
      sectool identity list --at 2h
    """
    at = session(ctx)
    now = moment_us(at_) if at_ else time.time_ns() // 1000
    rows = _past(at, now) if at_ else _present(at)
    columns = [
        Column("WORKLOAD", lambda r: r["workload"]),
        Column("SPIFFE ID", lambda r: r["spiffe_id"]),
        Column("EXPIRES IN", lambda r: duration((r["not_after"] - now) / 1e6), right=True),
        Column("LABELS", lambda r: ",".join(f"{k}={v}" for k, v in r["labels"].items())),
        Column("ROTATED", lambda r: r.get("rotations", ""), wide=True, right=True),
        Column("BYTES", lambda r: r.get("bytes", ""), wide=True, right=True),
        Column("NOT AFTER", lambda r: show_time(r["not_after"]), wide=True),
        Column("SERIAL", lambda r: r["serial"], wide=True),
        Column("FINGERPRINT", lambda r: r["fingerprint"], wide=True),
    ]
    emit(rows, columns, output, "sectool.identity/1", color=at.color)


@app.command()
def show(
    ctx: typer.Context,
    workload: Which,
    at_: At = None,
    pem: Annotated[
        bool,
        typer.Option("--pem", help="Its certificates instead: the SVID, its host CA, the root; for openssl."),
    ] = False,
    output: Output = Format.TABLE,
) -> None:
    """Show one identity: what it claims, who vouches for it, and whether it holds right now.

    \b
    Examples:
      sectool identity show web
      sectool identity show web --pem > chain.pem
      sectool identity show web --at 2h -o json
    """
    at = session(ctx)
    if at_ and pem:
        raise UsageError(
            "certificates of the past are not kept, only what they said", "leave --pem or --at out"
        )
    rows = _past(at, moment_us(at_)) if at_ else _present(at)
    row = _one(rows, workload)
    alike = sum(workload in (r["workload"], r["spiffe_id"]) for r in rows)
    if alike > 1:
        at.say(
            f"{alike} identities are of {escape(workload)}: this is one of them; a serial number names the others"
        )
    if pem:
        with at.control() as control:
            sys.stdout.write(control.call("identity.show", id=row["id"]).payload.decode("ascii"))
        return
    if output not in (Format.TABLE, Format.WIDE):
        emit_document(row, output, "sectool.identity/1")
        return
    lines = [
        ("workload", row["workload"]),
        ("SPIFFE ID", row["spiffe_id"]),
        *(("label", f"{key}={value}") for key, value in row["labels"].items()),
        ("serial", row["serial"]),
        ("fingerprint", row["fingerprint"]),
        ("valid from", show_time(row["not_before"])),
        ("valid until", show_time(row["not_after"])),
    ]
    if not at_:
        lines += [
            ("renewed at", show_time(row["renew_at"])),
            ("rotations", str(row["rotations"])),
            ("in a SYN", f"{row['bytes']} bytes"),
            ("state", row["refused"] or "holds"),
        ]
    for name, text in lines:
        sys.stdout.write(f"{name + ':':14}{escape(text)}\n")


@app.command()
def verify(
    ctx: typer.Context,
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="SVID and host CA in PEM, a credential blob, or a revocation list (- is stdin).",
        ),
    ],
    at_: At = None,
    output: Output = Format.TABLE,
) -> None:
    """Verify certificates as the packet path would, by what this host trusts and knows to be revoked.

    Exit code 1 and the reason (as in drop_reason of events) when they are refused.

    \b
    Examples:
      sectool identity show web --pem | sectool identity verify -
      sectool identity verify chain.pem -o json
    """
    from sectool.agent.settings import load_settings
    from sectool.cli.revocation import read_input
    from sectool.events import DropReason
    from sectool.identity.examine import examine

    at = session(ctx)
    data = read_input(file)
    moment = moment_us(at_) if at_ else time.time_ns() // 1000
    settings = load_settings(at.paths.settings)
    try:
        found = examine(
            data,
            at.paths.state,
            moment,
            closed=settings.revocation_expired == "closed",
            required=settings.revocation_required,
        )
    except CredentialError as error:
        name = DropReason(error.reason).name.lower() if error.reason else "unusable"
        row: dict[str, Any] = {"valid": False, "reason": name, "why": error.message, "hint": error.hint}
    else:
        row = {"valid": True, "reason": "", "why": "", "hint": "", **found}
    if output not in (Format.TABLE, Format.WIDE):
        emit_document(row, output, "sectool.verification/1")
    elif row["valid"]:
        sys.stdout.write("valid\n")
        for key, value in found.items():
            sys.stdout.write(f"{key.replace('_', ' ') + ':':14}{escape(str(value))}\n")
    else:
        sys.stdout.write(f"refused: {row['reason']}: {escape(row['why'])}\n")
        if row["hint"]:
            at.say(row["hint"])
    if not row["valid"]:
        raise typer.Exit(int(Exit.DENIED))


@app.command()
def rotate(
    ctx: typer.Context,
    workload: Annotated[
        str, typer.Argument(metavar="[WORKLOAD]", help="Name or SPIFFE ID [default: all].")
    ] = "",
) -> None:
    """Issue new SVIDs now, before half of their life is over. Live connections go on.

    \b
    Examples:
      sectool identity rotate
      sectool identity rotate web
    """
    require_root("renewing identities", "sectool identity list")
    at = session(ctx)
    with at.control() as control:
        done = control.call("identity.rotate", workload=workload)["items"]
    at.say(f"renewed {len(done)} identit{'y' if len(done) == 1 else 'ies'}")


@app.command()
def revoke(
    ctx: typer.Context,
    workload: Which,
    issued_before: Annotated[
        str | None,
        typer.Option(
            "--issued-before",
            metavar="TIME",
            help="Only SVIDs issued before then (`now`: those so far); else for good.",
        ),
    ] = None,
    days: Annotated[
        int, typer.Option("--days", metavar="N", help="How long the list is fresh; renewed by itself here.")
    ] = 30,
    reason: Annotated[str, typer.Option("--reason", "-r", metavar="TEXT", help="Why, for the record.")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be revoked, and do nothing.")
    ] = False,
) -> None:
    """Revoke a workload of this host: no new connection, its live ones are cut, it gets no SVID any more.

    This host's CA signs a list of its own. Other hosts need it, too: `sectool revocation export`, or the CA service.
    For a whole host, or where this host cannot be trusted any more, use `sectool ca revoke` where the root is.

    \b
    Examples:
      sectool identity revoke web --reason "compromised"
      sectool identity revoke web --issued-before now --reason "key leaked, fixed since"
      sectool identity revoke 1a2b3c4d5e6f7081a --reason "one SVID only"
    """
    require_root("revoking identities", "sectool identity list")
    at = session(ctx)
    fields: dict[str, Any] = {"days": days, "reason": reason}
    if issued_before is not None:
        fields["issued_before"] = (
            time.time_ns() // 1000 if issued_before == "now" else moment_us(issued_before)
        )
    known = [r for r in _present(at) if workload in (r["workload"], r["spiffe_id"])]
    if workload.startswith("spiffe://") or known:
        fields["spiffe_id"] = known[0]["spiffe_id"] if known else workload
    else:
        from sectool.identity.revocation import plain_serial

        try:
            fields["serial"] = plain_serial(workload)
        except UsageError:
            raise UsageError(
                f"there is no workload {workload[:100]!r} here",
                "name one of `sectool identity list`, or its serial",
            ) from None
    what = fields.get("spiffe_id") or f"serial {fields['serial']}"
    if dry_run:
        at.say(f"would revoke {escape(what)}")
        return
    with at.control() as control:
        done = control.call("identity.revoke", **fields)
    at.say(f"revoked {escape(what)}: list {done['number']}, fresh until {show_time(done['next_update'])}")
    at.say(
        f"other hosts: sectool revocation export {done['issuer_name']} > revoked.pem; there: sectool revocation import"
    )


@app.command()
def audit(ctx: typer.Context, output: Output = Format.TABLE) -> None:
    """Look for what is wrong with keys, certificates and lists of this host; exit code 1 when something is.

    \b
    Examples:
      sectool identity audit
      sectool identity audit -o json
    """
    from sectool.identity.audit import audit as findings

    at = session(ctx)
    try:
        rows = _present(at)
    except NoDaemonError:
        rows = []
        at.say("no daemon is running: identities in use are not looked at")
    found = [
        *({"what": r["spiffe_id"], "finding": r["refused"]} for r in rows if r["refused"]),
        *findings(at.paths.state, time.time_ns() // 1000),
    ]
    columns = [Column("WHAT", lambda r: r["what"]), Column("FINDING", lambda r: r["finding"])]
    emit(found, columns, output, "sectool.identity-audit/1", color=at.color)
    if found:
        raise typer.Exit(int(Exit.DENIED))
    at.say("keys, certificates and lists are in order")


def _present(at: Session) -> list[dict[str, Any]]:
    with at.control() as control:
        rows: list[dict[str, Any]] = control.call("identity.list")["items"]
        return rows


def _past(at: Session, moment: int) -> list[dict[str, Any]]:
    from store.control import ControlHistory

    with ControlHistory(at.paths.control_history, read_only=True) as history:
        rows = [dict(version.body) for version in history.as_of("identity", moment)]
    return [{**r, "workload": r["spiffe_id"].rpartition("/")[2]} for r in rows if r["not_after"] > moment]


def _one(rows: list[dict[str, Any]], wanted: str) -> Row:
    found = [r for r in rows if wanted in (r["workload"], r["spiffe_id"], r["serial"])]
    if not found:
        raise UsageError(
            f"there is no identity {wanted[:200]!r} here", "sectool identity list shows what there is"
        )
    return found[0]
