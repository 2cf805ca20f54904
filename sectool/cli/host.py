"""`sectool host`: enrolment of this host."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sectool.cli.context import Session, session
from sectool.cli.passphrase import PassphraseFd, ask_once
from sectool.errors import NoDaemonError, SectoolError, UsageError

if TYPE_CHECKING:
    from sectool.identity.extensions import LabelConstraints
    from sectool.labels import LabelSet

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)


@app.callback()
def host() -> None:
    """Enrol this host in a trust domain.

    \b
    Example:
      sectool host enroll --name web-1 --label env=prod
    """


@app.command()
def enroll(
    ctx: typer.Context,
    name: Annotated[
        str | None, typer.Option("--name", "-n", metavar="NAME", help="Host name [default: this host's].")
    ] = None,
    ca: Annotated[
        Path | None,
        typer.Option("--ca", metavar="DIR", help="Folder of the root [default: ca/ in the state folder]."),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", "-l", metavar="KEY=VALUE", help="Label of every workload here; repeatable."),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow", metavar="KEY=VALUE", help="What this host may vouch for (KEY=*, *=*); repeatable."
        ),
    ] = None,
    network: Annotated[
        list[str] | None,
        typer.Option(
            "--network", metavar="CIDR", help="Network in which peers must have an identity; repeatable."
        ),
    ] = None,
    join: Annotated[
        str | None,
        typer.Option(
            "--join", metavar="TOKEN", help="Join over the network with a CA's token (- reads it from stdin)."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing enrolment.")] = False,
    passphrase_fd: PassphraseFd = None,
) -> None:
    """Make a certificate authority for this host, issued by the root, which may vouch only for what is allowed here.

    Without --allow the host's own labels are pinned and everything else is free: a host enrolled with env=dev can
    never vouch for env=prod.

    \b
    Examples:
      sectool host enroll --name web-1 --label env=prod --label zone=a
      sectool host enroll --name web-1 --join join1.eyJ1cmwiOi...
      sectool host enroll --name lab-1 --ca /media/usb/ca --allow 'app=*' --allow env=dev
    """
    if join is not None:
        if ca or label or allow:
            raise UsageError(
                "the token says what this host may vouch for", "leave --ca, --label and --allow out"
            )
        _join(session(ctx), join, name or socket.gethostname(), network, force=force)
        return
    from sectool.identity.enrolment import enroll_host

    at = session(ctx)
    labels = labels_of(label)
    enrolled = enroll_host(
        at.paths.state,
        name or socket.gethostname(),
        (ca or at.paths.ca).absolute(),
        labels,
        constraints_of(allow) if allow else None,
        network or None,
        force=force,
        passphrase=ask_once(passphrase_fd),
    )
    at.say(f"enrolled {enrolled.name} in {enrolled.trust_domain}")
    at.say("next: sectool up")


def labels_of(texts: list[str] | None) -> LabelSet:
    """What `--label` says; UsageError for what is no label."""
    from sectool.labels import LabelError, LabelSet

    try:
        return LabelSet.parse(",".join(texts or []))
    except LabelError as error:
        raise UsageError(str(error), "write --label key=value") from None


def constraints_of(allow: list[str]) -> LabelConstraints:
    """What `--allow` says."""
    from sectool.identity.extensions import LabelConstraints

    allowed: dict[str, tuple[str, ...]] = {}
    for text in allow:
        key, equals, value = text.partition("=")
        if not equals or not key or not value:
            raise UsageError(
                f"{text!r} is not KEY=VALUE", "write --allow env=dev, --allow 'app=*' or --allow '*=*'"
            )
        allowed[key] = (*allowed.get(key, ()), value)
    return LabelConstraints(allowed, "")


@app.command()
def request(
    ctx: typer.Context,
    name: Annotated[
        str | None, typer.Option("--name", "-n", metavar="NAME", help="Host name [default: this host's].")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label", "-l", metavar="KEY=VALUE", help="Label to ask for; the CA decides; repeatable."
        ),
    ] = None,
    renew: Annotated[
        bool, typer.Option("--renew", help="Ask for what this host has now, with a new key.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Give up a request that is under way.")] = False,
) -> None:
    """Ask for a host CA where the root is not here: a request on stdout, its key stays (request/, 0600).

    The answer of `sectool ca sign` is taken by `sectool host accept`. Nothing in request or answer is secret.

    \b
    Examples:
      sectool host request --name web-1 --label env=prod > web-1.csr
      sectool host request --renew > web-1.csr
    """
    from sectool.identity.enrolment import default_constraints, load_host
    from sectool.identity.joining import prepare

    at = session(ctx)
    if renew:
        host = load_host(at.paths.state)
        wanted, wish = host.name, host.constraints
    else:
        wanted = name or socket.gethostname()
        wish = default_constraints(wanted, labels_of(label))
    sys.stdout.write(prepare(at.paths.state, wanted, wish, force=force).decode("ascii"))
    at.say("next, where the root is: sectool ca sign FILE; then here: sectool host accept ANSWER")


@app.command()
def accept(
    ctx: typer.Context,
    file: Annotated[str, typer.Argument(metavar="FILE", help="What the CA gave (- is stdin).")],
    network: Annotated[
        list[str] | None,
        typer.Option(
            "--network", metavar="CIDR", help="Network in which peers must have an identity; repeatable."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an enrolment in another trust domain.")
    ] = False,
) -> None:
    """Take what the CA gave: the answer to this host's request, or the roots to trust (sectool ca bundle).

    A renewal keeps labels, networks and the other domains trusted; the daemon takes it up without losing a connection.

    \b
    Examples:
      sectool host accept web-1.pem
      ssh ca sectool ca bundle | sectool host accept -
    """
    from sectool.cli.revocation import read_input
    from sectool.identity.joining import accept as enrol
    from sectool.identity.joining import read_answer, take_roots

    at = session(ctx)
    answer, now = read_input(file), time.time_ns() // 1000
    if read_answer(answer)[0] is None:
        host = take_roots(at.paths.state, answer, now)
        count = len(host.bundle.roots[host.trust_domain])
        at.say(f"{count} root{'' if count == 1 else 's'} of {host.trust_domain} trusted")
    else:
        host = enrol(at.paths.state, answer, now, enforced_networks=network or None, force=force)
        at.say(f"enrolled {host.name} in {host.trust_domain}")
    take_up(at)


def _join(at: Session, text: str, name: str, networks: list[str] | None, *, force: bool) -> None:
    from sectool.caservice.client import join, remember_service
    from sectool.caservice.tokens import MAX_TOKEN, Token
    from sectool.identity.joining import REQUEST, accept, prepare

    token = Token.decode(sys.stdin.read(MAX_TOKEN + 1) if text == "-" else text)
    if at.paths.host.exists() and not force:
        raise UsageError("this host is enrolled already", "use --force to enrol it again")
    answer = join(token, prepare(at.paths.state, name, None, force=True))
    saved = at.paths.state / REQUEST / "answer.pem"
    saved.write_bytes(answer)
    try:
        host = accept(
            at.paths.state, answer, time.time_ns() // 1000, enforced_networks=networks or None, force=force
        )
    except UsageError as error:  # the token is spent; the answer is not
        raise UsageError(error.message, f"{error.hint}; then: sectool host accept {saved}") from None
    remember_service(at.paths.state, token.url)
    at.say(f"enrolled {host.name} in {host.trust_domain}; may vouch for: {host.constraints}")
    at.say("next: sectool up")
    take_up(at)


def take_up(at: Session) -> None:
    """Have a running daemon go by the enrolment as it is now."""
    try:
        with at.control() as control:
            control.call("reload")
    except NoDaemonError:
        return
    except SectoolError as error:
        at.warn(f"the running daemon did not take it up: {error.message}")
