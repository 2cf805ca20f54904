"""The comparison of before and after, on real changes to this machine's state where they are harmless."""

from __future__ import annotations

import secrets
import subprocess
from pathlib import Path

import pytest

from labs import netns, place, residue
from labs.residue import Snapshot, left_behind


@pytest.fixture
def lab() -> str:
    return f"t{secrets.token_hex(4)}"


def test_equal_snapshots_leave_nothing() -> None:
    one = Snapshot("x", frozenset({"route: a", "mount: b"}))
    assert left_behind(one, one) == []


def test_what_came_and_what_went_is_told() -> None:
    before = Snapshot("x", frozenset({"route: a", "mount: b"}))
    after = Snapshot("x", frozenset({"route: a", "file: c"}))
    assert left_behind(before, after) == ["left behind: file: c", "gone: mount: b"]


def test_a_cgroup_that_stays_is_told(tmp_path: Path) -> None:
    same = Snapshot("x", frozenset())
    assert left_behind(same, same, frozenset({tmp_path, tmp_path / "gone"})) == [
        f"left behind: cgroup: {tmp_path}"
    ]


@pytest.mark.kernel
def test_a_namespace_is_seen_as_namespace_and_mount(lab: str) -> None:
    before = residue.take(lab)
    name = netns.namespace(lab, "web")
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        left = left_behind(before, residue.take(lab))
    finally:
        netns.destroy(lab)
    assert f"left behind: namespace: {name}" in left
    assert any(line.endswith(f"/netns/{name}") and "mount" in line for line in left)
    assert left_behind(before, residue.take(lab)) in ([], ["left behind: mount: /run/netns"])


@pytest.mark.kernel
def test_a_mount_of_the_lab_is_told_and_one_of_somebody_else_is_not(lab: str, tmp_path: Path) -> None:
    before = residue.take(lab)
    own, others = tmp_path / lab, tmp_path / "others"
    for folder in (own, others):
        folder.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", folder], check=True)
    try:
        left = [line for line in left_behind(before, residue.take(lab)) if str(tmp_path) in line]
    finally:
        subprocess.run(["umount", own, others], check=True)
    assert left == [f"left behind: mount: {own}"]


@pytest.mark.kernel
def test_a_cgroup_and_a_process_are_seen(lab: str) -> None:
    before = residue.take(lab)
    folder = place.cgroup_of(lab, "web")
    folder.mkdir(parents=True)
    process = subprocess.Popen(["sleep", "60"], env={"PATH": "/usr/bin:/bin", place.MARK: lab})
    try:
        (folder / "cgroup.procs").write_text(str(process.pid))
        left = left_behind(before, residue.take(lab))
        assert residue.cgroups_in_use(lab) == {folder}
    finally:
        process.kill()
        process.wait()
        place.remove_cgroups(lab)
    assert f"left behind: cgroup: {folder}" in left
    assert any(f"process: {process.pid} sleep" in line for line in left)
    assert left_behind(before, residue.take(lab)) == []


@pytest.mark.kernel
def test_a_file_with_the_lab_s_name_is_seen(lab: str) -> None:
    before = residue.take(lab)
    file = Path("/tmp") / f"sectool-{lab}"
    file.touch()
    try:
        assert left_behind(before, residue.take(lab)) == [f"left behind: file: {file}"]
    finally:
        file.unlink()
