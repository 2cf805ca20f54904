"""Compact segments: the same rows in less room, whatever kills the one who makes them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sectool.cli.main import main
from sectool.errors import SectoolError, StoreError
from sectool.events import Phase
from store import compaction, segment
from store.query import run
from store.verify import verify


@pytest.fixture
def full(lab: Any) -> Any:
    """A store with one sealed segment of 500 flows that ended, known by name, and one being written."""
    store = lab.inside()
    labels, rule = lab.labels("app=web"), lab.rule("allow app=web to call app=db")
    lab.identity("spiffe://lab/web", labels)
    for flow in range(500):
        start = lab.T0 + flow
        for phase in (Phase.VERDICT, Phase.END):
            end = start + 5 if phase == Phase.END else 0
            lab.ring().put(
                lab.record(flow=flow, start=start, phase=phase, end=end, source_labels=labels, rule=rule)
            )
    lab.ring().put_blob({"type": "workload.start", "ts": lab.T0, "name": "web"})
    store.step()
    store.close()
    store = lab.inside()
    lab.ring().put(lab.record(flow=1000, start=lab.T0 + 5000))
    store.step()
    return store


def everything(store: Any) -> list[Any]:
    return [
        run(store.catalog, sql, limit=10_000).table.to_pylist()
        for sql in (
            "SELECT * FROM flows ORDER BY seq",
            "SELECT * FROM flow_records ORDER BY seq",
            "SELECT * FROM events ORDER BY seq",
            f"SELECT * FROM flows_open_at(make_timestamp({1_772_330_584_000_000 + 100})) ORDER BY seq",
        )
    ]


def test_the_same_answers_from_less(full: Any, lab: Any) -> None:
    before = everything(full)
    native = segment.segment_files(lab.events)[0]
    size = native.stat().st_size
    name, left = full.compact_next(0)
    assert name == compaction.compact_name(native).name
    assert left == 0
    assert not native.exists()
    assert everything(full) == before
    assert verify(lab.state).problems == ()
    assert segment.size_of(segment.segment_files(lab.events)[0]) < size
    assert full.compact_next(0) == (None, 0), "once is enough"
    full.close()
    again = lab.inside()
    assert everything(again) == before
    assert again.next_seq > before[1][-1]["seq"], "numbers go on"
    again.close()
    assert lab.reader().query("SELECT count(*) AS n FROM flows").table["n"].to_pylist() == [501]


def test_what_is_young_stays(full: Any) -> None:
    assert full.compact_next(1 << 60) == (None, 0)


@pytest.mark.parametrize("moment", ["written in part", "before the chain", "after the chain"])
def test_killed_while_compacting(full: Any, lab: Any, moment: str) -> None:
    before = everything(full)
    native = segment.segment_files(lab.events)[0]
    with full.catalog.reading() as cursor:
        made = compaction.write_compact(cursor, full.catalog.alias(native.name), native)
    if moment == "written in part":
        made.chmod(0o750)
        made.rename(made.with_name(made.name + compaction.UNFINISHED))
    elif moment == "after the chain":
        compaction.seal_compact(lab.events, native, made)
    reader_files = [path.name for path in segment.segment_files(lab.events)]
    assert native.name in reader_files
    assert made.name not in reader_files, "nothing is read twice"
    full.close()
    again = lab.inside()
    assert everything(again) == before
    assert verify(lab.state).problems == ()
    assert native.exists() != (moment == "after the chain")
    assert made.exists() == (moment == "after the chain")


def test_a_compact_segment_that_was_changed_is_found(full: Any, lab: Any) -> None:
    full.compact_next(0)
    made = segment.segment_files(lab.events)[0]
    file = made / "flow_records.parquet"
    file.chmod(0o640)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    assert [(p.where, p.what) for p in verify(lab.state).problems] == [
        (made.name, "was changed after it was sealed")
    ]


def test_a_damaged_compact_segment_is_set_aside(full: Any, lab: Any) -> None:
    full.compact_next(0)
    full.close()
    made = segment.segment_files(lab.events)[0]
    made.chmod(0o750)
    (made / "flow_records.parquet").unlink()
    store = lab.inside()
    store.step()
    assert not made.exists()
    assert list(lab.events.glob(f"{made.name}.damaged-*"))
    assert run(store.catalog, "SELECT count(*) AS n FROM flows").table["n"].to_pylist() == [1]


def test_other_rows_are_refused(full: Any, lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compact form that lost a row never takes the place of the native one."""
    native = segment.segment_files(lab.events)[0]
    monkeypatch.setitem(compaction._ORDER, "flow_records", " ORDER BY seq LIMIT 999")
    with pytest.raises(StoreError, match="same rows of flow_records"):
        full.compact_next(0)
    assert native.exists()
    assert not list(lab.events.glob("*.parquet*"))


def test_retention_that_comes_between_leaves_nothing_half_done(
    full: Any, lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = compaction.write_compact

    def write_and_lose(cursor: Any, alias: str, path: Path) -> Path:
        made = write(cursor, alias, path)
        assert full.prune(0, None) == [path.name]
        return made

    monkeypatch.setattr(compaction, "write_compact", write_and_lose)
    with pytest.raises(StoreError, match="deleted meanwhile"):
        full.compact_next(0)
    assert run(full.catalog, "SELECT count(*) AS n FROM flows").table["n"].to_pylist() == [1]
    assert not list(lab.events.glob("*.parquet*"))
    assert verify(lab.state).problems == ()


def test_retention_takes_compact_segments_too(full: Any, lab: Any) -> None:
    full.compact_next(0)
    (name,) = full.prune(0, None)
    assert name.endswith(segment.COMPACT)
    assert verify(lab.state).problems == ()
    assert [Path(p).suffix for p in segment.segment_files(lab.events)] == [segment.NATIVE]
    assert run(full.catalog, "SELECT count(*) AS n FROM flows").table["n"].to_pylist() == [1]


def test_names_rise_though_the_clock_is_set_back(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hour = 3_600_000_000
    for life, clock in enumerate((lab.T0 + hour, lab.T0, lab.T0 + hour, lab.T0 - hour)):
        monkeypatch.setattr("store.process.now_us", lambda clock=clock: clock)
        store = lab.inside()
        lab.ring().put(lab.record(flow=life, pid=life, start=clock))
        store.step()
        store.close()
    assert len(segment.segment_files(lab.events)) == 4
    rows = lab.reader().query("SELECT pid FROM flow_records ORDER BY seq").table["pid"].to_pylist()
    assert rows == [0, 1, 2, 3]
    firsts = [segment.sealed(lab.events)[p.name]["first_seq"] for p in segment.segment_files(lab.events)]
    assert firsts == sorted(firsts)
    assert verify(lab.state).problems == ()


def test_after_a_jump_of_the_clock_nothing_is_deleted_for_its_age(
    full: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    full.limits = replace(full.limits, keep_us=3_600_000_000_000_000)
    began = full._began[0]
    monkeypatch.setattr("store.process.now_us", lambda: began + 10 * full.limits.keep_us)
    monkeypatch.setattr("store.upkeep.now_us", lambda: began + 10 * full.limits.keep_us)
    full.tidy()
    assert len(full.catalog.segments) == 2


def test_a_file_of_the_folder_cannot_be_asked_for(full: Any, lab: Any) -> None:
    full.compact_next(0)
    made = segment.segment_files(lab.events)[0]
    for sql in (
        f"SELECT * FROM '{made}/flow_records.parquet'",
        f"SELECT * FROM read_parquet('{made}/flow_records.parquet')",
        f'SELECT * FROM "{made}/flow_records.parquet"',
    ):
        with pytest.raises(SectoolError):
            run(full.catalog, sql)


def test_by_command_with_and_without_a_running_store(lab: Any, capsys: pytest.CaptureFixture[str]) -> None:
    where = ("--state", str(lab.state), "--run", str(lab.run), "-q", "store")
    for life in range(2):
        store = lab.inside()
        for flow in range(50):
            lab.ring().put(lab.record(flow=100 * life + flow))
        store.step()
        store.close()
    first, second = (path.stem for path in segment.segment_files(lab.events))
    assert main([*where, "compact", "--older", "1000w"]) == 0
    assert main([*where, "prune", "--keep", "1k", "--dry-run", "-o", "csv"]) == 0
    assert second in capsys.readouterr().out
    lab.start()
    assert main([*where, "compact", "--older", "0s", "-o", "csv"]) == 0
    assert capsys.readouterr().out.split() == ["segment", f"{first}.parquet", f"{second}.parquet"]
    assert pids(lab.live()) == [7] * 100
    lab.stop()
    assert main([*where, "verify"]) == 0
    capsys.readouterr()
    assert main([*where, "prune", "--keep-days", "0", "-o", "csv"]) == 0
    assert capsys.readouterr().out.split() == ["segment", f"{first}.parquet", f"{second}.parquet"]
    assert main([*where, "prune"]) == 2
    assert main([*where, "prune", "--keep", "much"]) == 2
    assert main([*where, "verify"]) == 0


def pids(reader: Any) -> list[int]:
    return list(reader.query("SELECT pid FROM flow_records ORDER BY seq").table["pid"].to_pylist())
