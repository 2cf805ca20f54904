"""The store's own ids: given out once, told by the segment that uses them, the same after a restart."""

from __future__ import annotations

from typing import Any

import duckdb
import pytest

from sectool.labels import LabelSet
from store.query import run

WEB, DB = LabelSet.parse("app=web"), LabelSet.parse("app=db")


def names(store: Any) -> list[tuple[Any, ...]]:
    table = run(
        store.catalog, "SELECT source_labels, destination_labels, source_labels_id FROM flows ORDER BY seq"
    ).table
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def ids(store: Any) -> list[tuple[int, int]]:
    table = run(
        store.catalog, "SELECT source_labels, destination_labels FROM flow_records ORDER BY seq"
    ).table
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def test_small_numbers_are_on_record_and_stable_ids_in_the_view(lab: Any) -> None:
    web, db = lab.labels("app=web"), lab.labels("app=db")
    lab.ring().put(lab.record(flow=1, source_labels=web, destination_labels=db))
    store = lab.inside()
    store.step()
    assert ids(store) == [(1, 2)]
    assert names(store) == [("app=web", "app=db", WEB.id)]


def test_a_name_told_after_the_record_is_known_from_then_on(lab: Any) -> None:
    lab.ring().put(lab.record(flow=1, source_labels=WEB.id, destination_labels=DB.id))
    store = lab.inside()
    store.step()
    assert names(store) == [(None, None, WEB.id)]
    lab.labels("app=db")
    store.step()
    assert names(store) == [(None, "app=db", WEB.id)]
    store.close()
    again = lab.inside()
    again.step()
    assert names(again) == [(None, "app=db", WEB.id)]
    lab.labels("app=web")
    lab.ring().put(lab.record(flow=2, source_labels=WEB.id, destination_labels=DB.id))
    again.step()
    assert names(again) == [("app=web", "app=db", WEB.id)] * 2
    assert len(set(ids(again))) == 1


def test_numbers_go_on_after_a_restart(lab: Any) -> None:
    web = lab.labels("app=web")
    lab.ring().put(lab.record(flow=1, source_labels=web))
    store = lab.inside()
    store.step()
    store.close()
    db = lab.labels("app=db")
    lab.ring().put(lab.record(flow=2, source_labels=db, destination_labels=web))
    again = lab.inside()
    again.step()
    assert ids(again) == [(1, 0), (2, 1)]


def test_what_a_failed_transaction_gave_out_is_given_out_anew(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = lab.inside()
    ingest = store._ingest
    web = {"type": "dict.labels", "id": WEB.id, "labels": dict(WEB)}

    def full(*_: object) -> None:
        raise duckdb.IOException("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(type(ingest), "_note_position", full)
        with pytest.raises(duckdb.IOException):
            ingest.write([web], None, (1, 1, 0))
    lab.labels("app=db")
    lab.labels("app=web")
    lab.ring().put(lab.record(flow=1, source_labels=WEB.id, destination_labels=DB.id))
    store.step()
    assert names(store) == [("app=web", "app=db", WEB.id)]
    live = ingest.live.alias
    rows = run(store.catalog, "SELECT id, text FROM labels ORDER BY id").table.to_pylist()
    assert rows == [{"id": 1, "text": "app=db"}, {"id": 2, "text": "app=web"}]
    on_disk = store.catalog.cursor().execute(f"SELECT id, text FROM {live}.labels ORDER BY id").fetchall()
    assert on_disk == [(1, "app=db"), (2, "app=web")]


def test_a_segment_that_cannot_be_seen_keeps_its_numbers(lab: Any) -> None:
    web = lab.labels("app=web")
    lab.ring().put(lab.record(flow=1, source_labels=web))
    store = lab.inside()
    store.step()
    path = store._ingest.live.path
    store.close()
    path.chmod(0o640)
    with path.open("r+b") as file:
        file.write(b"\0" * 8192)
    db = lab.labels("app=db")
    lab.ring().put(lab.record(flow=2, source_labels=db))
    again = lab.inside()
    again.step()
    assert [row[0] > 1 << 18 for row in ids(again)] == [True]
