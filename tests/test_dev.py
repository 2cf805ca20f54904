"""The set-up script: what it says when it cannot go on. (That it works is shown by whatever runs these tests.)"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOBODY = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")


def dev(*command: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command line; its words and exit code."""
    env = {**os.environ, "PATH": path or os.environ["PATH"]}
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=120)


@pytest.fixture
def script() -> Iterator[Path]:
    """A copy of the script alone, in a folder that every user may enter."""
    folder = Path(tempfile.mkdtemp(prefix="st-dev-"))
    folder.chmod(0o777)
    try:
        yield Path(shutil.copy(ROOT / "dev", folder))
    finally:
        shutil.rmtree(folder)


def test_help_names_every_command() -> None:
    done = dev(str(ROOT / "dev"), "help")
    assert done.returncode == 0
    for command in ("demo", "test", "bench", "vm-test", "fuzz", "setup", "check", "lint"):
        assert f"\n  {command} " in done.stdout


def test_unknown_command_is_a_usage_error() -> None:
    done = dev(str(ROOT / "dev"), "frobnicate")
    assert done.returncode == 2
    assert "there is no command 'frobnicate'" in done.stderr


@pytest.mark.kernel
@pytest.mark.parametrize("command", ["demo", "test", "bench"])
def test_without_root_it_says_so(script: Path, command: str) -> None:
    done = dev(*NOBODY, str(script), command)
    assert done.returncode == 1
    assert f"dev: {command} needs root" in done.stderr
    assert f"sudo ./dev {command}" in done.stderr


@pytest.mark.kernel
def test_without_apt_it_names_what_is_missing(script: Path) -> None:
    few = script.parent / "bin"
    few.mkdir()
    for name in ("bash", "cat", "dirname", "grep", "id", "mkdir", "mv", "readlink", "rm", "sort"):
        (few / name).symlink_to(str(shutil.which(name)))
    done = dev(str(script), "setup", path=str(few))
    assert done.returncode == 1
    assert "this system has no apt-get, and these are missing:" in done.stderr
    assert "build-essential" in done.stderr
    assert "iperf3" in done.stderr


@pytest.mark.kernel
def test_without_network_namespaces_it_says_so(script: Path) -> None:
    done = dev("setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin", str(script), "demo")
    assert done.returncode == 1
    assert "gives no network namespaces" in done.stderr
    assert not (script.parent / ".venv").exists(), "it went on to the slow part"


@pytest.mark.kernel
def test_a_kernel_without_the_queue_target_is_named(script: Path) -> None:
    """iptables itself decides: with a target folder that lacks NFQUEUE it refuses the rule as such a kernel does."""
    targets = script.parent / "targets"
    targets.mkdir()
    done = dev("env", f"XTABLES_LIBDIR={targets}", str(script), "demo")
    assert done.returncode == 1
    assert "this kernel has no NFQUEUE for iptables" in done.stderr
