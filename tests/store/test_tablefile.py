"""Results for other programs: every type that SQL can give is written and read back, or becomes text."""

from __future__ import annotations

import io
from datetime import datetime

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from store.tablefile import ArrowFile, ParquetFile, unique, values

ODD = {
    "TIMESTAMP 'infinity'": "infinity",
    "TIMESTAMP '12026-01-01'": "12026-01-01 00:00:00",
    "DATE '-infinity'": "-infinity",
    "INTERVAL '3 months 1 day'": "3 months 1 day",
    "123::BIGNUM": "123",
    "TIMESTAMP_NS '2026-01-01 00:00:00.123456789'": "2026-01-01 00:00:00.123456789",
    "[TIMESTAMP 'infinity']": "[infinity]",
    "union_value(a := 1)": 1,
    "TIMESTAMP '2026-01-01 00:00:00'": datetime(2026, 1, 1),  # noqa: DTZ001
    "NULL": None,
    "170141183460469231731687303715884105727::HUGEINT": 170141183460469231731687303715884105727,
    "MAP {'a': 1}": [("a", 1)],
}


def asked(sql: str) -> pa.Table:
    """What the engine answers."""
    with duckdb.connect() as engine:
        return engine.sql(sql).to_arrow_table()


@pytest.mark.parametrize("expression", ODD)
def test_every_type_has_a_value_and_fits_a_file(expression: str) -> None:
    table = asked(f"SELECT {expression} AS x UNION ALL SELECT NULL")
    assert values(table["x"]) == [ODD[expression], None]
    out = io.BytesIO()
    for file, read in (
        (ArrowFile(out), lambda data: pa.ipc.open_file(data).read_all()),
        (ArrowFile(out, streamed=True), lambda data: pa.ipc.open_stream(data).read_all()),
        (ParquetFile(out), pq.read_table),
    ):
        for _ in range(2):
            file.write(table)
        file.close()
        back = read(pa.py_buffer(out.getvalue()))
        assert [str(value) for value in values(back["x"])] == 2 * [str(ODD[expression]), "None"]
        out.seek(0)
        out.truncate()


def test_columns_of_one_name_are_told_apart() -> None:
    out = io.BytesIO()
    file = ParquetFile(out)
    file.write(asked("SELECT 1 AS a, 2 AS a_2, 3 AS b").rename_columns(["a", "a_2", "a"]))
    file.close()
    assert pq.read_table(pa.py_buffer(out.getvalue())).to_pylist() == [{"a": 1, "a_2": 2, "a_3": 3}]


@settings(max_examples=50)
@given(st.lists(st.text(alphabet="a_23", max_size=4), max_size=8))
def test_names_become_unique_and_keep_their_order(names: list[str]) -> None:
    """Invariant: as many names, all different, each beginning as the one it stands for."""
    made = unique(names)
    assert len(set(made)) == len(names)
    assert all(new.startswith(old) for new, old in zip(made, names, strict=True))
