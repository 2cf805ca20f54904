"""State at a moment, from the control history: policies, activations, identities, workloads, trust.

Every function takes UTC microseconds. The history belongs to root: where it cannot be read, `History.why` says so
and everything it would have told is empty; events tell the rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sectool.errors import SectoolError, StoreError
from sectool.policy import DocumentSet, parse
from store.control import KINDS, ControlHistory, Transaction, Version

CONTROL = "control.sqlite"


@dataclass(frozen=True, slots=True)
class Revision:
    """A policy revision: who applied it when (`applied`, UTC microseconds), why, and its text."""

    number: int
    hash: str
    text: str
    author: str
    reason: str
    applied: int


class History:
    """The control history of a state folder, opened to read."""

    def __init__(self, history: ControlHistory | None, why: str = "") -> None:
        self._history = history
        self.why = why

    def as_of(self, kind: str, moment: int) -> list[Version]:
        """Versions of `kind` that were so at `moment`; identities only while they were valid."""
        if self._history is None:
            return []
        found = self._history.as_of(kind, moment)
        if kind == "identity":
            found = [v for v in found if int(v.body.get("not_after") or 0) > moment]
        return found

    def everything_at(self, moment: int) -> dict[str, list[Version]]:
        """Versions of all kinds at `moment`. Of policies those that some host had in force."""
        out = {kind: self.as_of(kind, moment) for kind in KINDS}
        active = {str(v.body.get("revision")) for v in out["activation"]}
        out["policy"] = [v for v in out["policy"] if v.key in active]
        return out

    def in_force(self, moment: int, host: str | None = None) -> Revision | None:
        """The revision in force at `moment`, on `host` or on the one host that there is."""
        for version in self.as_of("activation", moment):
            if host is None or version.key == host:
                return self.revision(int(version.body["revision"]))
        return None

    def revision(self, number: int) -> Revision | None:
        """A revision by its number."""
        if self._history is None:
            return None
        for version in self._history.history("policy", str(number)):
            body = version.body
            return Revision(
                number, body["hash"], body["text"], body["author"], body["reason"], version.valid_from
            )
        return None

    def documents(self, number: int) -> DocumentSet | None:
        """The documents of a revision; None when it is not there or this release cannot read it."""
        revision = self.revision(number) if number else None
        if revision is None:
            return DocumentSet() if number == 0 else None
        try:
            return parse(revision.text, f"revision {number}")
        except SectoolError:
            return None

    def transactions(self) -> list[Transaction]:
        """The chain of changes."""
        return [] if self._history is None else self._history.transactions()

    def versions(self, kind: str) -> list[Version]:
        """Every version of `kind` that is believed today, in the order of recording."""
        return [] if self._history is None else [v for v in self._history.history(kind) if v.tx_to is None]


@contextlib.contextmanager
def open_history(events: Path) -> Iterator[History]:
    """The control history beside the folder of segments."""
    path = events.parent / CONTROL
    try:
        history = ControlHistory(path, read_only=True)
    except (StoreError, PermissionError) as error:
        why = error.message if isinstance(error, SectoolError) else f"no permission to read {path}"
        yield History(None, why)
        return
    try:
        yield History(history)
    finally:
        history.close_file()


def version_row(version: Version) -> dict[str, Any]:
    """A version as plain data."""
    return {
        "key": version.key,
        "since": version.valid_from,
        "until": version.valid_to,
        **version.body,
    }
