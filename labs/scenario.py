"""Scenarios: what a learner is told, the hosts it plays on, the fault in them, and goals that code checks.

A scenario is a YAML file in labs/scenarios, read as strictly as policy: an unknown field is an error with its place.

    title, minutes, story, debrief   prose
    hosts                            names of the shop's hosts, and `ops`, where its root is kept (labs.topology)
    bare                             those of them that have no enforcer to begin with
    policy                           start with the shop's own policy (default: none, everything is denied)
    files                            host -> file name -> text, in the learner's folder there
    setup, solution                  steps: {host, run, as, exit, background}, {carry, from, to}: a file from one
                                     learner's folder to others, and in a solution {answer, text}
    goals                            {says, host, run, as, exit, shows, hides}, {says, host, sql, is}
                                     or {says, answer, is}
    hints                            the next one each time it is asked for: text, or {text, costs}

In all texts `{work}` is the learner's folder on the host (in prose: nothing, since that is where a learner's shell
begins), and `{web}`, `{db}` … are the hosts' IPv4 addresses. A scenario knows no more of where it is played: namespaces
and virtual machines serve the same file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from labs.topology import TRAINING
from sectool.errors import DocumentError, UsageError

FOLDER = Path(__file__).with_name("scenarios")
NAME = re.compile(r"[a-z0-9-]{1,40}")
FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,60}")
HINT_COSTS = 10  # points of 100


@dataclass(frozen=True, slots=True)
class Step:
    """Something that is done on a host: a shell command, as a workload if it has labels."""

    on: str
    run: str
    labels: tuple[str, ...] = ()
    exit: int | None = 0  # None: whatever it is
    background: bool = False


@dataclass(frozen=True, slots=True)
class Carry:
    """A file of one host's work folder that comes into those of others."""

    file: str
    source: str
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Hint:
    """What helps on, and the points it costs."""

    text: str
    costs: int = HINT_COSTS


@dataclass(frozen=True, slots=True)
class Answer:
    """What the learner says to a question of a goal."""

    question: str
    text: str


@dataclass(frozen=True, slots=True)
class Goal:
    """What must hold at the end. One of: a command and what comes of it, a query and its value, an answer."""

    says: str
    on: str = ""
    run: str = ""
    labels: tuple[str, ...] = ()
    exit: int = 0
    shows: str = ""
    hides: str = ""
    sql: str = ""
    answer: str = ""
    expected: str = ""  # of a query or an answer; several forms of an answer are divided by |


@dataclass(frozen=True, slots=True)
class Scenario:
    """One scenario, as its file says."""

    name: str
    title: str
    minutes: int
    story: str
    hosts: tuple[str, ...]
    bare: tuple[str, ...]
    policy: bool
    files: Mapping[str, Mapping[str, str]]
    setup: tuple[Step | Carry, ...]
    goals: tuple[Goal, ...]
    hints: tuple[Hint, ...]
    solution: tuple[Step | Carry | Answer, ...]
    debrief: str


def names() -> list[str]:
    """All scenarios, in the order in which they teach."""
    return sorted((path.stem for path in FOLDER.glob("*.yaml")), key=lambda name: (load(name).minutes, name))


def load(name: str) -> Scenario:
    """The scenario of that name. UsageError if there is none, DocumentError with the place of a mistake."""
    path = FOLDER / f"{name}.yaml"
    if not NAME.fullmatch(name) or not path.is_file():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise UsageError(f"there is no scenario {name!r}", f"there are: {known}")
    return parse(path.read_text(encoding="utf-8"), name)


def parse(text: str, name: str) -> Scenario:
    """A scenario's text. DocumentError with file:line:column."""
    where = f"{name}.yaml"
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        raise DocumentError(
            at, f"not YAML: {getattr(error, 'problem', error)}", "see labs/scenarios for examples"
        ) from None
    read = _Reader(where, root)
    top = read.mapping(value, (), _FIELDS, required=_FIELDS - {"bare", "policy", "files", "setup", "hints"})
    hosts = tuple(read.texts(top["hosts"], ("hosts",)))
    known = {host.name for host in TRAINING}
    for number, host in enumerate(hosts):
        if host not in known:
            raise read.error(
                ("hosts", number), f"there is no host {host!r}; there are {', '.join(sorted(known))}"
            )
    read.hosts = frozenset(hosts)
    return Scenario(
        name,
        read.text(top["title"], ("title",)),
        read.number(top["minutes"], ("minutes",)),
        read.text(top["story"], ("story",)),
        hosts,
        tuple(read.all(top.get("bare", []), ("bare",), read.host)),
        read.flag(top.get("policy", False), ("policy",)),
        read.files(top.get("files", {}), ("files",)),
        tuple(read.all(top.get("setup", []), ("setup",), read.step)),
        tuple(read.all(top["goals"], ("goals",), read.goal)),
        tuple(read.all(top.get("hints", []), ("hints",), read.hint)),
        tuple(read.all(top["solution"], ("solution",), read.step_or_answer)),
        read.text(top["debrief"], ("debrief",)),
    )


_FIELDS = frozenset(
    (
        "title",
        "minutes",
        "story",
        "hosts",
        "bare",
        "policy",
        "files",
        "setup",
        "goals",
        "hints",
        "solution",
        "debrief",
    )
)
_STEP = frozenset(("host", "run", "as", "exit", "background"))
_CARRY = frozenset(("carry", "from", "to"))
_GOAL = frozenset(("says", "host", "run", "as", "exit", "shows", "hides", "sql", "answer", "is"))

At = tuple[str | int, ...]


class _Reader:
    """Checks values and knows where they stand."""

    def __init__(self, where: str, root: Any) -> None:
        self._where, self._root = where, root
        self.hosts: frozenset[str] = frozenset()

    def error(self, at: At, message: str) -> DocumentError:
        """An error at the nearest place of the document that exists."""
        node = self._root
        for part in at:
            found = None
            if isinstance(node, yaml.MappingNode):
                found = next((v for k, v in node.value if k.value == part), None)
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
                found = node.value[part]
            if found is None:
                break
            node = found
        mark = node.start_mark if node is not None else None
        return DocumentError(
            f"{self._where}:{mark.line + 1}:{mark.column + 1}" if mark else self._where,
            message,
            "docs/lab.md says how a scenario is written",
        )

    def mapping(
        self, value: Any, at: At, fields: frozenset[str], required: frozenset[str] = frozenset()
    ) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.error(at, "expected fields and their values")
        if unknown := [key for key in value if key not in fields]:
            raise self.error(
                (*at, unknown[0]), f"unknown field {unknown[0]!r}; there are {', '.join(sorted(fields))}"
            )
        if missing := sorted(required - set(value)):
            raise self.error(at, f"missing: {', '.join(missing)}")
        return dict(value)

    def text(self, value: Any, at: At) -> str:
        if not isinstance(value, str) or not value.strip():
            raise self.error(at, "expected text")
        return value.strip()

    def texts(self, value: Any, at: At) -> list[str]:
        if not isinstance(value, list):
            raise self.error(at, "expected a list")
        return [self.text(one, (*at, number)) for number, one in enumerate(value)]

    def all(self, value: Any, at: At, read: Callable[[Any, At], Any]) -> list[Any]:
        if not isinstance(value, list):
            raise self.error(at, "expected a list")
        return [read(one, (*at, number)) for number, one in enumerate(value)]

    def number(self, value: Any, at: At) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.error(at, "expected a number")
        return value

    def flag(self, value: Any, at: At) -> bool:
        if not isinstance(value, bool):
            raise self.error(at, "expected true or false")
        return value

    def host(self, value: Any, at: At) -> str:
        host = self.text(value, at)
        if host not in self.hosts:
            raise self.error(at, f"{host!r} is not among this scenario's hosts")
        return host

    def file(self, value: Any, at: At) -> str:
        name = self.text(value, at)
        if not FILE.fullmatch(name):
            raise self.error(at, f"{name!r} is no name of a file in the work folder")
        return name

    def files(self, value: Any, at: At) -> dict[str, dict[str, str]]:
        if not isinstance(value, dict):
            raise self.error(at, "expected hosts and their files")
        found: dict[str, dict[str, str]] = {}
        for host, texts in value.items():
            here = (*at, host)
            if not isinstance(texts, dict):
                raise self.error(here, "expected names of files and their texts")
            found[self.host(host, here)] = {
                self.file(name, here): self.text(text, (*here, name)) + "\n" for name, text in texts.items()
            }
        return found

    def hint(self, value: Any, at: At) -> Hint:
        if isinstance(value, str):
            return Hint(self.text(value, at))
        fields = self.mapping(value, at, frozenset(("text", "costs")), frozenset(("text",)))
        costs = self.number(fields.get("costs", HINT_COSTS), (*at, "costs"))
        return Hint(self.text(fields["text"], (*at, "text")), costs)

    def step(self, value: Any, at: At) -> Step | Carry:
        if isinstance(value, dict) and "carry" in value:
            fields = self.mapping(value, at, _CARRY, _CARRY)
            targets = self.all(fields["to"], (*at, "to"), self.host)
            return Carry(
                self.file(fields["carry"], (*at, "carry")),
                self.host(fields["from"], (*at, "from")),
                tuple(targets),
            )
        fields = self.mapping(value, at, _STEP, frozenset(("host", "run")))
        wanted = fields.get("exit", 0)
        return Step(
            self.host(fields["host"], (*at, "host")),
            self.text(fields["run"], (*at, "run")),
            tuple(self.texts(fields.get("as", []), (*at, "as"))),
            None if wanted is None else self.number(wanted, (*at, "exit")),
            self.flag(fields.get("background", False), (*at, "background")),
        )

    def step_or_answer(self, value: Any, at: At) -> Step | Carry | Answer:
        if isinstance(value, dict) and "answer" in value:
            fields = self.mapping(value, at, frozenset(("answer", "text")), frozenset(("answer", "text")))
            return Answer(self.text(fields["answer"], at), self.text(str(fields["text"]), at))
        return self.step(value, at)

    def goal(self, value: Any, at: At) -> Goal:
        fields = self.mapping(value, at, _GOAL, frozenset(("says",)))
        kinds = [kind for kind in ("run", "sql", "answer") if kind in fields]
        if len(kinds) != 1:
            raise self.error(at, "a goal has exactly one of run, sql and answer")
        if kinds[0] != "answer":
            self.host(fields.get("host"), (*at, "host"))
        if kinds[0] != "run" and "is" not in fields:
            raise self.error(at, f"a goal with {kinds[0]} says what it `is`")
        return Goal(
            self.text(fields["says"], (*at, "says")),
            str(fields.get("host", "")),
            str(fields.get("run", "")),
            tuple(self.texts(fields.get("as", []), (*at, "as"))),
            self.number(fields.get("exit", 0), (*at, "exit")),
            str(fields.get("shows", "")),
            str(fields.get("hides", "")),
            str(fields.get("sql", "")),
            str(fields.get("answer", "")),
            str(fields.get("is", "")),
        )
