"""Lists of flows and events: the questions of the CLI and TUI, asked so that they stay fast on millions of rows.

Which flows are wanted is found first, on the numeric columns alone; only their few records are then joined and
turned into words. A flow is in the answer when any of its records matches the filter.
"""

# ruff: noqa: S608 -- SQL is put together from this package's own parts, values are parameters

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import duckdb
import pyarrow as pa

from sectool.errors import UsageError
from sectool.events import Phase
from sectool.filters import Filter
from store.catalog import Catalog
from store.filtersql import Condition, compile_filter
from store.flowidsql import community_of
from store.narrowing import begun_in, narrow, narrow_at, narrow_rows, windows
from store.query import DEFAULT_TIMEOUT_MS, MAX_ROWS, Result, small, time_limit
from store.schema import OPEN_IDS, RECORD_COLUMNS, merged_sql
from store.segment import one
from store.talks import about_pairs, rows_of_flows, rows_of_pairs
from store.wording import Names, flows_table

DEFAULT_COUNT = 1000
_MERGED = merged_sql("picked_records")
_ADDRESSES = "source_ip_hi, source_ip_lo, destination_ip_hi, destination_ip_lo"
_NAMED = (
    f"* REPLACE (event_uuid(event_start, event_id)::VARCHAR AS event_id), {community_of('r')} AS community_id"
)
_WORD = re.compile(r"\w+")
_PICKED = (
    "event_start TIMESTAMP, event_id UBIGINT, source_ip_hi UBIGINT, source_ip_lo UBIGINT, destination_ip_hi UBIGINT,"
    " destination_ip_lo UBIGINT"
)
_KNOWN = f"(r.ts <= make_timestamp(?) OR r.phase = {Phase.VERDICT:d})"  # by a moment: verdicts precede what they tell


def _compile(cursor: duckdb.DuckDBPyConnection, filter_: Filter) -> Condition:
    return compile_filter(
        filter_, lambda sql, values: [int(row[0]) for row in cursor.execute(sql, values).fetchall()]
    )


def _window(since: int | None, until: int | None) -> Condition:
    sql, values = "", []
    if since is not None:
        sql, values = " AND event_start >= make_timestamp(?)", [since]
    if until is not None:
        sql, values = sql + " AND event_start < make_timestamp(?)", [*values, until]
    return sql, values


def list_flows(
    catalog: Catalog,
    filter_: Filter,
    *,
    since: int | None = None,
    until: int | None = None,
    at: int | None = None,
    first: int | None = None,
    last: int | None = None,
    timeout_ms: int = DEFAULT_TIMEOUT_MS,
) -> Result:
    """Flows that began in [since, until), or were open `at` a moment (UTC microseconds), oldest first.

    `first` or `last` of them by event_start; without either, the last 1000. Columns are those of the view flows.
    """
    if first is not None and last is not None:
        raise UsageError("ask for the first or for the last flows, not for both")
    count = min(max(0, next((n for n in (first, last) if n is not None), DEFAULT_COUNT)), MAX_ROWS)
    order = "ASC" if first is not None else "DESC"
    with catalog.reading() as cursor, time_limit(cursor, timeout_ms):
        if at is None:
            more = _pick(catalog, cursor, filter_, since, until, count, order)
        else:
            more = _pick_open(catalog, cursor, filter_, _window(since, until), at, count, order)
        _records(catalog, cursor, at)
        merged = small(cursor, f"SELECT * FROM ({_MERGED}) ORDER BY event_start, event_id")
        return Result(flows_table(cursor, merged, Names()), more)


def _pick(
    catalog: Catalog,
    cursor: duckdb.DuckDBPyConnection,
    filter_: Filter,
    since: int | None,
    until: int | None,
    count: int,
    order: str,
) -> bool:
    """Fill the temporary table `picked` with the ids of up to `count` flows; whether there are more."""
    condition, values = _compile(cursor, filter_)
    pairs = about_pairs(filter_)
    of_pairs = None if pairs is None else _compile(cursor, pairs)
    columns = _asked(condition)
    cursor.execute(f"CREATE TEMP TABLE chosen ({_PICKED})")
    found = 0
    for low, high in windows(catalog, since, until, newest_first=order == "DESC"):
        among = begun_in(catalog, low, high) if of_pairs is not None else ()
        rows = rows_of_pairs(cursor, among, of_pairs) if of_pairs is not None and among else None
        if rows is not None:
            narrow_rows(catalog, cursor, rows, low, high, columns)
        else:
            narrow(catalog, cursor, low, high, columns=columns)
        found += _candidates(cursor, (condition, values), _window(low, high), count - found, order)
        cursor.execute("INSERT INTO chosen SELECT * FROM candidates")
        if found > count:
            break
    _keep(cursor, "chosen", count, order)
    return found > count


def _asked(condition: str) -> str:
    """The columns of flow_records that finding candidates takes."""
    words = {*_WORD.findall(condition), *_WORD.findall(_PICKED), "seq", "phase"}
    return ", ".join(f'"{name}"' for name, _ in RECORD_COLUMNS if name in words)


def _candidates(
    cursor: duckdb.DuckDBPyConnection, condition: Condition, window: Condition, count: int, order: str
) -> int:
    """Fill `candidates` with the first `count` flows, and one more if there is one; how many they are."""
    # A flow has several records: look at more of them until enough are distinct.
    records = count + count // 2 + 64
    while True:
        cursor.execute(
            f"CREATE OR REPLACE TEMP TABLE candidates AS SELECT event_start, event_id, {_ADDRESSES} FROM flow_records"
            f" WHERE {condition[0]}{window[0]} ORDER BY event_start {order}, event_id {order} LIMIT {records}",
            [*condition[1], *window[1]],
        )
        found, distinct = one(cursor, "SELECT count(*), count(DISTINCT event_id) FROM candidates")
        if found < records or distinct > count:
            return min(int(distinct), count + 1)
        records *= 4


def _pick_open(
    catalog: Catalog,
    cursor: duckdb.DuckDBPyConnection,
    filter_: Filter,
    window: Condition,
    at: int,
    count: int,
    order: str,
) -> bool:
    condition, values = _compile(cursor, filter_)
    narrow_at(catalog, cursor, at)
    cursor.execute("CREATE TEMP TABLE opened AS " + OPEN_IDS.replace("$moment", "make_timestamp($1)"), [at])
    cursor.execute(
        f"CREATE TEMP TABLE chosen AS SELECT r.event_start, r.event_id, {_ADDRESSES} FROM flow_records r"
        " SEMI JOIN opened o ON r.event_start = o.event_start AND r.event_id = o.event_id"
        f" WHERE ({condition}){window[0].replace('event_start', 'r.event_start')} AND {_KNOWN}",
        [*values, *window[1], at],
    )
    _keep(cursor, "chosen", count, order)
    return int(one(cursor, "SELECT count(DISTINCT event_id) FROM chosen")[0]) > count


def _keep(cursor: duckdb.DuckDBPyConnection, table: str, count: int, order: str) -> None:
    addresses = ", ".join(f"any_value({column}) AS {column}" for column in _ADDRESSES.split(", "))
    cursor.execute(
        f"CREATE TEMP TABLE picked AS SELECT event_start, event_id, {addresses} FROM {table}"
        f" GROUP BY event_start, event_id ORDER BY event_start {order}, event_id {order} LIMIT {count}"
    )


def _records(catalog: Catalog, cursor: duckdb.DuckDBPyConnection, at: int | None) -> None:
    """Fill `picked_records` with all records of the flows `picked`, as far as they were known `at` a moment."""
    first, last = one(cursor, "SELECT epoch_us(min(event_start)), epoch_us(max(event_start)) FROM picked")
    if first is None:
        first, last = 0, 0
    among = narrow(catalog, cursor, first, last + 1) if at is None else narrow_at(catalog, cursor, at, {})
    rows = rows_of_flows(cursor, among, "picked") if among else None
    if at is not None:
        narrow_at(catalog, cursor, at, rows, again=True)
    elif rows is not None:
        narrow_rows(catalog, cursor, rows, first, last + 1)
    cursor.execute(
        "CREATE TEMP TABLE picked_records AS SELECT r.* FROM flow_records r"
        " SEMI JOIN picked p ON r.event_start = p.event_start AND r.event_id = p.event_id"
        f" WHERE r.event_start BETWEEN make_timestamp(?) AND make_timestamp(?){'' if at is None else f' AND {_KNOWN}'}",
        [first, last, *([] if at is None else [at])],
    )


class Tail:
    """New flows by sequence number, for one follower."""

    def __init__(self, filter_: Filter, next_seq: int) -> None:
        self._filter = filter_
        self._names = Names()
        self.next_seq = next_seq

    def advance(self, catalog: Catalog, source: str, end: int, limit: int) -> pa.Table | None:
        """Flows whose verdict has a number from `next_seq` up to and without `end`, at most `limit`; None: none.

        `source` is the relation to read, as narrow as the caller knows how (the live segment's flow_records).
        """
        with catalog.reading() as cursor, time_limit(cursor, DEFAULT_TIMEOUT_MS):
            condition, values = _compile(cursor, self._filter)
            cursor.execute(
                f"SELECT {_NAMED} FROM {source} r WHERE seq >= ? AND seq < ?"
                f" AND phase = {Phase.VERDICT:d} AND ({condition}) ORDER BY seq LIMIT {limit}",
                [self.next_seq, end, *values],
            )
            records = cursor.to_arrow_table()
            assert records is not None
            found = records.num_rows
            self.next_seq = end if found < limit else records["seq"][-1].as_py() + 1
            return flows_table(cursor, records, self._names) if found else None


def no_new_flows(catalog: Catalog) -> pa.Table:
    """What a follower gets when there is nothing: an empty table with the columns of flows."""
    with catalog.reading() as cursor:
        nothing = small(cursor, f"SELECT {_NAMED} FROM flow_records r LIMIT 0")
        return flows_table(cursor, nothing, Names())


def list_events(
    catalog: Catalog,
    types: Sequence[str] = (),
    *,
    since: int | None = None,
    until: int | None = None,
    first: int | None = None,
    last: int | None = None,
    timeout_ms: int = DEFAULT_TIMEOUT_MS,
) -> Result:
    """Events that are no flows (columns seq, ts, type, body) in [since, until), oldest first.

    A type ending in `.*` stands for all that begin so. `first` or `last` as in `list_flows`.
    """
    if first is not None and last is not None:
        raise UsageError("ask for the first or for the last events, not for both")
    count = min(max(0, next((n for n in (first, last) if n is not None), DEFAULT_COUNT)), MAX_ROWS)
    order = "ASC" if first is not None else "DESC"
    tests: list[str] = []
    values: list[Any] = []
    for kind in types:
        stem = kind.removesuffix("*")
        tests.append("type = ?" if stem == kind else "starts_with(type, ?)")
        values.append(stem)
    where = f"({' OR '.join(tests)})" if tests else "true"
    window = _window(since, until)
    with catalog.reading() as cursor, time_limit(cursor, timeout_ms):
        cursor.execute(
            "CREATE TEMP TABLE picked AS SELECT * FROM events"
            f" WHERE {where}{window[0].replace('event_start', 'ts')}"
            f" ORDER BY ts {order}, seq {order} LIMIT {count + 1}",
            [*values, *window[1]],
        )
        table = small(cursor, "SELECT * FROM picked ORDER BY ts, seq")
        more = table.num_rows > count
        if more:
            table = table.slice(0, count) if first is not None else table.slice(table.num_rows - count)
        return Result(table, more)
