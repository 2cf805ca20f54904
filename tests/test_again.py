"""Tests that failed beside others are run alone: what that says, and when it does not happen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.again import UNSTEADY, plain

ROOT = Path(__file__).parents[1]

TESTS = """\
import os, pytest
from pathlib import Path

BESIDE = "PYTEST_XDIST_WORKER" in os.environ

@pytest.mark.xdist_group("pair")
@pytest.mark.parametrize("name", ["a@b"])
def test_disturbed(name): assert not BESIDE

def test_broken(): assert "BROKEN" not in os.environ

@pytest.fixture
def late():
    yield
    assert not BESIDE, "after the test"

def test_disturbed_at_its_end(late): Path("ran.txt").open("a").write("x")

@pytest.mark.parametrize("n", range(int(os.environ.get("MANY", 0))))
def test_many(n): assert False

def test_sound(): pass
"""


def run(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The throwaway tests, two at once."""
    (folder / "test_throwaway.py").write_text(TESTS)
    own = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    args = ["-q", "-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-n", "2", "--dist", "loadgroup"]
    return subprocess.run(
        [sys.executable, "-m", "tests.again", *args, f"--rootdir={folder}"],
        cwd=folder,
        env={**own, **environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_what_fails_only_beside_others_passes_and_is_named(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done
    named = [
        f"{UNSTEADY} test_throwaway.py::test_disturbed[a@b]",
        f"{UNSTEADY} test_throwaway.py::test_disturbed_at_its_end",
    ]
    for stream in (done.stdout, done.stderr):
        assert sorted(line for line in stream.splitlines() if line.startswith("UNSTEADY")) == named
    assert (tmp_path / "ran.txt").read_text() == "xx", "only what failed is run again, once"


def test_what_fails_alone_too_fails(tmp_path: Path) -> None:
    done = run(tmp_path, BROKEN="1")
    assert done.returncode == 1, done
    assert "FAILED alone, too: test_throwaway.py::test_broken\n" in done.stderr
    assert f"{UNSTEADY} test_throwaway.py::test_disturbed[a@b]\n" in done.stderr


def test_many_failures_are_no_chance(tmp_path: Path) -> None:
    done = run(tmp_path, MANY="2")
    assert done.returncode == 1, done
    assert "once more" not in done.stderr
    assert "UNSTEADY" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.py::test[x@y]", "a.py::test[x@y]"),
        ("a.py::test[x@y]@group", "a.py::test[x@y]"),
        ("a.py::test@group", "a.py::test"),
        ("a.py::test", "a.py::test"),
    ],
)
def test_names_lose_their_group(name: str, expected: str) -> None:
    assert plain(name) == expected
