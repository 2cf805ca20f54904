"""Who talks to whom: flows added up by parties and service, in SQL, over numbers alone.

A party is its label set; without one, its address. Names are looked up for the few rows that are shown.
"""

# ruff: noqa: S608 -- SQL is put together from this package's own parts, values are parameters

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import duckdb

from sectool.events import Action, Encryption, Phase
from store.filtersql import Condition
from store.query import small
from store.schema import OPEN_IDS
from store.timeline import party, service_text

EVERYTHING: Condition = ("true", [])
KEY = "source_labels, destination_labels, from_hi, from_lo, to_hi, to_lo, transport, service"
COUNTS = "allowed, denied, encrypted, bytes"

_SERVICE = (
    "CASE WHEN transport IN (1, 58) THEN source_port * 256 + destination_port"
    " ELSE destination_port END AS service"
)
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
# Nearly all parties have labels; grouping those by fewer columns takes half the time.
_LABELLED = "source_labels <> 0 AND destination_labels <> 0"


def add_up(
    cursor: duckdb.DuckDBPyConnection,
    into: str,
    since: int,
    until: int,
    condition: Condition = EVERYTHING,
    *,
    volume: bool = True,
) -> None:
    """Make the temporary table `into` (KEY and COUNTS) of the flows that began in [since, until) (UTC microseconds).

    Without `volume` bytes are 0, and it takes half the time: ends of flows are not looked at.
    """
    phases = f"phase IN ({Phase.VERDICT:d}, {Phase.END:d})" if volume else f"phase = {Phase.VERDICT:d}"
    window = (
        f"{phases} AND event_start >= make_timestamp(?)"
        f" AND event_start < make_timestamp(?) AND ({condition[0]})"
    )
    values = [since, until, *condition[1]]
    _make(
        cursor, into, f"(SELECT * FROM flow_records WHERE {window})", values, _SUMS if volume else _VERDICTS
    )


def add_up_open(
    cursor: duckdb.DuckDBPyConnection, into: str, moment: int, condition: Condition = EVERYTHING
) -> None:
    """The same of the flows that were open at `moment`."""
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
    cursor: duckdb.DuckDBPyConnection, since: int, until: int, condition: Condition = EVERYTHING
) -> int:
    """Bytes of all flows that began in [since, until) and have ended."""
    row = cursor.execute(
        "SELECT coalesce(sum(source_bytes + destination_bytes), 0)::BIGINT FROM flow_records"
        f" WHERE phase = {Phase.END:d} AND event_start >= make_timestamp(?) AND event_start < make_timestamp(?)"
        f" AND ({condition[0]})",
        [since, until, *condition[1]],
    ).fetchall()[0]
    return int(row[0])


def _make(
    cursor: duckdb.DuckDBPyConnection, into: str, source: str, values: list[Any], sums: str = _SUMS
) -> None:
    cursor.execute(
        f"""
CREATE OR REPLACE TEMP TABLE {into} AS
SELECT source_labels, destination_labels, NULL::UBIGINT AS from_hi, NULL::UBIGINT AS from_lo, NULL::UBIGINT AS to_hi,
    NULL::UBIGINT AS to_lo, transport, service, {COUNTS} FROM (
    SELECT source_labels, destination_labels, transport, {_SERVICE}, {sums} FROM {source} WHERE {_LABELLED}
    GROUP BY source_labels, destination_labels, transport, service)
UNION ALL
SELECT source_labels, destination_labels, CASE WHEN source_labels = 0 THEN source_ip_hi END AS from_hi,
    CASE WHEN source_labels = 0 THEN source_ip_lo END AS from_lo,
    CASE WHEN destination_labels = 0 THEN destination_ip_hi END AS to_hi,
    CASE WHEN destination_labels = 0 THEN destination_ip_lo END AS to_lo, transport, {_SERVICE}, {sums}
FROM {source} WHERE NOT ({_LABELLED})
GROUP BY source_labels, destination_labels, from_hi, from_lo, to_hi, to_lo, transport, service
""",
        values * 2,
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
    return [_named(row) for row in table.to_pylist()]


_HIDDEN = frozenset(
    (
        "source_labels",
        "destination_labels",
        "from_hi",
        "from_lo",
        "to_hi",
        "to_lo",
        "place",
        "source_text",
        "destination_text",
        "service",
        "transport",
    )
)


def _named(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "source": party(row["source_text"], None, None, row["source_ip"] or "?"),
        "source_labels": row["source_text"],
        "destination": party(row["destination_text"], None, None, row["destination_ip"] or "?"),
        "destination_labels": row["destination_text"],
        "service": service_text(row["transport"], row["service"]),
        **{key: value for key, value in row.items() if key not in _HIDDEN},
    }
