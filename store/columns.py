"""Ring records and JSON events as Arrow columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sectool.events import FIELDS, now_us
from store.schema import DICTIONARIES, RECORD_COLUMNS, REFERENCES

MAX_US = 253_402_300_799_000_000  # the last second of the year 9999
Numbering = Callable[[str, int], int]  # table and stable id, to the store's id

_MAX_ID = (1 << 63) - 1
_COUNTERS = ("source_bytes", "source_packets", "destination_bytes", "destination_packets")
_MAX_COUNT = np.uint64(
    1 << 62
)  # beyond it a sum of two would be an error, and one bad record spoil every query
_DICTIONARY_OF = {
    "dict.identity": "identities",
    "dict.labels": "labels",
    "dict.workload": "workloads",
    "dict.rule": "rules",
}
_ARROW = {
    "BIGINT": pa.int64(),
    "VARCHAR": pa.string(),
    "TIMESTAMP": pa.timestamp("us"),
    "MAP(VARCHAR, VARCHAR)": pa.map_(pa.string(), pa.string()),
}


def records_table(records: NDArray[np.void], first_seq: int, number: Numbering) -> pa.Table:
    """Flow records, numbered from `first_seq`, as the columns of flow_records.

    `number` gives the store's ids for stable ids of a dictionary.
    """
    count = len(records)
    arrays: list[pa.Array] = [pa.array(np.arange(first_seq, first_seq + count, dtype=np.int64))]
    for name, _ in FIELDS:
        if name in ("kind", "_pad"):
            continue
        column = np.ascontiguousarray(records[name])
        if name in ("ts", "start", "end"):
            arrays.append(_times(column, none_is_zero=name == "end"))
        elif name in ("source_ip", "destination_ip"):
            halves = column.view(">u8").reshape(count, 2).astype("<u8")
            arrays.append(pa.array(np.ascontiguousarray(halves[:, 0])))
            arrays.append(pa.array(np.ascontiguousarray(halves[:, 1])))
        elif name == "event_id":  # the first half follows from when the flow began
            halves = column.view(">u8").reshape(count, 2)
            arrays.append(pa.array(halves[:, 1].astype("<u8")))
        elif name == "community":
            arrays.append(pa.array(column.view(">u2").reshape(count, 10)[:, 0].astype("<u2")))
        elif name in REFERENCES:
            arrays.append(_numbered(column, REFERENCES[name], number))
        elif name == "history":
            arrays.append(_letters(column))
        elif name in _COUNTERS:
            arrays.append(pa.array(np.minimum(column, _MAX_COUNT)))
        else:
            arrays.append(pa.array(column))
    return pa.table(arrays, names=[name for name, _ in RECORD_COLUMNS])


def _times(column: NDArray[np.void], *, none_is_zero: bool) -> pa.Array:
    clipped = np.clip(column.view(np.int64), 0, MAX_US)  # a year DuckDB cannot print would spoil every query
    missing = clipped == 0 if none_is_zero else None
    return pa.array(clipped, mask=missing).cast(pa.timestamp("us"))


def _numbered(column: NDArray[np.void], table: str, number: Numbering) -> pa.Array:
    """The store's ids for a column of stable ids: few different values in a batch, so each is looked up once."""
    encoded = pa.array(column.view(np.int64)).dictionary_encode()
    keys = encoded.dictionary.to_pylist()
    ids = pa.array([number(table, key) if key else 0 for key in keys], pa.uint32())
    return ids.take(encoded.indices)


def _letters(column: NDArray[np.void]) -> pa.Array:
    """Zeek history: few different values in a batch, so each is decoded once."""
    words, index = np.unique(column.view("S12"), return_inverse=True)
    texts = [word.decode("ascii", "replace") for word in words.tolist()]
    return pa.DictionaryArray.from_arrays(pa.array(index.astype(np.int32)), pa.array(texts, type=pa.string()))


def events_table(blobs: Iterable[dict[str, Any]], first_seq: int) -> pa.Table:
    """Events as the columns of the table events. What has no sound type or time gets `?` and the present."""
    seqs, times, types, bodies = [], [], [], []
    for seq, blob in enumerate(blobs, first_seq):
        kind, ts = blob.get("type"), blob.get("ts")
        seqs.append(seq)
        types.append(clean(kind) if isinstance(kind, str) and 0 < len(kind) <= 64 else "?")
        times.append(ts if isinstance(ts, int) and 0 <= ts <= MAX_US else now_us())
        bodies.append(clean(json.dumps(blob, ensure_ascii=False, separators=(",", ":"))))
    return pa.table(
        {
            "seq": pa.array(seqs, pa.int64()),
            "ts": pa.array(times, pa.timestamp("us")),
            "type": pa.array(types, pa.string()),
            "body": pa.array(bodies, pa.string()),
        }
    )


def clean(text: str) -> str:
    """`text` without what UTF-8 cannot carry (lone surrogates)."""
    return text.encode("utf-8", "replace").decode("utf-8")


def dictionary_row(blob: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Dictionary table and row of a blob; None for events, and for entries that fit no table (kept as events).

    What the row refers to, and itself, are stable ids: `id` is left to who gives them out.
    """
    table = _DICTIONARY_OF.get(str(blob.get("type")))
    if table is None:
        return None
    row: dict[str, Any] = {}
    for name, kind in DICTIONARIES[table][1:]:
        value = blob.get("id" if name == "key" else name)
        if (table, name) == ("labels", "text"):
            value = _labels_text(blob)
        try:
            row[name] = None if value is None else _fit(value, kind)
        except (TypeError, ValueError):
            return None
    return (table, row) if row["key"] else None


def _labels_text(blob: dict[str, Any]) -> str:
    labels = blob.get("labels")
    if not isinstance(labels, dict):
        raise TypeError
    return ",".join(f"{key}={labels[key]}" for key in sorted(labels))


def _fit(value: Any, kind: str) -> Any:
    match kind:
        case "BIGINT":
            number = int(value)
            if not -_MAX_ID - 1 <= number <= _MAX_ID:
                raise ValueError
            return number
        case "TIMESTAMP":
            return min(max(int(value), 0), MAX_US)
        case "VARCHAR":
            return clean(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        case _:
            if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
                raise TypeError
            return [(clean(key), clean(text)) for key, text in sorted(value.items())]


def dictionary_table(table: str, rows: list[dict[str, Any]]) -> pa.Table:
    """Rows of one dictionary as Arrow."""
    columns = DICTIONARIES[table]
    return pa.table({name: pa.array([row.get(name) for row in rows], _ARROW[kind]) for name, kind in columns})
