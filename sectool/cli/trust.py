"""`sectool trust`: other trust domains, whose workloads this host can know."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sectool.cli.context import Session, require_root, session
from sectool.cli.moments import moment_us, show_time
from sectool.cli.output import Column, Format, Row, emit, emit_document
from sectool.cli.text import duration, escape
from sectool.errors import NoDaemonError, UsageError

if TYPE_CHECKING:
    from sectool.identity.federation import Federation

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)

MAX_READ = 1 << 20

Output = Annotated[Format, typer.Option("--output", "-o", help="Format of the data on stdout.")]
At = Annotated[
    str | None,
    typer.Option("--at", metavar="TIME", help="As of a moment in the past, e.g. 2h or a timestamp."),
]
Domain = Annotated[str, typer.Argument(metavar="DOMAIN", help="The other trust domain's name.")]
Reason = Annotated[str, typer.Option("--reason", "-r", metavar="TEXT", help="Why, for the record.")]


@app.callback()
def trust() -> None:
    """Other trust domains: whose identities count here, and how far.

    A peer of another domain is known as domain=NAME,federated=true. Of the labels its own domain vouches for only
    those count that --accept names. Rules that allow speak of our own domain unless they say another: `app=web` never
    means a partner's workload, `domain=partner.example,app=web` does.

    \b
    Examples:
      sectool trust export --file ours.json
      sectool trust add partner.example --bundle theirs.json --accept app
      sectool trust list
    """


@app.command()
def add(
    ctx: typer.Context,
    domain: Domain,
    bundle: Annotated[
        str | None,
        typer.Option(
            "--bundle",
            metavar="FILE",
            help="Its SPIFFE bundle document or roots in PEM (- is stdin).",
        ),
    ] = None,
    url: Annotated[
        str | None, typer.Option("--url", metavar="URL", help="Its bundle endpoint: refreshed from there.")
    ] = None,
    endpoint_id: Annotated[
        str | None,
        typer.Option(
            "--endpoint-id",
            metavar="SPIFFE-ID",
            help="The endpoint shows this SPIFFE ID (else: a web certificate).",
        ),
    ] = None,
    accept: Annotated[
        list[str] | None,
        typer.Option(
            "--accept",
            metavar="KEY[=VALUE]",
            help="Label of theirs that counts (VALUE may end in *); repeatable.",
        ),
    ] = None,
    reason: Reason = "",
) -> None:
    """Trust another domain's bundle: its workloads can prove who they are to this host from now on.

    Trust is one-way and lets nothing pass by itself: the other side has to trust our bundle, and rules on both sides
    have to allow it. Given again for a domain that is known, it replaces the source, the bundle (never by an older
    one) and the labels that count; with --accept alone only the labels change.

    \b
    Examples:
      sectool trust add partner.example --bundle partner.json
      sectool trust add partner.example --url https://trust.partner.example/bundle.json --accept app --accept tier=web
      sectool trust add partner.example --url https://10.9.0.1:8443/ --bundle partner.json \\
          --endpoint-id spiffe://partner.example/host/gate-1/bundle-endpoint
    """
    require_root("changing whom this host trusts", "sectool trust list")
    at = session(ctx)
    if endpoint_id and not url:
        raise UsageError(
            "--endpoint-id says who answers at an endpoint, but there is none", "give --url as well"
        )
    if not (bundle or url or accept):
        raise UsageError("there is nothing to trust", "give --bundle FILE or --url URL")
    profile = "https_spiffe" if endpoint_id else "https_web" if url else "file" if bundle else ""
    fields: dict[str, Any] = {
        "domain": domain,
        "profile": profile,
        "url": url or "",
        "endpoint_id": endpoint_id or "",
        "accept": accept or [],
    }
    document = _read(bundle) if bundle else b""
    try:
        with at.control(timeout=30.0) as control:
            done: Row = control.call("trust.add", document, reason=reason, **fields).header
    except NoDaemonError:
        done = _add_offline(at, fields, document)
    at.say(f"{escape(domain)}: {_summary(done)}")


@app.command("list")
def list_(ctx: typer.Context, at_: At = None, output: Output = Format.TABLE) -> None:
    """List the trust domains whose identities count here: our own, and those we have a relationship with.

    \b
    Examples:
      sectool trust list
      sectool trust list --at 2026-03-01T02:00:00Z
      sectool trust list -o json
    """
    at = session(ctx)
    now = time.time_ns() // 1000
    rows = _past(at, moment_us(at_)) if at_ else _present(at)
    columns = [
        Column("DOMAIN", lambda r: r["trust_domain"]),
        Column("SOURCE", lambda r: r["url"] or r["profile"]),
        Column("ROOTS", lambda r: len(r["roots"]), right=True),
        Column("ACCEPTED LABELS", _accepted),
        Column(
            "BUNDLE AGE", lambda r: duration((now - r["fetched"]) / 1e6) if r["fetched"] else "-", right=True
        ),
        Column("STATE", _state, style=lambda r: "warn" if r["error"] else ""),
        Column("PROFILE", lambda r: r["profile"], wide=True),
        Column("SEQUENCE", lambda r: "-" if r["sequence"] is None else r["sequence"], wide=True, right=True),
        Column("ENDPOINT ID", lambda r: r["endpoint_id"] or "-", wide=True),
        Column("CHECKED", lambda r: show_time(r["checked"]), wide=True),
    ]
    emit(rows, columns, output, "sectool.trust-domain/1", color=at.color)


@app.command()
def show(ctx: typer.Context, domain: Domain, at_: At = None, output: Output = Format.TABLE) -> None:
    """Show one trust domain: where its bundle comes from, how fresh it is, its roots, which of its labels count.

    \b
    Examples:
      sectool trust show partner.example
      sectool trust show partner.example --at 2d -o json
    """
    at = session(ctx)
    rows = _past(at, moment_us(at_)) if at_ else _present(at)
    row = next((r for r in rows if r["trust_domain"] == domain), None)
    if row is None:
        known = ", ".join(r["trust_domain"] for r in rows) or "none"
        raise UsageError(
            f"trust domain {domain[:200]!r} is not trusted {'then' if at_ else 'here'}", f"known: {known}"
        )
    if output not in (Format.TABLE, Format.WIDE):
        emit_document(row, output, "sectool.trust-domain/1")
        return
    lines = [
        ("domain", row["trust_domain"] + (" (this host's own)" if row["own"] else "")),
        ("source", " ".join(filter(None, (row["profile"], row["url"], row["endpoint_id"])))),
        ("labels accepted", "all it vouches for" if row["own"] else _accepted(row)),
        ("sequence", "-" if row["sequence"] is None else str(row["sequence"])),
        ("bundle from", show_time(row["fetched"])),
        ("last checked", show_time(row["checked"])),
        ("state", _state(row)),
        *(("left out", text) for text in row["ignored"]),
        *(("root", f"{r['fingerprint']} until {show_time(r['not_after'])}") for r in row["roots"]),
    ]
    for name, text in lines:
        sys.stdout.write(f"{name + ':':17}{escape(text)}\n")


@app.command()
def refresh(
    ctx: typer.Context,
    domain: Annotated[str, typer.Argument(metavar="[DOMAIN]", help="Only this one.")] = "",
    output: Output = Format.TABLE,
) -> None:
    """Ask the bundle endpoints now, instead of when they are due. Exit code 1 when one could not be asked.

    \b
    Examples:
      sectool trust refresh
      sectool trust refresh partner.example
    """
    require_root("refreshing trust bundles", "sectool trust list")
    at = session(ctx)
    with at.control(timeout=60.0) as control:
        rows = control.call("trust.refresh", domain=domain)["items"]
    columns = [
        Column("DOMAIN", lambda r: r["trust_domain"]),
        Column("RESULT", lambda r: r["error"] or ("has changed" if r["changed"] else "is up to date")),
    ]
    emit(rows, columns, output, "sectool.trust-refresh/1", color=at.color)
    if any(row["error"] for row in rows):
        at.say(
            "the daemon's connections are judged like any other's: policy has to let it reach the endpoint"
        )
        raise typer.Exit(1)


@app.command()
def remove(ctx: typer.Context, domain: Domain, reason: Reason = "") -> None:
    """Trust a domain no more: its live connections are cut at once, and no new one passes.

    \b
    Example:
      sectool trust remove partner.example --reason "contract ended"
    """
    require_root("changing whom this host trusts", "sectool trust list")
    at = session(ctx)
    try:
        with at.control() as control:
            control.call("trust.remove", domain=domain, reason=reason)
    except NoDaemonError:
        _federation(at).remove(domain)
        at.say("no daemon is running; it will find the change when it starts")
    at.say(f"{escape(domain)} is not trusted any more")


@app.command()
def export(
    ctx: typer.Context,
    domain: Annotated[str, typer.Argument(metavar="[DOMAIN]", help="Another one than our own.")] = "",
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help="Write it there, not to stdout.")
    ] = None,
) -> None:
    """Write our own trust domain's bundle as a SPIFFE document: what another domain needs to trust ours.

    There is nothing secret in it, but whoever can change it on its way can make others trust them: hand it over by a
    way that both sides trust.

    \b
    Examples:
      sectool trust export > ours.json
      sectool trust export --file /srv/www/bundle.json
    """
    at = session(ctx)
    try:
        with at.control() as control:
            text = control.call("trust.show", domain=domain).payload.decode("ascii")
    except NoDaemonError:
        text = _export_offline(at, domain)
    if file is None:
        sys.stdout.write(text)
        return
    from sectool.identity.files import write_atomic

    write_atomic(file.absolute(), text.encode("ascii"))
    at.say(f"written: {file}")


@app.command()
def serve(
    ctx: typer.Context,
    listen: Annotated[
        str,
        typer.Option(
            "--listen", metavar="ADDRESS:PORT", help="Where to serve, e.g. 0.0.0.0:8443 or [::]:8443."
        ),
    ],
    certificate: Annotated[
        Path | None,
        typer.Option("--certificate", metavar="FILE", help="Web certificate chain, PEM (https_web)."),
    ] = None,
    key: Annotated[Path | None, typer.Option("--key", metavar="FILE", help="Its private key, PEM.")] = None,
) -> None:
    """Publish our own bundle at an HTTPS endpoint, for as long as this command runs.

    Without a web certificate TLS shows an SVID of this host, which is renewed by itself (https_spiffe); the SPIFFE ID
    to expect is printed. Policy has to let the other side reach the port: it is a program of this host like any other.

    \b
    Examples:
      sectool trust serve --listen 0.0.0.0:8443
      sectool trust serve --listen 0.0.0.0:443 --certificate fullchain.pem --key privkey.pem
    """
    import asyncio

    from sectool.agent.federation import export as own_document
    from sectool.identity.enrolment import load_host
    from sectool.spiffe.publish import SvidContext, publish, web_context

    require_root("reading this host's enrolment", "sectool trust export on a host where it was read")
    at = session(ctx)
    address, port = _listening(listen)
    if (certificate is None) != (key is None):
        raise UsageError("a web certificate needs its key, and a key its certificate", "give both")
    host = load_host(at.paths.state)
    svids = None if certificate else SvidContext(host.authority)
    web = web_context(certificate, key) if certificate and key else None

    def document() -> str:
        return own_document(at.paths.state, load_host(at.paths.state))

    def ready(spiffe_id: str) -> None:
        at.say(f"publishing the bundle of {host.trust_domain} at https://{listen}/")
        if spiffe_id:
            at.say(f"others name this endpoint: --endpoint-id {spiffe_id}")

    document()
    asyncio.run(publish(document, address, port, svids, web, ready))


def _listening(text: str) -> tuple[str, int]:
    address, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"{text!r} is not an address and port", "write --listen 0.0.0.0:8443")
    return address.removeprefix("[").removesuffix("]") or "0.0.0.0", int(port)  # noqa: S104 - what was asked for


def _read(name: str) -> bytes:
    if name == "-":
        return sys.stdin.buffer.read(MAX_READ)
    try:
        with Path(name).open("rb") as file:
            return file.read(MAX_READ)
    except OSError as error:
        raise UsageError(f"cannot read {name}: {error.strerror}", "check the path") from None


def _present(at: Session) -> list[dict[str, Any]]:
    try:
        with at.control() as control:
            rows: list[dict[str, Any]] = control.call("trust.list")["items"]
            return rows
    except NoDaemonError:
        from sectool.agent.federation import describe_all
        from sectool.identity.enrolment import load_host

        host = load_host(at.paths.state)
        at.say("no daemon is running; read from the state folder")
        return describe_all(host, _federation(at))


def _past(at: Session, moment: int) -> list[dict[str, Any]]:
    from sectool.agent.records import OfflineRecords

    found = OfflineRecords(at.paths.control_history).trusted_at(moment)
    return [
        {
            "trust_domain": domain,
            "own": "profile" not in body,
            "profile": body.get("profile", "enrolment"),
            "url": body.get("url", ""),
            "endpoint_id": body.get("endpoint_id", ""),
            "accept": body.get("accept", {}),
            "sequence": body.get("sequence"),
            "refresh_s": None,
            "added": 0,
            "fetched": 0,
            "checked": 0,
            "error": "",
            "ignored": [],
            "roots": [{"fingerprint": p, "not_before": 0, "not_after": 0} for p in body["roots"]],
        }
        for domain, body in found.items()
    ]


def _federation(at: Session) -> Federation:
    from sectool.agent.federation import TRUST
    from sectool.identity.enrolment import load_host
    from sectool.identity.federation import Federation

    return Federation(at.paths.state / TRUST, load_host(at.paths.state).trust_domain)


def _add_offline(at: Session, fields: dict[str, Any], document: bytes) -> Row:
    from sectool.agent.federation import describe, relationship_of
    from sectool.identity.federation import Profile
    from sectool.spiffe.endpoint import fetch_bundle

    now = time.time_ns() // 1000
    federation = _federation(at)
    wanted = relationship_of(fields, document, now, federation)
    if fields["profile"] and wanted.source.profile is not Profile.FILE:
        fresh = fetch_bundle(wanted.source, wanted.trust_domain, wanted.bundle.roots)
        wanted = wanted.with_bundle(fresh, now)
    federation.put(wanted)
    at.say("no daemon is running; it will find the change when it starts")
    return describe(wanted)


def _export_offline(at: Session, domain: str) -> str:
    from sectool.agent.federation import export as own_document
    from sectool.identity.enrolment import load_host

    host = load_host(at.paths.state)
    if domain and domain != host.trust_domain:
        return _federation(at).get(domain).bundle.to_json()
    return own_document(at.paths.state, host)


def _accepted(row: Row) -> str:
    if row["own"]:
        return "*"
    parts = [k if v == ["*"] else f"{k}={'|'.join(v)}" for k, v in row["accept"].items()]
    return ",".join(parts) or "none"


def _state(row: Row) -> str:
    if row["error"]:
        return f"not refreshed: {row['error']}"
    if not row["roots"]:
        return "no roots: nobody of this domain is trusted"
    return "good" if row["refresh_s"] is None else f"good, refreshed every {duration(row['refresh_s'])}"


def _summary(row: Row) -> str:
    count = len(row["roots"])
    labels = _accepted(row)
    return f"{count} root{'' if count == 1 else 's'} trusted; labels that count: {labels}"
