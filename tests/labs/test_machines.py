"""Scenarios by ssh; in ssh's place a program that runs the same command here, in a namespace of its own."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from labs.machines import Layout, Machines
from sectool.errors import SectoolError, UsageError

CONFIG = "Host web\n  HostName 192.0.2.1\nHost db ops\n  User vagrant\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "ssh.conf"
    file.write_text(CONFIG)
    return file


def test_a_host_without_a_machine_plays_on_the_one_that_stands_for_it(config: Path, tmp_path: Path) -> None:
    machines = Machines(config, tmp_path / "memory", ("web", "batch"))
    assert machines.machines == {"web": "web", "batch": "ops"}
    assert "web" in machines.way_in("web")
    assert not machines.exists()


def test_hosts_that_are_missing_are_named(config: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no machine for plain, rogue"):
        Machines(config, tmp_path, ("web", "rogue", "plain"))
    with pytest.raises(UsageError, match="cannot read"):
        Machines(tmp_path / "none", tmp_path, ("web",))


@pytest.fixture
def here(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machines:
    """A machine `web` that is this one, its folders below the test's."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "ssh").write_text('#!/bin/sh\nfor last; do :; done\nexec unshare --net sh -c "$last"\n')
    (programs / "sudo").write_text('#!/bin/sh\nshift\nexec "$@"\n')
    (programs / "systemctl").write_text("#!/bin/sh\nexit 1\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}")
    paths = (str(tmp_path / name) for name in ("state", "run", "aside", "mark"))
    made = Machines(config, tmp_path / "memory", ("web",), ("web",), Layout(*paths))
    state = tmp_path / "state"
    (state / "host").mkdir(parents=True)
    (state / "host" / "host.key").write_text("key")
    (state / "events").mkdir()
    return made


@pytest.mark.kernel
def test_a_machine_that_is_not_for_playing_is_left_alone(here: Machines, tmp_path: Path) -> None:
    with pytest.raises(SectoolError, match="make the file"):
        here.build(lambda _: None, policy=False)
    assert (tmp_path / "state" / "events").exists()
    assert not (tmp_path / "aside").exists()


@pytest.mark.kernel
def test_a_machine_begins_afresh_and_keeps_its_enrolment(here: Machines, tmp_path: Path) -> None:
    state, work = tmp_path / "state", Path(here.work("web"))
    (tmp_path / "mark").touch()
    here.build(lambda _: None, policy=True)
    assert here.exists()
    assert [p.name for p in state.iterdir()] == ["host"]
    (state / "host" / "host.key").write_text("another")
    here.write("web", "a file", b"\0\xff")
    assert here.read("web", "a file") == b"\0\xff"
    done = here.run("web", 'cat $SECTOOL_STATE/host/host.key; echo "it\'s" >&2; exit 3')
    assert (done.exit, done.out, done.err) == (3, "another", "it's\n")
    assert here.run("web", "sleep 60", timeout=0.1).exit is None
    here.start("web", "echo $$ > $SECTOOL_STATE/pid; exec sleep 600")
    end = time.monotonic() + 20
    while not (state / "pid").exists() or not (state / "pid").read_text():
        assert time.monotonic() < end
    process = Path("/proc", (state / "pid").read_text().strip())
    assert process.exists()
    here.build(lambda _: None, policy=True)
    while process.exists():
        assert time.monotonic() < end, "what was left running goes with the next beginning"
    assert (state / "host" / "host.key").read_text() == "key"
    assert not list(work.iterdir())
    with pytest.raises(SectoolError, match="cannot read"):
        here.read("web", "a file")
