"""Scenario files are read strictly; progress and score; and every scenario can be missed and can be solved."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from labs import progress, scenario
from labs.progress import Progress
from labs.scenariocli import prove
from sectool.errors import DocumentError, UsageError

SMALL = """\
title: A title
minutes: 5
story: Once.
hosts: [web]
setup:
  - {host: web, run: "true"}
goals:
  - {says: it runs, host: web, run: "true"}
  - {says: who, answer: who, is: me|myself}
hints: [look]
solution:
  - {answer: who, text: me}
debrief: The end.
"""


def test_a_scenario_is_read_as_it_is_written() -> None:
    one = scenario.parse(SMALL, "small")
    assert (one.title, one.minutes, one.hosts, one.policy) == ("A title", 5, ("web",), False)
    assert [goal.answer for goal in one.goals] == ["", "who"]
    assert one.solution == (scenario.Answer("who", "me"),)


@pytest.mark.parametrize(
    ("old", "new", "words", "line"),
    [
        ("title: A title\n", "", "missing: title", 1),
        ("minutes: 5", "minuts: 5", "unknown field 'minuts'", 2),
        ("hosts: [web]", "hosts: [web, nowhere]", "there is no host 'nowhere'", 4),
        ('{host: web, run: "true"}', '{host: db, run: "true"}', "'db' is not among this scenario's hosts", 6),
        (
            'run: "true"}\n  - {says: who',
            'run: "true", sql: "select 1"}\n  - {says: who',
            "exactly one of",
            8,
        ),
        ("is: me|myself", "shows: me", "what it `is`", 9),
        ("hints: [look]", "hints: look", "expected a list", 10),
        ("story: Once.", "story: [", "not YAML", 5),
    ],
)
def test_mistakes_are_named_with_their_place(old: str, new: str, words: str, line: int) -> None:
    assert old in SMALL
    with pytest.raises(DocumentError) as caught:
        scenario.parse(SMALL.replace(old, new, 1), "small")
    assert words in caught.value.message
    assert caught.value.where.startswith(f"small.yaml:{line}:")


def test_there_is_no_other_scenario() -> None:
    with pytest.raises(UsageError) as caught:
        scenario.load("../../etc/passwd")
    assert "first-policy" in caught.value.hint


@pytest.mark.parametrize("name", scenario.names())
def test_every_file_tells_checks_and_solves(name: str) -> None:
    one = scenario.load(name)
    assert one.goals
    assert one.solution
    asked = {goal.answer for goal in one.goals if goal.answer}
    assert asked == {step.question for step in one.solution if isinstance(step, scenario.Answer)}


def test_hints_cost_and_the_solution_costs_all() -> None:
    fresh = Progress()
    assert fresh.score == 100
    assert fresh.checked(1, 2).best is None
    assert Progress(hints=2).checked(2, 2).best == 80
    assert Progress(solution_seen=True).checked(2, 2).best == 0
    assert Progress(hints=50).score == 0
    better = Progress(hints=2).checked(2, 2).again().checked(2, 2)
    assert better.best == 100
    assert Progress(hints=3, best=90).checked(2, 2).best == 90


def test_progress_outlives_the_program_and_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert progress.load() == {}
    progress.save("one", Progress(hints=1))
    progress.save("two", Progress(reached=2, goals=2, best=70))
    assert progress.load() == {"one": Progress(hints=1), "two": Progress(reached=2, goals=2, best=70)}
    progress.file().write_text("{broken")
    assert progress.load() == {}
    progress.file().write_text('{"one": {"no such field": 1}}')
    assert progress.load() == {}


# All of them with SECTOOL_SCENARIOS=all, or `sectool lab scenario check --all --solved --unsolved`.
SOME = ("first-policy", "the-0200-page", "enforcer-crash")
PLAYED = scenario.names() if os.environ.get("SECTOOL_SCENARIOS") == "all" else SOME


@pytest.mark.kernel
@pytest.mark.parametrize("name", PLAYED)
def test_a_scenario_is_missed_before_and_reached_by_its_solution(name: str) -> None:
    assert prove(name, solved=True, unsolved=True) == []
