"""Questions made to read only what can be in their answer, by what the index knows.

A temporary view `flow_records` of one cursor stands before the one of all segments; whatever is asked on that cursor
afterwards (also the views and macros built on it) sees it. It leaves out only what the question cannot see:

    narrow       records of the flows that began in a stretch of time
    narrow_at    what decides which flows were open at a moment, and how they stood then
    narrow_rows  chosen rows, and whatever is not indexed yet

Rows that are not indexed are always part of it, so that the answer is the same with an index, a part of one, or none.
"""

# ruff: noqa: S608 -- built from aliases of the catalog, column names and numbers

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from sectool.events import Phase
from store.index import ALIAS, COLUMNS, Stretch, stem

if TYPE_CHECKING:
    import duckdb

    from store.catalog import Catalog

Span = tuple[int, int]
Rows = Mapping[int, Collection[int]]  # sequence numbers by stretch
_MOST = (1 << 62) - 1


def narrow(
    catalog: Catalog,
    cursor: duckdb.DuckDBPyConnection,
    since: int | None,
    until: int | None,
    but: Collection[int] = (),
    columns: str = COLUMNS,
) -> tuple[Stretch, ...]:
    """Only flows that began in [since, until) (UTC microseconds) are asked about; the stretches they are in.

    Without the rows of the stretches `but` (numbers), though with what other stretches have of their flows. `columns`
    are those that will be asked for: there may be hundreds of parts, and each is planned with all of them.
    """
    known = stretches(catalog)
    if not known or (since is None and until is None and not but):
        widen(cursor)
        return known
    chosen = begun_in(catalog, since, until)
    read = {s.number for s in chosen} - set(but)
    late = (
        f"SELECT {columns} FROM {ALIAS}.late WHERE n <= {known[-1].number} AND {_begun(since, until)}"
        f"{_but('n', read)}"
    )
    _see(cursor, [*_rows(catalog, known, lambda s: s.number in read, columns), late])
    return chosen


def begun_in(catalog: Catalog, since: int | None, until: int | None) -> tuple[Stretch, ...]:
    """The stretches that have flows begun in [since, until) (UTC microseconds)."""
    first, last = since or 0, _MOST if until is None else until
    return tuple(s for s in stretches(catalog) if s.begins and s.begins[1] >= first and s.begins[0] < last)


def narrow_at(
    catalog: Catalog,
    cursor: duckdb.DuckDBPyConnection,
    moment: int,
    rows: Rows | None = None,
    *,
    again: bool = False,
) -> tuple[Stretch, ...]:
    """Only which flows were open at `moment` (UTC microseconds) is asked, and what was known of them then.

    Returns the stretches that are read; given `rows`, only those of them. `again` (as with `rows`): this moment was
    asked about on this cursor before.
    """
    known = stretches(catalog)
    if not known:
        widen(cursor)
        return known
    touched = [s for s in known if _touches(s, moment)]
    read = {s.number for s in touched}
    newest = known[-1].number
    then = f"make_timestamp({moment})"
    if rows is None and not again:
        opened = (
            f"FROM {ALIAS}.crossing WHERE n <= {newest} AND event_start <= {then}"
            f" AND (gone IS NULL OR gone > {newest} OR closed > {then})"
        )
        cursor.execute(
            f"CREATE OR REPLACE TEMP TABLE at_crossing AS SELECT {COLUMNS} {opened}{_but('n', read)}"
        )
        cursor.execute(
            f"CREATE OR REPLACE TEMP TABLE at_late AS SELECT {COLUMNS} FROM {ALIAS}.late l SEMI JOIN"
            f" (SELECT event_start, event_id {opened}) c ON l.event_start = c.event_start AND l.event_id = c.event_id"
            f" WHERE n <= {newest} AND phase = {Phase.UPDATE:d} AND ts <= {then}{_but('n', read)}"
        )
    # Begun in what is read, ended elsewhere, and ended by then: without a word of it they would look open.
    ended = COLUMNS.replace('"phase"', f"{Phase.END:d}::UTINYINT AS phase").replace(
        '"event_end"', "closed AS event_end"
    )
    _see(
        cursor,
        [
            *(
                _rows(catalog, known, lambda s: s.number in read)
                if rows is None
                else _chosen(catalog, known, rows)
            ),
            f"SELECT {COLUMNS} FROM at_crossing",
            f"SELECT {COLUMNS} FROM at_late",
            f"SELECT {ended} FROM {ALIAS}.crossing WHERE n <= {newest} AND gone <= {newest}{_among('n', read)}"
            f"{_but('gone', read)} AND coalesce(closed <= {then}, true)",
        ],
    )
    return tuple(touched)


def narrow_rows(
    catalog: Catalog,
    cursor: duckdb.DuckDBPyConnection,
    rows: Rows,
    since: int | None,
    until: int | None,
    columns: str = COLUMNS,
) -> None:
    """Only `rows` are asked about, and what is not among them by its nature: records in other stretches of the flows
    that began in [since, until), and what is not indexed."""
    known = stretches(catalog)
    late = f"SELECT {columns} FROM {ALIAS}.late WHERE n <= {known[-1].number if known else 0}"
    _see(
        cursor,
        [*_chosen(catalog, known, rows, columns), f"{late} AND {_begun(since, until)}{_but('n', rows)}"],
    )


def widen(cursor: duckdb.DuckDBPyConnection) -> None:
    """Everything is asked about again."""
    cursor.execute("DROP VIEW IF EXISTS temp.main.flow_records")


def stretches(catalog: Catalog) -> tuple[Stretch, ...]:
    """What is indexed now."""
    return catalog.index.stretches if catalog.index is not None else ()


def windows(
    catalog: Catalog, since: int | None, until: int | None, *, newest_first: bool
) -> Iterator[tuple[int | None, int | None]]:
    """[since, until) cut into windows to be asked one after the other until there is enough, each twice the rows of
    the one before. One window when nothing is indexed."""
    begins = [
        s.begins
        for s in stretches(catalog)
        if s.begins and (since is None or s.begins[1] >= since) and (until is None or s.begins[0] < until)
    ]
    edges = sorted((b[0] for b in begins), reverse=True) if newest_first else sorted(b[1] + 1 for b in begins)
    size, place = 1, 0
    while place + size < len(edges):
        place += size
        edge = edges[place - 1]
        if newest_first and (since is None or edge > since):
            yield edge, until
            until = edge
        elif not newest_first and (until is None or edge < until):
            yield since, edge
            since = edge
        size *= 2
    yield since, until


def _begun(since: int | None, until: int | None) -> str:
    tests = [] if since is None else [f"event_start >= make_timestamp({since})"]
    tests += [] if until is None else [f"event_start < make_timestamp({until})"]
    return " AND ".join(tests) or "true"


def _chosen(catalog: Catalog, known: Iterable[Stretch], rows: Rows, columns: str = COLUMNS) -> list[str]:
    """SELECTs of chosen rows, and of those that are not indexed."""
    by_stem = _by_stem(known)
    parts: list[str] = []
    for name in catalog.segments:
        relation, mine = f"{catalog.alias(name)}.flow_records", by_stem.get(stem(name), [])
        wanted = sorted(itertools.chain.from_iterable(rows.get(s.number, ()) for s in mine))
        if wanted:
            parts.append(f"SELECT {columns} FROM {relation} WHERE seq IN ({', '.join(map(str, wanted))})")
        parts += _rest(relation, mine, columns)
    return parts


def _by_stem(known: Iterable[Stretch]) -> dict[str, list[Stretch]]:
    out: dict[str, list[Stretch]] = {}
    for one in known:
        out.setdefault(one.stem, []).append(one)
    return out


def _touches(one: Stretch, moment: int) -> bool:
    """Whether rows of it can decide what was open at a moment: not all over by then, and not all later."""
    over = one.later is None or one.later[1] <= moment
    later = (one.begins is None or one.begins[0] > moment) and (one.later is None or one.later[0] > moment)
    return not over and not later


def _rows(
    catalog: Catalog, known: Iterable[Stretch], chosen: Callable[[Stretch], bool], columns: str = COLUMNS
) -> list[str]:
    """SELECTs of all rows of chosen stretches, and of those that are not indexed."""
    by_stem = _by_stem(known)
    parts: list[str] = []
    for name in catalog.segments:
        relation, mine = f"{catalog.alias(name)}.flow_records", by_stem.get(stem(name), [])
        picked = [s for s in mine if chosen(s)]
        if mine and mine[-1].whole and len(picked) == len(mine):
            parts.append(f"SELECT {columns} FROM {relation}")
            continue
        parts += [
            f"SELECT {columns} FROM {relation} WHERE seq BETWEEN {low} AND {high}"
            for low, high in _runs(picked)
        ]
        parts += _rest(relation, mine, columns)
    return parts


def _runs(picked: Iterable[Stretch]) -> list[Span]:
    """Ranges of rows, neighbours made one."""
    out: list[Span] = []
    for one in picked:
        if out and out[-1][1] + 1 == one.first:
            out[-1] = (out[-1][0], one.last)
        else:
            out.append((one.first, one.last))
    return out


def _rest(relation: str, mine: list[Stretch], columns: str) -> list[str]:
    if not mine:
        return [f"SELECT {columns} FROM {relation}"]
    return [] if mine[-1].whole else [f"SELECT {columns} FROM {relation} WHERE seq > {mine[-1].last}"]


def _see(cursor: duckdb.DuckDBPyConnection, parts: list[str]) -> None:
    cursor.execute("CREATE OR REPLACE TEMP VIEW flow_records AS " + " UNION ALL ".join(parts))


def _but(column: str, numbers: Iterable[int]) -> str:
    listed = ", ".join(map(str, sorted(numbers)))
    return f" AND {column} NOT IN ({listed})" if listed else ""


def _among(column: str, numbers: Iterable[int]) -> str:
    listed = ", ".join(map(str, sorted(numbers)))
    return f" AND {column} IN ({listed})" if listed else " AND false"
