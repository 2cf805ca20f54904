"""Running the command line as a user does: a process of its own, with folders of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str


Cli = Callable[..., Done]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """`cli("policy", "test", file)` with empty state and run folders; environment by keyword."""

    def run(*args: object, stdin: str = "", **environment: str) -> Done:
        done = subprocess.run(
            [sys.executable, "-m", "sectool", *map(str, args)],
            capture_output=True,
            text=True,
            input=stdin,
            timeout=60,
            cwd=tmp_path,
            env={
                **os.environ,
                "SECTOOL_STATE": str(tmp_path / "state"),
                "SECTOOL_RUN": str(tmp_path / "run"),
                "TMPDIR": str(tmp_path),
                **environment,
            },
        )
        assert "Traceback" not in done.stderr or environment.get("SECTOOL_DEBUG")
        return Done(done.returncode, done.stdout, done.stderr)

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
