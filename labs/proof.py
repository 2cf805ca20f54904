"""That a scenario is one: missed before anything is done, and reached by its own solution."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass

from labs.play import Play
from labs.scenario import load
from labs.spaces import Spaces
from sectool.errors import SectoolError


@dataclass(frozen=True, slots=True)
class Proof:
    """What is wrong with a scenario, if anything, and what it took to find out: by the clock, and of processors."""

    name: str
    wrong: tuple[str, ...]
    seconds: float
    processor_s: float


def longest_first(names: Iterable[str]) -> list[str]:
    """An order in which several at once are done soonest: those with the most hosts and steps first."""

    def size(name: str) -> int:
        one = load(name)
        return 5 * len(one.hosts) + len(one.setup) + len(one.solution) + len(one.goals)

    return sorted(names, key=lambda name: (-size(name), name))


def prove(name: str, *, solved: bool, unsolved: bool) -> Proof:
    """Play it on namespaces of its own, and take these down again."""
    scenario = load(name)
    spaces = Spaces(f"sc{secrets.token_hex(4)}", scenario.hosts, scenario.bare)
    play = Play(scenario, spaces)
    begin, used = time.monotonic(), 0.0
    wrong: list[str] = []
    try:
        play.start(temporary=True)
        if unsolved and play.missed() is None:
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
        used = spaces.processor_s()
        play.stop()
    return Proof(name, tuple(wrong), time.monotonic() - begin, used)
