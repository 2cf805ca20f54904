"""`sectool ca`: the trust domain's root."""

from __future__ import annotations

from typing import Annotated

import typer

from sectool.cli.context import session

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)


@app.callback()
def ca() -> None:
    """The trust domain's root: make it, once.

    \b
    Example:
      sectool ca init --trust-domain shop.example
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
    force: Annotated[
        bool, typer.Option("--force", help="Replace an existing root: every enrolment ends.")
    ] = False,
) -> None:
    """Make the root of a new trust domain in the state folder (ca/).

    Its key (root.key, 0600) can enrol any host with any label: keep it where hosts are enrolled, nowhere else.

    \b
    Example:
      sectool ca init --trust-domain shop.example
    """
    from sectool.identity.enrolment import init_ca

    at = session(ctx)
    root = init_ca(at.paths.state, trust_domain, force=force)
    at.say(f"made the root of {root.trust_domain} in {at.paths.ca}")
    at.say("next: sectool host enroll --name NAME")
