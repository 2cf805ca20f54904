"""`sectool lab`: practise on hosts made of network namespaces."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from labs import attackcli, scenariocli

app = typer.Typer(
    rich_markup_mode=None, no_args_is_help=True, help="Practise on hosts made of network namespaces."
)
app.add_typer(scenariocli.app, name="scenario")
app.add_typer(attackcli.app, name="attack")

Name = Annotated[str, typer.Option("--name", metavar="NAME", help="Which lab, if there are several.")]


@app.callback()
def lab() -> None:
    """Practise on hosts made of network namespaces. Nothing outside of them is touched.

    \b
    Examples:
      sectool lab up
      sectool lab exec web --label app=web -- psql -h 10.77.0.20 -U shop postgres -c 'select 1'
      sectool lab exec db -- sectool flows
      sectool lab down
    """


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


@app.command()
def up(
    name: Name = "lab",
    bare: Annotated[bool, typer.Option("--bare", help="Hosts and services only, no enforcer.")] = False,
) -> None:
    """Build the lab: hosts web, db, batch, rogue and plain, their services, enforcers and policy.

    \b
    Example:
      sectool lab up
    """
    from labs.lab import Lab

    Lab(name).up(_say, enforce=not bare)
    _say(f"lab {name} is up; next: sectool lab status, sectool lab exec HOST -- COMMAND")


@app.command()
def down(name: Name = "lab") -> None:
    """Take the lab down, also when it was left half-way: nothing of it stays.

    \b
    Example:
      sectool lab down
    """
    from labs.lab import Lab

    lab = Lab(name)
    if lab.exists():
        lab.down(_say)
    else:
        _say(f"nothing to do: there is no lab {name}")


@app.command()
def status(name: Name = "lab") -> None:
    """Show the hosts of the lab: addresses, enforcer, processes. Exit 1 when it is not up.

    \b
    Example:
      sectool lab status
    """
    from labs import netns
    from labs.lab import Lab
    from sectool.errors import SectoolError

    lab = Lab(name)
    record = lab.record()
    if record is None or not lab.exists():
        raise SectoolError(f"lab {name} is not up", f"build it: sectool lab up --name {name}")
    out = sys.stdout
    out.write(f"lab {name}: {record['phase']}\n")
    out.write(f"{'host':8}{'trust domain':16}{'enforcer':10}{'processes':>9}  addresses\n")
    for node in lab.nodes.values():
        if not node.folder.exists():
            continue
        enforcer = node.host.enforcer
        running = (node.run_folder / "control.sock").exists()
        state = "none" if enforcer is None else "up" if running else "down"
        try:
            count = len(netns.processes({node.netns.stat().st_ino}))
        except OSError:
            count, state = 0, "gone"
        addresses = ", ".join(node.host.addresses)
        domain = enforcer.trust_domain if enforcer else "-"
        out.write(f"{node.name:8}{domain:16}{state:10}{count:9}  {addresses}\n")


@app.command(name="exec")
def execute(
    host: Annotated[
        str, typer.Argument(metavar="HOST", help="web, db, batch, rogue or plain; of a scenario also ops.")
    ],
    command: Annotated[
        list[str], typer.Argument(metavar="COMMAND [ARG]...", help="The program to run there.")
    ],
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label", "-l", metavar="KEY=VALUE", help="Run it as a workload with this label; repeatable."
        ),
    ] = None,
    name: Name = "lab",
) -> None:
    """Run a program on a host of the lab. Its input, output and exit code are its own.

    Write -- before a program that takes options. `sectool` is the host's own there, as in
    `sectool lab exec db -- sectool flows`.

    \b
    Examples:
      sectool lab exec batch --label app=batch --label env=prod -- curl http://10.77.0.10/
      sectool lab exec web -- bash
    """
    import os
    from dataclasses import replace

    from labs.lab import SECTOOL, Lab
    from labs.topology import SHOP, TRAINING
    from sectool.errors import SectoolError

    node = Lab(name, replace(SHOP, hosts=TRAINING))[host]
    if not node.netns.exists():
        raise SectoolError(f"lab {name} is not up", f"build it: sectool lab up --name {name}")
    program, *rest = command
    argv = [SECTOOL if program == "sectool" else program, *rest]
    argv = node.place().argv(node.workload(label or [], argv) if label else argv)
    if (node.folder / "work").is_dir():  # a scenario's: where the learner's files are
        os.chdir(node.folder / "work")
    os.execvpe(argv[0], argv, node.environment())


@app.command()
def demo() -> None:
    """Bring a lab up, run every case through it, show and check the verdicts, take it down.

    \b
    Example:
      sectool lab demo
    """
    from labs.demo import run

    raise typer.Exit(run())
