"""Segments of older versions made into such as are written now, at the start of the store.

    version 1   records name dictionary entries by stable ids, have the whole event id and SHA-1 of the community id
    version 2   see store.schema

    read NAME ─► write NAME.new ─► compare both ─► chain entry {segment, replaces} ─► rename over NAME

Killed before the rename, it is made again at the next start; what was there is only replaced by what holds the same.
"""

# ruff: noqa: S608 -- names are constants of store.schema; values are parameters

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb

from sectool.errors import StoreError
from store import segment
from store.compaction import attach_ddl, remove
from store.schema import (
    DICTIONARIES,
    LAYOUT,
    RECORD_COLUMNS,
    REFERENCES,
    SEGMENT_VERSION,
    segment_ddl,
)

if TYPE_CHECKING:
    from store.numbers import Given, Numbers

log = logging.getLogger("store")

OLDEST = 1
UNFINISHED = ".new"
_CHECKED = "seq, ts, event_start, event_end, phase, action, source_ip_lo, destination_ip_lo, source_port, source_bytes"


def version_of(path: Path) -> int | None:
    """The version of a segment; None when that cannot be read."""
    try:
        with duckdb.connect(":memory:") as connection:
            _attach(connection, path, "o")
            return int(segment.one(connection, "SELECT max(version) FROM o.meta")[0])
    except (duckdb.Error, OSError, TypeError):
        return None


def migrate(events: Path, path: Path, numbers: Numbers) -> Path:
    """Replace the sealed segment `path` of version 1; where the new one lies (a native file).

    Raises StoreError when the new one does not hold the same, duckdb.Error, OSError; then nothing is changed.
    """
    target = path.with_suffix(segment.NATIVE)
    made = target.with_name(target.name + UNFINISHED)
    for file in (made, segment.wal_of(made)):
        file.unlink(missing_ok=True)
    try:
        with duckdb.connect(":memory:") as connection, numbers.giving() as given:
            _attach(connection, path, "o")
            connection.execute(f"ATTACH '{_quoted(made)}' AS n ({LAYOUT})")
            made.chmod(0o640)
            _fill(connection, given)
            _compare(connection, path.name)
            connection.execute("CHECKPOINT n")
            summary = segment.summarise(connection, "n")
            connection.execute("DETACH n")
        made.chmod(0o440)
        segment.append_entry(
            events, {**segment.sealed_fields(target.name, made, summary), "replaces": path.name}
        )
        made.replace(target)
    except BaseException:
        for file in (made, segment.wal_of(made)):
            file.unlink(missing_ok=True)
        raise
    if path != target:
        remove(path)
    log.warning("%s was of version %d: converted", path.name, OLDEST)
    return target


def _attach(connection: duckdb.DuckDBPyConnection, path: Path, alias: str) -> None:
    if segment.compact(path):
        for statement in attach_ddl(path, alias):
            connection.execute(statement)
    else:
        connection.execute(f"ATTACH '{_quoted(path)}' AS {alias} (READ_ONLY)")


def _fill(connection: duckdb.DuckDBPyConnection, given: Given) -> None:
    for statement in segment_ddl("n"):
        connection.execute(statement)
    connection.execute("CREATE TEMP TABLE named (kind VARCHAR, key BIGINT, id BIGINT)")
    for table in DICTIONARIES:
        used = [column for column, kind in REFERENCES.items() if kind == table]
        parts = [f"SELECT id FROM o.{table}", *(f"SELECT {column} FROM o.flow_records" for column in used)]
        if table == "labels":
            parts += [f"SELECT labels_id FROM o.{other}" for other in ("identities", "workloads")]
        keys = connection.execute(
            f"SELECT DISTINCT id FROM ({' UNION ALL '.join(parts)}) WHERE id <> 0"
        ).fetchall()
        connection.execute(
            "INSERT INTO named SELECT ?, unnest(?::BIGINT[]), unnest(?::BIGINT[])",
            [table, [key for (key,) in keys], [given.number(table, key) for (key,) in keys]],
        )
    for table, columns in DICTIONARIES.items():
        rest = ", ".join(
            f"(SELECT any_value(l.id) FROM named l WHERE l.kind = 'labels' AND l.key = d.\"{name}\")"
            if name == "labels_id"
            else f'd."{name}"'
            for name, _ in columns[2:]
        )
        connection.execute(
            f"INSERT INTO n.{table} SELECT m.id, m.key, {rest} FROM named m LEFT JOIN o.{table} d ON d.id = m.key"
            f" WHERE m.kind = '{table}'"
        )
    joins = " ".join(
        f"LEFT JOIN named m{place} ON m{place}.kind = '{table}' AND m{place}.key = r.{column}"
        for place, (column, table) in enumerate(REFERENCES.items())
    )
    places = {column: place for place, column in enumerate(REFERENCES)}
    values = ", ".join(_value(name, places) for name, _ in RECORD_COLUMNS)
    connection.execute(
        f"INSERT INTO n.flow_records SELECT {values} FROM o.flow_records r {joins} ORDER BY r.seq"
    )
    for table in ("events", "positions"):
        connection.execute(f"INSERT INTO n.{table} SELECT * FROM o.{table}")
    connection.execute(
        f"INSERT INTO n.meta SELECT {SEGMENT_VERSION}, created, first_seq, ? FROM o.meta", [given.next]
    )


def _value(name: str, places: dict[str, int]) -> str:
    if name == "event_id":
        return "('0x' || replace(right(r.event_id::VARCHAR, 17), '-', ''))::UBIGINT"
    if name == "community":
        return "('0x' || left(hex(r.community), 4))::USMALLINT"
    if name in places:
        return f"coalesce(m{places[name]}.id, 0)"
    return f'r."{name}"'


def _compare(connection: duckdb.DuckDBPyConnection, name: str) -> None:
    """Whether the new one has the same rows, each naming the same."""
    stable = ", ".join(f"coalesce(k{n}.key, 0)" for n in range(len(REFERENCES)))
    joins = " ".join(
        f"LEFT JOIN n.{table} k{n} ON k{n}.id = r.{column}"
        for n, (column, table) in enumerate(REFERENCES.items())
    )
    before = f"SELECT count(*), sum(hash({_CHECKED}, {', '.join(REFERENCES)})::HUGEINT) FROM o.flow_records"
    after = f"SELECT count(*), sum(hash({_CHECKED}, {stable})::HUGEINT) FROM n.flow_records r {joins}"
    same = segment.one(connection, before) == segment.one(connection, after)
    for table in ("events", "positions"):
        content = f"SELECT count(*), sum(hash(t)::HUGEINT) FROM {{}}.{table} t"
        same = same and segment.one(connection, content.format("o")) == segment.one(
            connection, content.format("n")
        )
    if not same:
        raise StoreError(
            f"{name}: converted to version {SEGMENT_VERSION} it does not hold the same rows",
            "it stays as it is, and is not read; keep it, and report this",
        )


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
