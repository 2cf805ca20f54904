"""The index changes how fast questions are answered, and nothing else."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import numpy as np
import pytest

from sectool.events import Phase
from sectool.filters import Filter, parse_text
from store import index
from store.changes import changes
from store.connectivity import connectivity
from store.flows import list_flows
from store.narrowing import narrow, narrow_at
from store.process import Limits, Store
from store.query import run
from store.reader import LocalReader
from store.segment import one
from store.state import state

SECOND = 1_000_000
PATIENCE = 120_000  # milliseconds a question may take on a busy machine
SEEDS = [int(seed) for seed in os.environ.get("STORE_INDEX_SEEDS", "1").split(",")]
FILTERS = (
    "from-ip=10.0.0.1 to-net=10.0.1.2/31 protocol=tcp",
    "from-label=app=a1 to-port=443",
    "not ip=10.0.0.1 verdict=deny",
)


def history(lab: Any, seed: int, flows: int) -> list[tuple[int, bytes]]:
    """Records in order of arrival: flows short and long, updates, lost verdicts and ends, denials."""
    rng = np.random.default_rng(seed)
    labels = [0, *(lab.labels(f"app=a{i}") for i in range(3))]
    out: list[tuple[int, bytes]] = []
    for flow in range(1, flows + 1):
        start = lab.T0 + int(rng.integers(0, 1000)) * SECOND + int(rng.integers(0, 1000))
        lasts = int(rng.choice([1, 20, 300, 5000], p=[0.6, 0.2, 0.15, 0.05])) * SECOND
        denied = rng.random() < 0.15
        fields: dict[str, Any] = {
            "flow": flow,
            "start": start,
            "source_ip": f"10.0.0.{rng.integers(1, 5)}",
            "destination_ip": f"10.0.1.{rng.integers(1, 4)}",
            "destination_port": int(rng.choice([443, 5432])),
            "source_labels": labels[rng.integers(0, 4)],
            "destination_labels": labels[rng.integers(0, 4)],
            "source_port": 40_000 + flow % 256,
            "action": 2 if denied else 1,
            "drop_reason": 1 if denied else 0,
        }
        late = int(rng.integers(0, 3)) * 100_000
        if rng.random() > 0.04:
            out.append((start + late, lab.record(**fields, ts=start)))
        if denied:
            continue
        for n, after in enumerate((60, 120, 2000), 1):
            if after * SECOND < lasts:
                counts = {
                    "source_bytes": n * 100,
                    "destination_bytes": n * 1000,
                    "ts": start + after * SECOND,
                }
                arrives = start + after * SECOND + late
                out.append((arrives, lab.record(**fields, **counts, phase=Phase.UPDATE, history=b"ShA")))
        if rng.random() > 0.05:
            end = start + lasts
            counts = {"source_bytes": 9000, "destination_bytes": 90_000, "ts": end, "end": end}
            out.append((end + late, lab.record(**fields, **counts, phase=Phase.END, history=b"ShADadFf")))
    return sorted(out, key=lambda pair: pair[0])


def fill(lab: Any, store: Store, records: list[tuple[int, bytes]], segments: int, tail: int) -> None:
    """Put `records` into so many segments, the last `tail` of them into the one being written."""
    body = records[: len(records) - tail]
    parts: list[Any] = [*np.array_split(np.arange(len(body)), segments), range(len(body), len(records))]
    for part in parts:
        for i in part:
            lab.ring().put(records[i][1])
        while store.step():
            pass
        store._roll_if_due()
        store.tidy()


def index_all(store: Store) -> int:
    """Index what there is; how many stretches."""
    assert store.catalog.index is not None
    live = None if store._ingest is None else store._ingest.live.path.name
    while store.shelf.extend_index(store.catalog, live, store.next_seq):
        pass
    return len(store.catalog.index.stretches)


@pytest.fixture
def short_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stretches so short that small histories have many."""
    monkeypatch.setattr(index, "STRETCH", 50)


@contextlib.contextmanager
def without(store: Store) -> Any:
    """The same catalog, asked without its index."""
    kept, store.catalog.index = store.catalog.index, None
    try:
        yield
    finally:
        store.catalog.index = kept


def answers(store: Store, t0: int) -> dict[str, Any]:
    """What all kinds of questions are answered."""
    catalog = store.catalog
    out: dict[str, Any] = {}
    pair, labels, denied = (parse_text(text) for text in FILTERS)
    asked: list[tuple[Filter, dict[str, int]]] = [
        (pair, {"last": 20}),
        (denied, {"last": 1000}),
        (labels, {"since": t0 + 200 * SECOND, "until": t0 + 400 * SECOND, "first": 1000}),
        (labels, {"at": t0 + 700 * SECOND}),
        (Filter(), {"last": 30}),
        *((Filter(), {"at": t0 + at * SECOND, "last": 200}) for at in (333, 4000)),
    ]
    for filter_, bounds in asked:
        result = list_flows(catalog, filter_, **bounds, timeout_ms=PATIENCE)
        out[f"{filter_.to_json()} {bounds}"] = result.table.to_pylist(), result.truncated
    out["state"] = state(catalog, t0 + 900 * SECOND)
    out["map at"] = connectivity(catalog, at=t0 + 100 * SECOND)
    sql = f"SELECT * FROM flows_open_at(make_timestamp({t0 + 300 * SECOND})) ORDER BY seq"
    out["sql"] = run(catalog, sql, timeout_ms=PATIENCE).table.to_pylist()
    out["map"] = connectivity(catalog, since=t0 + 100 * SECOND, until=t0 + 600 * SECOND)
    for name in ("map", "map at"):
        for edge in out[name]["edges"]:
            edge["services"].sort()
    for chosen in (Filter(), labels):
        between = {"before": t0 + 450 * SECOND, "after": t0 + 930 * SECOND, "window": 400 * SECOND}
        out[f"diff {chosen.to_json()}"] = changes(catalog, **between, filter_=chosen, limit=1000)
    return out


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.usefixtures("short_stretches")
def test_answers_are_the_same_with_and_without_an_index(lab: Any, seed: int) -> None:
    store = lab.inside(Limits(segment_bytes=1))
    records = history(lab, seed, 160)
    fill(lab, store, records, segments=3, tail=30)
    assert index_all(store) >= 6
    assert store.catalog.index is not None
    stems = {s.stem for s in store.catalog.index.stretches}
    assert len(stems) >= 3
    indexed = answers(store, lab.T0)
    with without(store):
        plain = answers(store, lab.T0)
    for question, answer in plain.items():
        assert indexed[question] == answer, question
    assert any(rows for rows, _ in (plain[k] for k in plain if "'at'" in k))


@pytest.mark.usefixtures("short_stretches")
def test_a_question_reads_no_more_than_its_stretches(lab: Any) -> None:
    store = lab.inside(Limits(segment_bytes=1))
    fill(lab, store, history(lab, 3, 200), segments=4, tail=0)
    index_all(store)
    assert store.catalog.index is not None
    known = store.catalog.index.stretches
    with store.catalog.reading() as cursor:
        everything = one(cursor, "SELECT count(*) FROM flow_records")[0]
        begins = known[2].begins
        assert begins is not None
        narrow(store.catalog, cursor, begins[0], begins[0] + SECOND)
        assert 0 < one(cursor, "SELECT count(*) FROM flow_records")[0] < everything / 2
        narrow_at(store.catalog, cursor, begins[0])
        assert 0 < one(cursor, "SELECT count(*) FROM flow_records")[0] < everything / 2


@pytest.mark.usefixtures("short_stretches")
def test_an_index_that_is_damaged_or_does_not_fit_is_made_anew(lab: Any) -> None:
    store = lab.inside(Limits(segment_bytes=1))
    fill(lab, store, history(lab, 4, 120), segments=3, tail=0)
    made = index_all(store)
    asked = list_flows(store.catalog, parse_text(""), at=lab.T0 + 300 * SECOND).table.to_pylist()
    store.close()
    path = index.index_file(lab.events)
    path.write_bytes(b"no index at all" * 1000)
    with contextlib.closing(LocalReader(lab.events)) as reader:
        assert reader.catalog.index is None
        assert reader.flows(at=lab.T0 + 300 * SECOND).table.to_pylist() == asked
    again = lab.inside(Limits(segment_bytes=1))
    assert index_all(again) == made
    assert list_flows(again.catalog, parse_text(""), at=lab.T0 + 300 * SECOND).table.to_pylist() == asked
    again.close()
    # The newest segment is gone, with it rows that the index knows.
    newest = max(lab.events.glob("flows-*.duckdb"))
    newest.unlink()
    third = lab.inside(Limits(segment_bytes=1))
    assert third.catalog.index is not None
    assert all(s.stem != index.stem(newest.name) for s in third.catalog.index.stretches)


@pytest.mark.usefixtures("short_stretches")
def test_retired_segments_leave_the_index_and_open_flows_stay_known(lab: Any) -> None:
    store = lab.inside(Limits(segment_bytes=1))
    fill(lab, store, history(lab, 5, 150), segments=4, tail=0)
    index_all(store)
    moment = lab.T0 + 3000 * SECOND
    before = list_flows(store.catalog, parse_text(""), at=moment).table.num_rows
    sizes = [path.stat().st_size for path in sorted(lab.events.glob("flows-*.duckdb"))]
    gone = store.prune(sum(sizes[-3:]), None)
    assert gone
    assert store.catalog.index is not None
    stems = {index.stem(name) for name in gone}
    assert not any(s.stem in stems for s in store.catalog.index.stretches)
    assert list_flows(store.catalog, parse_text(""), at=moment).table.num_rows == before > 0


def test_readers_without_a_store_use_the_index(lab: Any) -> None:
    store = lab.inside(Limits(segment_bytes=1))
    fill(lab, store, history(lab, 6, 50), segments=2, tail=0)
    index_all(store)
    store.close()
    with contextlib.closing(LocalReader(lab.events)) as reader:
        assert reader.catalog.index is not None
        assert reader.catalog.index.stretches
        assert reader.flows(last=5).table.num_rows == 5
