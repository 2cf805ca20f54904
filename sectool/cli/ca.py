"""`sectool ca`: the trust domain's root, where it is kept."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sectool.cli.context import Session, session
from sectool.cli.host import constraints_of, labels_of
from sectool.cli.moments import moment_us, show_time
from sectool.cli.output import Column, Format, emit
from sectool.cli.passphrase import PassphraseFd, ask_new, ask_once
from sectool.cli.text import escape
from sectool.errors import CredentialError, SectoolError, UsageError

if TYPE_CHECKING:
    from sectool.identity.revocation import Entries, RevocationList

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)
rollover = typer.Typer(rich_markup_mode=None, no_args_is_help=True)
token = typer.Typer(rich_markup_mode=None, no_args_is_help=True)
app.add_typer(rollover, name="rollover")
app.add_typer(token, name="token")

Output = Annotated[Format, typer.Option("--output", "-o", help="Format of the data on stdout.")]
Folder = Annotated[
    Path | None,
    typer.Option("--ca", metavar="DIR", help="Folder of the root [default: ca/ in the state folder]."),
]
Labels = Annotated[
    list[str] | None,
    typer.Option("--label", "-l", metavar="KEY=VALUE", help="Label of every workload there; repeatable."),
]
Allowed = Annotated[
    list[str] | None,
    typer.Option("--allow", metavar="KEY=VALUE", help="What it may vouch for (KEY=*, *=*); repeatable."),
]
Host = Annotated[
    list[str] | None, typer.Option("--host", metavar="NAME", help="A host enrolled here; repeatable.")
]
Serial = Annotated[
    list[str] | None,
    typer.Option("--serial", metavar="HEX", help="A certificate, of a host or an SVID; repeatable."),
]
Certificate = Annotated[
    list[Path] | None,
    typer.Option("--certificate", metavar="FILE", help="A host CA's certificate; repeatable."),
]
Workload = Annotated[
    list[str] | None, typer.Option("--workload", metavar="SPIFFE-ID", help="A workload; repeatable.")
]
Days = Annotated[
    int, typer.Option("--days", metavar="N", help="How long the list is fresh; afterwards hosts fail closed.")
]
Reason = Annotated[str, typer.Option("--reason", "-r", metavar="TEXT", help="Why, for the record.")]


@app.callback()
def ca() -> None:
    """The trust domain's root: make it, issue and revoke from it, replace it.

    \b
    Examples:
      sectool ca init --trust-domain shop.example --passphrase
      sectool ca sign web-1.csr --label env=prod > web-1.pem
      sectool ca revoke --host web-1 --reason "stolen"
      sectool ca rollover begin
    """


@app.command()
def init(
    ctx: typer.Context,
    trust_domain: Annotated[
        str,
        typer.Option(
            "--trust-domain", "-d", metavar="NAME", help="Name of the trust domain, like a host name."
        ),
    ],
    passphrase: Annotated[
        bool, typer.Option("--passphrase", help="Encrypt the root's key; asked for at the terminal.")
    ] = False,
    passphrase_fd: PassphraseFd = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing root: every enrolment ends.")
    ] = False,
) -> None:
    """Make the root of a new trust domain in the state folder (ca/).

    Its key (root.key, 0600) can enrol any host with any label: keep it where hosts are enrolled, nowhere else, or on a
    medium that is plugged in for `ca sign` and `ca revoke` only. With --passphrase its file is encrypted.

    \b
    Examples:
      sectool ca init --trust-domain shop.example
      sectool ca init --trust-domain shop.example --passphrase
      sectool --state /media/usb ca init --trust-domain shop.example --passphrase-fd 3 3<secret
    """
    from sectool.identity.enrolment import init_ca

    at = session(ctx)
    secret = ask_new(passphrase_fd) if passphrase or passphrase_fd is not None else b""
    root = init_ca(at.paths.state, trust_domain, force=force, passphrase=secret)
    at.say(f"made the root of {root.trust_domain} in {at.paths.ca}")
    at.say("next: sectool host enroll --name NAME")


@app.command()
def sign(
    ctx: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="The host's request (- is stdin).")],
    label: Labels = None,
    allow: Allowed = None,
    as_requested: Annotated[
        bool, typer.Option("--as-requested", help="Grant the constraints that the request asks for.")
    ] = False,
    ca: Folder = None,
    days: Annotated[int, typer.Option("--days", metavar="N", help="How long its CA is valid.")] = 365,
    passphrase_fd: PassphraseFd = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be granted, and sign nothing.")
    ] = False,
) -> None:
    """Answer a host's request: a certificate for its CA, and whom to trust, on stdout. No network is needed.

    What the host may vouch for is decided here: --label pins a label, --allow lists all that is allowed. Its request
    counts only with --as-requested. A host that was enrolled before and asks again (host request --renew) gets what it
    had, unless something else is said.

    \b
    Examples:
      sectool ca sign web-1.csr --label env=prod > web-1.pem
      sectool ca sign web-1.csr --dry-run
      ssh web-1 sectool host request --name web-1 | sectool ca sign - --allow app=web | ssh web-1 sectool host accept -
    """
    from sectool.identity.authority import RootAuthority
    from sectool.identity.enrolment import default_constraints, within_reach
    from sectool.identity.joining import grant, read_request
    from sectool.identity.register import registered
    from sectool.identity.rollover import bundle

    at, now = session(ctx), time.time_ns() // 1000
    folder = _folder(at, ca)
    wanted = read_request(read_input(file))
    labels = labels_of(label)
    known = [each for each in registered(folder) if each.name == wanted.name]
    if as_requested and wanted.constraints is not None:
        limits = within_reach(wanted.constraints, wanted.name, labels)
    elif allow:
        limits = within_reach(constraints_of(allow), wanted.name, labels)
    elif known and not labels:
        limits = known[-1].constraints
    else:
        limits = default_constraints(wanted.name, labels)
    at.say(f"host {escape(wanted.name)} may vouch for: {escape(str(limits))}")
    if dry_run:
        return
    root = RootAuthority.load(folder, ask_once(passphrase_fd))
    answer = grant(root, wanted, limits, bundle(folder), now, days=days, ca_dir=folder)
    sys.stdout.write(answer.decode("ascii"))
    at.say("next, on the host: sectool host accept FILE")


@app.command()
def hosts(ctx: typer.Context, ca: Folder = None, output: Output = Format.TABLE) -> None:
    """List the host CAs issued here, and which of them are revoked.

    \b
    Example:
      sectool ca hosts
    """
    from sectool.identity.register import current_list, registered
    from sectool.identity.rollover import status

    at, now = session(ctx), time.time_ns() // 1000
    folder = _folder(at, ca)
    root = status(folder, now).roots[0]
    listed = current_list(folder, root.certificate, root.spiffe_id().trust_domain, now)
    held = listed.entries if listed else None

    def state(each: Any) -> str:
        if held is not None and (each.serial in held.serials or each.key in held.keys):
            return "revoked"
        return "expired" if each.not_after_us < now else "valid"

    rows = [
        {
            "name": each.name,
            "serial": each.serial,
            "state": state(each),
            "not_before": each.not_before_us,
            "not_after": each.not_after_us,
            "constraints": str(each.constraints),
            "key": each.key,
        }
        for each in registered(folder)
    ]
    columns = [
        Column("HOST", lambda r: r["name"]),
        Column("STATE", lambda r: r["state"], style=lambda r: "bad" if r["state"] == "revoked" else ""),
        Column("VALID UNTIL", lambda r: show_time(r["not_after"])),
        Column("SERIAL", lambda r: r["serial"]),
        Column("MAY VOUCH FOR", lambda r: r["constraints"]),
        Column("ISSUED", lambda r: show_time(r["not_before"]), wide=True),
        Column("KEY ID", lambda r: r["key"], wide=True),
    ]
    emit(rows, columns, output, "sectool.host-ca/1", color=at.color)


@app.command()
def revoke(
    ctx: typer.Context,
    host: Host = None,
    workload: Workload = None,
    serial: Serial = None,
    certificate: Certificate = None,
    issued_before: Annotated[
        str | None,
        typer.Option(
            "--issued-before", metavar="TIME", help="With --workload: only its SVIDs from before then."
        ),
    ] = None,
    renew: Annotated[
        bool, typer.Option("--renew", help="Sign the list again, with a new date, as it is.")
    ] = False,
    days: Days = 30,
    reason: Reason = "",
    ca: Folder = None,
    passphrase_fd: PassphraseFd = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be revoked, and sign nothing.")
    ] = False,
) -> None:
    """Revoke hosts, workloads or certificates: the root signs its next list (ca/revoked.pem, shown on stdout).

    On this host it is in force at once; others import it (sectool revocation import) or fetch it from the CA service.
    Their live connections with what is revoked are cut. Renew the list before it expires: hosts refuse everybody of
    the domain when they cannot know any more (setting revocation_expired).

    \b
    Examples:
      sectool ca revoke --host web-1 --reason "stolen" > revoked.pem
      sectool ca revoke --workload spiffe://shop.example/host/web-1/wl/web --issued-before now
      sectool ca revoke --renew --days 90 > revoked.pem
    """
    at = session(ctx)
    entries = _entries(_folder(at, ca), host, workload, serial, certificate, issued_before)
    if not entries and not renew:
        raise UsageError(
            "there is nothing to revoke", "give --host, --workload, --serial, --certificate or --renew"
        )
    _say_entries(at, "would revoke" if dry_run else "revoking", entries)
    if not dry_run:
        _publish(at, ca, entries, None, days, reason or "revoked at the CA", passphrase_fd)


@app.command()
def reinstate(
    ctx: typer.Context,
    host: Host = None,
    workload: Workload = None,
    serial: Serial = None,
    certificate: Certificate = None,
    days: Days = 30,
    reason: Reason = "",
    ca: Folder = None,
    passphrase_fd: PassphraseFd = None,
) -> None:
    """Take back a revocation that was a mistake: the root signs its next list without it.

    \b
    Example:
      sectool ca reinstate --workload spiffe://shop.example/host/web-1/wl/web > revoked.pem
    """
    at = session(ctx)
    entries = _entries(_folder(at, ca), host, workload, serial, certificate, None)
    if not entries:
        raise UsageError(
            "there is nothing to reinstate", "give --host, --workload, --serial or --certificate"
        )
    _say_entries(at, "reinstating", entries)
    _publish(at, ca, None, entries, days, reason or "reinstated at the CA", passphrase_fd)


@app.command()
def bundle(ctx: typer.Context, ca: Folder = None) -> None:
    """Write the roots that hosts have to trust now to stdout: during a rollover both. For `sectool host accept`.

    \b
    Example:
      sectool ca bundle | ssh web-1 sectool host accept -
    """
    from sectool.identity.rollover import bundle as roots

    sys.stdout.write(roots(_folder(session(ctx), ca)).to_pem())


@rollover.callback()
def rollover_() -> None:
    """A new root in place of the old one, with an overlap in which hosts trust both: no connection is lost.

    \b
    In this order:
      sectool ca rollover begin      then every host: sectool ca bundle | ... sectool host accept -
      sectool ca rollover switch     then every host: host request --renew, ca sign, host accept
      sectool ca rollover finish     then every host: sectool ca bundle | ... sectool host accept -
    """


@rollover.command("begin")
def begin_(
    ctx: typer.Context,
    ca: Folder = None,
    passphrase: Annotated[bool, typer.Option("--passphrase", help="Encrypt the new root's key.")] = False,
    passphrase_fd: PassphraseFd = None,
) -> None:
    """Make the next root (ca/next). Hosts are given both; the old one issues until `switch`.

    \b
    Example:
      sectool ca rollover begin
    """
    from sectool.identity.rollover import begin

    at = session(ctx)
    secret = ask_new(passphrase_fd) if passphrase or passphrase_fd is not None else b""
    root = begin(_folder(at, ca), time.time_ns() // 1000, passphrase=secret)
    at.say(
        f"made the next root of {root.trust_domain}; give it to every host: sectool ca bundle, sectool host accept"
    )


@rollover.command("switch")
def switch_(ctx: typer.Context, ca: Folder = None, passphrase_fd: PassphraseFd = None) -> None:
    """Issue from the next root from now on. Every host has to have the bundle with both before this.

    \b
    Example:
      sectool ca rollover switch
    """
    from sectool.identity.rollover import switch

    at = session(ctx)
    switch(_folder(at, ca), time.time_ns() // 1000, ask_once(passphrase_fd))
    if (_folder(at, ca) / "revoked.pem").exists():
        at.say(
            "its revocation list holds what the old one's did; every host needs it: sectool revocation import"
        )
    at.say(
        "the new root issues now; renew every host: sectool host request --renew, sectool ca sign, sectool host accept"
    )


@rollover.command("finish")
def finish_(
    ctx: typer.Context,
    ca: Folder = None,
    force: Annotated[
        bool, typer.Option("--force", help="Even though hosts still depend on the old root.")
    ] = False,
) -> None:
    """Destroy the old root's key; refused while a host's CA is by it.

    \b
    Example:
      sectool ca rollover finish
    """
    from sectool.identity.rollover import finish

    at = session(ctx)
    old = finish(_folder(at, ca), time.time_ns() // 1000, force=force)
    at.say(
        f"root {old.fingerprint.hex()[:16]} is gone; give every host the bundle without it: sectool ca bundle"
    )


@rollover.command("status")
def status_(ctx: typer.Context, ca: Folder = None, output: Output = Format.TABLE) -> None:
    """Show how far a rollover is, and which hosts still depend on the old root.

    \b
    Example:
      sectool ca rollover status
    """
    from sectool.identity.rollover import status

    at = session(ctx)
    found = status(_folder(at, ca), time.time_ns() // 1000)
    names = {"none": ["current"], "begun": ["current", "next"], "switched": ["current", "old"]}[found.step]
    rows = [
        {
            "root": name,
            "fingerprint": root.fingerprint.hex(),
            "not_after": root.not_after_us,
            "hosts_behind": [each.name for each in found.behind] if name == "old" else [],
        }
        for name, root in zip(names, found.roots, strict=True)
    ]
    columns = [
        Column("ROOT", lambda r: r["root"]),
        Column("FINGERPRINT", lambda r: r["fingerprint"][:16]),
        Column("VALID UNTIL", lambda r: show_time(r["not_after"])),
        Column("HOSTS THAT DEPEND ON IT STILL", lambda r: ", ".join(r["hosts_behind"]) or "-"),
    ]
    emit(rows, columns, output, "sectool.rollover/1", color=at.color)


@app.command()
def serve(
    ctx: typer.Context,
    listen: Annotated[
        str, typer.Option("--listen", metavar="ADDRESS:PORT", help="Where to listen, e.g. 10.0.0.1:8443.")
    ],
    ca: Folder = None,
    passphrase_fd: PassphraseFd = None,
) -> None:
    """Let hosts join with tokens, renew their CAs, and hear of roots and revocations, over TLS 1.3. Until interrupted.

    Every enrolment, renewal and refusal is in the control history. The root's key stays in this process: it needs no
    other service on its host, and no root beyond read and write in the CA folder. Policy has to let hosts reach it.

    \b
    Examples:
      sectool ca serve --listen 10.0.0.1:8443
      sectool ca serve --listen '[::]:8443' --passphrase-fd 3 3<secret
    """
    import asyncio

    from sectool.caservice.record import Recorder
    from sectool.caservice.server import Server
    from sectool.caservice.server import serve as run
    from sectool.caservice.service import Service
    from sectool.identity.authority import RootAuthority

    at = session(ctx)
    host, colon, port = listen.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise UsageError(f"{listen!r} is not an address and port", "write --listen 10.0.0.1:8443")
    folder, secret = _folder(at, ca), ask_once(passphrase_fd)
    root = RootAuthority.load(folder, secret)
    server = Server(Service(folder, root, Recorder(at.paths.control_history, at.say)))
    at.say(
        f"the CA of {root.trust_domain} serves at {listen}; next: sectool ca token create --url https://ADDRESS:{port}"
    )
    address = host.removeprefix("[").removesuffix("]")
    asyncio.run(run(server, address, int(port), load=lambda: RootAuthority.load(folder, secret)))


@token.callback()
def token_() -> None:
    """Join tokens: each lets one host enrol, once, with what it may vouch for bound to it.

    \b
    Examples:
      sectool ca token create --url https://10.0.0.1:8443 --name web-1 --label env=prod
      sectool ca token list
      sectool ca token revoke 1a2b3c4d5e6f
    """


@token.command("create")
def create_(
    ctx: typer.Context,
    url: Annotated[str, typer.Option("--url", metavar="URL", help="Where hosts reach the CA service.")],
    name: Annotated[
        str, typer.Option("--name", "-n", metavar="NAME", help="Only for the host of that name.")
    ] = "",
    label: Labels = None,
    allow: Allowed = None,
    ttl: Annotated[
        str, typer.Option("--ttl", metavar="TIME", help="How long it is good, e.g. 30m, 1h, 1d.")
    ] = "1h",
    ca: Folder = None,
) -> None:
    """Make a token, on stdout: whoever has it can enrol one host. It pins this CA, so the host needs nothing else.

    \b
    Example:
      sectool ca token create --url https://10.0.0.1:8443 --name web-1 --label env=prod
    """
    from sectool.caservice.tokens import Tokens
    from sectool.identity.extensions import LabelConstraints
    from sectool.identity.rollover import status
    from sectool.moment import parse_time

    at, now = session(ctx), time.time_ns() // 1000
    labels = labels_of(label)
    allowed = dict(constraints_of(allow).allow) if allow else {"*": ("*",)}
    limits = LabelConstraints({**allowed, **{key: (value,) for key, value in labels.items()}}, "")
    ttl_s = (now - parse_time(ttl, now)) // 1_000_000
    root = status(_folder(at, ca), now).roots[0].fingerprint.hex()
    made = Tokens(_folder(at, ca)).create(url, root, name, limits, ttl_s, now)
    sys.stdout.write(made.encode() + "\n")
    at.say(f"token {made.id}, good for {ttl}; on the host: sectool host enroll --join TOKEN")


@token.command("list")
def list_tokens(ctx: typer.Context, ca: Folder = None, output: Output = Format.TABLE) -> None:
    """List tokens: open, used (by whom), revoked and expired. Their secrets are not known here.

    \b
    Example:
      sectool ca token list
    """
    from sectool.caservice.tokens import Tokens

    at, now = session(ctx), time.time_ns() // 1000
    rows = [
        {
            "id": kept.id,
            "state": "expired" if kept.state == "open" and kept.expires_us < now else kept.state,
            "name": kept.name,
            "used_by": kept.used_by,
            "expires": kept.expires_us,
            "created": kept.created_us,
            "constraints": str(kept.constraints(kept.name or "NAME")),
        }
        for kept in Tokens(_folder(at, ca)).all()
    ]
    columns = [
        Column("TOKEN", lambda r: r["id"]),
        Column("STATE", lambda r: r["state"]),
        Column("FOR", lambda r: r["name"] or "any"),
        Column("USED BY", lambda r: r["used_by"] or "-"),
        Column("GOOD UNTIL", lambda r: show_time(r["expires"])),
        Column("MAY VOUCH FOR", lambda r: r["constraints"]),
        Column("CREATED", lambda r: show_time(r["created"]), wide=True),
    ]
    emit(rows, columns, output, "sectool.join-token/1", color=at.color)


@token.command("revoke")
def revoke_token(
    ctx: typer.Context,
    token_id: Annotated[str, typer.Argument(metavar="TOKEN", help="Its id, as listed.")],
    ca: Folder = None,
) -> None:
    """Void an open token.

    \b
    Example:
      sectool ca token revoke 1a2b3c4d5e6f
    """
    from sectool.caservice.tokens import Tokens

    at = session(ctx)
    gone = Tokens(_folder(at, ca)).revoke(token_id, time.time_ns() // 1000)
    at.say(f"token {gone.id} is void")


def read_input(name: str) -> bytes:
    """A file, or stdin for `-`; at most 1 MiB."""
    from sectool.cli.revocation import read_input as read

    return read(name)


def _folder(at: Session, ca: Path | None) -> Path:
    return (ca or at.paths.ca).absolute()


def _entries(
    folder: Path,
    hosts: list[str] | None,
    workloads: list[str] | None,
    serials: list[str] | None,
    certificates: list[Path] | None,
    issued_before: str | None,
) -> Entries:
    from sectool.clock import SECOND
    from sectool.identity.authority import BACKDATE_S
    from sectool.identity.register import of_host, read_host_certificate
    from sectool.identity.revocation import Entries, plain_serial
    from sectool.identity.spiffe import SpiffeId

    now = time.time_ns() // 1000
    before = 0
    if issued_before is not None:
        if not workloads:
            raise UsageError("--issued-before is for workloads", "give --workload SPIFFE-ID, or leave it out")
        moment = now if issued_before == "now" else moment_us(issued_before)
        before = max(
            1, moment // SECOND - BACKDATE_S
        )  # certificates of ours begin a little before they are issued
    try:
        named = {str(SpiffeId.parse(text)): before for text in workloads or []}
    except CredentialError as error:
        raise UsageError(
            error.message, "a SPIFFE ID looks like spiffe://shop.example/host/web-1/wl/web"
        ) from None
    entries = Entries(frozenset(map(plain_serial, serials or [])), workloads=named)
    for name in hosts or []:
        entries |= of_host(folder, name, now)
    for path in certificates or []:
        entries |= read_host_certificate(read_input(str(path))).entries
    return entries


def _say_entries(at: Session, verb: str, entries: Entries) -> None:
    for kind, items in (("serial", entries.serials), ("key", entries.keys), ("workload", entries.workloads)):
        for item in sorted(items):
            at.say(f"{verb} {kind} {item}")


def _publish(
    at: Session,
    ca: Path | None,
    more: Entries | None,
    less: Entries | None,
    days: int,
    reason: str,
    passphrase_fd: int | None,
) -> RevocationList:
    from sectool.cli.revocation import take
    from sectool.identity.authority import RootAuthority
    from sectool.identity.register import revoke as sign_next
    from sectool.identity.revocation import Entries

    folder = _folder(at, ca)
    root = RootAuthority.load(folder, ask_once(passphrase_fd))
    none = Entries()
    made = sign_next(folder, root, more or none, time.time_ns() // 1000, less=less or none, days=days)
    at.say(
        f"list {made.number} of {made.trust_domain}, fresh until {show_time(made.next_update_us)}: {folder}/revoked.pem"
    )
    if not sys.stdout.isatty():
        sys.stdout.write(made.pem.decode("ascii"))
    if at.paths.host.exists():
        try:
            take(at, made.pem, reason)
        except SectoolError as error:
            at.warn(f"this host did not take it: {error.message}")
    at.say("other hosts: sectool revocation import revoked.pem")
    return made
