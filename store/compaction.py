"""Sealed segments made compact: a folder of Parquet files (zstd) in place of a native file, with the same rows.

    write NAME.parquet.new/ ─► hash all rows of both ─► rename ─► chain entry {segment, replaces} ─► remove native

Killed before the chain entry, the Parquet folder is thrown away at the next start; killed after it, the native file is.
Native files answer "last N" and "at T" faster; Parquet takes half the room. The catalog puts both end to end.
"""

# ruff: noqa: S608 -- names are constants of store.schema and aliases of the catalog

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import duckdb

from sectool.errors import StoreError
from sectool.events import now_us
from store import segment
from store.schema import SEGMENT_TABLES
from store.segment import Damage, Summary

# Rows are sorted so that equal ones meet: the order of arrival for what is searched by it, any for the rest.
_ORDER = {"flow_records": " ORDER BY seq", "events": " ORDER BY seq"}
_LEVEL = 6
UNFINISHED = ".new"
GOING = ".going"  # a segment that was emptied before the chain said that it goes


def compact_name(path: Path) -> Path:
    """Where the compact form of a native segment lies."""
    return path.with_suffix(segment.COMPACT)


def attach_ddl(path: Path, alias: str) -> list[str]:
    """Statements that make a compact segment's tables appear as `alias`.table."""
    quoted = str(path).replace("'", "''")
    return [
        f"CREATE SCHEMA {alias}",
        *(
            f"CREATE VIEW {alias}.{table} AS SELECT * FROM read_parquet('{quoted}/{table}.parquet')"
            for table in SEGMENT_TABLES
        ),
    ]


def write_compact(cursor: duckdb.DuckDBPyConnection, alias: str, path: Path) -> Path:
    """Write the compact form of the sealed segment attached as `alias`, and check it row by row; where it lies.

    Nothing else is changed. Raises StoreError when it does not hold the same rows, duckdb.Error, OSError.
    """
    target = compact_name(path)
    making = target.with_name(target.name + UNFINISHED)
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(mode=0o750)
    try:
        for table in SEGMENT_TABLES:
            file = making / f"{table}.parquet"
            quoted = str(file).replace("'", "''")
            cursor.execute(
                f"COPY (SELECT * FROM {alias}.{table}{_ORDER.get(table, '')}) TO '{quoted}'"
                f" (FORMAT parquet, COMPRESSION zstd, COMPRESSION_LEVEL {_LEVEL})"
            )
            if _content(cursor, f"{alias}.{table}") != _content(cursor, f"read_parquet('{quoted}')"):
                raise StoreError(
                    f"{path.name}: its compact form does not hold the same rows of {table}",
                    "the native file stays; check it with `sectool store verify`",
                )
            file.chmod(0o440)
            _sync(file)
        making.rename(target)
        target.chmod(0o550)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    return target


def _content(cursor: duckdb.DuckDBPyConnection, relation: str) -> tuple[Any, ...]:
    return segment.one(cursor, f"SELECT count(*), sum(hash(t)::HUGEINT) FROM {relation} t")


def seal_compact(events: Path, native: Path, made: Path) -> None:
    """Enter the compact form into the chain, in place of the native file. Durable on return."""
    old = segment.sealed(events)[native.name]
    about = {
        name: old[name] for name in ("records", "events", "first_seq", "last_seq", "first_us", "last_us")
    }
    entry = {"segment": made.name, "replaces": native.name, "sha256": segment.file_hash(made)}
    segment.append_entry(events, {**entry, "bytes": segment.size_of(made), **about, "sealed_us": now_us()})


def recover(path: Path) -> tuple[Summary | None, list[Damage]]:
    """What a compact segment holds of which the chain does not know: its entry was lost. As segment.recover."""
    try:
        with duckdb.connect(":memory:") as connection:
            for statement in attach_ddl(path, "s"):
                connection.execute(statement)
            return segment.summarise(connection, "s"), []
    except (duckdb.Error, OSError) as error:
        first = str(error).strip().partition("\n")[0][:300]
        if not segment.damaged_by(error):
            return None, [Damage(path.name, f"{segment.NOT_NOW}: {first}")]
        return None, [Damage(path.name, first, segment.set_aside(path).name)]


def settle(events: Path) -> None:
    """Finish or undo what a killed compaction left. Only for who holds the folder's lock."""
    known = segment.sealed(events)
    gone = segment.gone(events)
    for going in events.glob(f"flows-*{GOING}"):
        name = going.name.removesuffix(GOING)
        if name in known and name not in gone:
            segment.append_entry(events, {"retired": name, "at_us": now_us()})
        remove(going)
    for unfinished in events.glob(f"flows-*{segment.COMPACT}{UNFINISHED}"):
        shutil.rmtree(unfinished, ignore_errors=True)
    for made in events.glob(f"flows-*{segment.COMPACT}"):
        native = made.with_suffix(segment.NATIVE)
        if made.name in known:
            native.unlink(missing_ok=True)
        elif native.exists():
            remove(made)


def remove(path: Path) -> None:
    """Delete a segment of either form."""
    if path.is_dir():
        path.chmod(0o750)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def retire(events: Path, path: Path) -> None:
    """Enter into the chain that a sealed segment goes, and delete it. Raises OSError with one of both done.

    The chain may find no room on a disk that others filled to the last byte: then the segment's own is used. Whoever
    kills us in between leaves `NAME.going`, which `settle` takes for the missing entry.
    """
    entry = {"retired": path.name, "at_us": now_us()}
    try:
        segment.append_entry(events, entry)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        going = path.with_name(path.name + GOING)
        path.rename(going)
        for file in going.iterdir() if going.is_dir() else (going,):
            os.truncate(file, 0)
        segment.append_entry(events, entry)
        path = going
    remove(path)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
