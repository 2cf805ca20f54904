"""Running the command line as a user does: a process of its own, with folders of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import preloaded
from tests.preloaded import Done, sectool

Cli = Callable[..., Done]


@pytest.fixture(scope="session", autouse=True)
def _preloaded() -> None:
    """Commands are forked from a process that starts here, outside what tests make."""
    preloaded.start()


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """`cli("policy", "test", file)` with empty state and run folders; environment by keyword."""

    def run(*args: object, stdin: str = "", **environment: str) -> Done:
        done = sectool(
            [str(arg) for arg in args],
            {
                **os.environ,
                "SECTOOL_STATE": str(tmp_path / "state"),
                "SECTOOL_RUN": str(tmp_path / "run"),
                "TMPDIR": str(tmp_path),
                **environment,
            },
            cwd=tmp_path,
            stdin=stdin,
        )
        assert "Traceback" not in done.err or environment.get("SECTOOL_DEBUG")
        return done

    return run


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """As `cli`, in this process: sooner done, for what does not need a process of its own."""
    from sectool.cli.main import main

    monkeypatch.setenv("SECTOOL_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("SECTOOL_RUN", str(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> Done:
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        told = capsys.readouterr()
        return Done(code, told.out, told.err)

    return run
