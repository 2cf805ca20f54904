"""`sectool lab scenario`: learn by putting things right on hosts made of network namespaces."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from labs.play import Play

app = typer.Typer(
    rich_markup_mode=None, no_args_is_help=True, help="Learn by putting things right, scenario by scenario."
)

Name = Annotated[str, typer.Argument(metavar="SCENARIO", help="Its name; `scenario list` shows them.")]


@app.callback()
def scenario() -> None:
    """Learn by putting things right: each scenario builds hosts, tells a story, and checks what you reach.

    \b
    Examples:
      sectool lab scenario list
      sudo sectool lab scenario run the-0200-page
      sudo sectool lab scenario check the-0200-page
      sudo sectool lab scenario hint the-0200-page
      sudo sectool lab scenario stop the-0200-page
    """


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


@app.command(name="list")
def list_() -> None:
    """List the scenarios with your progress. Points: 100, less 10 for each hint; none with the solution shown.

    \b
    Example:
      sectool lab scenario list
    """
    from labs import progress, scenario

    have = progress.load()
    sys.stdout.write(f"{'SCENARIO':28}{'MINUTES':>7}  {'REACHED':9}{'BEST':>4}  TITLE\n")
    for name in scenario.names():
        one, mine = scenario.load(name), have.get(name, progress.Progress())
        reached = f"{mine.reached}/{mine.goals}" if mine.goals else "-"
        best = "-" if mine.best is None else str(mine.best)
        sys.stdout.write(f"{name:28}{one.minutes:>7}  {reached:9}{best:>4}  {one.title}\n")


@app.command()
def run(name: Name) -> None:
    """Build the scenario's hosts, put the fault in, and tell the story.

    Begins afresh when it is running already: an instructor's reset.

    \b
    Example:
      sudo sectool lab scenario run first-policy
    """
    from labs import progress
    from labs.play import Play
    from labs.scenario import load

    play = Play(load(name))
    if play.lab.exists():
        _say("running already: beginning afresh")
        play.stop()
    play.start(_say)
    progress.save(name, progress.load().get(name, progress.Progress()).again())
    _tell(play.scenario.title, play.scenario.story)
    out = sys.stdout
    out.write("\nGoals\n")
    for number, goal in enumerate(play.scenario.goals, 1):
        out.write(f"  {number}. {goal.says}\n")
        if goal.answer:
            out.write(f"     answer with: sectool lab scenario answer {name} {goal.answer} TEXT\n")
    hosts = ", ".join(f"{node.name} {node.host.ip4}" for node in play.lab.nodes.values())
    out.write(f"\nHosts: {hosts}\n")
    out.write(f"Work on one:  sudo sectool lab exec --name {play.lab.name} HOST -- bash\n")
    first = next(iter(play.lab.nodes.values()))
    out.write(f"Your files:   {first.folder.parent}/HOST/work\n")
    out.write(f"Then:         sudo sectool lab scenario check {name}\n")


def _tell(title: str, text: str) -> None:
    sys.stdout.write(f"\n{title}\n{'=' * len(title)}\n{text}\n")


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
    at_once: Annotated[int, typer.Option("--jobs", help="With --all: so many at once.")] = 2,
) -> None:
    """See which goals are reached. Exit 0 when all are, 1 when some are not.

    \b
    Examples:
      sudo sectool lab scenario check first-policy
      sudo sectool lab scenario check --all --solved --unsolved
    """
    from labs import progress, scenario
    from sectool.errors import UsageError

    if everything != (not name) or (not everything and (solved or unsolved)):
        raise UsageError("name one scenario, or ask for --all", "sectool lab scenario list")
    if everything:
        if not (solved or unsolved):
            raise UsageError("--all wants --solved, --unsolved or both")
        with ThreadPoolExecutor(max(1, at_once)) as pool:
            waiting = {one: pool.submit(prove, one, solved, unsolved) for one in scenario.names()}
            wrong = [line for future in waiting.values() for line in future.result()]
        for line in wrong:
            sys.stdout.write(line + "\n")
        sys.stdout.write(f"{len(waiting)} scenarios, {len(wrong)} complaints\n")
        raise typer.Exit(1 if wrong else 0)
    play = _running(name)
    outcomes = play.check()
    for number, outcome in enumerate(outcomes, 1):
        sign = "reached" if outcome.reached else "missing"
        sys.stdout.write(f"{sign}  {number}. {outcome.goal.says}\n")
        if not outcome.reached:
            sys.stdout.write(f"         {outcome.found}\n")
    reached = sum(outcome.reached for outcome in outcomes)
    mine = progress.load().get(name, progress.Progress()).checked(reached, len(outcomes))
    progress.save(name, mine)
    if reached < len(outcomes):
        sys.stdout.write(f"{reached} of {len(outcomes)} goals\n")
        raise typer.Exit(1)
    _tell("What to take with you", play.scenario.debrief)
    sys.stdout.write(
        f"\nAll {len(outcomes)} goals, {mine.score} points. To end: sectool lab scenario stop {name}\n"
    )


def prove(name: str, solved: bool, unsolved: bool) -> list[str]:
    """What is wrong with a scenario: reached without doing anything, or not reached by its own solution."""
    import secrets

    from labs.play import Play
    from labs.scenario import load
    from sectool.errors import SectoolError

    play = Play(load(name), f"sc{secrets.token_hex(4)}")
    wrong = []
    try:
        play.start(temporary=True)
        if unsolved and all(outcome.reached for outcome in play.check(patience_s=0)):
            wrong.append(f"{name}: every goal is reached before anything is done")
        if solved:
            play.solve()
            wrong += [
                f"{name}: its solution does not reach: {o.goal.says} ({o.found})"
                for o in play.check()
                if not o.reached
            ]
    except SectoolError as error:
        wrong.append(f"{name}: {error.message}")
    finally:
        play.stop()
    return wrong


def _running(name: str) -> Play:
    from labs.play import Play
    from labs.scenario import load
    from sectool.errors import SectoolError

    play = Play(load(name))
    if not play.lab.exists():
        raise SectoolError(
            f"scenario {name} is not running", f"start it: sudo sectool lab scenario run {name}"
        )
    return play


@app.command()
def answer(
    name: Name,
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="As the goal calls it.")],
    text: Annotated[str, typer.Argument(metavar="TEXT", help="What you found out.")],
) -> None:
    """Answer a question that a goal asks.

    \b
    Example:
      sudo sectool lab scenario answer the-0200-page rule 'deny zone=front to call zone=back'
    """
    _running(name).answer(question, text)


@app.command()
def hint(name: Name) -> None:
    """Show the next hint. It costs 10 points.

    \b
    Example:
      sectool lab scenario hint first-policy
    """
    from dataclasses import replace

    from labs import progress
    from labs.scenario import load

    one = load(name)
    mine = progress.load().get(name, progress.Progress())
    for text in one.hints[: mine.hints + 1]:
        sys.stdout.write(f"- {text}\n")
    if mine.hints >= len(one.hints):
        _say("there are no more hints; sectool lab scenario solve shows the way")
    else:
        progress.save(name, replace(mine, hints=mine.hints + 1))


@app.command()
def solve(name: Name) -> None:
    """Have it solved before your eyes, command by command. You score nothing then.

    \b
    Example:
      sudo sectool lab scenario solve first-policy
    """
    from dataclasses import replace

    from labs import progress

    play = _running(name)
    progress.save(name, replace(progress.load().get(name, progress.Progress()), solution_seen=True))
    play.solve(_say)


@app.command()
def stop(name: Name) -> None:
    """Take the scenario's hosts down. Nothing of them stays.

    \b
    Example:
      sudo sectool lab scenario stop first-policy
    """
    _running(name).stop()
