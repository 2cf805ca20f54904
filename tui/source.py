"""Where answers come from: a running daemon through the local API, or a folder of its state without one.

Every function here may block: views call them in threads. Each call opens what it needs, so threads share nothing
but the opened files of an offline store.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sectool.api.client import Client
from sectool.api.paths import Paths
from sectool.errors import NoDaemonError, PrivilegeError, SectoolError, StoreError
from sectool.filters import Filter

if TYPE_CHECKING:
    import pyarrow as pa

    from sectool.cli.explained import Answer
    from store.backtest import Outcome
    from store.reader import Reader

TIMEOUT_MS = 15_000
SLOW_S = 60.0  # changes of policy wait for every worker
EVERYTHING = Filter()


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a query as plain dicts. `more`: there were more than asked for."""

    items: list[dict[str, Any]]
    more: bool = False


@dataclass(frozen=True, slots=True)
class Revision:
    """A policy revision: its facts (see `sectool policy history -o json`) and its text."""

    facts: Mapping[str, Any]
    text: str


class Source:
    """One host, live or from its files. `offline` never talks to a daemon."""

    def __init__(self, paths: Paths, *, offline: bool = False, read_only: bool = False) -> None:
        self.paths = paths
        self.offline = offline
        self.read_only = read_only or offline or os.geteuid() != 0
        self._files: Reader | None = None

    @classmethod
    def of_store(cls, folder: Path) -> Source:
        """A state folder, or the events folder in it (a case bundle has the same shape). Raises StoreError."""
        state = folder.absolute()
        if not (state / "events").is_dir() and any(state.glob("flows-*.duckdb")):
            state = state.parent
        if not (state / "events").is_dir():
            raise StoreError(
                f"there are no events in {folder}",
                "name a state folder (it has `events` in it) or an exported case",
            )
        return cls(Paths(state, state / "no-daemon"), offline=True)

    @property
    def why_read_only(self) -> str:
        """Why nothing can be changed, for people; empty when it can."""
        if self.offline:
            return "these are stored files: there is nothing to change"
        if os.geteuid() != 0:
            return "changing policy needs root: run it with sudo"
        return "this is read-only mode" if self.read_only else ""

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Reader]:
        from store.reader import LiveReader, open_reader

        if not self.offline:
            client = Client(self.paths.events_socket, timeout=TIMEOUT_MS / 1000 + 5)
            with client:
                yield LiveReader(client)
            return
        if self._files is None:
            self._files = open_reader(self.paths.state, self.paths.run)
        yield self._files

    def _call(self, op: str, payload: bytes = b"", *, timeout: float = 10.0, **fields: Any) -> dict[str, Any]:
        if self.offline:
            raise NoDaemonError("these are stored files: no daemon answers", "open the host itself")
        with Client(self.paths.control_socket, timeout=timeout) as client:
            header = client.call(op, payload, **fields).header
        return {k: v for k, v in header.items() if k not in ("ok", "payload")}

    def close(self) -> None:
        """Close files."""
        if self._files is not None:
            self._files.close()

    # --- reading ---------------------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """What `sectool status -o json` says, with the store's counters under `store`."""
        if self.offline:
            with self._reading() as reader:
                return {"state": "files", "host": self.paths.state.name, "store": reader.stats()}
        document = self._call("status")
        with contextlib.suppress(SectoolError), self._reading() as reader:
            document["store"] = {**document.get("store", {}), **reader.stats()}
        return document

    def table(self, sql: str, *, limit: int = 1000) -> tuple[pa.Table, bool]:
        """One SELECT over the documented views, as Arrow, and whether there was more."""
        with self._reading() as reader:
            result = reader.query(sql, limit=limit, timeout_ms=TIMEOUT_MS)
        return result.table, result.truncated

    def query(self, sql: str, *, limit: int = 1000) -> Rows:
        """One SELECT, as rows."""
        table, more = self.table(sql, limit=limit)
        return Rows(table.to_pylist(), more)

    def flows(self, filter_: Filter = EVERYTHING, *, since: int | None, until: int | None, last: int) -> Rows:
        """The newest `last` flows begun in [since, until), oldest first, in the names of the event format."""
        from sectool.cli.flowrow import flow_row

        with self._reading() as reader:
            found = reader.flows(filter_, since=since, until=until, last=last, timeout_ms=TIMEOUT_MS)
        return Rows([flow_row(row) for row in found.table.to_pylist()], found.truncated)

    def flow(self, event_id: str) -> dict[str, Any]:
        """One flow by its id. Raises UsageError when it is not on record."""
        from sectool.cli.flowrow import flow_row
        from store.recorded import find_flow

        with self._reading() as reader:
            return flow_row(find_flow(reader, event_id))

    def position(self) -> int:
        """Number of the next record: rises with every event that arrives; 0 without a daemon."""
        if self.offline:
            return 0
        with Client(self.paths.events_socket, timeout=5.0) as client:
            return int(client.call("ping")["next_seq"])

    def events(
        self,
        types: Sequence[str] = (),
        *,
        since: int | None = None,
        until: int | None = None,
        last: int = 200,
    ) -> Rows:
        """Events that are no flows, oldest first: seq, ts, type, body (JSON text)."""
        with self._reading() as reader:
            found = reader.events(types, since=since, until=until, last=last, timeout_ms=TIMEOUT_MS)
        return Rows(found.table.to_pylist(), found.truncated)

    def revision(self, *, number: int | None = None, at: int | None = None) -> Revision:
        """A revision by number, the one in force at a moment, or the one in force. SectoolError: none."""
        if not self.offline:
            with Client(self.paths.control_socket) as client:
                answer = client.call("policy.show", rev=number, at=at)
            return Revision(answer.header, answer.payload.decode("utf-8"))
        history = self._history()
        found = (
            history.get(number)
            if number is not None
            else history.at(at)
            if at is not None
            else history.active()
        )
        if found is None:
            raise SectoolError("no policy has been applied on this host yet")
        return Revision(found.summary(), found.text)

    def revisions(self) -> list[dict[str, Any]]:
        """Facts of all revisions, newest first."""
        if self.offline:
            rows: list[dict[str, Any]] = self._history().history()
            return rows
        items: list[dict[str, Any]] = self._call("policy.history")["items"]
        return items

    def _history(self) -> Any:
        from sectool.agent.revisions import OfflineHistory

        if not self.paths.control_history.exists():
            raise StoreError("there is no control history here", "it is control.sqlite of the state folder")
        return OfflineHistory(self.paths.control_history)

    def identities(self) -> list[dict[str, Any]]:
        """Identities this host has issued; of stored files, all that flows were seen with."""
        if not self.offline:
            items: list[dict[str, Any]] = self._call("identity.list")["items"]
            return items
        rows = self.query(
            "SELECT i.spiffe_id, l.text AS labels, i.serial, i.not_before, i.not_after, i.fingerprint "
            "FROM identities i LEFT JOIN labels l ON l.id = i.labels_id ORDER BY 1 LIMIT 500"
        )
        return rows.items

    # --- policy ----------------------------------------------------------------------------------------------

    def explain(self, event_id: str) -> tuple[Answer, str]:
        """Why a recorded flow was decided as it was, as `sectool explain ID` says, and the policy text of then."""
        from tui.inquest import explain

        with self._reading() as reader:
            return explain(self, reader, event_id)

    def backtest(self, text: str, since: int | None, until: int | None) -> Outcome:
        """What the documents `text`, staged ones as if enforced, would have made of recorded flows."""
        from sectool.policy import parse
        from sectool.policy.testing import as_if_enforced
        from store.backtest import backtest
        from store.situations import Window, open_history

        candidate = as_if_enforced(parse(text, "draft"))
        history = open_history(self.paths.events, None if self.offline else self.paths.events_socket)
        try:
            return backtest(history, candidate, Window(since, until))
        finally:
            history.close()

    def check(self, text: str) -> dict[str, Any]:
        """What applying `text` would change."""
        return self._call("policy.check", text.encode(), timeout=SLOW_S)

    def apply(self, text: str, reason: str) -> dict[str, Any]:
        """Make `text` the policy in force."""
        self._may_write()
        return self._call("policy.apply", text.encode(), timeout=SLOW_S, reason=reason)

    def promote(self, names: Sequence[str], reason: str) -> dict[str, Any]:
        """Enforce staged documents."""
        self._may_write()
        return self._call("policy.promote", timeout=SLOW_S, names=list(names), reason=reason)

    def rollback(self, revision: int, reason: str) -> dict[str, Any]:
        """Return to an earlier revision."""
        self._may_write()
        return self._call("policy.rollback", timeout=SLOW_S, revision=revision, reason=reason)

    def _may_write(self) -> None:
        if self.read_only:
            raise PrivilegeError("nothing is changed from here", self.why_read_only)
