"""Programs in real cgroups: attested by inode, found again after a restart, forgotten when they end."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sectool.agent.programs import ROOT_GROUP, Program, Programs, forget_programs, parent_cgroup
from sectool.errors import SectoolError, UsageError

pytestmark = pytest.mark.kernel


def cgroup_mount() -> Path:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise AssertionError("no cgroup v2 here")


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process in a cgroup of its own, as a login session would be."""
    home = cgroup_mount() / f"st-{secrets.token_hex(4)}"
    home.mkdir()
    process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    (home / "cgroup.procs").write_text(str(process.pid))
    yield process
    process.kill()
    process.wait()
    for folder in sorted(home.rglob("*"), reverse=True):
        if folder.is_dir():
            folder.rmdir()
    home.rmdir()


@pytest.fixture
def ended() -> list[Program]:
    return []


@pytest.fixture
def programs(tmp_path: Path, ended: list[Program]) -> Programs:
    return Programs(cgroup_mount(), tmp_path / "programs.json", ended.append)


def test_the_caller_moves_into_a_cgroup_inside_its_own(
    programs: Programs, sleeper: subprocess.Popen[bytes]
) -> None:
    before = parent_cgroup(sleeper.pid)
    program = programs.register("web", {"app": "web"}, 0, sleeper.pid)
    assert program.cgroup == f"/{before}/web"
    assert parent_cgroup(sleeper.pid) == f"{before}/web"
    assert (cgroup_mount() / program.cgroup.lstrip("/")).stat().st_ino == program.cgroup_id
    second = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    try:
        (cgroup_mount() / before / "cgroup.procs").write_text(str(second.pid))
        assert programs.register(None, {"app": "web"}, 0, second.pid).cgroup == f"/{before}/web-2"
    finally:
        second.kill()
        second.wait()
    programs.sweep()
    assert [p.name for p in programs.by_id.values()] == ["web"]


def test_a_restarted_daemon_knows_running_programs(
    programs: Programs, sleeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    program = programs.register("web", {"app": "web"}, 0, sleeper.pid)
    again = Programs(cgroup_mount(), tmp_path / "programs.json", lambda _: None)
    again.load()
    assert again.by_id == {program.cgroup_id: program}
    assert (tmp_path / "programs.json").stat().st_mode & 0o777 == 0o600


def test_an_ended_program_is_told_and_its_cgroup_removed(
    programs: Programs, sleeper: subprocess.Popen[bytes], tmp_path: Path, ended: list[Program]
) -> None:
    program = programs.register("web", {"app": "web"}, 0, sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    programs.sweep()
    assert ended == [program]
    assert not (cgroup_mount() / program.cgroup.lstrip("/")).exists()
    assert json.loads((tmp_path / "programs.json").read_text()) == []


def test_down_forgets_ended_programs_and_keeps_running_ones_on_record(
    programs: Programs, sleeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    record = tmp_path / "programs.json"
    programs.register("web", {}, 0, sleeper.pid)
    forget_programs(cgroup_mount(), record)
    assert record.exists()
    sleeper.kill()
    sleeper.wait()
    forget_programs(cgroup_mount(), record)
    assert not record.exists()


def test_a_reused_cgroup_path_is_not_the_program_of_before(
    programs: Programs, sleeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    program = programs.register("web", {}, 0, sleeper.pid)
    rows = json.loads((tmp_path / "programs.json").read_text())
    rows[0]["cgroup_id"] = program.cgroup_id + 1
    (tmp_path / "programs.json").write_text(json.dumps(rows))
    again = Programs(cgroup_mount(), tmp_path / "programs.json", lambda _: None)
    again.load()
    assert again.by_id == {}


@pytest.mark.parametrize("text", ["", "{", "[1]", '[{"name": 1}]', "null"])
def test_a_damaged_record_is_survived(tmp_path: Path, text: str) -> None:
    (tmp_path / "programs.json").write_text(text)
    programs = Programs(cgroup_mount(), tmp_path / "programs.json", lambda _: None)
    programs.load()
    assert programs.by_id == {}


@pytest.mark.parametrize(
    ("name", "labels"),
    [("../../x", {}), ("a/b", {}), ("", {}), (".", {}), ("ok", {"bad key": "x"}), ("ok", {"k": "v\n"})],
)
def test_bad_names_and_labels_are_refused_before_anything_is_made(
    programs: Programs, sleeper: subprocess.Popen[bytes], name: str, labels: dict[str, str]
) -> None:
    before = parent_cgroup(sleeper.pid)
    with pytest.raises(UsageError):
        programs.register(name, labels, 0, sleeper.pid)
    assert parent_cgroup(sleeper.pid) == before
    assert programs.by_id == {}


def test_a_process_that_is_gone_is_an_error(programs: Programs) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    with pytest.raises(SectoolError, match="cgroup of process"):
        programs.register("web", {}, 0, process.pid)


def test_a_process_in_the_root_cgroup_gets_a_place_of_its_own() -> None:
    assert ROOT_GROUP == "sectool"
    own = Path("/proc/self/cgroup").read_text().splitlines()
    if "0::/" in own:
        assert parent_cgroup(os.getpid()) == ROOT_GROUP
    else:
        assert parent_cgroup(os.getpid()) not in ("", ROOT_GROUP)
