"""The console script `sectool`: global options, the list of commands, and the one place where errors surface."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer._click.exceptions import ClickException, NoArgsIsHelpError, UsageError
from typer.core import TyperGroup

from sectool.api.paths import Paths
from sectool.cli.context import Color, Session
from sectool.cli.lazy import Place, Unloaded
from sectool.cli.report import INTERRUPTED, defect, from_os, report, usage
from sectool.errors import Exit, SectoolError
from sectool.errors import UsageError as SectoolUsage

COMMANDS: dict[str, Place] = {
    "ca": Place("sectool.cli.ca", "The trust domain's root: make it, issue and revoke from it, replace it."),
    "host": Place("sectool.cli.host", "Enrol this host in a trust domain."),
    "up": Place("sectool.cli.daemon", "Start enforcing in this network namespace.", "up"),
    "down": Place("sectool.cli.daemon", "Stop enforcing and leave no trace in the kernel.", "down"),
    "mode": Place("sectool.cli.mode", "Whether what policy denies is denied: enforce or observe.", "mode"),
    "break-glass": Place(
        "sectool.cli.mode", "Suspend denial for a while, on record and with an alert.", "break-glass"
    ),
    "reload": Place("sectool.cli.daemon", "Have the daemon read its settings and trust again.", "reload"),
    "restart": Place(
        "sectool.cli.daemon", "Replace the daemon by the installed program, losing nothing.", "restart"
    ),
    "status": Place("sectool.cli.status", "Show what is enforced right now, and how well.", "status"),
    "doctor": Place(
        "sectool.cli.doctor", "What keeps this host from enforcing well, and the remedy.", "doctor"
    ),
    "metrics": Place("sectool.cli.metrics", "Numbers for Prometheus: print them, or serve them.", "metrics"),
    "run": Place("sectool.cli.run", "Run a program as a workload with labels of its own.", "run"),
    "policy": Place("sectool.cli.policy", "Apply, test, explain, compare and roll back policy."),
    "explain": Place("sectool.cli.explain", "Why a connection is allowed or denied, and by whom.", "explain"),
    "flows": Place(
        "sectool.cli.flows", "List or follow the connections seen, with verdict and reason.", "flows"
    ),
    "alerts": Place("sectool.cli.alerts", "List what is wrong now, and who was told."),
    "events": Place(
        "sectool.cli.flows", "List what else happened: workloads, identities, policy, enforcer.", "events"
    ),
    "timeline": Place(
        "sectool.cli.timeline", "Everything that happened around a moment, or to one thing.", "timeline"
    ),
    "store": Place(
        "sectool.cli.store", "The recorded history as files: how much, whether sound, what is kept."
    ),
    "diff": Place(
        "sectool.cli.difference", "What changed between two moments, and who talks to whom now.", "diff"
    ),
    "map": Place("sectool.cli.map", "Who talks to whom, by labels: table, Graphviz, Mermaid or SVG.", "map"),
    "top": Place("sectool.cli.top", "The console for incidents: what is denied, why, since when.", "top"),
    "replay": Place("sectool.cli.replay", "Play recorded connections back, faster or slower.", "replay"),
    "ends": Place("sectool.cli.ends", "Compare both ends of connections between two hosts.", "ends"),
    "investigate": Place(
        "sectool.cli.investigate", "Everything on record about one thing, as a report.", "investigate"
    ),
    "capture": Place(
        "sectool.cli.capture", "Packets of chosen connections, with whose they are, into a file."
    ),
    "case": Place("sectool.cli.case", "A window of history as a signed bundle for another machine."),
    "query": Place("sectool.cli.query", "Ask the event store in SQL, read-only.", "query"),
    "identity": Place(
        "sectool.cli.identity", "The identities this host has issued: show, verify, renew, revoke."
    ),
    "revocation": Place("sectool.cli.revocation", "Signed lists of what is revoked: take, show, pass on."),
    "vuln": Place("sectool.cli.vuln", "Known vulnerabilities of workloads, from scanners' reports."),
    "trust": Place("sectool.cli.trust", "Other trust domains: whose identities count here, and how far."),
    "workload": Place("sectool.cli.workload", "The workloads seen on this host."),
    "names": Place("sectool.cli.names", "List the host names that addresses are known by.", "names"),
    "lab": Place("labs.cli", "Practise on hosts made of network namespaces."),
}


class Root(TyperGroup):
    """The top level: everything below it is loaded when used."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        for name, place in COMMANDS.items():
            self.commands[name] = Unloaded(name, place)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a reader that went away (`| head`) is no failure."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except BrokenPipeError:
            # What is still buffered must not fail again when the interpreter shuts down.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return int(Exit.OK)


app = typer.Typer(
    cls=Root,
    name="sectool",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 fine or allowed, 1 denied, different or failed, 2 usage, 3 no daemon, 4 partial data.",
)


def _version(asked: bool) -> None:
    if asked:
        from sectool import __version__

        sys.stdout.write(f"sectool {__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    state: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="State folder [env: SECTOOL_STATE; default: /var/lib/sectool]."),
    ] = None,
    run: Annotated[
        str | None, typer.Option(metavar="DIR", help="Run folder [env: SECTOOL_RUN; default: /run/sectool].")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Read this case bundle or state folder, and ask no daemon."),
    ] = None,
    color: Annotated[Color, typer.Option(help="Colour on stdout.")] = Color.AUTO,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No talk on stderr but errors and warnings.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Workload identity in the TCP handshake: who may talk to whom on plain Linux hosts, and what happened.

    \b
    Examples:
      sectool up --background
      sectool policy apply shop.yaml --reason "web may reach db"
      sectool run --label app=web -- nginx -g 'daemon off;'
      sectool flows --verdict deny --since 10m
      sectool explain 'app=web -> app=db tcp/5432'
    """
    if store is None:
        ctx.obj = Session(Paths.resolve(state, run), color, quiet)
    elif state or run:
        raise SectoolUsage("--store stands for --state and --run", "give it alone")
    else:  # where no daemon listens
        ctx.obj = Session(Paths.resolve(store, Path(store) / "no-daemon"), color, quiet, offline=True)


def main(args: Sequence[str] | None = None) -> int:
    """Run `sectool ARGS`; returns the exit code."""
    try:
        result = typer.main.get_command(app).main(
            list(sys.argv[1:] if args is None else args), prog_name="sectool", standalone_mode=False
        )
        return result if isinstance(result, int) else int(Exit.OK)
    except SectoolError as error:
        return report(error)
    except NoArgsIsHelpError as error:
        sys.stderr.write(error.format_message() + "\n")
        return int(Exit.USAGE)
    except UsageError as error:
        return usage(error.format_message(), error.ctx.command_path if error.ctx else "sectool")
    except ClickException as error:
        return usage(error.format_message(), "sectool")
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except OSError as error:
        return report(from_os(error))
    except Exception as error:  # the last line of defence: a traceback never reaches a user
        return defect(error)


if __name__ == "__main__":
    sys.exit(main())
