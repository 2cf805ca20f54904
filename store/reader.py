"""Reading events, with or without a running store: the same questions, the same views, the same answers.

`open_reader` asks the store process when one answers on events.sock; otherwise it opens all segments itself,
read-only (the last one with its log, as a crash left it).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import duckdb
import pyarrow as pa

from sectool.api.client import Answer, Client
from sectool.errors import NoDaemonError, PrivilegeError, StoreError
from sectool.filters import Filter
from store import questions, segment
from store.catalog import Catalog
from store.flows import list_events, list_flows
from store.query import DEFAULT_ROWS, DEFAULT_TIMEOUT_MS, MAX_TIMEOUT_MS, Result, explain, run, stream

ALL = Filter()


@dataclass(frozen=True, slots=True)
class TailFrame:
    """News of a followed stream. `gap` flows were skipped before it because the reader was too slow."""

    table: pa.Table | None
    next_seq: int
    gap: int = 0


class Reader(Protocol):
    """What both ways of reading can do. Times are UTC microseconds."""

    live: bool
    warnings: list[str]

    def query(
        self, sql: str, *, limit: int = ..., timeout_ms: int = ..., begun: tuple[int, int] | None = None
    ) -> Result:
        """One SELECT over the documented views. `begun`: see store.query.run."""

    def stream(self, sql: str, *, timeout_ms: int = ...) -> Iterator[pa.Table]:
        """See store.query.stream."""

    def explain(self, sql: str, *, analyze: bool = False, timeout_ms: int = ...) -> str:
        """See store.query.explain."""

    def flows(
        self,
        filter_: Filter = ...,
        *,
        since: int | None = None,
        until: int | None = None,
        at: int | None = None,
        first: int | None = None,
        last: int | None = None,
        timeout_ms: int = ...,
    ) -> Result:
        """See store.flows.list_flows."""

    def events(
        self,
        types: Sequence[str] = (),
        *,
        since: int | None = None,
        until: int | None = None,
        first: int | None = None,
        last: int | None = None,
        timeout_ms: int = ...,
    ) -> Result:
        """See store.flows.list_events."""

    def tail(self, filter_: Filter = ..., from_seq: int | None = None) -> Iterator[TailFrame]:
        """New flows as they come; NoDaemonError without a store process."""

    def ask(self, question: str, **fields: Any) -> dict[str, Any]:
        """One of store.questions, with its fields (None: not given)."""

    def stats(self) -> dict[str, Any]:
        """Counters and state of the store."""

    def close(self) -> None:
        """Let go of everything."""


def open_reader(state_dir: Path, run_dir: Path) -> Reader:
    """The store's answers if it runs, else the segments themselves.

    Raises PrivilegeError when the caller may read neither, StoreError when there are no events to read.
    """
    client = Client(run_dir / "events.sock", timeout=MAX_TIMEOUT_MS / 1000 + 10)
    try:
        client.call("ping")
    except NoDaemonError:
        return LocalReader(state_dir / "events")
    return LiveReader(client)


def _result(answer: Answer) -> Result:
    return Result(from_ipc(answer.payload), bool(answer.get("truncated")), str(answer.get("limited", "")))


def from_ipc(payload: bytes) -> pa.Table:
    """The table of an Arrow IPC stream. Raises StoreError for anything else."""
    try:
        with pa.ipc.open_stream(pa.py_buffer(payload)) as reader:
            return reader.read_all()
    except (pa.ArrowException, OSError) as error:
        raise StoreError(
            f"the store's answer is no Arrow stream: {error}", "client and store may differ in version"
        ) from None


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


class LiveReader:
    """Asks the store process."""

    live = True

    def __init__(self, client: Client) -> None:
        self._client = client
        self.warnings: list[str] = []

    def query(
        self,
        sql: str,
        *,
        limit: int = DEFAULT_ROWS,
        timeout_ms: int = DEFAULT_TIMEOUT_MS,
        begun: tuple[int, int] | None = None,
    ) -> Result:
        """One SELECT over the documented views."""
        fields: dict[str, Any] = {} if begun is None else {"begun_since": begun[0], "begun_until": begun[1]}
        return _result(self._client.call("query", sql=sql, limit=limit, timeout_ms=timeout_ms, **fields))

    def stream(self, sql: str, *, timeout_ms: int = DEFAULT_TIMEOUT_MS) -> Iterator[pa.Table]:
        """See store.query.stream."""
        with Client(self._client.path, timeout=self._client.timeout) as client:
            for answer in client.stream("stream", sql=sql, timeout_ms=timeout_ms):
                if answer.payload:
                    yield from_ipc(answer.payload)

    def explain(self, sql: str, *, analyze: bool = False, timeout_ms: int = DEFAULT_TIMEOUT_MS) -> str:
        """See store.query.explain."""
        answer = self._client.call("explain", sql=sql, analyze=analyze, timeout_ms=timeout_ms)
        return answer.payload.decode(errors="replace")

    def flows(
        self,
        filter_: Filter = ALL,
        *,
        since: int | None = None,
        until: int | None = None,
        at: int | None = None,
        first: int | None = None,
        last: int | None = None,
        timeout_ms: int = DEFAULT_TIMEOUT_MS,
    ) -> Result:
        """See store.flows.list_flows."""
        fields = _given(since=since, until=until, at=at, first=first, last=last, timeout_ms=timeout_ms)
        return _result(self._client.call("flows", filter=filter_.to_json(), **fields))

    def events(
        self,
        types: Sequence[str] = (),
        *,
        since: int | None = None,
        until: int | None = None,
        first: int | None = None,
        last: int | None = None,
        timeout_ms: int = DEFAULT_TIMEOUT_MS,
    ) -> Result:
        """See store.flows.list_events."""
        fields = _given(since=since, until=until, first=first, last=last, timeout_ms=timeout_ms)
        return _result(self._client.call("events", types=list(types), **fields))

    def tail(
        self,
        filter_: Filter = ALL,
        from_seq: int | None = None,
    ) -> Iterator[TailFrame]:
        """New flows as they come, until the store ends or the iterator is closed. The first frame has no rows."""
        with Client(self._client.path, timeout=None) as client:
            for answer in client.stream("tail", filter=filter_.to_json(), **_given(from_seq=from_seq)):
                table = from_ipc(answer.payload) if answer.payload else None
                yield TailFrame(table, int(answer["next_seq"]), int(answer.get("gap", 0)))

    def ask(self, question: str, **fields: Any) -> dict[str, Any]:
        """One of store.questions."""
        return questions.decode(self._client.call("ask", question=question, **_given(**fields)).payload)

    def stop(self) -> None:
        """End, from any thread, whatever is being asked: NoDaemonError there. Nothing can be asked any more."""
        self._client.abort()

    def stats(self) -> dict[str, Any]:
        """Counters and state of the store."""
        return {key: value for key, value in self._client.call("stats").header.items() if key != "ok"}

    def close(self) -> None:
        """Hang up."""
        self._client.close()


class LocalReader:
    """Opens all segments itself; nothing is written."""

    live = False

    def __init__(self, events: Path) -> None:
        self._events = events
        self.warnings: list[str] = []
        try:
            files = segment.segment_files(events)
        except PermissionError:
            raise PrivilegeError(
                f"no permission to read {events}", "run it with sudo, or join the group of the events folder"
            ) from None
        if not events.is_dir():
            raise StoreError(
                f"there are no events in {events}",
                "start the daemon with `sectool up`, or name its folder with --state",
            )
        self._catalog = Catalog(events)
        for path in files:
            damage = self._catalog.attach_sealed(path)
            if damage is not None:
                self.warnings.append(f"{path.name} is left out: {damage.what}")
        self._catalog.remake_views()
        with contextlib.suppress(
            duckdb.Error, OSError, ValueError
        ):  # without it answers take longer, that is all
            self._catalog.attach_index(read_only=True)

    def stop(self, thread: int | None = None) -> None:
        """End, from any thread, what is being asked, or what `thread` asks: StoppedError there."""
        self._catalog.interrupt_queries(thread)

    @property
    def catalog(self) -> Catalog:
        """The opened segments, for this package's own statements."""
        return self._catalog

    def query(
        self,
        sql: str,
        *,
        limit: int = DEFAULT_ROWS,
        timeout_ms: int = DEFAULT_TIMEOUT_MS,
        begun: tuple[int, int] | None = None,
    ) -> Result:
        """One SELECT over the documented views."""
        return run(self._catalog, sql, limit=limit, timeout_ms=timeout_ms, begun=begun)

    def stream(self, sql: str, *, timeout_ms: int = DEFAULT_TIMEOUT_MS) -> Iterator[pa.Table]:
        """See store.query.stream."""
        return stream(self._catalog, sql, timeout_ms=timeout_ms)

    def explain(self, sql: str, *, analyze: bool = False, timeout_ms: int = DEFAULT_TIMEOUT_MS) -> str:
        """See store.query.explain."""
        return explain(self._catalog, sql, analyze=analyze, timeout_ms=timeout_ms)

    def flows(
        self,
        filter_: Filter = ALL,
        *,
        since: int | None = None,
        until: int | None = None,
        at: int | None = None,
        first: int | None = None,
        last: int | None = None,
        timeout_ms: int = DEFAULT_TIMEOUT_MS,
    ) -> Result:
        """See store.flows.list_flows."""
        return list_flows(
            self._catalog,
            filter_,
            since=since,
            until=until,
            at=at,
            first=first,
            last=last,
            timeout_ms=timeout_ms,
        )

    def events(
        self,
        types: Sequence[str] = (),
        *,
        since: int | None = None,
        until: int | None = None,
        first: int | None = None,
        last: int | None = None,
        timeout_ms: int = DEFAULT_TIMEOUT_MS,
    ) -> Result:
        """See store.flows.list_events."""
        return list_events(
            self._catalog, types, since=since, until=until, first=first, last=last, timeout_ms=timeout_ms
        )

    def tail(
        self,
        filter_: Filter = ALL,
        from_seq: int | None = None,
    ) -> Iterator[TailFrame]:
        """There is nothing to follow without a store process: NoDaemonError."""
        raise NoDaemonError(
            "no daemon runs, so there is nothing to follow",
            "start it with `sectool up`, or leave --follow out",
        )

    def ask(self, question: str, **fields: Any) -> dict[str, Any]:
        """One of store.questions."""
        return questions.decode(questions.encode(questions.answer(self._catalog, question, _given(**fields))))

    def stats(self) -> dict[str, Any]:
        """What the files say."""
        with self._catalog.reading() as cursor:
            records, events = segment.one(
                cursor, "SELECT (SELECT count(*) FROM flow_records), (SELECT count(*) FROM events)"
            )
        files = segment.segment_files(self._events)
        return {
            "flow_records": records,
            "events": events,
            "segments": len(files),
            "unopened_segments": [warning.split(" ")[0] for warning in self.warnings],
            "bytes": sum(segment.size_of(path) for path in files),
            "degraded": "no store process runs",
        }

    def close(self) -> None:
        """Close the segments."""
        with contextlib.suppress(duckdb.Error):
            self._catalog.close()
