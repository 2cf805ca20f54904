"""Hints and solutions cost points; what was best stays; the file outlives the program and damage."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from labs import progress
from labs.progress import Progress

ROOT = Path(__file__).parents[2]


def test_hints_cost_and_the_solution_costs_all() -> None:
    fresh = Progress()
    assert fresh.score == 100
    assert fresh.checked(1, 2).best is None
    assert fresh.hinted(10).hinted(25).checked(2, 2).best == 65
    assert Progress(solution_seen=True).checked(2, 2).best == 0
    assert Progress(lost=500).score == 0
    better = fresh.hinted(20).checked(2, 2).again().checked(2, 2)
    assert better.best == 100
    assert Progress(lost=30, best=90).checked(2, 2).best == 90


def test_progress_outlives_the_program_and_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert progress.load() == {}
    progress.save("one", Progress(hints=1))
    progress.save("two", Progress(reached=2, goals=2, best=70))
    assert progress.load() == {"one": Progress(hints=1), "two": Progress(reached=2, goals=2, best=70)}
    progress.forget(["one", "three"])
    assert progress.load() == {"two": Progress(reached=2, goals=2, best=70)}
    progress.file().write_text("{broken")
    assert progress.load() == {}
    progress.file().write_text('{"one": {"no such field": 1}}')
    assert progress.load() == {}


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder of root's that others may pass through, which pytest's own are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.kernel
def test_under_sudo_it_is_the_learners_own(open_folder: Path) -> None:
    """Written with the learner's rights: a link that leads where only root may write is no way there."""
    learner = pwd.getpwnam("nobody")
    base = open_folder / "state"
    base.mkdir()
    os.chown(base, learner.pw_uid, learner.pw_gid)
    environment = {**os.environ, "SUDO_UID": str(learner.pw_uid), "XDG_STATE_HOME": str(base)}
    code = (
        "from labs import progress as p; p.save('one', p.Progress(best=50)); import os; print(os.geteuid())"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
    kept = base / "sectool" / "scenarios.json"
    assert kept.stat().st_uid == learner.pw_uid
    assert json.loads(kept.read_text())["one"]["best"] == 50
    secret = open_folder / "secret"
    secret.write_text("root's")
    (base / "sectool" / "scenarios.new").symlink_to(secret)
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert secret.read_text() == "root's"
