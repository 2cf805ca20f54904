"""`sectool run`: start a program as a workload."""

from __future__ import annotations

import os
import signal
from typing import Annotated

import typer

from sectool.cli.context import require_root, session
from sectool.errors import SectoolError, UsageError

app = typer.Typer(rich_markup_mode=None)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
def run(
    ctx: typer.Context,
    command: Annotated[
        list[str], typer.Argument(metavar="COMMAND [ARG]...", help="The program and its arguments.")
    ],
    label: Annotated[
        list[str] | None,
        typer.Option("--label", "-l", metavar="KEY=VALUE", help="A label of the workload; repeatable."),
    ] = None,
    user: Annotated[
        str | None, typer.Option("--user", "-u", metavar="USER", help="Run as this user (with its groups).")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", metavar="NAME", help="Name in listings [default: label app].")
    ] = None,
) -> None:
    """Run a program as a workload with labels of its own.

    The daemon puts the process into a cgroup that stands for these labels; the kernel vouches for it from then on,
    for all its children too. The program then replaces this command: signals and exit code are its own.

    \b
    Examples:
      sectool run --label app=web --label env=prod -- nginx -g 'daemon off;'
      sectool run -l app=batch -u nobody -- python3 /srv/batch.py
    """
    require_root("starting a workload", "plain programs: they get an automatic identity")
    from sectool.labels import LabelError, LabelSet

    try:
        labels = LabelSet.parse(",".join(label or []))
    except LabelError as error:
        raise UsageError(str(error), "write --label key=value") from None
    account = _account(user) if user is not None else None
    with session(ctx).control() as control:
        control.call("run.register", labels=dict(labels), name=name)
    if account is not None:
        become(*account)
    workload_api = session(ctx).paths.run / "workload.sock"
    # A program that may not reach it is not sent there.
    if os.access(workload_api, os.W_OK, effective_ids=True):
        os.environ.setdefault("SPIFFE_ENDPOINT_SOCKET", f"unix://{workload_api}")
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # Python ignores it, and programs inherit that
    try:
        os.execvp(command[0], command)  # noqa: S606
    except FileNotFoundError:
        raise UsageError(f"there is no program {command[0]!r}", "give its path, or check PATH") from None
    except OSError as error:
        raise SectoolError(f"cannot run {command[0]}: {error.strerror}") from None


def _account(user: str) -> tuple[str, int, int, str]:
    import pwd

    try:
        entry = pwd.getpwuid(int(user)) if user.isdigit() else pwd.getpwnam(user)
    except KeyError:
        raise UsageError(f"there is no user {user!r} on this host") from None
    return entry.pw_name, entry.pw_uid, entry.pw_gid, entry.pw_dir


def become(name: str, uid: int, gid: int, home: str) -> None:
    """Give up root for good: groups, then group, then user; HOME and USER follow."""
    os.initgroups(name, gid)
    os.setgid(gid)
    os.setuid(uid)
    os.environ.update({"HOME": home, "USER": name, "LOGNAME": name})
