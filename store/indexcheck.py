"""Whether the index fits the segments: it is made a second time, from sealed segments alone, and compared row by row.

An edited index cannot add to what is on record, but it could have questions look in the wrong place. Nothing in it can
vouch for itself, so nothing in it is believed: the same code makes the same stretches again in a scratch file, which
takes as long as making it did. What the index says of rows that are not sealed yet, or of flows whose beginning was
deleted with its segment, has nothing left to compare it with; it is counted, not checked.
"""

# ruff: noqa: S608 -- names are constants of store.index and aliases given here

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from sectool.errors import StoreError
from store import segment
from store.compaction import attach_ddl
from store.index import ALIAS, TABLES, Index, Stretch, index_file, make, stem
from store.segment import Damage

MEMORY = "1GB"
REMEDY = "delete it while no store runs: it is made anew from the segments"
TRIES = 5
_BEYOND = 1 << 30  # no stretch has that number
_KEPT = "kept"  # alias of the index under test
_WHAT = {
    "stretches": "which rows there are, and of when",
    "crossing": "flows that stay open",
    "late": "how flows went on",
    "talks": "who talked to whom",
}


@dataclass(frozen=True, slots=True)
class IndexVerdict:
    """What was found. `unchecked`: stretches over rows that no seal covers yet."""

    problems: tuple[Damage, ...]
    stretches: int
    unchecked: int


NOTHING = IndexVerdict((), 0, 0)


def check_index(events: Path, sound: Collection[str]) -> IndexVerdict:
    """Compare the index of `events` with the sealed segments named in `sound`. A running store is not disturbed.

    Raises StoreError when it cannot be copied or made again for want of room.
    """
    path = index_file(events)
    if not path.exists():
        return NOTHING
    with tempfile.TemporaryDirectory(prefix="sectool-index-") as scratch:
        folder = Path(scratch)
        copied = _copy(path, folder / "kept.duckdb")
        try:
            return _check(events, copied, folder, sound)
        except (duckdb.OutOfMemoryException, OSError) as error:
            raise StoreError(
                f"the index cannot be checked: {str(error).strip().partition(chr(10))[0]}",
                "set TMPDIR to a folder with room for another one, or leave it out: --no-index",
            ) from None
        except duckdb.Error as error:  # the segments are whole by their hashes
            first = str(error).strip().partition("\n")[0][:200]
            return IndexVerdict((_problem(f"cannot be read ({first})"),), 0, 0)


def _copy(path: Path, target: Path) -> Path:
    """The index as it was at one moment, though a store may be writing it."""
    pairs = ((path, target), (segment.wal_of(path), segment.wal_of(target)))
    for _ in range(TRIES):
        before = [_state(source) for source, _ in pairs]
        try:
            for (source, copy), state in zip(pairs, before, strict=True):
                copy.unlink(missing_ok=True)
                if state is not None:
                    shutil.copyfile(source, copy)
        except FileNotFoundError:
            continue
        if before == [_state(source) for source, _ in pairs]:
            return target
    raise StoreError("the index changes all the time", "try again in a moment, or leave it out: --no-index")


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return None
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _check(events: Path, copied: Path, folder: Path, sound: Collection[str]) -> IndexVerdict:
    with duckdb.connect(":memory:") as connection, contextlib.ExitStack() as held:
        for setting in (
            f"memory_limit='{MEMORY}'",
            f"temp_directory='{_quoted(folder / 'tmp')}'",
            f"allowed_directories=['{_quoted(events)}', '{_quoted(folder)}']",
            "enable_external_access=false",
        ):
            connection.execute(f"SET {setting}")
        try:
            connection.execute(f"ATTACH '{_quoted(copied)}' AS {ALIAS}")
            if problem := _shape(connection):
                return IndexVerdict((problem,), 0, 0)
            kept = Index(connection.cursor())
            held.callback(kept.close)
        except ValueError:  # of another release: not used either, but made anew at the next start
            return NOTHING
        names = {stem(path.name): path for path in segment.segment_files(events) if path.name in sound}
        chosen: list[Stretch] = []
        for stretch in kept.stretches:
            if stretch.stem not in names:
                break
            chosen.append(stretch)
        unchecked = len(kept.stretches) - len(chosen)
        order = [list(names).index(stretch.stem) for stretch in chosen]
        if order != sorted(order):
            return IndexVerdict((_problem("has the segments in another order"),), 0, unchecked)
        if unchecked:
            _forget(connection, kept.stretches[len(chosen)].number)
        kept.close()
        held.pop_all()
        connection.execute(f"DETACH {ALIAS}")
        connection.execute(f"ATTACH '{_quoted(copied)}' AS {_KEPT} (READ_ONLY)")
        problem = _remake(connection, folder, chosen, names) or _compare(connection, events, chosen)
        return IndexVerdict(() if problem is None else (problem,), len(chosen), unchecked)


def _forget(connection: duckdb.DuckDBPyConnection, number: int) -> None:
    """Have the copy know nothing of the stretches from `number` on, as if they had not been made yet."""
    for table in TABLES[1:]:
        connection.execute(f"DELETE FROM {ALIAS}.{table} WHERE n >= {number}")
    connection.execute(f"UPDATE {ALIAS}.crossing SET gone = NULL, closed = NULL WHERE gone >= {number}")


def _shape(connection: duckdb.DuckDBPyConnection) -> Damage | None:
    """The index has tables, with rows. Anything that is worked out when it is asked could say now this, now that."""
    for kind in ("views", "functions"):
        internal = "NOT internal" if kind == "views" else "NOT internal AND function_type LIKE '%macro'"
        found = segment.one(
            connection, f"SELECT count(*) FROM duckdb_{kind}() WHERE database_name = '{ALIAS}' AND {internal}"
        )
        if found[0]:
            return _problem(f"holds {kind}, which an index never does")
    return None


def _remake(
    connection: duckdb.DuckDBPyConnection, folder: Path, chosen: Sequence[Stretch], names: Mapping[str, Path]
) -> Damage | None:
    """Make the chosen stretches again, in the database `ALIAS`; what could not be made as the index has it."""
    connection.execute(f"ATTACH '{_quoted(folder / 'again.duckdb')}' AS {ALIAS}")
    with contextlib.closing(connection.cursor()) as cursor:
        make(cursor)
        columns = "SELECT table_name, column_name, data_type FROM duckdb_columns() WHERE database_name = ? ORDER BY ALL"
        if cursor.execute(columns, [_KEPT]).fetchall() != cursor.execute(columns, [ALIAS]).fetchall():
            return _problem("has other columns than an index has")
        first = chosen[0].number if chosen else _BEYOND
        # Numbers go on from those before, and so do flows that began in segments that were deleted since.
        cursor.execute(
            f"INSERT INTO {ALIAS}.stretches VALUES ({first - 1}, '', 0, 0, 0, true, NULL, NULL, NULL, NULL)"
        )
        cursor.execute(
            f"INSERT INTO {ALIAS}.crossing SELECT * REPLACE (CASE WHEN gone < {first} THEN gone END AS gone,"
            f" CASE WHEN gone < {first} THEN closed END AS closed) FROM {_KEPT}.crossing WHERE n < {first}"
        )
        if not chosen:
            return None
        again = Index(connection.cursor())
        try:
            return _extend(connection, again, chosen, names)
        finally:
            again.close()


def _extend(
    connection: duckdb.DuckDBPyConnection, again: Index, chosen: Sequence[Stretch], names: Mapping[str, Path]
) -> Damage | None:
    attached = ""
    for stretch in chosen:
        if stretch.stem != attached:
            if attached:
                connection.execute(
                    "DROP SCHEMA s CASCADE" if segment.compact(names[attached]) else "DETACH s"
                )
            path = names[stretch.stem]
            for statement in (
                attach_ddl(path, "s")
                if segment.compact(path)
                else [f"ATTACH '{_quoted(path)}' AS s (READ_ONLY)"]
            ):
                connection.execute(statement)
            attached, first = stretch.stem, 0
        made = again.extend("s", stretch.stem, first, sealed=stretch.whole)
        if not made or again.stretches[-1] != stretch:
            return _problem(
                f"says other rows of {stretch.stem} from number {stretch.first} on ({_WHAT['stretches']})"
            )
        first = stretch.last + 1
    return None


def _compare(connection: duckdb.DuckDBPyConnection, events: Path, chosen: Sequence[Stretch]) -> Damage | None:
    first = chosen[0].number if chosen else _BEYOND
    stems = {stretch.number: stretch.stem for stretch in chosen}
    with contextlib.closing(connection.cursor()) as cursor:
        deleted = any(entry.get("retired") for entry in segment.entries(events))
        before = segment.one(cursor, f"SELECT count(*) FROM {_KEPT}.crossing WHERE n < {first}")[0]
        if before and not deleted:
            return _problem(f"tells of {before} flows of segments that never were ({_WHAT['crossing']})")
        for table in TABLES[1:]:
            ours = f"n <> {first - 1}" if table == "stretches" else "true"
            rows = "* REPLACE (list_sort(seqs) AS seqs)" if table == "talks" else "*"
            one = f"SELECT {rows} FROM {_KEPT}.{table}"
            other = f"SELECT {rows} FROM {ALIAS}.{table} WHERE {ours}"
            wrong, number = segment.one(
                cursor,
                f"SELECT count(*), min(n) FROM (({one} EXCEPT ALL {other}) UNION ALL ({other} EXCEPT ALL {one}))",
            )
            if wrong:
                where = f" of {stems[number]}" if number in stems else ""
                return _problem(f"has {wrong} rows{where} that the segments do not bear out ({_WHAT[table]})")
    return None


def _problem(what: str) -> Damage:
    return Damage("index.duckdb", f"{what}; {REMEDY}")


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
