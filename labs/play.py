"""A scenario on a lab: built with its fault, checked goal by goal, solved the way its author would."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from labs.lab import SECTOOL, Lab, Node, Result, Say
from labs.scenario import Answer, Goal, Scenario, Step
from labs.topology import SHOP
from sectool.errors import SectoolError

PATIENCE_S = 10.0  # for what comes true a moment later: events on record, a flow cut
ANSWERS = "answers.json"


def _silent(_: str) -> None:
    return


@dataclass(frozen=True, slots=True)
class Outcome:
    """A goal, whether it is reached, and what was found."""

    goal: Goal
    reached: bool
    found: str


class Play:
    """One scenario and its lab."""

    def __init__(self, scenario: Scenario, name: str = "") -> None:
        self.scenario = scenario
        hosts = tuple(host for host in SHOP.hosts if host.name in scenario.hosts)
        policies = SHOP.policies if scenario.policy else ()
        domains = {host.enforcer.trust_domain for host in hosts if host.enforcer}
        policies = tuple(p for p in policies if p[0] in domains)
        short = "sc" + sha256(scenario.name.encode()).hexdigest()[:8]
        self.lab = Lab(name or short, replace(SHOP, hosts=hosts, policies=policies))

    def start(self, say: Say = _silent, *, temporary: bool = False) -> None:
        """Build the hosts and put the fault in. Leaves nothing behind when it fails."""
        self.lab.up(say, temporary=temporary)
        try:
            for node in self.lab.nodes.values():
                (node.folder / "work").mkdir()
            for host, files in self.scenario.files.items():
                for name, text in files.items():
                    (self.lab[host].folder / "work" / name).write_text(self._filled(text, self.lab[host]))
            self.do(self.scenario.setup)
        except BaseException:
            self.lab.down()
            raise

    def stop(self) -> None:
        """Take the hosts down."""
        self.lab.down()

    def solve(self, say: Say = _silent) -> None:
        """Do what the author would, telling each command."""
        self.do(self.scenario.solution, say)

    def do(self, steps: Iterable[Step | Answer], say: Say = _silent) -> None:
        """Take these steps; SectoolError at the first whose exit code is not what it should be."""
        for step in steps:
            if isinstance(step, Answer):
                say(f"answer: {step.question}: {step.text}")
                self.answer(step.question, step.text)
                continue
            node = self.lab[step.on]
            command = self._filled(step.run, node)
            who = f" as {','.join(step.labels)}" if step.labels else ""
            say(f"{step.on}{who}$ {command}")
            argv = self._argv(node, command, step.labels)
            if step.background:
                node.popen(argv, out=subprocess.DEVNULL)
                continue
            done = node.execute(argv, timeout=60.0)
            if step.exit is not None and done.exit != step.exit:
                raise SectoolError(
                    f"on {step.on}: `{command}`: exit {done.exit}: {(done.err or done.out).strip()}"
                )

    def answer(self, question: str, text: str) -> None:
        """Keep what the learner says to a question. SectoolError when no goal asks it."""
        asked = [goal.answer for goal in self.scenario.goals if goal.answer]
        if question not in asked:
            raise SectoolError(f"nobody asks for {question!r}", f"asked for: {', '.join(asked) or 'nothing'}")
        answers = self._answers()
        answers[question] = text
        (self.lab.folder / ANSWERS).write_text(json.dumps(answers))

    def _answers(self) -> dict[str, str]:
        try:
            return dict(json.loads((self.lab.folder / ANSWERS).read_text()))
        except (OSError, ValueError):
            return {}

    def check(self, patience_s: float = PATIENCE_S) -> list[Outcome]:
        """Look at every goal; one that is not reached is looked at again until `patience_s` seconds are over."""
        end = time.monotonic() + patience_s
        outcomes = [self._look(goal) for goal in self.scenario.goals]
        while not all(o.reached for o in outcomes) and time.monotonic() < end:
            time.sleep(0.2)
            outcomes = [o if o.reached else self._look(o.goal) for o in outcomes]
        return outcomes

    def _look(self, goal: Goal) -> Outcome:
        if goal.answer:
            said = self._answers().get(goal.answer)
            right = said is not None and _same(said, goal.expected)
            return Outcome(goal, right, "not answered yet" if said is None else f"answered: {said}")
        node = self.lab[goal.on]
        if goal.sql:
            return self._query(goal, node)
        done = node.execute(self._argv(node, self._filled(goal.run, node), goal.labels), timeout=20.0)
        said = done.out + done.err
        reached = done.exit == goal.exit and goal.shows in said and not (goal.hides and goal.hides in said)
        return Outcome(goal, reached, _shown(done))

    def _query(self, goal: Goal, node: Node) -> Outcome:
        try:
            rows = node.json("query", goal.sql)["items"]
        except SectoolError as error:
            return Outcome(goal, False, error.message)
        value = "" if not rows else str(next(iter(rows[0].values())))
        return Outcome(goal, value == goal.expected, f"it is {value or 'nothing'}")

    @staticmethod
    def _argv(node: Node, command: str, labels: tuple[str, ...]) -> list[str]:
        # `sectool` in a command is the one that runs the lab, whatever else is installed on the machine.
        shell = ["sh", "-c", f"PATH={Path(SECTOOL).parent}:$PATH; {command}"]
        return node.workload(labels, shell) if labels else shell

    def _filled(self, text: str, node: Node) -> str:
        text = text.replace("{work}", str(node.folder / "work"))
        for name, other in self.lab.nodes.items():
            text = text.replace(f"{{{name}}}", other.host.ip4)
        return text


def _same(said: str, expected: str) -> bool:
    def plain(text: str) -> str:
        return " ".join(text.lower().split())

    return plain(said) in [plain(form) for form in expected.split("|")]


def _shown(done: Result) -> str:
    lines = (done.out + done.err).strip().splitlines()
    return f"exit {done.exit}: {lines[-1][:120] if lines else 'no output'}"
