"""The one DuckDB instance of a process: segments attached end to end, dictionaries in memory, cursors on top.

The instance can touch no file outside the folder of segments, and its settings are locked before the first query.
Attaching, detaching and remaking views is done under `changing`, which waits for running queries.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb

from store import schema
from store.compaction import attach_ddl
from store.controlviews import ControlMirror, control_ddl
from store.index import ALIAS as INDEX_ALIAS
from store.index import Index, index_file, make
from store.segment import NOT_NOW, OTHER_VERSION, Damage, compact, damaged_by, one, segment_files

MEMORY = "1GB"
SPILL = "2GB"


class Catalog:
    """Attached segments of `events`. Thread-safe; cursors are not shared between threads."""

    def __init__(self, events: Path) -> None:
        self.events = events
        self._aliases: dict[str, str] = {}  # segment name to alias, in order of attachment
        self._next = 1
        self._shape = threading.RLock()  # attaching, detaching, remaking views
        self._gate = threading.Condition()
        self._readers: dict[duckdb.DuckDBPyConnection, int] = {}  # and the thread that reads
        self._changing = False
        self.control = ControlMirror(events)
        self.index: Index | None = None  # without one every question reads everything
        self._root = duckdb.connect(
            ":memory:",
            config={
                "autoinstall_known_extensions": "false",
                "autoload_known_extensions": "false",
                "allow_community_extensions": "false",
                "allow_unsigned_extensions": "false",
                "python_enable_replacements": "false",
            },
        )
        for setting in (
            "TimeZone='UTC'",
            f"memory_limit='{MEMORY}'",
            f"temp_directory='{_quoted(events / 'tmp')}'",
            f"max_temp_directory_size='{SPILL}'",
            # Checkpoints are made from another cursor (store.process), never in the middle of an insert.
            "checkpoint_threshold='1TB'",
            # Nor may they merge small row groups: that writes over and over what is long compressed, and inserts
            # wait for it (0.7 s instead of 0.1 s for the rows of half a second at 100,000 a second).
            "max_vacuum_tasks=0",
            f"allowed_directories=['{_quoted(events)}']",
            "enable_external_access=false",
            "lock_configuration=true",
        ):
            self._root.execute(f"SET {setting}")
        for statement in (*schema.catalog_ddl(), *control_ddl(), *schema.union_ddl([]), *schema.flows_ddl()):
            self._root.execute(statement)

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """A connection of its own to the instance."""
        return self._root.cursor()

    @property
    def segments(self) -> list[str]:
        """Names of the attached segments."""
        return list(self._aliases)

    def alias(self, name: str) -> str:
        """The catalog name of segment `name`."""
        return self._aliases[name]

    @contextlib.contextmanager
    def reading(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """A cursor for one query; segments stay attached as they are while it is held."""
        with self._gate:
            self._gate.wait_for(lambda: not self._changing)
            cursor = self.cursor()
            self._readers[cursor] = threading.get_ident()
        try:
            yield cursor
        finally:
            with self._gate:
                self._readers.pop(cursor, None)
                self._gate.notify_all()
            cursor.close()

    def interrupt_queries(self, thread: int | None = None) -> None:
        """Stop every query that runs now, or those of one thread (`threading.get_ident`)."""
        with self._gate:
            for cursor, reader in self._readers.items():
                if thread in (None, reader):
                    with contextlib.suppress(duckdb.Error):
                        cursor.interrupt()

    @contextlib.contextmanager
    def _alone(self, timeout_s: float) -> Iterator[bool]:
        """Whether all queries ended within `timeout_s` seconds; new ones wait meanwhile."""
        with self._gate:
            self._gate.wait_for(lambda: not self._changing)
            self._changing = True
            alone = self._gate.wait_for(lambda: not self._readers, timeout_s)
        try:
            yield alone
        finally:
            with self._gate:
                self._changing = False
                self._gate.notify_all()

    def attach(self, path: Path, *, make: Callable[[str], None] | None = None) -> str:
        """Attach one sealed segment, or a new one that is writable once `make` has given it its tables.

        Nobody sees it before it is complete. Returns its alias. Raises duckdb.Error.
        """
        mode = " (READ_ONLY)" if make is None else f" ({schema.LAYOUT})"
        with self._shape, contextlib.closing(self.cursor()) as cursor:
            alias = f"s{self._next}"
            self._next += 1
            try:
                if compact(path):
                    for statement in attach_ddl(path, alias):
                        cursor.execute(statement)
                else:
                    cursor.execute(f"ATTACH '{_quoted(path)}' AS {alias}{mode}")
                if make is not None:
                    make(alias)
                else:
                    self._check(cursor, alias)
                    self._learn(cursor, alias)
            except duckdb.Error:
                with contextlib.suppress(duckdb.Error):
                    _let_go(cursor, path.name, alias)
                raise
            self._aliases[path.name] = alias
            return alias

    def attach_index(self, *, read_only: bool) -> None:
        """Attach the folder's index, made when it is missing and may be written. Raises duckdb.Error, ValueError."""
        path = index_file(self.events)
        if read_only and not path.exists():
            return
        with self._shape:
            cursor = self.cursor()
            try:
                mode = " (READ_ONLY)" if read_only else ""
                cursor.execute(f"ATTACH '{_quoted(path)}' AS {INDEX_ALIAS}{mode}")
                tables = "SELECT count(*) FROM duckdb_tables() WHERE database_name = ?"
                if not read_only and not one(cursor, tables, [INDEX_ALIAS])[0]:
                    make(cursor)
                    path.chmod(0o640)
                self.index = Index(cursor)
            except (duckdb.Error, OSError, ValueError):
                with contextlib.suppress(duckdb.Error):
                    cursor.execute(f"DETACH DATABASE IF EXISTS {INDEX_ALIAS}")
                cursor.close()
                raise

    def drop_index(self) -> None:
        """Go on without an index."""
        with self._shape, contextlib.closing(self.cursor()) as cursor:
            if self.index is not None:
                self.index.close()
                self.index = None
            with contextlib.suppress(duckdb.Error):
                cursor.execute(f"DETACH DATABASE IF EXISTS {INDEX_ALIAS}")

    def attach_sealed(self, path: Path) -> Damage | None:
        """Attach a sealed segment; what is wrong with it instead, when it cannot be."""
        try:
            self.attach(path)
        except (duckdb.Error, OSError) as error:
            first = str(error).strip().splitlines()[0][:300]
            return Damage(path.name, first if damaged_by(error) else f"{NOT_NOW}: {first}")
        return None

    def _check(self, cursor: duckdb.DuckDBPyConnection, alias: str) -> None:
        row = one(cursor, f"SELECT max(version) FROM {alias}.meta")  # noqa: S608
        if row[0] != schema.SEGMENT_VERSION:
            raise duckdb.InvalidInputException(f"{OTHER_VERSION} {row[0]}, not {schema.SEGMENT_VERSION}")
        for table, columns in schema.SEGMENT_TABLES.items():
            names = ", ".join(f'"{name}"' for name, _ in columns)
            cursor.execute(f"SELECT {names} FROM {alias}.{table} LIMIT 0").fetchall()  # noqa: S608

    def _learn(self, cursor: duckdb.DuckDBPyConnection, alias: str) -> None:
        for table, columns in schema.DICTIONARIES.items():
            names = [f'"{name}"' for name, _ in columns[1:]]
            # An entry can be there twice: first by its stable id alone, then whole. Nothing makes a whole one less.
            parts = ", ".join(f"any_value({name}) AS {name}" for name in names)
            better = ", ".join(f"{name} = coalesce(excluded.{name}, {table}.{name})" for name in names)
            cursor.execute(
                f"INSERT INTO {table} SELECT id, {parts} FROM {alias}.{table} GROUP BY id"  # noqa: S608
                f" ON CONFLICT (id) DO UPDATE SET {better}"
            )

    def remake_views(self) -> None:
        """Put what is attached end to end. Running queries keep what they have."""
        with self._shape, contextlib.closing(self.cursor()) as cursor:
            for statement in schema.union_ddl(self._aliases.values()):
                cursor.execute(statement)

    def in_order(self) -> None:
        """Have the segments in the order of their names, which is that of their rows, whatever came first."""
        with self._shape:
            order = [path.name for path in segment_files(self.events)]
            self._aliases = {name: self._aliases[name] for name in order if name in self._aliases}
            self.remake_views()

    def reopen_read_only(self, path: Path, timeout_s: float) -> bool:
        """Detach a segment that was written until now and attach it read-only; False when queries kept it busy."""
        with self._shape, self._alone(timeout_s) as alone:
            if not alone:
                return False
            with contextlib.closing(self.cursor()) as cursor:
                cursor.execute(f"DETACH {self._aliases[path.name]}")
            order = list(self._aliases)
            del self._aliases[path.name]
            try:
                self.attach(path)
            finally:
                self._aliases = {name: self._aliases[name] for name in order if name in self._aliases}
                self.remake_views()
            return True

    def replace(self, old: Path, new: Path, timeout_s: float) -> bool:
        """Put the sealed segment `new` in the place of `old`, which has the same rows.

        False, and nothing changed, when queries kept it busy or retention took `old` meanwhile. Raises duckdb.Error,
        with `old` where it was.
        """
        with self._shape, self._alone(timeout_s) as alone:
            if not alone or old.name not in self._aliases:
                return False
            order = [new.name if name == old.name else name for name in self._aliases]
            self.attach(new)
            alias = self._aliases.pop(old.name)
            self._aliases = {name: self._aliases[name] for name in order}
            self.remake_views()
            with contextlib.closing(self.cursor()) as cursor:
                _let_go(cursor, old.name, alias)
            return True

    def detach_when_idle(self, path: Path, timeout_s: float) -> bool:
        """Detach a segment; False when queries ran for longer than `timeout_s`."""
        with self._shape, self._alone(timeout_s) as alone:
            if alone:
                self.detach(path)
            return alone

    def detach(self, path: Path) -> None:
        """Detach a segment that nobody queries any more."""
        with self._shape, contextlib.closing(self.cursor()) as cursor:
            alias = self._aliases.pop(path.name)
            self.remake_views()
            _let_go(cursor, path.name, alias)

    def close(self) -> None:
        """End the instance; running queries are interrupted by their owners first."""
        if self.index is not None:
            self.index.close()
        self._root.close()


def _let_go(cursor: duckdb.DuckDBPyConnection, name: str, alias: str) -> None:
    cursor.execute(f"DROP SCHEMA {alias} CASCADE" if compact(Path(name)) else f"DETACH {alias}")


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")
