"""`store verify` and the index: as it was made it fits; however it is edited, that is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest

from sectool.cli.main import main
from store import index, segment
from store.indexcheck import check_index
from store.process import Limits
from store.verify import verify
from tests.store.test_index import fill, history, index_all

STRETCH = 50


@pytest.fixture(scope="module")
def made(make_lab: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A lab with four sealed segments, one of them compact and the oldest deleted since, and their index."""
    lab = make_lab(tmp_path_factory.mktemp("indexcheck"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "STRETCH", STRETCH)
        store = lab.inside(Limits(segment_bytes=1))
        fill(lab, store, history(lab, 5, 80), segments=3, tail=0)
        assert index_all(store) > 3
        for _ in range(2):
            assert store.compact_next(0)[0]
        store.close()
        store = lab.inside()
        known = segment.sealed(lab.events)
        files = [path for path in segment.segment_files(lab.events) if path.name in known]
        store.prune(sum(int(known[path.name]["bytes"]) for path in files[1:]), None, "eve")
        index_all(store)
        store.close()
    return lab


@pytest.fixture
def state(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it."""
    monkeypatch.setattr(index, "STRETCH", STRETCH)
    shutil.copytree(made.state, tmp_path / "state")
    return tmp_path / "state"


def edit(state: Path, *statements: str) -> None:
    with duckdb.connect(str(index.index_file(state / "events"))) as connection:
        for statement in statements:
            connection.execute(statement)


def test_as_it_was_made(state: Path) -> None:
    before = index.index_file(state / "events").read_bytes()
    verdict = verify(state)
    assert verdict.problems == ()
    assert verdict.stretches is not None
    assert verdict.stretches > 1
    assert verdict.unchecked == 0
    assert verify(state, index=False).stretches is None
    assert index.index_file(state / "events").read_bytes() == before


@pytest.mark.parametrize(
    ("statements", "what"),
    [
        (
            ["DELETE FROM crossing WHERE seq = (SELECT max(seq) FROM crossing WHERE gone IS NULL)"],
            "stay open",
        ),
        (["UPDATE crossing SET gone = n WHERE gone IS NULL"], "stay open"),
        (["UPDATE late SET source_bytes = 1 WHERE seq = (SELECT min(seq) FROM late)"], "went on"),
        (["UPDATE talks SET seqs = seqs[2:] WHERE n = (SELECT min(n) FROM talks)"], "who talked"),
        (
            ["UPDATE stretches SET last_begin = first_begin WHERE n = (SELECT min(n) FROM stretches)"],
            "which rows",
        ),
        (["UPDATE stretches SET whole = true WHERE n = (SELECT min(n) FROM stretches)"], "which rows"),
        (["DELETE FROM stretches WHERE n = (SELECT min(n) + 1 FROM stretches)"], ""),
        (["INSERT INTO late SELECT 0, * EXCLUDE n FROM late LIMIT 1"], "went on"),
        (
            [
                "ALTER TABLE late RENAME TO hidden",
                "CREATE VIEW late AS SELECT * FROM hidden WHERE source_port <> 40001",
            ],
            "views",
        ),
        (["ALTER TABLE talks ADD COLUMN more INTEGER"], "columns"),
    ],
    ids=lambda value: value[0][:30] if isinstance(value, list) else "",
)
def test_an_edited_index_is_found(state: Path, statements: list[str], what: str) -> None:
    edit(state, *statements)
    (problem,) = verify(state).problems
    assert problem.where == index.INDEX
    assert what in problem.what
    assert "made anew" in problem.what


def test_flows_of_segments_that_never_were(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "STRETCH", STRETCH)
    store = lab.inside()
    fill(lab, store, history(lab, 5, 60), segments=1, tail=5)
    store.close()
    store = lab.inside()
    assert index_all(store)
    store.close()
    assert verify(lab.state).problems == ()
    edit(lab.state, "INSERT INTO crossing SELECT -1, * EXCLUDE n FROM crossing LIMIT 1")
    assert "never were" in verify(lab.state).problems[0].what


@pytest.mark.parametrize("how", ["gone", "noise", "torn", "of another release"])
def test_what_is_no_index(state: Path, how: str) -> None:
    path = index.index_file(state / "events")
    if how == "gone":
        path.unlink()
    elif how == "noise":
        path.write_bytes(b"noise" * 5000)
    elif how == "torn":
        path.write_bytes(path.read_bytes()[:9000])
    else:
        edit(state, "UPDATE meta SET version = 1")
    problems = verify(state).problems
    assert bool(problems) == (how in ("noise", "torn"))
    assert all(problem.where == index.INDEX for problem in problems)


def test_beside_a_store_that_writes(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "STRETCH", STRETCH)
    records = history(lab, 7, 120)
    store = lab.inside()
    fill(lab, store, records[:100], segments=1, tail=0)
    store.close()
    store = lab.inside()
    fill(lab, store, records[100:], segments=1, tail=0)
    index_all(store)
    verdict = check_index(lab.events, segment.sealed(lab.events))
    assert verdict.problems == ()
    assert verdict.stretches > 0
    assert verdict.unchecked > 0
    assert index_all(store) == verdict.stretches + verdict.unchecked, "the store was not disturbed"


def test_by_command(state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--state", str(state), "--run", str(state / "run"), "store", "verify")
    assert main([*where]) == 0
    assert "made again from the segments" in capsys.readouterr().out
    edit(state, "DELETE FROM late")
    assert main([*where, "-o", "json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"][0]["where"] == index.INDEX
    assert main([*where, "--no-index"]) == 0
    assert "index: left out" in capsys.readouterr().out
