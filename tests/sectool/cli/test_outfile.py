"""Files of results: whole or not there, never over another unasked, for their owner alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sectool.cli.outfile import check_target, new_file
from sectool.errors import UsageError


def test_a_file_is_there_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with new_file(path, force=False) as out:
        out.write(b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_nlink == 1
    assert os.listdir(tmp_path) == ["out"]  # noqa: PTH208


def test_a_failure_leaves_nothing_and_spoils_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), new_file(path, force=True) as out:
        out.write(b"new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_nothing_is_written_over_unasked(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(UsageError, match="exists"), new_file(path, force=False) as out:
        out.write(b"mine")
        path.write_bytes(b"theirs")  # made meanwhile
    assert path.read_bytes() == b"theirs"
    with pytest.raises(UsageError, match="exists"):
        check_target(path, force=False)
    with new_file(path, force=True) as out:
        out.write(b"mine")
    assert path.read_bytes() == b"mine"


@pytest.mark.parametrize("kind", ["symlink", "dangling", "folder", "fifo"])
def test_only_regular_files_are_written_over(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "out", tmp_path / "other"
    if kind == "symlink":
        other.write_bytes(b"theirs")
    if kind in ("symlink", "dangling"):
        path.symlink_to(other)
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(UsageError, match="not a regular file"):
        check_target(path, force=True)
    if kind == "symlink":
        assert other.read_bytes() == b"theirs"


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no folder"):
        check_target(tmp_path / "none" / "out", force=False)
