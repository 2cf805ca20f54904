"""Scenario files are read strictly; and every scenario can be missed and can be solved."""

from __future__ import annotations

import os

import pytest

from labs import scenario
from labs.proof import longest_first, prove
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
    assert one.hints == (scenario.Hint("look", 10),)
    assert one.bare == ()


def test_hosts_may_be_bare_files_carried_and_hints_dear() -> None:
    text = SMALL.replace("hosts: [web]", "hosts: [web, db, ops]\nbare: [db]")
    text = text.replace("hints: [look]", "hints: [look, {text: there, costs: 30}]")
    text = text.replace("solution:\n", "solution:\n  - {carry: list.pem, from: ops, to: [web, db]}\n")
    one = scenario.parse(text, "small")
    assert one.bare == ("db",)
    assert one.hints[1] == scenario.Hint("there", 30)
    assert one.solution[0] == scenario.Carry("list.pem", "ops", ("web", "db"))


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
        ("minutes: 5", "minutes: soon", "expected a number", 2),
        ("hints: [look]", "hints: [{text: look, costs: -1}]", "expected a number", 10),
        ("story: Once.", "story: Once.\npolicy: perhaps", "expected true or false", 4),
        ("story: Once.", "story: Once.\nbare: [db]", "'db' is not among this scenario's hosts", 4),
        ("story: Once.", "story: Once.\nfiles: {web: {../x: y}}", "no name of a file", 4),
        ('{host: web, run: "true"}', "{carry: /etc/passwd, from: web, to: [web]}", "no name of a file", 6),
    ],
)
def test_mistakes_are_named_with_their_place(old: str, new: str, words: str, line: int) -> None:
    assert old in SMALL
    with pytest.raises(DocumentError) as caught:
        scenario.parse(SMALL.replace(old, new, 1), "small")
    assert words in caught.value.message
    assert caught.value.where.startswith(f"small.yaml:{line}:")


def test_the_promised_scenarios_are_there() -> None:
    assert len(scenario.names()) >= 14
    assert sorted(longest_first(scenario.names())) == sorted(scenario.names())


def test_there_is_no_other_scenario() -> None:
    with pytest.raises(UsageError) as caught:
        scenario.load("../../etc/passwd")
    assert "first-policy" in caught.value.hint


@pytest.mark.parametrize("name", scenario.names())
def test_every_file_tells_checks_and_solves(name: str) -> None:
    one = scenario.load(name)
    assert one.goals
    assert one.solution
    assert len(one.hints) >= 2
    asked = {goal.answer for goal in one.goals if goal.answer}
    assert asked == {step.question for step in one.solution if isinstance(step, scenario.Answer)}


# The cheapest that use the most of what scenarios are made of (12, 15 and 19 s of processor on a busy machine; all
# fourteen take 320). All of them with SECTOOL_SCENARIOS=all, or `sectool lab scenario check --all --solved --unsolved`.
SOME = ("first-policy", "vulnerable-service", "replayed-and-forged")
PLAYED = scenario.names() if os.environ.get("SECTOOL_SCENARIOS") == "all" else SOME


@pytest.mark.long
@pytest.mark.kernel
@pytest.mark.parametrize("name", PLAYED)
def test_a_scenario_is_missed_before_and_reached_by_its_solution(name: str) -> None:
    assert prove(name, solved=True, unsolved=True).wrong == ()
