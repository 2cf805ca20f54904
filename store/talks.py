"""Which rows speak of a pair: looked up in the index of talks instead of in the rows themselves."""

# ruff: noqa: S608 -- built from this package's own parts and numbers, values are parameters

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from sectool.filters import Field, Filter
from store.filtersql import Condition
from store.index import ALIAS, Stretch
from store.segment import one

if TYPE_CHECKING:
    import duckdb

    from store.narrowing import Rows

_PAIR = frozenset((Field.LABEL, Field.IP, Field.NET))
_ALSO_KNOWN = frozenset((*_PAIR, Field.PROTOCOL))
_ADDRESSES = ("source_ip_hi", "source_ip_lo", "destination_ip_hi", "destination_ip_lo")
MOST_ROWS = 8192  # chosen one by one; beyond, reading whole stretches is quicker
_MOST_LISTED = 64


def about_pairs(filter_: Filter) -> Filter | None:
    """The part of a filter that talks can answer; None when it names no party, which is what makes them few."""
    clauses = tuple(c for c in filter_.clauses if c.field in _ALSO_KNOWN)
    named = any(c.field in _PAIR and not c.negated for c in clauses)
    return Filter(clauses) if named else None


def all_about_pairs(filter_: Filter) -> bool:
    """Whether talks know everything that the filter asks."""
    return all(c.field in _ALSO_KNOWN for c in filter_.clauses)


def rows_of_pairs(
    cursor: duckdb.DuckDBPyConnection, among: Iterable[Stretch], condition: Condition
) -> Rows | None:
    """Rows that `condition` (over the columns of talks) can hold for, by stretch; None when they are too many."""
    return _rows(cursor, among, f"({condition[0]})", condition[1], "")


def rows_of_flows(cursor: duckdb.DuckDBPyConnection, among: Iterable[Stretch], flows: str) -> Rows | None:
    """Rows between the same addresses as those of the table `flows`, which all records of those flows are among."""
    same = " AND ".join(f"t.{c} = p.{c}" for c in _ADDRESSES)
    join = f" SEMI JOIN (SELECT DISTINCT {', '.join(_ADDRESSES)} FROM {flows}) p ON {same}"
    tests = ["true"]
    for column in (
        "source_ip_lo",
        "destination_ip_lo",
    ):  # a list is compared while reading, a join only afterwards
        listed = cursor.execute(f"SELECT DISTINCT {column} FROM {flows} LIMIT {_MOST_LISTED + 1}").fetchall()
        if 0 < len(listed) <= _MOST_LISTED:
            tests.append(f"t.{column} IN ({', '.join(str(int(row[0])) for row in listed)})")
    return _rows(cursor, among, " AND ".join(tests), [], join)


def _rows(
    cursor: duckdb.DuckDBPyConnection,
    among: Iterable[Stretch],
    test: str,
    values: list[object],
    join: str,
) -> Rows | None:
    first = {s.number: s.first for s in among}
    if not first:
        return {}
    numbers = ", ".join(map(str, first))
    cursor.execute(
        f"CREATE OR REPLACE TEMP TABLE found_talks AS SELECT n, seqs FROM {ALIAS}.talks t{join}"
        f" WHERE n BETWEEN {min(first)} AND {max(first)} AND n IN ({numbers}) AND {test} LIMIT {MOST_ROWS + 1}",
        values,
    )
    if int(one(cursor, "SELECT coalesce(sum(len(seqs)), 0) FROM found_talks")[0]) > MOST_ROWS:
        return None
    found = cursor.execute("SELECT n, seqs FROM found_talks").fetchall()
    out: dict[int, list[int]] = {}
    for number, offsets in found:
        out.setdefault(number, []).extend(first[number] + offset for offset in offsets)
    return out
