from __future__ import annotations

import os
from pathlib import Path

import pytest

from sectool.errors import SectoolError, UsageError
from sectool.identity.files import MAX_FILE, new_directory, read_file, write_atomic


def read(path: Path, *, secret: bool = False) -> bytes:
    return read_file(path, "nothing here", "make one", secret=secret)


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_atomic(path, b"one", 0o600)
    write_atomic(path, b"two", 0o640)
    assert path.read_bytes() == b"two"
    assert path.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()  # a directory cannot be replaced by a file
    with pytest.raises(SectoolError, match="cannot write"):
        write_atomic(tmp_path / "a", b"x")
    with pytest.raises(SectoolError, match="cannot write"):
        write_atomic(tmp_path / "none" / "a", b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_cannot_be_read_is_said_in_words(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing here") as error:
        read(tmp_path / "none")
    assert error.value.hint == "make one"
    with pytest.raises(SectoolError):
        read(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(SectoolError, match="not a regular file"):
        read(tmp_path / "fifo")
    (tmp_path / "big").write_bytes(bytes(MAX_FILE + 1))
    with pytest.raises(SectoolError, match="larger"):
        read(tmp_path / "big")


def test_a_secret_must_be_ours_alone(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_atomic(path, b"k", 0o600)
    assert read(path, secret=True) == b"k"
    path.chmod(0o400)
    assert read(path, secret=True) == b"k"
    path.chmod(0o660)
    assert read(path) == b"k"
    with pytest.raises(SectoolError, match="0660"):
        read(path, secret=True)


@pytest.mark.kernel
def test_a_secret_of_somebody_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_atomic(path, b"k", 0o600)
    os.chown(path, 12345, -1)
    with pytest.raises(SectoolError, match="user 12345"):
        read(path, secret=True)


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "dir"
    with pytest.raises(ZeroDivisionError), new_directory(target, "there", "hint") as fresh:
        write_atomic(fresh / "half", b"x")
        raise ZeroDivisionError
    assert list((tmp_path / "deep").iterdir()) == []
    with new_directory(target, "there", "hint") as fresh:
        write_atomic(fresh / "whole", b"x")
        assert not target.exists()
    assert [p.name for p in target.iterdir()] == ["whole"]
    assert target.stat().st_mode & 0o777 == 0o700


def test_a_directory_is_replaced_only_by_force_and_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "dir"
    with new_directory(target, "there", "hint") as fresh:
        write_atomic(fresh / "old", b"x")
    with pytest.raises(UsageError, match="there"), new_directory(target, "there", "hint"):
        pass
    with pytest.raises(ZeroDivisionError), new_directory(target, "there", "hint", force=True) as fresh:
        raise ZeroDivisionError
    assert (target / "old").exists()
    with new_directory(target, "there", "hint", force=True) as fresh:
        write_atomic(fresh / "new", b"x")
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["dir"]
