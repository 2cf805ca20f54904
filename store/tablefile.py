"""The result of a query as other programs take it: Arrow and Parquet; values as text where nothing else fits."""

from __future__ import annotations

from typing import IO, Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq


def unique(names: list[str]) -> list[str]:
    """Column names, made different where SQL lets two be equal."""
    out: list[str] = []
    for name in names:
        candidate, number = name, 2
        while candidate in out:
            candidate, number = f"{name}_{number}", number + 1
        out.append(candidate)
    return out


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column's values as SQL writes them: `infinity`, `1 day`. Raises duckdb.Error for types it cannot read."""
    with duckdb.connect(":memory:", config={"enable_external_access": "false"}) as engine:
        engine.register("t", pa.table({"x": column}))
        return engine.sql("SELECT x::VARCHAR AS x FROM t").to_arrow_table()["x"]


def values(column: pa.ChunkedArray) -> list[Any]:
    """A column's values for Python; as text those that it has no type for (intervals, times beyond the year 9999)."""
    if pa.types.is_interval(column.type) or isinstance(column.type, pa.BaseExtensionType):
        return list(as_text(column).to_pylist())
    try:
        return list(column.to_pylist())
    except (OverflowError, ValueError):
        return list(as_text(column).to_pylist())


class ArrowFile:
    """An Arrow IPC file (`.arrow`), or a stream, which can be read from a pipe. All tables have one schema."""

    def __init__(self, out: IO[bytes], *, streamed: bool = False) -> None:
        self._out = out
        self._make = pa.ipc.new_stream if streamed else pa.ipc.new_file
        self._writer: Any = None

    def write(self, table: pa.Table) -> None:
        """Append the rows of `table`."""
        if self._writer is None:
            self._writer = self._make(self._out, table.schema)
        self._writer.write_table(table)

    def close(self) -> None:
        """Write the end. The file itself is its maker's to close."""
        if self._writer is not None:
            self._writer.close()


class ParquetFile:
    """A Parquet file (zstd). Columns of a type that Parquet has none for become text. All tables have one schema."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self._writer: Any = None

    def write(self, table: pa.Table) -> None:
        """Append the rows of `table`."""
        columns = [c if _parquet_has(c) else as_text(c) for c in table.columns]
        fitting = pa.table(columns, names=unique(table.column_names))
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._out, fitting.schema, compression="zstd")
        self._writer.write_table(fitting)

    def close(self) -> None:
        """Write the end. The file itself is its maker's to close."""
        if self._writer is not None:
            self._writer.close()


def _parquet_has(column: pa.ChunkedArray) -> bool:
    try:
        pq.write_table(pa.table({"x": column.slice(0, 0)}), pa.BufferOutputStream())
    except pa.ArrowNotImplementedError:
        return False
    return True
