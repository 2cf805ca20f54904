"""What a learner is shown without any hosts: the list with its score, hints and their price, the reset."""

from __future__ import annotations

import json
import secrets
from pathlib import Path

import pytest
from typer.testing import CliRunner

from labs import play, progress, scenario, scenariocli
from labs.progress import Progress
from sectool.errors import SectoolError, UsageError


@pytest.fixture(autouse=True)
def nobodys_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress of the test's own, and labs that nobody plays on."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    salt = secrets.token_hex(4)
    monkeypatch.setattr(play, "lab_name", lambda name: f"t{salt}")


def invoke(*args: str) -> tuple[str, str]:
    done = CliRunner().invoke(scenariocli.app, list(args), catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout, done.stderr


def test_the_list_adds_up_the_best_tries() -> None:
    progress.save("first-policy", Progress(reached=3, goals=3, best=90))
    progress.save("migration", Progress(hints=2, reached=1, goals=8))
    document = json.loads(invoke("list", "-o", "json")[0])
    assert (document["score"], document["solved"], document["possible"]) == (
        90,
        1,
        100 * len(scenario.names()),
    )
    rows = {row["name"]: row for row in document["items"]}
    assert rows["first-policy"]["best"] == 90
    assert (rows["migration"]["best"], rows["migration"]["hints"]) == (None, 2)
    table, said = invoke("list")
    assert "3/3" in table
    assert f"1 of {len(rows)} solved, 90 of {100 * len(rows)} points" in said


def test_hints_come_one_by_one_and_cost() -> None:
    hints = scenario.load("first-policy").hints
    out, said = invoke("hint", "first-policy")
    assert out.count("\n- ") == 0
    assert "90 points are left" in said
    out, said = invoke("hint", "first-policy")
    assert out.count("\n- ") == 1
    for _ in hints:
        out, said = invoke("hint", "first-policy")
    assert "no more hints" in said
    assert progress.load()["first-policy"] == Progress(hints=len(hints), lost=10 * len(hints))


def test_reset_forgets_what_it_is_told_to() -> None:
    for name in ("first-policy", "migration"):
        progress.save(name, Progress(best=50))
    assert "1 scenario forgotten" in invoke("reset", "migration")[1]
    assert list(progress.load()) == ["first-policy"]
    with pytest.raises(UsageError):
        invoke("reset", "no-such-scenario")
    assert list(progress.load()) == ["first-policy"]


def test_what_does_not_run_cannot_be_checked() -> None:
    with pytest.raises(SectoolError) as caught:
        invoke("check", "first-policy")
    assert caught.value.hint == "start it: sudo sectool lab scenario run first-policy"
    with pytest.raises(UsageError):
        invoke("check", "--all")
    with pytest.raises(UsageError):
        invoke("check", "first-policy", "--solved")
