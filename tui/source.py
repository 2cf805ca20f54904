"""Where answers come from: a running daemon through the local API, or a folder of its state without one.

Every function here may block: views call them in threads, and may call them off (tui.asking). Each call opens what it
needs, so threads share nothing but the opened files of an offline store.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sectool.api.client import Client
from sectool.api.paths import Paths
from sectool.errors import NoDaemonError, PrivilegeError, SectoolError, StoreError
from sectool.events import now_us
from sectool.filters import Filter
from sectool.labels import LabelSet
from tui.asking import CalledOffError, ended_by

if TYPE_CHECKING:
    import pyarrow as pa

    from sectool.cli.explained import Answer
    from store.backtest import Outcome
    from store.reader import LocalReader, Reader

TIMEOUT_MS = 15_000
DOCTOR_S = 60.0
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
        self.read_only = read_only or offline
        self._files: LocalReader | None = None
        self._opening = threading.Lock()

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
        """Why nothing can be changed, whoever asks; empty when it can. The rest is the daemon's to say (tui.rights)."""
        if self.offline:
            return "these are stored files: there is nothing to change"
        return "this is read-only mode" if self.read_only else ""

    @contextlib.contextmanager
    def _asking(self, socket: Path, timeout: float) -> Iterator[Client]:
        """A connection, hung up when the question is called off: the daemon sees that and stops working on it."""
        with Client(socket, timeout=timeout) as client, ended_by(client.abort):
            yield client

    @contextlib.contextmanager
    def _reading(self) -> Iterator[Reader]:
        from store.reader import LiveReader

        if not self.offline:
            with self._asking(self.paths.events_socket, TIMEOUT_MS / 1000 + 5) as client:
                yield LiveReader(client)
            return
        reader, thread = self._opened(), threading.get_ident()
        with ended_by(lambda: reader.stop(thread)):
            yield reader

    def _opened(self) -> LocalReader:
        from store.reader import LocalReader

        with self._opening:
            if self._files is None:
                self._files = LocalReader(self.paths.events)
            return self._files

    def _call(self, op: str, payload: bytes = b"", *, timeout: float = 10.0, **fields: Any) -> dict[str, Any]:
        if self.offline:
            raise NoDaemonError("these are stored files: no daemon answers", "open the host itself")
        with self._asking(self.paths.control_socket, timeout) as client:
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
        try:
            with self._reading() as reader:
                stats = reader.stats()
        except CalledOffError:
            raise
        except SectoolError as error:
            stats = {"error": error.message}
        document["store"] = {**document.get("store", {}), **stats}
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
        with self._asking(self.paths.events_socket, 5.0) as client:
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
            with self._asking(self.paths.control_socket, 10.0) as client:
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

    def identities(self, at: int | None = None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Identities in use, and the workloads they belong to: now, or at a moment in UTC microseconds.

        Stored files that have no control history tell of those that flows were seen with.
        """
        if not self.offline and at is None:
            return self._call("identity.list")["items"], self._call("workload.list")["items"]
        with self._reading() as reader:
            then = reader.ask("state", at=at if at is not None else now_us())
        if then["identity"] or not self.offline:
            return then["identity"], then["workload"]
        seen = self.query(
            "SELECT i.spiffe_id, l.text AS labels, i.serial, epoch_us(i.not_before) AS not_before, "
            "epoch_us(i.not_after) AS not_after, i.fingerprint "
            "FROM identities i LEFT JOIN labels l ON l.id = i.labels_id ORDER BY 1 LIMIT 500"
        )
        return [{**row, "labels": dict(LabelSet.parse(row["labels"] or ""))} for row in seen.items], []

    def revocations(self) -> list[dict[str, Any]]:
        """The revocation lists this host goes by."""
        items: list[dict[str, Any]] = self._call("revocation.list")["items"]
        return items

    def doctor(self) -> list[dict[str, Any]]:
        """What `sectool doctor` finds. It is run as a program, since it tries things in namespaces of its own."""
        there, here = self._call("status")["namespace"], os.stat("/proc/self/ns/net").st_ino  # noqa: PTH116
        if there != here:
            raise SectoolError(
                "its daemon is in another network namespace than this console", "run `sectool doctor` there"
            )
        places = {"SECTOOL_STATE": str(self.paths.state), "SECTOOL_RUN": str(self.paths.run)}
        process = subprocess.Popen(
            [sys.executable, "-m", "sectool", "doctor", "--all", "-o", "json"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **places},
        )
        with process, ended_by(process.kill):
            try:
                out, said = process.communicate(timeout=DOCTOR_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise SectoolError(
                    f"the doctor did not end within {DOCTOR_S:g} s", "run `sectool doctor`"
                ) from None
            try:
                items: list[dict[str, Any]] = json.loads(out)["items"]
            except (ValueError, KeyError, TypeError):
                last = said.decode(errors="replace").strip().rpartition("\n")[2]
                raise SectoolError(
                    f"the doctor failed: {last or 'it said nothing'}", "run `sectool doctor`"
                ) from None
        return items

    def ask(self, question: str, **fields: Any) -> dict[str, Any]:
        """One of the store's questions (store.questions), as `sectool timeline`, `map` and others ask them."""
        with self._reading() as reader:
            return reader.ask(question, **fields)

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
        with contextlib.closing(history), ended_by(history.stop):
            return backtest(history, candidate, Window(since, until))

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

    def revoke(self, spiffe_id: str, reason: str) -> dict[str, Any]:
        """Revoke an identity of this host, for good: this host's list that says so."""
        self._may_write()
        return self._call("identity.revoke", timeout=SLOW_S, spiffe_id=spiffe_id, reason=reason)

    def _may_write(self) -> None:
        if self.read_only:
            raise PrivilegeError("nothing is changed from here", self.why_read_only)
