"""A scenario being played: built with its fault, checked goal by goal, solved the way its author would."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256

from labs.lab import Result, Say
from labs.runner import Runner
from labs.scenario import Answer, Carry, Goal, Scenario, Step
from labs.spaces import Spaces
from sectool.errors import SectoolError

PATIENCE_S = 10.0  # for what comes true a moment later: events on record, a flow cut
ANSWERS = "answers.json"


def _silent(_: str) -> None:
    return


def lab_name(scenario: str) -> str:
    """The name of the lab on which a learner plays a scenario."""
    return "sc" + sha256(scenario.encode()).hexdigest()[:8]


def on_spaces(scenario: Scenario, name: str = "") -> Play:
    """A play on namespaces."""
    return Play(scenario, Spaces(name or lab_name(scenario.name), scenario.hosts, scenario.bare))


@dataclass(frozen=True, slots=True)
class Outcome:
    """A goal, whether it is reached, and what was found."""

    goal: Goal
    reached: bool
    found: str


class Play:
    """One scenario on its hosts."""

    def __init__(self, scenario: Scenario, runner: Runner) -> None:
        self.scenario = scenario
        self.runner = runner

    def start(self, say: Say = _silent, *, temporary: bool = False) -> None:
        """Build the hosts and put the fault in. Leaves nothing behind when it fails."""
        self.runner.build(say, policy=self.scenario.policy, temporary=temporary)
        try:
            for host, files in self.scenario.files.items():
                for name, text in files.items():
                    self.runner.write(host, name, self.filled(text, host).encode())
            if self.scenario.setup:
                say("what happened before you came: a moment")
            self.do(self.scenario.setup)
        except BaseException:
            self.runner.remove()
            raise

    def stop(self) -> None:
        """Take the hosts down."""
        self.runner.remove()

    def solve(self, say: Say = _silent) -> None:
        """Do what the author would, telling each command and what it says."""
        self.do(self.scenario.solution, say)

    def do(self, steps: Iterable[Step | Carry | Answer], say: Say = _silent) -> None:
        """Take these steps; SectoolError at the first whose exit code is not what it should be."""
        for step in steps:
            match step:
                case Answer():
                    text = self.filled(step.text, "")
                    say(f"answer: {step.question}: {text}")
                    self.answer(step.question, text)
                case Carry():
                    say(f"{step.source} -> {', '.join(step.targets)}: {step.file}")
                    data = self.runner.read(step.source, step.file)
                    for target in step.targets:
                        self.runner.write(target, step.file, data)
                case Step():
                    self._take(step, say)

    def _take(self, step: Step, say: Say) -> None:
        command = self.filled(step.run, step.on)
        who = f" as {','.join(step.labels)}" if step.labels else ""
        say(f"{step.on}{who}$ {command}")
        if step.background:
            self.runner.start(step.on, command, step.labels)
            return
        done = self.runner.run(step.on, command, step.labels)
        if step.exit is not None and done.exit != step.exit:
            raise SectoolError(
                f"on {step.on}: `{command}`: exit {done.exit}: {(done.err or done.out).strip()}"
            )
        if said := (done.out + done.err).rstrip():
            say("\n".join(f"    {line}" for line in said.splitlines()))

    def answer(self, question: str, text: str) -> None:
        """Keep what the learner says to a question. SectoolError when no goal asks it."""
        asked = [goal.answer for goal in self.scenario.goals if goal.answer]
        if question not in asked:
            raise SectoolError(f"nobody asks for {question!r}", f"asked for: {', '.join(asked) or 'nothing'}")
        answers = self._answers()
        answers[question] = text
        (self.runner.memory / ANSWERS).write_text(json.dumps(answers))

    def _answers(self) -> dict[str, str]:
        try:
            return dict(json.loads((self.runner.memory / ANSWERS).read_text()))
        except (OSError, ValueError):
            return {}

    def check(self, patience_s: float = PATIENCE_S) -> list[Outcome]:
        """Look at every goal; one that is not reached is looked at again until `patience_s` seconds are over.

        Answers do not change by waiting: they are looked at once.
        """
        end = time.monotonic() + patience_s
        outcomes = [self._look(goal) for goal in self.scenario.goals]
        while any(not o.reached and not o.goal.answer for o in outcomes) and time.monotonic() < end:
            time.sleep(0.2)
            outcomes = [o if o.reached or o.goal.answer else self._look(o.goal) for o in outcomes]
        return outcomes

    def missed(self) -> Outcome | None:
        """A goal that is not reached now, one that is more than a question if there is one; None when all are."""
        goals = sorted(self.scenario.goals, key=lambda goal: bool(goal.answer))
        return next((o for o in map(self._look, goals) if not o.reached), None)

    def _look(self, goal: Goal) -> Outcome:
        if goal.answer:
            said = self._answers().get(goal.answer)
            right = said is not None and _same(said, self.filled(goal.expected, ""))
            return Outcome(goal, right, "not answered yet" if said is None else f"answered: {said}")
        if goal.sql:
            return self._query(goal)
        done = self.runner.run(goal.on, self.filled(goal.run, goal.on), goal.labels, timeout=20.0)
        said = done.out + done.err
        reached = done.exit == goal.exit and goal.shows in said and not (goal.hides and goal.hides in said)
        return Outcome(goal, reached, _shown(done))

    def _query(self, goal: Goal) -> Outcome:
        sql = self.filled(goal.sql, goal.on).replace("'", "'\\''")
        done = self.runner.run(goal.on, f"sectool query '{sql}' -o json", timeout=30.0)
        if done.exit != 0:
            return Outcome(goal, False, _shown(done))
        rows = json.loads(done.out)["items"]
        value = "" if not rows else str(next(iter(rows[0].values())))
        return Outcome(goal, value == self.filled(goal.expected, goal.on), f"it is {value or 'nothing'}")

    def filled(self, text: str, host: str) -> str:
        """The text with the work folder of `host` and the addresses of all hosts in it.

        Without a host it is prose: who reads it is in the work folder, and files go by their names.
        """
        text = text.replace("{work}", self.runner.work(host)) if host else text.replace("{work}/", "")
        for name, address in self.runner.addresses.items():
            text = text.replace(f"{{{name}}}", address)
        return text


def _same(said: str, expected: str) -> bool:
    def plain(text: str) -> str:
        return " ".join(text.lower().split())

    return plain(said) in [plain(form) for form in expected.split("|")]


def _shown(done: Result) -> str:
    lines = (done.out + done.err).strip().splitlines()
    what = "did not end in time" if done.exit is None else f"exit {done.exit}"
    return f"{what}: {lines[-1][:120] if lines else 'no output'}"
