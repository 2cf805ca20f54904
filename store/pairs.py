"""Who talks to whom: flows added up by parties and service, in SQL, over numbers alone.

A party is its label set; without one, its address. Names are looked up for the few rows that are shown.
"""

# ruff: noqa: S608 -- SQL is put together from this package's own parts, values are parameters

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import duckdb

from sectool.events import Action, Encryption, Phase
from store.filtersql import Condition
from store.index import ALIAS as INDEX
from store.index import SERVICE
from store.narrowing import narrow, narrow_at, stretches
from store.query import small
from store.schema import OPEN_IDS
from store.timeline import party, service_text

if TYPE_CHECKING:
    from store.catalog import Catalog

EVERYTHING: Condition = ("true", [])
KEY = "source_labels, destination_labels, from_hi, from_lo, to_hi, to_lo, transport, service"
COUNTS = "allowed, denied, encrypted, bytes"

_SERVICE = f"{SERVICE} AS service"
_SUMS = f"""
    coalesce(sum(flow_count) FILTER (phase = {Phase.VERDICT:d} AND action IN ({Action.ALLOW:d}, {Action.AUDIT:d})), 0)
        ::BIGINT AS allowed,
    coalesce(sum(flow_count) FILTER (phase = {Phase.VERDICT:d} AND action NOT IN ({Action.ALLOW:d}, {Action.AUDIT:d})),
        0)::BIGINT AS denied,
    count(*) FILTER (phase = {Phase.VERDICT:d} AND encryption = {Encryption.ENCRYPTED:d})::BIGINT AS encrypted,
    coalesce(sum(source_bytes + destination_bytes) FILTER (phase = {Phase.END:d}), 0)::BIGINT AS bytes"""
_VERDICTS = f"""
    sum(CASE WHEN action IN ({Action.ALLOW:d}, {Action.AUDIT:d}) THEN flow_count::BIGINT ELSE 0 END)::BIGINT AS allowed,
    sum(CASE WHEN action IN ({Action.ALLOW:d}, {Action.AUDIT:d}) THEN 0 ELSE flow_count::BIGINT END)::BIGINT AS denied,
    0::BIGINT AS encrypted, 0::BIGINT AS bytes"""
_KNOWN_SUMS = (
    "sum(allowed)::BIGINT AS allowed, sum(denied)::BIGINT AS denied, sum(encrypted)::BIGINT AS encrypted,"
    " sum(bytes)::BIGINT AS bytes"
)
# Nearly all parties have labels; grouping those by fewer columns takes half the time.
_LABELLED = "source_labels <> 0 AND destination_labels <> 0"
_LABELS_ALONE = f"""
SELECT source_labels, destination_labels, NULL::UBIGINT AS from_hi, NULL::UBIGINT AS from_lo, NULL::UBIGINT AS to_hi,
    NULL::UBIGINT AS to_lo, transport, service, {COUNTS} FROM (
    SELECT source_labels, destination_labels, transport, service, {{sums}} FROM {{relation}} WHERE {_LABELLED}
    GROUP BY source_labels, destination_labels, transport, service)"""
_ADDRESSED = f"""
SELECT source_labels, destination_labels, CASE WHEN source_labels = 0 THEN source_ip_hi END AS from_hi,
    CASE WHEN source_labels = 0 THEN source_ip_lo END AS from_lo,
    CASE WHEN destination_labels = 0 THEN destination_ip_hi END AS to_hi,
    CASE WHEN destination_labels = 0 THEN destination_ip_lo END AS to_lo, transport, service, {{sums}}
FROM {{relation}} WHERE NOT ({_LABELLED})
GROUP BY source_labels, destination_labels, from_hi, from_lo, to_hi, to_lo, transport, service"""


def add_up(
    catalog: Catalog,
    cursor: duckdb.DuckDBPyConnection,
    into: str,
    since: int,
    until: int,
    condition: Condition = EVERYTHING,
    *,
    volume: bool = True,
    by_pairs: bool = False,
) -> None:
    """Make the temporary table `into` (KEY and COUNTS) of the flows that began in [since, until) (UTC microseconds).

    Without `volume` bytes are 0, and ends of flows are not looked at. `by_pairs`: the condition asks nothing that the
    index of talks does not know (store.talks.all_about_pairs); whole stretches are then added up from there.
    """
    told = _told(catalog, cursor, since, until) if by_pairs else ()
    if not told:
        narrow(catalog, cursor, since, until)
    phases = f"phase IN ({Phase.VERDICT:d}, {Phase.END:d})" if volume else f"phase = {Phase.VERDICT:d}"
    window = (
        f"{phases} AND event_start >= make_timestamp(?)"
        f" AND event_start < make_timestamp(?) AND ({condition[0]})"
    )
    values = [since, until, *condition[1]]
    source = f"(SELECT * FROM flow_records WHERE {window})"
    _make(
        cursor, into, source, values, _SUMS if volume else _VERDICTS, _talks(told, condition, volume=volume)
    )


def add_up_open(
    catalog: Catalog,
    cursor: duckdb.DuckDBPyConnection,
    into: str,
    moment: int,
    condition: Condition = EVERYTHING,
) -> None:
    """The same of the flows that were open at `moment`."""
    narrow_at(catalog, cursor, moment)
    cursor.execute(
        f"CREATE OR REPLACE TEMP TABLE {into}_ids AS " + OPEN_IDS.replace("$moment", "make_timestamp($1)"),
        [moment],
    )
    source = (
        f"(SELECT f.* FROM flow_records f SEMI JOIN {into}_ids o ON f.event_start = o.event_start"
        f" AND f.event_id = o.event_id WHERE f.phase = {Phase.VERDICT:d} AND ({condition[0]}))"
    )
    _make(cursor, into, source, list(condition[1]))


def volume_between(
    catalog: Catalog,
    cursor: duckdb.DuckDBPyConnection,
    since: int,
    until: int,
    condition: Condition = EVERYTHING,
    *,
    by_pairs: bool = False,
) -> int:
    """Bytes of all flows that began in [since, until) and have ended. `by_pairs` as in `add_up`."""
    told = _told(catalog, cursor, since, until) if by_pairs else ()
    if not told:
        narrow(catalog, cursor, since, until)
    row = cursor.execute(
        "SELECT coalesce(sum(source_bytes + destination_bytes), 0)::BIGINT FROM flow_records"
        f" WHERE phase = {Phase.END:d} AND event_start >= make_timestamp(?) AND event_start < make_timestamp(?)"
        f" AND ({condition[0]})",
        [since, until, *condition[1]],
    ).fetchall()[0]
    known = _talks(told, condition, volume=True)
    more = (
        cursor.execute(f"SELECT coalesce(sum(bytes), 0) FROM {known[0]}", known[1]).fetchall()[0][0]
        if known
        else 0
    )
    return int(row[0]) + int(more)


def _told(catalog: Catalog, cursor: duckdb.DuckDBPyConnection, since: int, until: int) -> tuple[int, ...]:
    """Stretches all of whose flows began in [since, until): talks have their sums. What is left is to be read."""
    inside = tuple(
        s.number for s in stretches(catalog) if s.begins and since <= s.begins[0] and s.begins[1] < until
    )
    if inside:
        narrow(catalog, cursor, since, until, but=inside)
    return inside


def _talks(told: tuple[int, ...], condition: Condition, *, volume: bool) -> Condition | None:
    if not told:
        return None
    numbers = ", ".join(map(str, told))
    return (
        f"(SELECT * FROM {INDEX}.talks WHERE n BETWEEN {told[0]} AND {told[-1]} AND n IN ({numbers})"
        f" AND begun{' + ended' if volume else ''} > 0 AND ({condition[0]}))",
        list(condition[1]),
    )


def _make(
    cursor: duckdb.DuckDBPyConnection,
    into: str,
    source: str,
    values: list[Any],
    sums: str = _SUMS,
    known: Condition | None = None,
) -> None:
    """Add up rows of flow_records (`source`, with `values`) and those of talks that say so already."""
    rows = [(f"(SELECT *, {_SERVICE} FROM {source})", values, sums)]
    if known is not None:
        rows.append((known[0], known[1], _KNOWN_SUMS))
    parts: list[str] = []
    for relation, _, counted in rows:
        parts += [
            _LABELS_ALONE.format(relation=relation, sums=counted),
            _ADDRESSED.format(relation=relation, sums=counted),
        ]
    together = " UNION ALL ".join(parts)
    if known is not None:
        again = ", ".join(f"sum({c})::BIGINT AS {c}" for c in COUNTS.split(", "))
        together = f"SELECT {KEY}, {again} FROM ({together}) GROUP BY {KEY}"
    cursor.execute(
        f"CREATE OR REPLACE TEMP TABLE {into} AS {together}",
        [value for _, given, _ in rows for value in given * 2],
    )


def named(cursor: duckdb.DuckDBPyConnection, relation: str) -> list[dict[str, Any]]:
    """The rows of `relation` (KEY and more) with labels and addresses as text, in its order."""
    table = small(
        cursor,
        f"SELECT p.*, a.text AS source_text, b.text AS destination_text,"
        " CASE WHEN from_hi IS NOT NULL THEN ip_text(from_hi, from_lo) END AS source_ip,"
        " CASE WHEN to_hi IS NOT NULL THEN ip_text(to_hi, to_lo) END AS destination_ip"
        f" FROM (SELECT *, row_number() OVER () AS place FROM {relation}) p"
        " LEFT JOIN labels a ON a.id = p.source_labels LEFT JOIN labels b ON b.id = p.destination_labels"
        " ORDER BY place",
    )
    rows = table.drop_columns([name for name in table.column_names if name in _UNUSED]).to_pylist()
    return [_named(row) for row in rows]


_UNUSED = frozenset(("source_labels", "destination_labels", "from_hi", "from_lo", "to_hi", "to_lo", "place"))


def _named(row: dict[str, Any]) -> dict[str, Any]:
    source, destination = row.pop("source_text"), row.pop("destination_text")
    return {
        "source": _party(source, row["source_ip"] or "?"),
        "source_labels": source,
        "destination": _party(destination, row["destination_ip"] or "?"),
        "destination_labels": destination,
        "service": _service_text(row.pop("transport"), row.pop("service")),
        **row,
    }


@functools.lru_cache(16_384)  # a few hundred parties and services make up thousands of pairs
def _party(labels: str | None, address: str) -> str:
    return party(labels, None, None, address)


@functools.lru_cache(16_384)
def _service_text(transport: int, service: int) -> str:
    return service_text(transport, service)
