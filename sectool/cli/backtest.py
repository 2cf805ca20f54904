"""`sectool policy backtest`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sectool.cli.context import Session, session
from sectool.cli.moments import moment_us, show_time
from sectool.cli.output import Column, Format, emit
from sectool.errors import Exit, SectoolError, UsageError

if TYPE_CHECKING:
    from sectool.policy.model import WorkloadDoc
    from store.backtest import Outcome
    from store.situations import History

SCHEMA = "sectool.policy-backtest/1"

Output = Annotated[Format, typer.Option("--output", "-o", help="Format of the data on stdout.")]
Since = Annotated[
    str | None, typer.Option("--since", metavar="TIME", help="Flows from then on (24h, or a timestamp).")
]
Until = Annotated[str | None, typer.Option("--until", metavar="TIME", help="Flows before that time.")]
Store = Annotated[
    Path | None,
    typer.Option(
        "--store",
        metavar="DIR",
        help="A state folder, case bundle or folder of segments [default: this host's].",
    ),
]


def backtest(
    ctx: typer.Context,
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="The candidate: policy files, or folders of *.yaml."),
    ],
    since: Since = None,
    until: Until = None,
    store: Store = None,
    staged: Annotated[
        bool, typer.Option("--staged", help="Judge as if staged documents were enforced.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 for any difference.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """What these files, as the whole policy, would have made of the recorded flows.

    Each recorded flow that policy decided on this host is judged again, as of its time, by the code that enforces.
    Changes are grouped, the worst first. Flows that were refused for other reasons (a bad credential, the other end)
    stay as they are and are counted. Needs no daemon; with --store the history of another host.

    Exits 1 when flows that were let through would be denied or lose their encryption, 4 when part of the history
    could not be read.

    \b
    Examples:
      sectool policy backtest shop.yaml --since 7d
      sectool policy backtest policies/ --store /backup/events -o json
      sectool policy backtest suggested.yaml --staged --strict
    """
    from sectool.policy import load
    from sectool.policy.testing import as_if_enforced
    from store.backtest import backtest as judge
    from store.situations import Window

    at = session(ctx)
    candidate = load(files)
    if staged:
        candidate = as_if_enforced(candidate)
    window = Window(moment_us(since) if since else None, moment_us(until) if until else None)
    with opened(at, store) as history, progress_bar(at, "judging history") as progress:
        outcome = judge(history, candidate, window, before=_labelled_by(at, store), progress=progress)
    if output in (Format.TABLE, Format.WIDE):
        _table(at, outcome, output)
    else:
        emit(rows(outcome), (), output, SCHEMA, extra=summary(outcome))
    for warning in outcome.warnings:
        at.warn(warning)
    if outcome.regressions or (strict and outcome.changes):
        raise typer.Exit(int(Exit.DENIED))
    if outcome.warnings:
        raise typer.Exit(int(Exit.PARTIAL))


def _segments(store: Path) -> Path:
    """The folder of segments in a state folder or a bundle, or that folder itself.

    A folder without any is refused: a back-test of nothing finds nothing, and would pass for a green one.
    """
    folder = store / "events" if (store / "events").is_dir() else store
    if folder.is_dir() and not any(folder.glob("flows-*")):
        raise UsageError(
            f"there are no segments in {folder}",
            hint="name a state folder, a case bundle, or the folder with flows-*.duckdb or flows-*.parquet",
        )
    return folder


@contextmanager
def opened(at: Session, store: Path | None) -> Iterator[History]:
    """The history in `store`, or this host's. Raises UsageError when no segment is in `store`."""
    from store.situations import open_history

    history = open_history(
        _segments(store) if store else at.paths.events, None if store else at.paths.events_socket
    )
    try:
        yield history
    finally:
        history.close()


@contextmanager
def progress_bar(at: Session, what: str) -> Iterator[Callable[[float], None] | None]:
    """A bar on stderr while `what` takes longer than a second; None when nobody looks."""
    if at.quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True, no_color=not at.color),
        transient=True,
    )
    task = bar.add_task(what, total=1.0)
    with bar:
        yield lambda done: bar.update(task, completed=done)


def _labelled_by(at: Session, store: Path | None) -> tuple[WorkloadDoc, ...] | None:
    """The Workload documents in force on this host; None when they are not to be had."""
    from sectool.cli.revisions import in_force

    if store is not None:
        return None
    try:
        return in_force(at)[1].workloads
    except SectoolError:
        return None


def rows(outcome: Outcome) -> list[dict[str, Any]]:
    """Changes as rows of the versioned output."""
    return [
        {
            **asdict(change),
            "kind": str(change.kind).replace(" ", "_"),
            "first": show_time(change.first, precise=True),
            "last": show_time(change.last, precise=True),
        }
        for change in outcome.changes
    ]


def summary(outcome: Outcome) -> dict[str, Any]:
    """What stands beside the changes."""
    from store.backtest import Kind

    return {
        "flows": outcome.flows,
        "judged": outcome.judged,
        "situations": outcome.situations,
        "not_judged": dict(outcome.unjudged),
        "relabelled": outcome.relabelled,
        "lost_events": outcome.lost,
        "first": show_time(outcome.first, precise=True),
        "last": show_time(outcome.last, precise=True),
        "regressions": outcome.regressions,
        "changed": {str(kind).replace(" ", "_"): outcome.count(kind) for kind in Kind},
        "warnings": list(outcome.warnings),
    }


def _table(at: Session, outcome: Outcome, output: Format) -> None:
    from store.backtest import REGRESSIONS

    columns = [
        Column("CHANGE", lambda r: r["kind"].replace("_", " "), lambda r: r["style"]),
        Column("FLOWS", lambda r: r["flows"], right=True),
        Column("FROM", lambda r: r["source"]),
        Column("TO", lambda r: r["destination"]),
        Column("SERVICE", lambda r: r["service"]),
        Column("DECIDES NOW", lambda r: r["now"]),
        Column("DECIDED THEN", lambda r: r["was"], wide=True),
        Column("FIRST", lambda r: r["first"], wide=True),
        Column("LAST", lambda r: r["last"]),
        Column("EXAMPLE", lambda r: r["example"], wide=True),
    ]
    shown = [
        {**row, "style": "bad" if change.kind in REGRESSIONS else "warn"}
        for row, change in zip(rows(outcome), outcome.changes, strict=True)
    ]
    if shown:
        emit(shown, columns, output, SCHEMA, color=at.color)
    if not outcome.flows:
        at.say("there are no flows in this window")
        return
    at.say(
        f"{outcome.flows} flows from {show_time(outcome.first)} to {show_time(outcome.last)}: "
        f"{outcome.judged} judged, {sum(c.flows for c in outcome.changes)} would change"
    )
    if outcome.unjudged:
        reasons = ", ".join(f"{count} {why.replace('_', ' ')}" for why, count in outcome.unjudged.items())
        at.say(f"policy has no say in {sum(outcome.unjudged.values())}: {reasons}")
    if outcome.relabelled:
        at.say(f"{outcome.relabelled} were judged by the labels that the Workload documents would give")
    if outcome.lost:
        at.warn(f"{outcome.lost} events of this time were lost; their flows are not in the history")
