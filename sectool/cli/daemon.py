"""`sectool up`, `down`, `reload` and `restart`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sectool.cli.context import require_root, session
from sectool.cli.mode import MODES
from sectool.errors import NoDaemonError, UsageError

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
    mode: Annotated[
        str | None,
        typer.Option(
            "--mode",
            metavar="MODE",
            help="enforce or observe, from now on; without it as it was chosen last.",
        ),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log details.")] = False,
) -> None:
    """Start enforcing in this network namespace.

    Loads the host's enrolment and the active policy revision, starts the event store and the packet workers, and
    only then changes the kernel's rules. Without a policy every new connection is denied, SSH to this host too;
    connections that exist already live on at the first start. In the foreground it runs until
    Ctrl-C or SIGTERM; the rules then stay (no new connection passes) until `sectool down`.

    With --mode observe nothing is denied: identities are shown where the handshake succeeds, and what would be denied
    passes and is recorded so, for `sectool policy suggest` to learn from. `sectool mode enforce` begins to deny.
    Without a daemon packets pass as well then.

    \b
    Examples:
      sectool up                       in the foreground, for systemd (Type=notify)
      sectool up --background          by hand
      sectool up -b --policy shop.yaml enforce this from the first moment
      sectool up -b --mode observe     only look and record: the first weeks on a host
      nsenter --net=/run/netns/blue sectool --state /srv/blue --run /run/blue up -b
    """
    require_root("starting the enforcer", WITHOUT_ROOT)
    at = session(ctx)
    if mode is not None and mode not in MODES:
        raise UsageError(f"there is no mode {mode!r}", f"modes are {', '.join(MODES)}")
    if not background:
        from sectool.agent.daemon import serve
        from sectool.agent.mode import Mode

        chosen = Mode(mode) if mode else None
        raise typer.Exit(serve(at.paths, verbose=verbose, policy=policy or (), mode=chosen))
    from sectool.agent.background import start

    told = start(at.paths, verbose=verbose, policy=policy or (), mode=mode)
    observing = told.get("mode") == "observe"
    doing = "observing" if observing else "enforcing"
    at.say(f"{doing} as {told.get('host')} in {told.get('trust_domain')}, daemon pid {told.get('pid')}")
    if told.get("revision"):
        at.say(f"policy revision {told['revision']} is active")
    elif not observing:
        at.warn("no policy has been applied yet: every connection is denied (sectool policy apply FILE)")
    if observing:
        at.warn("OBSERVING: nothing is denied, and what would be is recorded (sectool mode enforce begins)")


@app.command()
def reload(ctx: typer.Context) -> None:
    """Have the daemon read its settings and trust bundle again. No connection notices.

    A setting that cannot change while packets flow is named, and waits for `sectool restart`. With a mistake in
    the file nothing changes. SIGHUP does the same (systemctl reload).

    \b
    Example:
      sectool reload
    """
    require_root("reloading", WITHOUT_ROOT)
    at = session(ctx)
    with at.control() as control:
        done = control.call("reload")
    applied, waiting = done["applied"], done["waiting"]
    at.say(f"in force now: {', '.join(applied)}" if applied else "no setting has changed that can change now")
    at.say(f"trusted: {', '.join(done['trusted_domains'])}")
    if waiting:
        at.warn(f"wait for `sectool restart`: {', '.join(waiting)}")


@app.command()
def restart(ctx: typer.Context) -> None:
    """Replace the running daemon by the program that is installed now. All connections go on.

    For upgrades, and for settings that `sectool reload` cannot apply. The kernel rules stay. The packet workers go on
    until their successors stand by; these take over connections and keys of encrypted ones. If the installed
    program cannot start, nothing changes.

    \b
    Example:
      pip install --upgrade sectool && sectool restart
    """
    require_root("restarting", WITHOUT_ROOT)
    at = session(ctx)
    from sectool.agent.succession import wait_succeeded

    with at.control(timeout=60.0) as control:
        said = control.call("restart")
    status = wait_succeeded(at.paths, int(said["pid"]), int(said["started"]), timeout_s=60.0)
    gaps = [w["gap_ms"] for w in status["workers"] if w["gap_ms"] is not None]
    waited = f"; packets waited for {max(gaps):.0f} ms" if gaps else ""
    at.say(
        f"version {status['version']} (before: {said['version']}) enforces, daemon pid {status['pid']}{waited}"
    )


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
