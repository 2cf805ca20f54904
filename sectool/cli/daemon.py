"""`sectool up` and `sectool down`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sectool.cli.context import require_root, session
from sectool.errors import NoDaemonError

app = typer.Typer(rich_markup_mode=None)

WITHOUT_ROOT = "policy test, explain --file and, as a member of the socket's group, status and flows"


@app.command()
def up(
    ctx: typer.Context,
    background: Annotated[
        bool,
        typer.Option(
            "--background", "-b", help="Return once it enforces; log to agent.log in the run folder."
        ),
    ] = False,
    policy: Annotated[
        list[Path] | None,
        typer.Option("--policy", "-p", metavar="FILE", help="Policy to apply first; may be given again."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log details.")] = False,
) -> None:
    """Start enforcing in this network namespace.

    Loads the host's enrolment and the active policy revision, starts the event store and the packet workers, and
    only then changes the kernel's rules. Without a policy every new connection is denied, SSH to this host too;
    connections that exist already live on at the first start. In the foreground it runs until
    Ctrl-C or SIGTERM; the rules then stay (no new connection passes) until `sectool down`.

    \b
    Examples:
      sectool up                       in the foreground, for systemd (Type=notify)
      sectool up --background          by hand
      sectool up -b --policy shop.yaml enforce this from the first moment
      nsenter --net=/run/netns/blue sectool --state /srv/blue --run /run/blue up -b
    """
    require_root("starting the enforcer", WITHOUT_ROOT)
    at = session(ctx)
    if not background:
        from sectool.agent.daemon import serve

        raise typer.Exit(serve(at.paths, verbose=verbose, policy=policy or ()))
    from sectool.agent.background import start

    told = start(at.paths, verbose=verbose, policy=policy or ())
    at.say(f"enforcing as {told.get('host')} in {told.get('trust_domain')}, daemon pid {told.get('pid')}")
    if told.get("revision"):
        at.say(f"policy revision {told['revision']} is active")
    else:
        at.warn("no policy has been applied yet: every connection is denied (sectool policy apply FILE)")


@app.command()
def down(ctx: typer.Context) -> None:
    """Stop enforcing and leave no trace in the kernel: rules, sockets and run files go, state stays.

    Works without a daemon too, and then cleans up what one left behind when it was killed.

    \b
    Example:
      sectool down
    """
    require_root("stopping the enforcer", WITHOUT_ROOT)
    at = session(ctx)
    from sectool.agent.cleanup import clean, wait_gone

    try:
        with at.control(timeout=30.0) as control:
            pid = int(control.call("down")["pid"])
    except NoDaemonError:
        removed = clean(at.paths)
        if removed:
            at.say("no daemon was running; removed what was left: " + ", ".join(removed))
        else:
            at.say("nothing to do: no daemon is running and nothing is left of one")
        return
    wait_gone(pid, at.paths, timeout_s=30.0)
    at.say("stopped; new connections are no longer checked")
