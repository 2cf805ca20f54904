"""`sectool lab scenario`: learn by putting things right on hosts made of network namespaces, or on machines."""

from __future__ import annotations

import os
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sectool.cli.output import Format

if TYPE_CHECKING:
    from labs.play import Play

app = typer.Typer(
    rich_markup_mode=None, no_args_is_help=True, help="Learn by putting things right, scenario by scenario."
)

Name = Annotated[str, typer.Argument(metavar="SCENARIO", help="Its name; `scenario list` shows them.")]
On = Annotated[
    Path | None,
    typer.Option(
        "--machines",
        metavar="FILE",
        envvar="SECTOOL_MACHINES",
        help="Play on the machines of this ssh configuration, instead of namespaces (vagrant ssh-config > FILE).",
    ),
]


@app.callback()
def scenario() -> None:
    """Learn by putting things right: each scenario builds hosts, tells a story, and checks what you reach.

    \b
    Examples:
      sectool lab scenario list
      sudo sectool lab scenario run the-0200-page
      sudo sectool lab scenario check the-0200-page
      sectool lab scenario hint the-0200-page
      sudo sectool lab scenario stop the-0200-page
    """


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


@app.command(name="list")
def list_(
    output: Annotated[
        Format, typer.Option("--output", "-o", help="Format of the data on stdout.")
    ] = Format.TABLE,
) -> None:
    """List the scenarios with your progress and score.

    A scenario is worth 100 points, less what its hints cost (10 each, as a rule), and none with the solution shown.
    Your best try counts.

    \b
    Examples:
      sectool lab scenario list
      sectool lab scenario list -o json
    """
    from labs import progress, scenario
    from sectool.cli.output import Column, emit

    have = progress.load()
    rows = []
    for name in scenario.names():
        one, mine = scenario.load(name), have.get(name, progress.Progress())
        rows.append(
            {
                "name": name,
                "title": one.title,
                "minutes": one.minutes,
                "reached": mine.reached,
                "goals": len(one.goals),
                "hints": mine.hints,
                "best": mine.best,
            }
        )
    solved = [row["best"] for row in rows if isinstance(row["best"], int)]
    columns = [
        Column("SCENARIO", lambda r: r["name"]),
        Column("MINUTES", lambda r: r["minutes"], right=True),
        Column("GOALS", lambda r: f"{r['reached']}/{r['goals']}", right=True),
        Column("HINTS", lambda r: r["hints"] or "-", right=True),
        Column("BEST", lambda r: "-" if r["best"] is None else r["best"], right=True),
        Column("TITLE", lambda r: r["title"]),
    ]
    score = {"score": sum(solved), "solved": len(solved), "possible": 100 * len(rows)}
    emit(rows, columns, output, "sectool.scenario/1", extra=score)
    if output in (Format.TABLE, Format.WIDE):
        _say(f"{len(solved)} of {len(rows)} solved, {sum(solved)} of {100 * len(rows)} points")


@app.command()
def run(name: Name, machines: On = None) -> None:
    """Build the scenario's hosts, put the fault in, and tell the story. Begins afresh when it is running already.

    \b
    Examples:
      sudo sectool lab scenario run first-policy
      sectool lab scenario run first-policy --machines ssh.conf
    """
    from labs import progress

    play = _play(name, machines)
    if machines is None:
        _root()
    if play.runner.exists():
        _say("running already: beginning afresh")
        play.stop()
    play.start(_say)
    progress.save(name, progress.load().get(name, progress.Progress()).again())
    _tell(play.scenario.title, play.scenario.story, play)
    out = sys.stdout
    out.write("\nGoals\n")
    for number, goal in enumerate(play.scenario.goals, 1):
        out.write(_item(f"  {number}. ", play.filled(goal.says, "")) + "\n")
        if goal.answer:
            out.write(f"     answer with: {_again('answer', name, machines)} {goal.answer} TEXT\n")
    out.write("\nHosts\n")
    for host, address in play.runner.addresses.items():
        out.write(f"  {host:6}{address:12}{play.runner.way_in(host)}\n")
    folders = sorted({play.runner.work(host) for host in play.runner.addresses})
    out.write(f"A shell begins in your folder on that host. {_folders(folders)}\n")
    out.write(f"\nThen: {_again('check', name, machines)}     Stuck: {_again('hint', name, None)}\n")


def _folders(folders: list[str]) -> str:
    if len(folders) == 1:
        return f"It is {folders[0]} everywhere: carry files with scp."
    return "From here they are:\n" + "\n".join(f"  {folder}" for folder in folders)


def _again(command: str, name: str, machines: Path | None) -> str:
    if machines is not None:
        return f"sectool lab scenario {command} --machines {machines} {name}"
    return f"{'' if command == 'hint' else 'sudo '}sectool lab scenario {command} {name}"


def _tell(title: str, text: str, play: Play) -> None:
    sys.stdout.write(f"\n{title}\n{'=' * len(title)}\n{_prose(play.filled(text, ''))}\n")


def _prose(text: str) -> str:
    """Paragraphs as wide as people read; one with indented lines (commands) stays as it is."""
    out = []
    for paragraph in text.split("\n\n"):
        lines = paragraph.splitlines()
        commands = any(line.startswith(" ") for line in lines)
        out.append(paragraph if commands else _item("", " ".join(lines)))
    return "\n\n".join(out)


def _item(lead: str, text: str) -> str:
    """One paragraph behind a lead, its further lines below its first."""
    beside = " " * len(lead)
    return textwrap.fill(
        text,
        100,
        initial_indent=lead,
        subsequent_indent=beside,
        break_long_words=False,
        break_on_hyphens=False,
    )


@app.command()
def check(
    name: Annotated[str, typer.Argument(metavar="SCENARIO", help="Its name; none with --all.")] = "",
    everything: Annotated[
        bool, typer.Option("--all", help="Every scenario, on hosts of its own: what its authors run.")
    ] = False,
    solved: Annotated[
        bool, typer.Option("--solved", help="With --all: solve first; all goals must be reached.")
    ] = False,
    unsolved: Annotated[
        bool, typer.Option("--unsolved", help="With --all: some goal must be missed before anything is done.")
    ] = False,
    at_once: Annotated[int, typer.Option("--jobs", min=1, help="With --all: so many at once.")] = 3,
    machines: On = None,
) -> None:
    """See which goals are reached. Exit 0 when all are, 1 when some are not.

    \b
    Examples:
      sudo sectool lab scenario check first-policy
      sudo sectool lab scenario check --all --solved --unsolved
    """
    from sectool.errors import UsageError

    if everything != (not name) or (not everything and (solved or unsolved)):
        raise UsageError("name one scenario, or ask for --all", "sectool lab scenario list")
    if everything:
        if not (solved or unsolved):
            raise UsageError("--all wants --solved, --unsolved or both")
        if machines is not None:
            raise UsageError("--all plays on namespaces", "leave --machines out, or name one scenario")
        _root()
        raise typer.Exit(_check_all(solved, unsolved, at_once))
    raise typer.Exit(_check(name, _running(name, machines), machines))


def _check_all(solved: bool, unsolved: bool, at_once: int) -> int:
    import time

    from labs import proof, scenario
    from labs.lab import sweep

    sweep(_say)
    begin = time.monotonic()
    wrong: list[str] = []
    names = proof.longest_first(scenario.names())
    with ThreadPoolExecutor(at_once) as pool:
        try:
            for done in pool.map(lambda name: proof.prove(name, solved=solved, unsolved=unsolved), names):
                said = "as it should be" if not done.wrong else "WRONG"
                _say(f"{done.name:26}{done.seconds:6.1f} s, {done.processor_s:5.1f} s of processor  {said}")
                wrong += done.wrong
        except BaseException:
            _say("ending: what is being played is taken down first")
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    for line in wrong:
        sys.stdout.write(line + "\n")
    took = time.monotonic() - begin
    sys.stdout.write(f"{len(names)} scenarios, {len(wrong)} complaints, {took:.0f} s\n")
    return 1 if wrong else 0


def _check(name: str, play: Play, machines: Path | None) -> int:
    from labs import progress

    outcomes = play.check()
    for number, outcome in enumerate(outcomes, 1):
        sign = "reached" if outcome.reached else "missing"
        sys.stdout.write(_item(f"{sign}  {number}. ", play.filled(outcome.goal.says, "")) + "\n")
        if not outcome.reached:
            sys.stdout.write(f"         {outcome.found}\n")
    reached = sum(outcome.reached for outcome in outcomes)
    mine = progress.load().get(name, progress.Progress()).checked(reached, len(outcomes))
    progress.save(name, mine)
    if reached < len(outcomes):
        sys.stdout.write(f"{reached} of {len(outcomes)} goals\n")
        return 1
    _tell("What to take with you", play.scenario.debrief, play)
    sys.stdout.write(
        f"\nAll {len(outcomes)} goals, {mine.score} points. To end: {_again('stop', name, machines)}\n"
    )
    return 0


def _play(name: str, machines: Path | None) -> Play:
    from labs import play
    from labs.scenario import load

    one = load(name)
    if machines is None:
        return play.on_spaces(one)
    from labs import progress
    from labs.machines import Machines

    memory = progress.file().with_name("machines") / name
    return play.Play(one, Machines(machines, memory, one.hosts, one.bare))


def _running(name: str, machines: Path | None) -> Play:
    from sectool.errors import SectoolError

    play = _play(name, machines)
    if not play.runner.exists():
        raise SectoolError(f"scenario {name} is not running", f"start it: {_again('run', name, machines)}")
    if machines is None:
        _root()
    return play


def _root() -> None:
    """Hosts of namespaces are root's. PrivilegeError for anybody else, before anything is tried or counted."""
    from sectool.errors import PrivilegeError

    if os.geteuid() != 0:
        raise PrivilegeError(
            "hosts made of network namespaces take root", "run it with sudo; list and hint work without"
        )


@app.command()
def answer(
    name: Name,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="As the goal calls it.")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What you found out.")],
    machines: On = None,
) -> None:
    """Answer a question that a goal asks. You may answer anew; whether it is right is said by `check`.

    \b
    Example:
      sudo sectool lab scenario answer the-0200-page owner security
    """
    _running(name, machines).answer(question, text)


@app.command()
def hint(name: Name) -> None:
    """Show the next hint, and those before. Each costs 10 points, as a rule.

    \b
    Example:
      sectool lab scenario hint first-policy
    """
    from labs import progress
    from labs.play import on_spaces
    from labs.scenario import load

    one = load(name)
    mine = progress.load().get(name, progress.Progress())
    for each in one.hints[: mine.hints + 1]:
        sys.stdout.write(_item("- ", on_spaces(one).filled(each.text, "")) + "\n")
    if mine.hints >= len(one.hints):
        _say("there are no more hints; sectool lab scenario solve shows the way")
        return
    mine = mine.hinted(one.hints[mine.hints].costs)
    progress.save(name, mine)
    left = len(one.hints) - mine.hints
    _say(f"{mine.score} points are left to win; {left or 'no'} more {'hint' if left == 1 else 'hints'}")


@app.command()
def solve(name: Name, machines: On = None) -> None:
    """Have it solved before your eyes, command by command. You score nothing then.

    \b
    Example:
      sudo sectool lab scenario solve first-policy
    """
    from dataclasses import replace

    from labs import progress

    play = _running(name, machines)
    progress.save(name, replace(progress.load().get(name, progress.Progress()), solution_seen=True))
    play.solve(_say)
    _say(f"now look at the goals: {_again('check', name, machines)}")


@app.command()
def stop(name: Name, machines: On = None) -> None:
    """Take the scenario's hosts down. Nothing of them stays, but your progress does.

    \b
    Example:
      sudo sectool lab scenario stop first-policy
    """
    _running(name, machines).stop()


@app.command()
def reset(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[SCENARIO]...", help="Which; none: all of them.")
    ] = None,
    machines: On = None,
) -> None:
    """For the next learner: take down what runs, and forget progress and score.

    \b
    Examples:
      sudo sectool lab scenario reset
      sudo sectool lab scenario reset first-policy the-0200-page
    """
    from labs import progress, scenario

    chosen = names or scenario.names()
    for play in [_play(name, machines) for name in chosen]:
        if play.runner.exists():
            if machines is None:
                _root()
            play.stop()
            _say(f"{play.scenario.name}: taken down")
    progress.forget(chosen)
    _say(f"progress of {len(chosen)} {'scenario' if len(chosen) == 1 else 'scenarios'} forgotten")
