"""`sectool host`: enrolment of this host."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sectool.cli.context import session
from sectool.errors import NoDaemonError, SectoolError, UsageError

if TYPE_CHECKING:
    from sectool.identity.extensions import LabelConstraints

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
    force: Annotated[bool, typer.Option("--force", help="Replace an existing enrolment.")] = False,
) -> None:
    """Make a certificate authority for this host, issued by the root, which may vouch only for what is allowed here.

    Without --allow the host's own labels are pinned and everything else is free: a host enrolled with env=dev can
    never vouch for env=prod.

    \b
    Examples:
      sectool host enroll --name web-1 --label env=prod --label zone=a
      sectool host enroll --name lab-1 --ca /media/usb/ca --allow 'app=*' --allow env=dev
    """
    from sectool.identity.enrolment import enroll_host
    from sectool.labels import LabelError, LabelSet

    at = session(ctx)
    try:
        labels = LabelSet.parse(",".join(label or []))
    except LabelError as error:
        raise UsageError(str(error), "write --label key=value") from None
    enrolled = enroll_host(
        at.paths.state,
        name or socket.gethostname(),
        (ca or at.paths.ca).absolute(),
        labels,
        _constraints(allow) if allow else None,
        network or None,
        force=force,
    )
    at.say(f"enrolled {enrolled.name} in {enrolled.trust_domain}")
    at.say("next: sectool up")


def _constraints(allow: list[str]) -> LabelConstraints:
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
def trust(
    ctx: typer.Context,
    trust_domain: Annotated[
        str, typer.Argument(metavar="TRUST-DOMAIN", help="Name of the other trust domain.")
    ],
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Its root certificates, PEM.")],
) -> None:
    """Trust the workloads of another trust domain as well (policy still decides what they may do).

    \b
    Example:
      sectool host trust partner.example partner-root.crt
    """
    from sectool.identity.enrolment import trust_add

    at = session(ctx)
    try:
        pem = file.read_text(encoding="ascii")
    except FileNotFoundError:
        raise UsageError(f"there is no file {file}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{file} is not PEM", "convert it: openssl x509 -inform der -outform pem") from None
    bundle = trust_add(at.paths.state, trust_domain, pem)
    at.say(f"trusted now: {', '.join(bundle.trust_domains)}")
    try:
        with at.control() as control:
            control.call("reload")
    except NoDaemonError:
        return
    except SectoolError as error:
        at.warn(f"the running daemon did not take it up: {error.message}")
