"""The store in a notebook: the page that teaches it is run; moments, limits and failures are told."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

import store
from sectool.errors import NoDaemonError, StoreError, UsageError
from sectool.filters import parse_text
from store.archive import PartialWarning, TruncatedWarning
from store.query import StoppedError
from tests.store.conftest import StoreLab
from tests.store.shop import HOUR, fill, settle

PAGE = Path(__file__).parents[2] / "docs/howto/notebook.md"


@pytest.fixture(scope="module")
def shop() -> Iterator[StoreLab]:
    """Two days of a shop, in files."""
    base = Path(tempfile.mkdtemp(prefix="st-archive-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    lab = StoreLab(base)
    try:
        fill(lab)
        settle(lab)
        yield lab
    finally:
        lab.close()
        shutil.rmtree(base, ignore_errors=True)


def test_the_page_runs(shop: StoreLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "case-17").symlink_to(shop.state)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    said, names = io.StringIO(), {"__name__": "notebook"}
    with contextlib.redirect_stdout(said):
        for block in blocks:  # as cells of one notebook
            exec(compile(block, str(PAGE), "exec"), names)
    lines = said.getvalue().splitlines()
    assert lines[0].startswith("301 ['default_deny', ")
    assert lines[1] == "[('deny', 301), ('allow', 11)]"
    assert lines[2] == "2 alice reason 2"
    assert lines[3].count("spiffe://lab/") == 3
    assert "connections were open" in lines[4]
    assert [line.split()[-1] for line in lines[5:]] == [
        "policy.applied",
        "policy.applied",
        "policy.activated",
    ]


def test_moments(shop: StoreLab) -> None:
    with store.open(shop.state) as s:
        begin = shop.T0 + 24 * HOUR
        moment = datetime.fromtimestamp(begin // 1_000_000, UTC)
        for since in (begin, moment, moment.replace(tzinfo=None), moment.isoformat()):
            assert s.flows(since=since).num_rows == 302
        assert s.flows(since=timedelta(minutes=1)).num_rows == 0
        assert s.flows("to-port=6379", since="2026-01-01T00:00:00Z").num_rows == 1
        assert s.flows(parse_text("to-port=6379"), at=begin + 3 * HOUR).num_rows == 1
        assert s.policies(at=shop.T0 + HOUR)["revision"].to_pylist() == [1]
        assert s.policies()["revision"].to_pylist() == [2]
        assert s.activations(begin + HOUR)["host"].to_pylist() == ["host1"]
        assert s.workloads(shop.T0)["name"].to_pylist() == ["web"]
        assert s.trust().num_rows == 0
        assert s.changes().num_rows > 5
        for wrong in ("soon", True, 1.5):
            with pytest.raises(UsageError, match="is not a time"):
                s.flows(since=wrong)  # type: ignore[arg-type]


def test_nothing_is_left_out_silently(shop: StoreLab) -> None:
    with store.open(shop.state) as s:
        assert s.flows(last=5).num_rows == s.query("FROM flows", limit=5).num_rows == 5
        with pytest.warns(TruncatedWarning, match="128 MiB"):
            table = s.query("SELECT repeat('x', 1000000) FROM range(200)")
        assert table.schema.metadata[b"sectool.truncated"] == b"true"
        with pytest.warns(TruncatedWarning, match="most rows"):
            assert s.query("FROM range(1000001)", limit=2_000_000).num_rows == 1_000_000
        with pytest.raises(StoppedError):
            s.query("SELECT count(*) FROM range(100000000000) a, range(10)", timeout=0.2)
        with pytest.raises(UsageError, match="only SELECT"):
            s.query("DROP VIEW flows")
        assert "Projection" in s.explain("SELECT source_port + 1 FROM flow_records")
        assert s.stats()["flow_records"] == 322
        assert repr(s) == f"<store of {shop.state}: files>"
    with pytest.raises(StoreError, match="was closed"):
        s.stats()


def test_the_running_store_is_asked(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.ring().put(lab.record())
    lab.start()
    lab.stored(1)
    monkeypatch.setenv("SECTOOL_STATE", str(lab.state))
    monkeypatch.setenv("SECTOOL_RUN", str(lab.run))
    for args in ((), (lab.state,)):
        with store.open(*args) as s:
            assert s.live
            assert s.flows().num_rows == s.query("FROM flows").num_rows == 1
            assert "Total Time" in s.explain("SELECT count(*) FROM flows", analyze=True)
    monkeypatch.delenv("SECTOOL_STATE")
    with store.open(lab.state, run=lab.run) as s:
        assert s.live
    monkeypatch.delenv("SECTOOL_RUN")
    with pytest.warns(PartialWarning, match="left out"), store.open(lab.state) as s:
        assert not s.live


def test_nothing_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECTOOL_STATE", str(tmp_path / "state"))
    monkeypatch.setenv("SECTOOL_RUN", str(tmp_path / "run"))
    with pytest.raises(NoDaemonError, match="no daemon answers"):
        store.open()
    with pytest.raises(StoreError, match="there are no events"):
        store.open(tmp_path)
