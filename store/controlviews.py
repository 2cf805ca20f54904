"""The control history as SQL: policies, identities, workloads and trust as of a moment, and every change ever made.

A copy of the history in the in-memory catalog, made anew before a query that names one of these when the history
has grown. Moments are UTC TIMESTAMPs; NULL as `until` means: still so.
"""

# ruff: noqa: S608 -- put together from the constants below

from __future__ import annotations

import json
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from sectool.errors import PrivilegeError
from store.control import KINDS, ControlHistory

if TYPE_CHECKING:
    import duckdb

CONTROL = "control.sqlite"
AT_A_MOMENT = ("policies_at", "activations_at", "identities_at", "workloads_at", "trust_at")
_NAMES = re.compile(rf"\b({'|'.join((*AT_A_MOMENT, 'control_rows', 'changes'))})\b", re.IGNORECASE)

_ROWS = (
    ("kind", "VARCHAR"),
    ("key", "VARCHAR"),
    ("body", "JSON"),
    ("valid_from", "TIMESTAMP"),
    ("valid_to", "TIMESTAMP"),
    ("tx_from", "TIMESTAMP"),
    ("tx_to", "TIMESTAMP"),
    ("tx", "BIGINT"),
)
_CHANGES = (
    ("tx", "BIGINT"),
    ("ts", "TIMESTAMP"),
    ("actor", "VARCHAR"),
    ("actor_uid", "BIGINT"),
    ("kind", "VARCHAR"),
    ("reason", "VARCHAR"),
    ("hash", "VARCHAR"),
)


def _so(kind: str, alias: str) -> str:
    """What is believed today to have been so at `moment`."""
    return (
        f"{alias}.kind = '{kind}' AND {alias}.tx_to IS NULL AND {alias}.valid_from <= moment::TIMESTAMP"
        f" AND ({alias}.valid_to IS NULL OR {alias}.valid_to > moment::TIMESTAMP)"
    )


def _us(name: str) -> str:
    return f"make_timestamp((i.body->>'{name}')::BIGINT) AS {name}"


_MACROS = {
    "activations_at": "SELECT a.key AS host, (a.body->>'revision')::BIGINT AS revision, a.valid_from AS since,"
    f" a.valid_to AS until FROM control_rows a WHERE {_so('activation', 'a')}",
    "policies_at": "SELECT a.key AS host, (a.body->>'revision')::BIGINT AS revision, p.body->>'hash' AS hash,"
    " p.body->>'author' AS author, p.body->>'reason' AS reason, p.valid_from AS applied, a.valid_from AS since,"
    " a.valid_to AS until, p.body->>'text' AS text FROM control_rows a LEFT JOIN control_rows p"
    " ON p.kind = 'policy' AND p.key = a.body->>'revision' AND p.tx_to IS NULL"
    f" WHERE {_so('activation', 'a')}",
    "identities_at": "SELECT i.key AS spiffe_id, i.body->>'trust_domain' AS trust_domain,"
    " i.body->'labels' AS labels, i.body->>'serial' AS serial, i.body->>'fingerprint' AS fingerprint,"
    f" {_us('not_before')}, {_us('not_after')}, i.body->>'issuer' AS issuer, i.valid_from AS since"
    f" FROM control_rows i WHERE {_so('identity', 'i')}"
    " AND (i.body->>'not_after')::BIGINT > epoch_us(moment::TIMESTAMP)",
    "workloads_at": "SELECT w.key::BIGINT AS id, w.body->>'name' AS name, w.body->'labels' AS labels,"
    " w.body->>'user' AS user, w.body->>'executable' AS executable, w.body->>'sha256' AS sha256,"
    " w.body->>'unit' AS unit, w.body->>'cgroup' AS cgroup, w.valid_from AS since, w.valid_to AS until"
    f" FROM control_rows w WHERE {_so('workload', 'w')}",
    "trust_at": "SELECT t.key AS trust_domain, t.body->'roots' AS roots, t.valid_from AS since, t.valid_to AS until"
    f" FROM control_rows t WHERE {_so('trust', 't')}",
}


def control_ddl() -> list[str]:
    """Statements that make the copy's tables, empty, and the table functions over them."""
    tables = [
        f"CREATE TABLE {name} ({', '.join(f'{column} {kind}' for column, kind in columns)})"
        for name, columns in (("control_rows", _ROWS), ("changes", _CHANGES))
    ]
    return tables + [f"CREATE MACRO {name}(moment) AS TABLE {sql}" for name, sql in _MACROS.items()]


class ControlMirror:
    """Keeps the copy as new as the history beside the folder of segments. Thread-safe."""

    def __init__(self, events: Path) -> None:
        self._path = events.parent / CONTROL
        self._lock = threading.Lock()
        self._newest: tuple[int, str] | None = None

    def refresh(self, cursor: duckdb.DuckDBPyConnection, sql: str) -> None:
        """Make the copy what the history is now, if `sql` speaks of it. Raises StoreError, PrivilegeError."""
        if not _NAMES.search(sql):
            return
        try:
            there = self._path.exists()
        except PermissionError:
            there = True
        if not there:
            return
        with self._lock:
            try:
                history = ControlHistory(self._path, read_only=True)
            except PermissionError:
                raise PrivilegeError(
                    f"no permission to read {self._path}", "ask the running daemon, or run it with sudo"
                ) from None
            with history:
                changes = history.transactions()
                newest = (changes[-1].id, changes[-1].hash) if changes else (0, "")
                if newest == self._newest:
                    return
                versions = [version for kind in KINDS for version in history.history(kind)]
            rows = {
                "kind": [v.kind for v in versions],
                "key": [v.key for v in versions],
                "body": [json.dumps(v.body) for v in versions],
                **{
                    name: pa.array([getattr(v, name) for v in versions], pa.timestamp("us"))
                    for name in ("valid_from", "valid_to", "tx_from", "tx_to")
                },
                "tx": pa.array([v.tx for v in versions], pa.int64()),
            }
            made = {
                "tx": pa.array([c.id for c in changes], pa.int64()),
                "ts": pa.array([c.tx_us for c in changes], pa.timestamp("us")),
                "actor": [c.actor.name for c in changes],
                "actor_uid": pa.array([c.actor.uid for c in changes], pa.int64()),
                "kind": [c.kind for c in changes],
                "reason": [c.reason for c in changes],
                "hash": [c.hash for c in changes],
            }
            cursor.execute("BEGIN")
            try:
                for table, columns in (("control_rows", rows), ("changes", made)):
                    cursor.execute(f"DELETE FROM {table}")
                    cursor.register("copied", pa.table(columns))
                    cursor.execute(f"INSERT INTO {table} SELECT * FROM copied")
                    cursor.unregister("copied")
                cursor.execute("COMMIT")
            except BaseException:
                cursor.execute("ROLLBACK")
                raise
            self._newest = newest
