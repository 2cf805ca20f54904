"""Where cgroup v2 is mounted, from mountinfo texts of real systems."""

from __future__ import annotations

from pathlib import Path

import pytest

from nfq import cgroup
from sectool.errors import SectoolError

UNIFIED = "33 24 0:28 / {point} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "34 24 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu"
PART = "35 24 0:28 /docker/abc {point} ro - cgroup2 cgroup rw"
SHARED = "36 24 0:28 / {point} rw shared:9 master:1 - cgroup2 cgroup2 rw"


def write(folder: Path, *lines: str) -> Path:
    """A mountinfo file."""
    path = folder / "mountinfo"
    path.write_text("\n".join(lines) + "\n")
    return path


def made(folder: Path, name: str) -> Path:
    """A directory that looks like a cgroup."""
    point = folder / name
    point.mkdir()
    (point / "cgroup.procs").touch()
    return point


@pytest.mark.parametrize("line", [UNIFIED, SHARED, PART])
def test_the_mount_is_found(tmp_path: Path, line: str) -> None:
    point = made(tmp_path, "unified")
    assert cgroup.mount(write(tmp_path, V1, line.format(point=point))) == point


def test_a_blank_in_the_name(tmp_path: Path) -> None:
    point = made(tmp_path, "a b")
    assert cgroup.mount(write(tmp_path, UNIFIED.format(point=str(point).replace(" ", "\\040")))) == point


def test_the_whole_hierarchy_is_preferred(tmp_path: Path) -> None:
    part, whole = made(tmp_path, "part"), made(tmp_path, "whole")
    assert cgroup.mount(write(tmp_path, PART.format(point=part), UNIFIED.format(point=whole))) == whole


@pytest.mark.parametrize(
    "lines", [[], [V1], ["garbage"], ["- cgroup2 x"], [UNIFIED.format(point="/nowhere")]]
)
def test_without_one_it_is_told(tmp_path: Path, lines: list[str]) -> None:
    with pytest.raises(SectoolError) as caught:
        cgroup.mount(write(tmp_path, *lines))
    assert "mount" in caught.value.hint


def test_making_and_removing(tmp_path: Path) -> None:
    folder = cgroup.create("/a/b", tmp_path)
    assert folder == tmp_path / "a/b"
    assert cgroup.create("a/b", tmp_path) == folder
    assert not cgroup.remove(tmp_path / "a"), "not empty"
    assert cgroup.remove(folder)
    assert cgroup.remove(folder)
    with pytest.raises(SectoolError):
        cgroup.create("../x", tmp_path)
