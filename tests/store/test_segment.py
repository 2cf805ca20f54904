"""The chain over sealed segments, and their names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from store import segment
from store.segment import CHAIN, Summary


def chained(folder: Path, count: int = 4) -> list[Path]:
    """Some files, sealed as segments."""
    paths = []
    for number in range(count):
        path = folder / segment.segment_name(1_772_330_584_000_000, number)
        path.write_bytes(b"content %d" % number)
        segment.seal(folder, path, Summary(1, 0, number, number, number, number))
        paths.append(path)
    return paths


def edit(path: Path, change: Any) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    change(lines)
    path.write_bytes(b"".join(lines))


def test_names_sort_by_time_and_number(tmp_path: Path) -> None:
    names = [
        segment.segment_name(1_772_330_584_000_000 + t * 1_000_000, n) for t, n in ((0, 2), (0, 10), (1, 1))
    ]
    assert names[0] == "flows-20260301T020304Z-2.duckdb"
    for name in reversed([*names, "flows-x.duckdb", "other", f"{names[0]}.wal", f"{names[0]}.damaged-1"]):
        (tmp_path / name).touch()
    assert [path.name for path in segment.segment_files(tmp_path)] == names
    assert segment.segment_files(tmp_path / "missing") == []


def test_a_sound_chain(tmp_path: Path) -> None:
    paths = chained(tmp_path)
    assert segment.verify_chain(tmp_path) == []
    assert segment.chain_head(tmp_path)[0] == 4
    assert list(segment.sealed(tmp_path)) == [path.name for path in paths]
    assert all(path.stat().st_mode & 0o777 == 0o440 for path in paths)
    assert segment.mend_chain(tmp_path) == []


def swap(lines: list[bytes]) -> None:
    lines[1], lines[2] = lines[2], lines[1]


def forge(lines: list[bytes]) -> None:
    entry = json.loads(lines[1])
    entry["records"] = 7
    lines[1] = json.dumps(entry).encode() + b"\n"


def forge_well(lines: list[bytes]) -> None:
    entry = json.loads(lines[1])
    entry["sha256"] = "0" * 64
    entry["hash"] = segment._entry_hash(entry)
    lines[1] = json.dumps(entry).encode() + b"\n"


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (swap, "entry 2 is missing"),
        (forge, "entry 2 was edited"),
        (forge_well, "entry 3 does not follow"),
        (lambda lines: lines.pop(0), "entry 1 is missing"),
        (lambda lines: lines.pop(2), "entry 3 is missing"),
        (lambda lines: lines.insert(1, b"{}\n"), "line 2 is no entry"),
        (lambda lines: lines.insert(1, lines[1]), "entry 3 is missing"),
    ],
)
def test_an_edited_chain(tmp_path: Path, change: Any, what: str) -> None:
    chained(tmp_path)
    edit(tmp_path / CHAIN, change)
    problems = segment.verify_chain(tmp_path)
    assert any(what in problem.what for problem in problems), problems


def test_edited_and_removed_segments(tmp_path: Path) -> None:
    paths = chained(tmp_path)
    paths[1].chmod(0o640)
    paths[1].write_bytes(b"Content 1")
    paths[2].unlink()
    assert [(p.where, p.what) for p in segment.verify_chain(tmp_path)] == [
        (paths[1].name, "was changed after it was sealed"),
        (paths[2].name, "is missing"),
    ]
    segment.append_entry(tmp_path, {"retired": paths[2].name})
    assert [p.where for p in segment.verify_chain(tmp_path)] == [paths[1].name]


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(1, 2000), tail=st.binary(max_size=50))
def test_a_torn_chain_can_be_continued(
    tmp_path_factory: pytest.TempPathFactory, cut: int, tail: bytes
) -> None:
    """Invariant: after mend_chain, entries can be appended and what is left of the chain verifies."""
    folder = tmp_path_factory.mktemp("torn")
    chained(folder, 3)
    data = (folder / CHAIN).read_bytes()
    (folder / CHAIN).write_bytes(data[: max(0, len(data) - cut)] + tail)
    damaged = (folder / CHAIN).read_bytes()
    mended = segment.mend_chain(folder)
    if mended:
        assert (folder / mended[0].kept).read_bytes() == damaged
    path = folder / segment.segment_name(1_772_330_584_000_000, 99)
    path.write_bytes(b"next")
    segment.seal(folder, path, Summary(1, 0, 9, 9, 9, 9))
    assert all(problem.where != CHAIN for problem in segment.verify_chain(folder))
    assert path.name in segment.sealed(folder)
