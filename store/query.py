"""Somebody else's SQL, run so that it can read the events and do nothing else.

What keeps it harmless, from the outside in: exactly one statement, which is a SELECT to DuckDB's own parser, as is all
that it is made of; no table function but those of `TABLE_FUNCTIONS`; a read-only transaction; an instance that can
touch no file outside the folder of segments and whose settings are locked (store.catalog); limits on time, rows and
bytes; and for what escapes all these, limits on the process (store.bounds).
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from sectool.errors import Exit, SectoolError, UsageError
from store import bounds
from store.catalog import Catalog
from store.controlviews import AT_A_MOMENT
from store.narrowing import narrow
from store.segment import one

# The copy it warns of is what spares the second planning (see `small`).
warnings.filterwarnings("ignore", message="Arrow output on a DB-API result")

MAX_SQL = 100_000  # characters
MAX_ROWS = 1_000_000
MAX_BYTES = 128 << 20
BATCH_ROWS = 2048
CHUNK_BYTES = 4 << 20  # of a stream
DEFAULT_ROWS = 10_000
DEFAULT_TIMEOUT_MS = 10_000
MAX_TIMEOUT_MS = 600_000

TABLE_FUNCTIONS = frozenset(
    {
        *("flows_between", "flows_open_at"),
        *AT_A_MOMENT,
        *("range", "generate_series", "unnest", "repeat", "repeat_row", "json_each", "json_tree", "summary"),
        *(
            "duckdb_tables",
            "duckdb_views",
            "duckdb_columns",
            "duckdb_functions",
            "duckdb_types",
            "duckdb_settings",
        ),
        *("pragma_table_info", "pragma_version", "pragma_database_size"),
    }
)


QUERY_NODES = frozenset({"SELECT_NODE", "SET_OPERATION_NODE", "RECURSIVE_CTE_NODE", "CTE_NODE"})
WHEN_STUCK: list[Callable[[], None]] = []  # what the store process does about a query that does not stop
_NO_MEMORY = re.compile(r"out of memory|bad_alloc|allocation fail|cannot allocate memory", re.IGNORECASE)
_FILE = re.compile(r"[/\\*?:]|\.[a-z]", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Result:
    """Rows of a query. `truncated` when there were more than the limits let through; `limited` by which of them."""

    table: pa.Table
    truncated: bool
    limited: str = ""  # "rows", "bytes", or nothing known


class StoppedError(SectoolError):
    """A query was stopped at its time limit."""

    exit_code = Exit.PARTIAL


def check(cursor: duckdb.DuckDBPyConnection, sql: str) -> str:
    """The one statement in `sql`. Raises UsageError when it is not one SELECT of allowed parts."""
    if len(sql) > MAX_SQL:
        raise UsageError(f"the query has {len(sql)} characters; at most {MAX_SQL} are allowed")
    try:
        sql.encode()
        statements = cursor.extract_statements(sql)
    except (duckdb.Error, UnicodeError) as error:
        raise _refused(error) from None
    if len(statements) != 1:
        raise UsageError(f"one query at a time, please; these are {len(statements)}")
    if not _is_select(statements[0]):
        raise UsageError(
            "only SELECT can be asked here",
            "events are never changed; policy is changed with `sectool policy`",
        )
    text = str(statements[0].query)
    try:
        row = one(
            cursor, "SELECT json_serialize_sql(?::VARCHAR, skip_null := true, skip_empty := true)", [text]
        )
    except duckdb.Error as error:
        raise _refused(error) from None
    try:
        tree = json.loads(row[0])
    except RecursionError:
        raise UsageError("this query is nested too deep", "say it with fewer levels, or with WITH") from None
    if tree.get("error"):
        raise UsageError(f"this query is not understood: {tree.get('error_message', 'not a plain SELECT')}")
    for node in _nodes(tree):
        kind = str(node.get("type", ""))
        if (kind.endswith("_NODE") and kind not in QUERY_NODES) or "info_type" in node:
            # A CTE may be a COPY: it writes into the folder of segments, whatever the transaction.
            raise UsageError("only SELECT can be asked here, in WITH too", "nothing can be written from here")
    for name in _tables(tree):
        if _FILE.search(name):  # the engine would read a file of that name, were it in the folder of segments
            raise UsageError(
                "files cannot be read from here", "views: flows, flow_records, events; see docs/store.md"
            )
    for name in _table_functions(tree):
        if name not in TABLE_FUNCTIONS:
            raise UsageError(
                f"the function {name} cannot be read from here",
                "views: flows, flow_records, events, changes; see docs/store.md",
            )
    return text


def _is_select(statement: Any) -> bool:
    try:
        return bool(statement.type == duckdb.StatementType.SELECT)
    except ValueError:  # of a kind that the engine's Python side has no name for
        return False


def _nodes(tree: Any) -> Iterator[dict[str, Any]]:
    todo = [tree]
    while todo:
        node = todo.pop()
        if isinstance(node, dict):
            yield node
            todo.extend(node.values())
        elif isinstance(node, list):
            todo.extend(node)


def _table_functions(tree: Any) -> Iterator[str]:
    for node in _nodes(tree):
        if node.get("type") == "TABLE_FUNCTION":
            yield str(node.get("function", {}).get("function_name", "?")).lower()


def _tables(tree: Any) -> Iterator[str]:
    return (
        str(node["table_name"])
        for node in _nodes(tree)
        if node.get("type") == "BASE_TABLE" and "table_name" in node
    )


@contextlib.contextmanager
def time_limit(cursor: duckdb.DuckDBPyConnection, timeout_ms: int) -> Iterator[None]:
    """Interrupt what runs on `cursor` after `timeout_ms` (StoppedError). Other errors of SQL become UsageError.

    When it does not stop within bounds.STUCK_S, WHEN_STUCK is called.
    """
    expired = threading.Event()
    done = threading.Event()

    def stop() -> None:
        if not done.wait(timeout_ms / 1000):
            expired.set()
            told = time.monotonic()
            while not done.wait(0.05):  # an interrupt between two steps of the same query would go unheard
                cursor.interrupt()
                if WHEN_STUCK and time.monotonic() - told > bounds.STUCK_S:
                    WHEN_STUCK[0]()
                    return

    watch = threading.Thread(target=stop, name="query time limit", daemon=True)
    watch.start()
    try:
        yield
    except (duckdb.Error, pa.ArrowException, OSError, MemoryError) as error:
        raise _explain(error, timeout_ms if expired.is_set() else None) from None
    finally:
        done.set()
        watch.join()


def _too_long(timeout_ms: int) -> StoppedError:
    return StoppedError(
        f"the query took longer than {timeout_ms / 1000:g} s and was stopped",
        "narrow it with a time range (flows_between) or raise its time limit",
    )


def _explain(error: Exception, expired_ms: int | None) -> SectoolError:
    """An error of the engine, raised as its own kind or from within an Arrow stream, in words for people."""
    text = str(error)
    if isinstance(error, duckdb.InterruptException) or "INTERRUPT" in text:
        if expired_ms is not None:
            return _too_long(expired_ms)
        return StoppedError("the query was stopped to make room", "try again in a moment")
    if isinstance(error, duckdb.OutOfMemoryException | MemoryError) or _NO_MEMORY.search(text):
        return StoppedError(
            "the query needs more memory than the store gives it", "narrow it, or aggregate less at once"
        )
    return _refused(error)


def run(
    catalog: Catalog,
    sql: str,
    *,
    limit: int = DEFAULT_ROWS,
    timeout_ms: int = DEFAULT_TIMEOUT_MS,
    begun: tuple[int, int] | None = None,
) -> Result:
    """Run one SELECT of somebody else. Raises UsageError for bad SQL, StoppedError at its time limit.

    `begun`: the asker says that only flows begun from then until then (UTC microseconds) can be in the answer.
    """
    limit = min(max(limit, 0), MAX_ROWS)
    timeout_ms = min(max(timeout_ms, 1), MAX_TIMEOUT_MS)
    with catalog.reading() as cursor, time_limit(cursor, timeout_ms):
        statement = check(cursor, sql)
        catalog.control.refresh(cursor, statement)
        if begun is not None:
            narrow(catalog, cursor, *begun)
        cursor.execute("BEGIN TRANSACTION READ ONLY")
        try:
            return fetch(cursor, statement, limit)
        finally:
            with contextlib.suppress(duckdb.Error):
                cursor.execute("ROLLBACK")


def explain(
    catalog: Catalog, sql: str, *, analyze: bool = False, timeout_ms: int = DEFAULT_TIMEOUT_MS
) -> str:
    """The plan of one SELECT of somebody else, as text; with `analyze` it is run, and each step's rows and time told.

    Raises UsageError for bad SQL, StoppedError at its time limit.
    """
    timeout_ms = min(max(timeout_ms, 1), MAX_TIMEOUT_MS)
    with catalog.reading() as cursor, time_limit(cursor, timeout_ms):
        statement = check(cursor, sql)
        catalog.control.refresh(cursor, statement)
        cursor.execute("BEGIN TRANSACTION READ ONLY")
        try:
            rows = cursor.execute(f"EXPLAIN {'ANALYZE ' if analyze else ''}{statement}").fetchall()
        finally:
            with contextlib.suppress(duckdb.Error):
                cursor.execute("ROLLBACK")
    return "\n".join(str(row[-1]).rstrip("\n") for row in rows) + "\n"


def stream(
    catalog: Catalog, sql: str, *, timeout_ms: int = DEFAULT_TIMEOUT_MS
) -> Generator[pa.Table, None, None]:
    """All rows of one SELECT of somebody else, in tables of some megabytes; the first one is there without rows, too.

    Raises UsageError for bad SQL, StoppedError when it is not over after `timeout_ms`, what is done with the tables in
    between included. Only while it computes is it under a time limit of the engine: who takes long over a table holds
    up nobody but himself.
    """
    ends = time.monotonic() + min(max(timeout_ms, 1), MAX_TIMEOUT_MS) / 1000
    with catalog.reading() as cursor:
        with time_limit(cursor, _left(ends, timeout_ms)):
            statement = check(cursor, sql)
            catalog.control.refresh(cursor, statement)
            cursor.execute("BEGIN TRANSACTION READ ONLY")
            reader = cursor.sql(statement).to_arrow_reader(BATCH_ROWS)
        try:
            first = True
            while True:
                with time_limit(cursor, _left(ends, timeout_ms)):
                    table = _some(reader)
                if not table.num_rows and not first:
                    return
                first = False
                rows = max(
                    1, table.num_rows * 2 * CHUNK_BYTES // max(1, table.nbytes)
                )  # of huge rows, few at once
                for begin in range(0, max(1, table.num_rows), rows):
                    yield table.slice(begin, rows)
                del table  # before the next one is made
        finally:
            with contextlib.suppress(duckdb.Error):
                cursor.execute("ROLLBACK")


def _some(reader: pa.RecordBatchReader) -> pa.Table:
    """The next rows, CHUNK_BYTES or a little more; none at the end."""
    batches: list[pa.RecordBatch] = []
    size = 0
    while size < CHUNK_BYTES:
        try:
            batch = reader.read_next_batch()
        except StopIteration:
            break
        if batch.num_rows:
            batches.append(batch)
            size += batch.nbytes
    return pa.Table.from_batches(batches, reader.schema)


def _left(ends: float, timeout_ms: int) -> int:
    left = round((ends - time.monotonic()) * 1000)
    if left <= 0:
        raise _too_long(timeout_ms)
    return left


def fetch(cursor: duckdb.DuckDBPyConnection, sql: str, limit: int) -> Result:
    """The rows of one SELECT as far as the limits allow; what lies beyond is never computed."""
    reader = cursor.sql(sql).to_arrow_reader(BATCH_ROWS)
    batches: list[pa.RecordBatch] = []
    rows = size = 0
    limited = ""
    for batch in reader:
        if not batch.num_rows:
            continue
        keep = min(batch.num_rows, limit - rows)
        if keep < batch.num_rows:
            limited = "rows"
        if size + batch.nbytes > MAX_BYTES and (fits := _fitting(batch, MAX_BYTES - size)) < keep:
            keep, limited = fits, "bytes"
        if keep:
            batches.append(batch if keep == batch.num_rows else batch.slice(0, keep))
            rows += keep
            size += batches[-1].nbytes
        if limited:
            break
    return Result(pa.Table.from_batches(batches, reader.schema), bool(limited), limited)


def _fitting(batch: pa.RecordBatch, room: int) -> int:
    """How many rows from the first on have at most `room` bytes."""
    low, high = 0, batch.num_rows
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if batch.slice(0, middle).nbytes <= room else (low, middle - 1)
    return low


def small(cursor: duckdb.DuckDBPyConnection, sql: str) -> pa.Table:
    """All rows of one of our own queries. Half the planning of `fetch`, which matters when the rows are few."""
    return cursor.execute(sql).to_arrow_table()


def _refused(error: Exception) -> UsageError:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return UsageError(
        f"the query fails: {lines[0][:500] if lines else type(error).__name__}", "\n".join(lines[1:6])[:500]
    )
