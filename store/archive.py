"""The store for notebooks and scripts: `import store; s = store.open()`, and every answer is an Arrow table.

The same questions as those of the command line, answered by the same code (store.reader): by the running store, or
from the files of a state folder or case bundle. docs/howto/notebook.md shows it in use.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa

from sectool.api.paths import Paths
from sectool.clock import from_datetime
from sectool.errors import NoDaemonError, StoreError, UsageError
from sectool.filters import Filter, parse_text
from sectool.moment import parse_time
from store.query import MAX_ROWS, Result
from store.reader import LocalReader, Reader, open_reader

Moment = str | int | datetime | timedelta
"""How long ago (`"10m"`, a timedelta), `"2026-03-01T02:00:00Z"`, a datetime (without zone: UTC, as in the tables), or
UTC microseconds."""

DEFAULT_FLOWS = 100_000
DEFAULT_TIMEOUT_S = 60.0


class TruncatedWarning(UserWarning):
    """A table has not all rows that were asked for."""


class PartialWarning(UserWarning):
    """Files of the store were left out, because they are damaged or in use."""


def open_archive(
    path: str | os.PathLike[str] | None = None, *, run: str | os.PathLike[str] | None = None
) -> Archive:
    """Open what a host recorded.

    `path`: a state folder or case bundle, read from its files. None, or the state folder of this host's own daemon:
    the running store is asked (its socket is in `run`, SECTOOL_RUN, /run/sectool), else the files of the state folder
    (SECTOOL_STATE, /var/lib/sectool). Nothing is ever written.

    Raises StoreError when there is nothing to read, PrivilegeError when it may not be read.
    """
    own = Paths.resolve(run=run)
    state = own.state if path is None else Path(path).absolute()
    live = path is None or run is not None or _same(state, own.state)
    if live and not _there(own.events_socket) and not _there(state / "events"):
        raise NoDaemonError(
            f"no daemon answers at {own.run}, and there are no events in {state / 'events'}",
            "start it with `sectool up`, or name a state folder or case bundle",
        )
    if not live and not _there(state / "events"):
        raise StoreError(
            f"there are no events in {state}", "name a state folder (it has `events` in it) or a case bundle"
        )
    reader: Reader = open_reader(state, own.run) if live else LocalReader(state / "events")
    for warning in reader.warnings:
        warnings.warn(warning, PartialWarning, stacklevel=3)
    return Archive(reader, state)


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return one == other


def _there(path: Path) -> bool:
    try:
        return path.exists()
    except PermissionError:
        return True  # what cannot be looked at says so when it is opened


class Archive:
    """What a host recorded. Not for several threads at once; a context manager."""

    def __init__(self, reader: Reader, state: Path) -> None:
        self._reader: Reader | None = reader
        self.state = state

    def query(self, sql: str, *, limit: int | None = None, timeout: float = DEFAULT_TIMEOUT_S) -> pa.Table:
        """The rows of one SELECT (DuckDB's dialect) over the views of docs/store.md, read-only.

        `limit`: rows; without one a million at most, and a TruncatedWarning when there are more, or more than
        128 MiB. `timeout`: seconds. Raises UsageError for bad SQL, store.query.StoppedError at the time limit.
        """
        result = self._open().query(
            sql, limit=MAX_ROWS if limit is None else limit, timeout_ms=round(timeout * 1000)
        )
        return _told(result, limit)

    def explain(self, sql: str, *, analyze: bool = False, timeout: float = DEFAULT_TIMEOUT_S) -> str:
        """The plan of a SELECT as text; with `analyze` it is run, and each step's rows and time are told."""
        return self._open().explain(sql, analyze=analyze, timeout_ms=round(timeout * 1000))

    def flows(
        self,
        filter: str | Filter = "",  # noqa: A002 -- the word for it
        *,
        since: Moment | None = None,
        until: Moment | None = None,
        at: Moment | None = None,
        first: int | None = None,
        last: int | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
    ) -> pa.Table:
        """Flows, oldest first, with the columns of the view flows.

        `filter`: as the console takes it, `"verdict=deny from-label=app=web not to-port=443"`. Those that began from
        `since` until `until`, or were open `at` a moment; the `first` or `last` so many, else the last 100,000 (and a
        TruncatedWarning when there are more). Raises UsageError for a filter or moment that is none.
        """
        unbounded = first is None and last is None
        result = self._open().flows(
            filter if isinstance(filter, Filter) else parse_text(filter),
            since=_us(since),
            until=_us(until),
            at=_us(at),
            first=first,
            last=DEFAULT_FLOWS if unbounded else last,
            timeout_ms=round(timeout * 1000),
        )
        return _told(result, None if unbounded else max(first or 0, last or 0))

    def events(
        self,
        types: str | Sequence[str] = (),
        *,
        since: Moment | None = None,
        until: Moment | None = None,
        first: int | None = None,
        last: int | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
    ) -> pa.Table:
        """Events that are no flows (seq, ts, type, body as JSON), oldest first. `types`: `"policy.*"`, or several.

        The rest as in `flows`.
        """
        unbounded = first is None and last is None
        result = self._open().events(
            [types] if isinstance(types, str) else list(types),
            since=_us(since),
            until=_us(until),
            first=first,
            last=DEFAULT_FLOWS if unbounded else last,
            timeout_ms=round(timeout * 1000),
        )
        return _told(result, None if unbounded else max(first or 0, last or 0))

    def policies(self, at: Moment | None = None) -> pa.Table:
        """The policy in force at a moment (now): revision, hash, author, reason, since when, text."""
        return self._at("policies_at", at)

    def activations(self, at: Moment | None = None) -> pa.Table:
        """Which host had which revision in force at a moment (now)."""
        return self._at("activations_at", at)

    def identities(self, at: Moment | None = None) -> pa.Table:
        """Identities valid at a moment (now)."""
        return self._at("identities_at", at)

    def workloads(self, at: Moment | None = None) -> pa.Table:
        """Workloads that ran at a moment (now)."""
        return self._at("workloads_at", at)

    def trust(self, at: Moment | None = None) -> pa.Table:
        """Trust domains that counted at a moment (now), with their roots."""
        return self._at("trust_at", at)

    def changes(self) -> pa.Table:
        """Every change of policy, identities, workloads and trust: who made it, when and why."""
        return self.query("SELECT * FROM changes ORDER BY tx")

    def stats(self) -> dict[str, Any]:
        """Counters and state of the store."""
        return self._open().stats()

    @property
    def live(self) -> bool:
        """Whether the running store answers, not files."""
        return self._open().live

    @property
    def warnings(self) -> list[str]:
        """What had to be left out."""
        return list(self._open().warnings)

    def close(self) -> None:
        """Let go of everything. Nothing can be asked any more."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _at(self, function: str, at: Moment | None) -> pa.Table:
        moment = _us(at)
        moment = _now_us() if moment is None else moment
        return self.query(f"SELECT * FROM {function}(make_timestamp({moment:d}))")  # noqa: S608 -- a number

    def _open(self) -> Reader:
        if self._reader is None:
            raise StoreError("this store was closed", "open it again: store.open()")
        return self._reader

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        how = "closed" if self._reader is None else "live" if self._reader.live else "files"
        return f"<store of {self.state}: {how}>"


def _told(result: Result, wanted: int | None) -> pa.Table:
    """The table; with a warning, and a mark in its metadata, when rows are missing of the `wanted` (None: all)."""
    if not result.truncated or (wanted is not None and result.table.num_rows >= wanted):
        return result.table
    limit = "128 MiB" if result.limited == "bytes" else "the most rows an answer has"
    warnings.warn(
        f"these are {result.table.num_rows} rows, and there are more ({limit}); ask for less at once, by time",
        TruncatedWarning,
        stacklevel=3,
    )
    known = result.table.schema.metadata or {}
    return result.table.replace_schema_metadata({**known, b"sectool.truncated": b"true"})


def _us(moment: Moment | None) -> int | None:
    """UTC microseconds. Raises UsageError."""
    match moment:
        case None:
            return None
        case bool():
            raise UsageError(f"{moment} is not a time")
        case int():
            return moment
        case timedelta():
            return _now_us() - moment // timedelta(microseconds=1)
        case datetime():
            return from_datetime(moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment)
        case str():
            return parse_time(moment, _now_us())
    raise UsageError(
        f"{moment!r} is not a time", "give '10m', '2026-03-01T02:00:00Z', a datetime or UTC microseconds"
    )


def _now_us() -> int:
    return time.time_ns() // 1000
