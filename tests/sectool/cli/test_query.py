"""`sectool query`: to programs and files, with plans, and truthful about what was left out."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.sectool.cli.conftest import Cli
from tests.store.conftest import StoreLab

ROWS = 12


@pytest.fixture(scope="module")
def state() -> Iterator[Path]:
    """A state folder with a few flows, one of them with a hostile label."""
    base = Path(tempfile.mkdtemp(prefix="st-query-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    lab = StoreLab(base)
    try:
        for flow in range(ROWS):
            lab.ring().put(lab.record(flow=flow, source_port=40_000 + flow))
        lab.ring("agent").put_blob({"type": "new.kind", "ts": lab.T0, "what": "\x1b[31mred"})
        store = lab.inside()
        while store.step():
            pass
        store.close()
        yield lab.state
    finally:
        lab.close()
        shutil.rmtree(base, ignore_errors=True)


SQL = "SELECT source_port, event_start, source_ip FROM flows ORDER BY source_port"


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.csv", "x.jsonl"])
def test_a_whole_result_in_a_file(inside: Cli, state: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    done = inside("--store", state, "query", SQL, "--to", path)
    assert (done.code, done.out) == (0, "")
    assert f"{ROWS} rows are in" in done.err
    assert path.stat().st_mode & 0o777 == 0o600
    match path.suffix:
        case ".parquet":
            rows = pq.read_table(path).to_pylist()
        case ".arrow":
            rows = pa.ipc.open_file(path).read_all().to_pylist()
        case ".csv":
            rows = list(csv.DictReader(io.StringIO(path.read_text())))
        case _:
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            assert {row["schema"] for row in rows} == {"sectool.query/1"}
    assert [int(row["source_port"]) for row in rows] == [40_000 + flow for flow in range(ROWS)]
    assert {row["source_ip"] for row in rows} == {"10.0.0.1"}


def test_files_are_not_written_over(inside: Cli, state: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text("mine")
    done = inside("--store", state, "query", SQL, "--to", path)
    assert done.code == 2
    assert "--force" in done.err
    assert path.read_text() == "mine"
    assert inside("--store", state, "query", "SELECT sorce_ip FROM flows", "--to", path, "--force").code == 2
    assert path.read_text() == "mine"
    assert inside("--store", state, "query", SQL, "--to", path, "--force").code == 0
    assert path.read_text().startswith("source_port,")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--to", "x.doc"], "does not say its format"),
        (["--to", "x.csv", "-o", "table"], "not for files"),
        (["--to", "x.csv", "-o", "json"], "not for files"),
        (["--to", "none/x.csv"], "there is no folder"),
        (["--to", "x.csv", "--explain"], "a plan is text"),
        (["--analyze", "-o", "json"], "a plan is text"),
    ],
)
def test_what_makes_no_sense_is_refused(inside: Cli, state: Path, args: list[str], said: str) -> None:
    done = inside("--store", state, "query", SQL, *args)
    assert done.code == 2
    assert said in done.err


def test_a_name_without_a_known_ending(inside: Cli, state: Path, tmp_path: Path) -> None:
    assert inside("--store", state, "query", SQL, "--to", tmp_path / "x", "-o", "parquet").code == 0
    assert pq.read_table(tmp_path / "x").num_rows == ROWS


def command(state: Path, *args: str) -> list[str]:
    """A process of its own, whose stdout is what the test gives it."""
    return [sys.executable, "-m", "sectool", "--store", str(state), "query", SQL, *args]


def test_binary_goes_to_pipes_and_never_to_a_terminal(state: Path) -> None:
    done = subprocess.run(command(state, "-o", "arrow"), capture_output=True, check=True, timeout=60)
    assert pa.ipc.open_stream(done.stdout).read_all().num_rows == ROWS
    parent, child = pty.openpty()
    try:
        shown = subprocess.run(
            command(state, "-o", "parquet"), stdout=child, stderr=subprocess.PIPE, timeout=60, check=False
        )
    finally:
        os.close(child)
        os.close(parent)
    assert shown.returncode == 2
    assert b"nothing for a terminal" in shown.stderr


def test_what_is_left_out_is_told(inside: Cli, state: Path, tmp_path: Path) -> None:
    done = inside("--store", state, "query", SQL, "--limit", 5, "-o", "json")
    document = json.loads(done.out)
    assert done.code == 4
    assert (document["truncated"], document["limited"], len(document["items"])) == (True, "rows", 5)
    assert "the first 5 rows; --limit raises that" in done.err
    done = inside("--store", state, "query", SQL, "--limit", 5, "--to", tmp_path / "few.csv")
    assert (done.code, len((tmp_path / "few.csv").read_text().splitlines())) == (4, 6)
    assert "the first 5 rows; --limit was given" in done.err
    done = inside("--store", state, "query", SQL, "--limit", ROWS, "-o", "json")
    assert (done.code, json.loads(done.out)["truncated"]) == (0, False)


def test_a_file_has_more_than_is_ever_shown(inside: Cli, state: Path, tmp_path: Path) -> None:
    wide = "SELECT repeat('x', 100000) AS x, i FROM range(1500) r(i)"
    done = inside("--store", state, "query", wide, "-o", "jsonl", "--timeout", 60)
    assert done.code == 4
    assert "what is shown holds 128 MiB" in done.err
    assert 1300 <= len(done.out.splitlines()) < 1400
    assert inside("--store", state, "query", wide, "--to", tmp_path / "x.parquet").code == 0
    assert pq.read_table(tmp_path / "x.parquet", columns=["i"])["i"].to_pylist() == list(range(1500))


def test_a_query_that_fails_on_its_way_leaves_no_file(inside: Cli, state: Path, tmp_path: Path) -> None:
    late = "SELECT CASE WHEN i = 1000000 THEN error('too late') ELSE i::VARCHAR END FROM range(1000001) r(i)"
    done = inside("--store", state, "query", late, "--to", tmp_path / "x.arrow")
    assert done.code == 2
    assert "too late" in done.err
    endless = "SELECT * FROM range(100000000000) r(i)"
    done = inside("--store", state, "query", endless, "--to", tmp_path / "x.arrow", "--timeout", 0.5)
    assert done.code == 4
    assert "longer than 0.5 s" in done.err
    assert [path.name for path in tmp_path.iterdir()] == []


def test_plans(inside: Cli, state: Path) -> None:
    sql = "SELECT count(*) FROM flow_records WHERE source_port > 40005"
    done = inside("--store", state, "query", "--explain", sql)
    assert done.code == 0
    assert "Aggregate" in done.out
    done = inside("--store", state, "query", "--analyze", sql)
    assert "Total Time" in done.out
    done = inside("--store", state, "query", "--analyze", "SELECT '\x1b[31m' FROM flows")
    assert "\x1b" not in done.out
    assert inside("--store", state, "query", "--explain", "DELETE FROM s1.events").code == 2


def test_odd_values_are_shown(inside: Cli, state: Path) -> None:
    odd = "SELECT TIMESTAMP 'infinity' AS t, 'inf'::DOUBLE AS f, 'nan'::DOUBLE AS n, INTERVAL 1 DAY AS i, 1 AS i"
    for form in ("json", "table"):
        done = inside("--store", state, "query", odd, "-o", form)
        assert done.code == 0, done.err
        assert "infinity" in done.out
        assert "1 day" in done.out
    done = inside("--store", state, "query", "SELECT body->>'what' AS w FROM events")
    assert "\\x1b[31mred" in done.out
    assert inside("--store", state, "query", "SELECT 1 AS one WHERE false", "-o", "csv").out == "one\n"
