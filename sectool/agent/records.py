"""What the agent puts on record: policy revisions in the control history, workloads and identities as events.

All of it happens on one thread of its own, in the order it was asked for: a slow disk holds up the record, never a
packet and never the agent. Events for the store go with it (sectool.agent.eventlog).
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sectool.agent.eventlog import EventLog
from sectool.errors import SectoolError
from sectool.events import Type, now_us
from sectool.identity.credential import Credential

if TYPE_CHECKING:
    from sectool.agent.identities import Issued

log = logging.getLogger("sectool.agent")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Stored:
    """A policy revision as it is on record; `applied_us` in UTC microseconds."""

    revision: int
    hash: str
    text: str
    author: str
    reason: str
    applied_us: int


class Records:
    """The control history of a running daemon."""

    def __init__(self, path: Path, host: str) -> None:
        """Open or make the history at `path`. Raises StoreError when it cannot be read or written."""
        self._host = host
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="records")
        try:
            self._history: sqlite3.Connection = self._thread.submit(_open, path).result()
        except BaseException:
            self._thread.shutdown()
            raise

    async def close(self) -> None:
        """Finish what is under way."""
        await self._do(self._history.close)
        self._thread.shutdown()

    def _do(self, work: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    def _later(self, work: Callable[..., None], *args: Any) -> None:
        self._thread.submit(work, *args).add_done_callback(_complain)

    # Policy.

    async def newest(self) -> Stored | None:
        """The revision that is in force on this host."""
        return await self._do(_newest, self._history)

    async def revision(self, number: int) -> Stored | None:
        """A revision by number."""
        return await self._do(_revision, self._history, number)

    async def revision_at(self, moment_us: int) -> Stored | None:
        """The revision that was in force at a moment."""
        return await self._do(_revision_at, self._history, moment_us)

    async def revisions(self) -> list[Stored]:
        """All revisions, newest first."""
        return await self._do(_revisions, self._history)

    async def add_revision(self, text: str, digest: str, author: str, reason: str) -> Stored:
        """Store the next revision. Raises StoreError, and then nothing is stored."""
        return await self._do(_add, self._history, text, digest, author, reason)

    async def activated(self, revision: int) -> None:
        """This host enforces `revision` from now on."""
        log.info("revision %d is in force", revision)

    # Workloads and identities.

    def issued(
        self, events: EventLog, entry: Issued, credential: Credential, before: Credential | None
    ) -> None:
        """A credential was issued: dictionary entries, events, and a row each in the history."""
        peer = credential.peer
        events.define(Type.DICT_LABELS, peer.labels.id, labels=dict(peer.labels))
        events.define(
            Type.DICT_IDENTITY,
            peer.id,
            spiffe_id=peer.spiffe_id,
            trust_domain=peer.trust_domain,
            labels_id=peer.labels.id,
            fingerprint=peer.fingerprint.hex(),
            serial=peer.serial,
            not_before=peer.not_before_us,
            not_after=peer.not_after_us,
            issuer=peer.host,
        )
        events.define(Type.DICT_WORKLOAD, entry.workload_id, **entry.describe())
        if before is None:
            events.emit(
                Type.WORKLOAD_START,
                workload_id=entry.workload_id,
                workload=entry.workload.name,
                pid=entry.facts.pid,
                executable=entry.facts.executable,
                labels=dict(peer.labels),
            )
        events.emit(
            Type.IDENTITY_ISSUED if before is None else Type.IDENTITY_ROTATED,
            identity_id=peer.id,
            spiffe_id=peer.spiffe_id,
            serial=peer.serial,
            not_after=peer.not_after_us,
            workload_id=entry.workload_id,
            replaces=before.peer.id if before else None,
        )

    def stopped(self, events: EventLog, entry: Issued) -> None:
        """A workload has ended."""
        events.emit(Type.WORKLOAD_STOP, workload_id=entry.workload_id, workload=entry.workload.name)


def _complain(done: Future[None]) -> None:
    error = done.exception()
    if error is not None:
        log.error("not put on record: %s", error.message if isinstance(error, SectoolError) else error)


# Policy revisions, newest last, in a table of their own.

_TABLE = """
CREATE TABLE IF NOT EXISTS policy_revision (
    revision INTEGER PRIMARY KEY, hash TEXT NOT NULL, text TEXT NOT NULL,
    author TEXT NOT NULL, reason TEXT NOT NULL, applied_us INTEGER NOT NULL
) STRICT
"""
_COLUMNS = "revision, hash, text, author, reason, applied_us"


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute(_TABLE)
    return connection


def _select(history: sqlite3.Connection, rest: str, *values: int) -> list[Stored]:
    rows = history.execute(f"SELECT {_COLUMNS} FROM policy_revision {rest}", values)  # noqa: S608
    return [Stored(*row) for row in rows.fetchall()]


def _newest(history: sqlite3.Connection) -> Stored | None:
    return next(iter(_select(history, "ORDER BY revision DESC LIMIT 1")), None)


def _revision(history: sqlite3.Connection, number: int) -> Stored | None:
    return next(iter(_select(history, "WHERE revision = ?", number)), None)


def _revision_at(history: sqlite3.Connection, moment_us: int) -> Stored | None:
    rest = "WHERE applied_us <= ? ORDER BY revision DESC LIMIT 1"
    return next(iter(_select(history, rest, moment_us)), None)


def _revisions(history: sqlite3.Connection) -> list[Stored]:
    return _select(history, "ORDER BY revision DESC")


def _add(history: sqlite3.Connection, text: str, digest: str, author: str, reason: str) -> Stored:
    history.execute(
        "INSERT INTO policy_revision (hash, text, author, reason, applied_us) VALUES (?, ?, ?, ?, ?)",
        (digest, text, author, reason, now_us()),
    )
    newest = _newest(history)
    assert newest is not None
    return newest


def read_offline(path: Path) -> list[Stored]:
    """All revisions on record at `path`, newest first, read without a daemon."""
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
    try:
        return _revisions(connection)
    finally:
        connection.close()
