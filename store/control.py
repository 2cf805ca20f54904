"""Control history: who changed what, when, why; and what was in force, or known, at any moment.

    transactions   one row per change, each hashed over the one before: actor, reason, kind, hash of the bodies
    rows           versions of entities; half-open intervals [from, to) in integer UTC microseconds, to NULL: open

              valid time: when it was so            transaction time: when we knew it
    append    [valid_from, …)                       [tx, …)
    close     the open version is closed on both axes where knowledge changed; the past stays answerable:

    as_of(kind, valid)           what was so at `valid`, by what we know today
    as_of(kind, valid, known)    what was so at `valid`, by what we knew at `known`

An append over an open version of the same key ends that version: its row is closed in transaction time, and a row
with the shortened valid interval takes its place. Triggers refuse every other UPDATE and every DELETE; `verify`
finds what was changed around them. SQLite through sqlite-utils, in WAL mode: readers and writers in other
processes wait for each other at most `BUSY_MS`.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import pwd
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from sectool.errors import StoreError
from sectool.events import now_us as wall_clock_us

if TYPE_CHECKING:
    import sqlite_utils

VERSION = 1
BUSY_MS = 5000
GENESIS = "0" * 64
_Add = tuple[str, str, int, int | None]  # key, body, valid_from, valid_to
KINDS = ("policy", "activation", "identity", "workload", "network", "trust", "revocation", "enrolment")

_SCHEMA = f"""
CREATE TABLE transactions (
    id INTEGER PRIMARY KEY, tx_us INTEGER NOT NULL, actor_uid INTEGER NOT NULL, actor TEXT NOT NULL,
    reason TEXT NOT NULL, kind TEXT NOT NULL, body_hash TEXT NOT NULL, prev TEXT NOT NULL, hash TEXT NOT NULL
) STRICT;
CREATE TABLE rows (
    id INTEGER PRIMARY KEY,
    tx INTEGER NOT NULL REFERENCES transactions(id), closed_by INTEGER REFERENCES transactions(id),
    kind TEXT NOT NULL, key TEXT NOT NULL, body TEXT NOT NULL,
    valid_from INTEGER NOT NULL, valid_to INTEGER, tx_from INTEGER NOT NULL, tx_to INTEGER,
    CHECK (valid_to IS NULL OR valid_to >= valid_from), CHECK (tx_to IS NULL OR tx_to >= tx_from)
) STRICT;
CREATE INDEX rows_by_key ON rows (kind, key, tx_from);
CREATE INDEX rows_open ON rows (kind, key) WHERE tx_to IS NULL;
CREATE TRIGGER transactions_kept BEFORE DELETE ON transactions
    BEGIN SELECT RAISE(ABORT, 'history is never deleted'); END;
CREATE TRIGGER transactions_fixed BEFORE UPDATE ON transactions
    BEGIN SELECT RAISE(ABORT, 'history is never edited'); END;
CREATE TRIGGER rows_kept BEFORE DELETE ON rows
    BEGIN SELECT RAISE(ABORT, 'history is never deleted'); END;
CREATE TRIGGER rows_fixed BEFORE UPDATE ON rows
    WHEN OLD.tx_to IS NOT NULL OR NEW.tx_to IS NULL OR NEW.closed_by IS NULL
        OR NEW.id IS NOT OLD.id OR NEW.tx IS NOT OLD.tx OR NEW.kind IS NOT OLD.kind OR NEW.key IS NOT OLD.key
        OR NEW.body IS NOT OLD.body OR NEW.valid_from IS NOT OLD.valid_from OR NEW.valid_to IS NOT OLD.valid_to
        OR NEW.tx_from IS NOT OLD.tx_from
    BEGIN SELECT RAISE(ABORT, 'history is never edited'); END;
PRAGMA user_version = {VERSION};
"""


@dataclass(frozen=True, slots=True)
class Actor:
    """Who made a change."""

    uid: int
    name: str

    @classmethod
    def me(cls) -> Actor:
        """The user this process acts for (SUDO_UID when sudo raised it)."""
        uid = os.getuid()
        with contextlib.suppress(KeyError, ValueError):
            if uid == 0:
                uid = int(os.environ["SUDO_UID"])
        try:
            return cls(uid, pwd.getpwuid(uid).pw_name)
        except KeyError:
            return cls(uid, f"uid {uid}")


@dataclass(frozen=True, slots=True)
class Transaction:
    """One entry of the chain."""

    id: int
    tx_us: int
    actor: Actor
    reason: str
    kind: str
    body_hash: str
    prev: str
    hash: str


@dataclass(frozen=True, slots=True)
class Version:
    """One version of an entity: so in [valid_from, valid_to), and believed in [tx_from, tx_to)."""

    kind: str
    key: str
    body: dict[str, Any]
    valid_from: int
    valid_to: int | None
    tx_from: int
    tx_to: int | None
    tx: int


class ControlHistory:
    """The control history in one SQLite file. Not thread-safe: one object per thread."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        """Open the history, or make it (0600). Raises StoreError, and overwrites nothing, when it cannot be read."""
        self.path = path
        self._read_only = read_only
        self._db = self._open()

    def _open(self) -> sqlite_utils.Database:
        import sqlite_utils  # 0.4 s: only when history is needed

        if self._read_only and not self.path.exists():
            raise StoreError(
                f"there is no control history at {self.path}",
                "the daemon makes it when it starts for the first time",
            )
        try:
            if not self._read_only:
                self.path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
                os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            mode = "ro" if self._read_only else "rw"
            connection = sqlite3.connect(
                f"{self.path.absolute().as_uri()}?mode={mode}",
                uri=True,
                isolation_level=None,
                timeout=BUSY_MS / 1000,
                check_same_thread=False,
            )
        except (OSError, sqlite3.Error) as error:
            raise self._unreadable(error) from None
        try:
            with self._errors():
                connection.execute("PRAGMA trusted_schema = OFF")
                version = connection.execute("PRAGMA user_version").fetchone()[0]
                if version == 0 and not self._read_only:
                    version = self._create(connection)
                if version != VERSION:
                    raise StoreError(
                        f"{self.path} has schema version {version}, not {VERSION}",
                        "it was made by another release of sectool",
                    )
                connection.execute("SELECT count(*) FROM transactions, rows WHERE rows.id < 0").fetchone()
                if not self._read_only:  # only now that it is known to be ours
                    connection.execute("PRAGMA journal_mode = WAL")
                    connection.execute("PRAGMA synchronous = FULL")
        except BaseException:
            connection.close()
            raise
        return sqlite_utils.Database(connection)

    def _create(self, connection: sqlite3.Connection) -> int:
        connection.execute("BEGIN IMMEDIATE")
        try:
            version = int(connection.execute("PRAGMA user_version").fetchone()[0])
            if version == 0:  # nobody was faster
                if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    raise StoreError(
                        f"{self.path} is some other database",
                        "move it away, or name another folder with --state",
                    )
                for statement in _statements(_SCHEMA):
                    connection.execute(statement)
                version = VERSION
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        return version

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._unreadable(error) from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise self._unreadable(error) from None

    def _unreadable(self, error: Exception) -> StoreError:
        text = str(getattr(error, "strerror", None) or error)
        if isinstance(error, sqlite3.OperationalError) and ("locked" in text or "busy" in text):
            return StoreError(
                f"{self.path} is in use by another process for too long", "try again in a moment"
            )
        if isinstance(error, OSError) or "unable to open" in text or "readonly" in text or "full" in text:
            return StoreError(
                f"cannot use the control history {self.path}: {text}",
                "look at its permissions and at the room on its disk",
            )
        return StoreError(
            f"the control history {self.path} is damaged: {text}",
            "nothing was changed; move it away (with its -wal and -shm) and put back a copy, "
            "or start without it: policies have to be applied again",
        )

    # --- writing ---------------------------------------------------------------------------------------------

    def append(
        self,
        kind: str,
        key: str,
        body: Mapping[str, Any],
        actor: Actor,
        reason: str,
        now_us: int | None = None,
        valid_from: int | None = None,
    ) -> Transaction:
        """Record that `key` is `body` from `valid_from` on (default: now). An open version of it ends there."""
        with self._transaction() as connection:
            tx_us = self._moment(connection, now_us)
            start = tx_us if valid_from is None else valid_from
            ended = _Ended.find(connection, kind, key, start)
            adds = [*ended.carried(start), (key, _canonical(body), start, None)]
            return self._enter(connection, kind, tx_us, actor, reason, adds, ended)

    def close(
        self,
        kind: str,
        key: str,
        actor: Actor,
        reason: str,
        now_us: int | None = None,
        valid_to: int | None = None,
    ) -> Transaction:
        """Record that `key` is no more from `valid_to` on (default: now). StoreError when it is not there."""
        with self._transaction() as connection:
            tx_us = self._moment(connection, now_us)
            end = tx_us if valid_to is None else valid_to
            ended = _Ended.find(connection, kind, key, end)
            if not ended.rows:
                raise StoreError(f"there is no {kind} {key!r} to close", "list what there is first")
            return self._enter(connection, kind, tx_us, actor, reason, ended.carried(end), ended)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        if self._read_only:
            raise StoreError(f"{self.path} was opened to read only")
        connection = self._db.conn
        assert connection is not None
        with self._errors():
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    @staticmethod
    def _moment(connection: sqlite3.Connection, now_us: int | None) -> int:
        """Transaction time never runs backwards, whatever the clock does."""
        now = wall_clock_us() if now_us is None else now_us
        last = connection.execute("SELECT tx_us FROM transactions ORDER BY id DESC LIMIT 1").fetchone()
        return max(now, int(last[0])) if last else now

    @staticmethod
    def _enter(
        connection: sqlite3.Connection,
        kind: str,
        tx_us: int,
        actor: Actor,
        reason: str,
        adds: Sequence[_Add],
        ended: _Ended,
    ) -> Transaction:
        """Write one transaction: its chain entry, the rows it adds, the ends of those it replaces."""
        last = connection.execute("SELECT id, hash FROM transactions ORDER BY id DESC LIMIT 1").fetchone()
        number, prev = (int(last[0]) + 1, str(last[1])) if last else (1, GENESIS)
        first = int(connection.execute("SELECT coalesce(max(id), 0) + 1 FROM rows").fetchone()[0])
        added = [(row, kind, *add) for row, add in enumerate(adds, first)]
        content = _content_hash(added, [row[0] for row in ended.rows])
        entry = Transaction(number, tx_us, actor, reason, kind, content, prev, "")
        entry = replace(entry, hash=_hash(entry))
        connection.execute(
            "INSERT INTO transactions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (number, tx_us, actor.uid, actor.name, reason, kind, content, prev, entry.hash),
        )
        for row in ended.rows:
            connection.execute(
                "UPDATE rows SET tx_to = ?, closed_by = ? WHERE id = ?", (tx_us, number, row[0])
            )
        connection.executemany(
            "INSERT INTO rows (id, kind, key, body, valid_from, valid_to, tx_from, tx) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            [(*row, tx_us, number) for row in added],
        )
        return entry

    # --- reading ---------------------------------------------------------------------------------------------

    def current(self, kind: str) -> list[Version]:
        """Versions of `kind` that are open on both axes, by key."""
        return self._versions("kind = ? AND tx_to IS NULL AND valid_to IS NULL", [kind], "key, id")

    def as_of(self, kind: str, valid_us: int, known_us: int | None = None) -> list[Version]:
        """Versions that were so at `valid_us`, by what is known now, or was known at `known_us`; by key."""
        where = "kind = ? AND valid_from <= ? AND (valid_to IS NULL OR valid_to > ?)"
        values: list[Any] = [kind, valid_us, valid_us]
        if known_us is None:
            where += " AND tx_to IS NULL"
        else:
            where += " AND tx_from <= ? AND (tx_to IS NULL OR tx_to > ?)"
            values += [known_us, known_us]
        return self._versions(where, values, "key, id")

    def history(self, kind: str, key: str | None = None) -> list[Version]:
        """Every version ever recorded, in the order of recording."""
        where, values = "kind = ?", [kind]
        if key is not None:
            where, values = where + " AND key = ?", [kind, key]
        return self._versions(where, values, "id")

    def transactions(self, since_id: int = 0) -> list[Transaction]:
        """Entries of the chain with an id above `since_id`."""
        with self._errors():
            rows = self._db.query("SELECT * FROM transactions WHERE id > ? ORDER BY id", [since_id])
            return [_transaction(row) for row in rows]

    def _versions(self, where: str, values: Sequence[Any], order: str) -> list[Version]:
        with self._errors():
            return [
                Version(
                    row["kind"],
                    row["key"],
                    json.loads(row["body"]),
                    row["valid_from"],
                    row["valid_to"],
                    row["tx_from"],
                    row["tx_to"],
                    row["tx"],
                )
                for row in self._db["rows"].rows_where(where, values, order_by=order)
            ]

    def verify(self) -> str | None:
        """The first place where the history does not hold, in words; None when all of it does."""
        with self._errors():
            connection = self._db.conn
            assert connection is not None
            connection.execute("BEGIN")  # one snapshot, whatever others append meanwhile
            try:
                return self._verify(connection)
            finally:
                connection.execute("ROLLBACK")

    def _verify(self, connection: sqlite3.Connection) -> str | None:
        prev, tx_us = GENESIS, 0
        for number, entry in enumerate(self.transactions(), 1):
            if entry.id != number:
                return f"transaction {number} is missing"
            if entry.prev != prev:
                return f"transaction {number} does not follow the one before it"
            if not hmac.compare_digest(_hash(entry), entry.hash):
                return f"transaction {number} was edited"
            if entry.tx_us < tx_us:
                return f"transaction {number} is older than the one before it"
            prev, tx_us = entry.hash, entry.tx_us
            problem = self._verify_rows(connection, entry)
            if problem:
                return problem
        stray = connection.execute(
            "SELECT id FROM rows WHERE tx NOT IN (SELECT id FROM transactions)"
            " OR (tx_to IS NULL) <> (closed_by IS NULL) OR closed_by NOT IN (SELECT id FROM transactions) LIMIT 1"
        ).fetchone()
        return f"row {stray[0]} belongs to no transaction" if stray else None

    @staticmethod
    def _verify_rows(connection: sqlite3.Connection, entry: Transaction) -> str | None:
        """Whether what hangs on a transaction is exactly what it did."""
        added = connection.execute(
            "SELECT id, kind, key, body, valid_from, valid_to, tx_from FROM rows WHERE tx = ? ORDER BY id",
            (entry.id,),
        ).fetchall()
        closed = connection.execute(
            "SELECT id, tx_to FROM rows WHERE closed_by = ? ORDER BY id", (entry.id,)
        ).fetchall()
        for row in (*added, *closed):
            if row[-1] != entry.tx_us:
                return f"row {row[0]} (transaction {entry.id}) was edited"
        content = _content_hash([row[:-1] for row in added], [row[0] for row in closed])
        if not hmac.compare_digest(content, entry.body_hash):
            return f"a row of transaction {entry.id} ({entry.kind} by {entry.actor.name}) was added, edited or removed"
        return None

    def close_file(self) -> None:
        """Close the file."""
        self._db.close()

    def __enter__(self) -> ControlHistory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close_file()


@dataclass(frozen=True, slots=True)
class _Ended:
    """Versions that a change ends: (id, key, body, valid_from) each."""

    rows: list[tuple[int, str, str, int]]

    @classmethod
    def find(cls, connection: sqlite3.Connection, kind: str, key: str, end: int) -> _Ended:
        """Those of `key` that are believed to go on beyond `end`."""
        return cls(
            connection.execute(
                "SELECT id, key, body, valid_from FROM rows WHERE kind = ? AND key = ? AND tx_to IS NULL"
                " AND (valid_to IS NULL OR valid_to > ?) ORDER BY id",
                (kind, key, end),
            ).fetchall()
        )

    def carried(self, end: int) -> list[_Add]:
        """What of them stays true: their time before `end`."""
        return [(key, body, start, end) for _, key, body, start in self.rows if start < end]


def _statements(script: str) -> Iterator[str]:
    statement = ""
    for line in script.strip().splitlines():
        statement += line + "\n"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _canonical(body: Mapping[str, Any]) -> str:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _content_hash(added: Sequence[Sequence[Any]], closed: Sequence[int]) -> str:
    """SHA-256 over rows added (id, kind, key, body, valid_from, valid_to) and ids of rows closed."""
    content = json.dumps([[list(row) for row in added], list(closed)], separators=(",", ":"))
    return hashlib.sha256(content.encode()).hexdigest()


def _hash(entry: Transaction) -> str:
    fields = [
        *(entry.id, entry.tx_us, entry.actor.uid, entry.actor.name),
        *(entry.reason, entry.kind, entry.body_hash, entry.prev),
    ]
    return hashlib.sha256(json.dumps(fields, separators=(",", ":")).encode()).hexdigest()


def _transaction(row: Mapping[str, Any]) -> Transaction:
    actor = Actor(row["actor_uid"], row["actor"])
    return Transaction(
        row["id"], row["tx_us"], actor, row["reason"], row["kind"], row["body_hash"], row["prev"], row["hash"]
    )
