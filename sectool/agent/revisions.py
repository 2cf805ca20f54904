"""Policy revisions: each apply is one, none is ever changed, one is in force."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sectool.agent.records import OfflineRecords, Records, Stored
from sectool.errors import SectoolError
from sectool.events import now_us
from sectool.policy import DocumentSet, Engine, WorkloadDoc, parse
from sectool.policy.conflicts import Conflicts, find_conflicts
from sectool.policy.lint import lint

if TYPE_CHECKING:
    from store.control import Actor


@dataclass(frozen=True)
class Draft:
    """A policy that parses and compiles, not in force yet."""

    documents: DocumentSet
    engine: Engine
    lint: list[str]
    conflicts: Conflicts

    @property
    def hash(self) -> str:
        """SHA-256 of the meaning, hexadecimal."""
        return self.documents.hash


def draft(text: str) -> Draft:
    """Parse and compile. Raises DocumentError for what cannot be taken."""
    documents = parse(text)
    engine = Engine(documents)
    return Draft(documents, engine, lint(documents), find_conflicts(engine, now_us()))


@dataclass(frozen=True)
class Revision:
    """One stored revision. `applied` is UTC microseconds."""

    stored: Stored
    active: bool = False

    @property
    def revision(self) -> int:
        return self.stored.revision

    @property
    def hash(self) -> str:
        return self.stored.hash

    @property
    def text(self) -> str:
        return self.stored.text

    @property
    def author(self) -> str:
        return self.stored.author

    @property
    def reason(self) -> str:
        return self.stored.reason

    @cached_property
    def documents(self) -> DocumentSet:
        """The documents; an old revision stays readable because the language only grows."""
        return parse(self.stored.text, f"revision {self.revision}")

    @cached_property
    def engine(self) -> Engine:
        """Compiled."""
        return Engine(self.documents, self.revision)

    def summary(self) -> dict[str, Any]:
        """Facts for listings, without the text."""
        return {
            "revision": self.revision,
            "hash": self.hash,
            "author": self.author,
            "roles": list(self.stored.roles),
            "reason": self.reason,
            "applied": self.stored.applied_us,
            "documents": len(self.documents),
            "active": self.active,
        }


class Revisions:
    """The revisions of a running daemon. `active` is in force, or None before the first apply."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self.active: Revision | None = None

    async def load(self) -> None:
        """Take up the newest revision."""
        stored = await self._records.newest()
        self.active = Revision(stored, active=True) if stored else None

    @property
    def workload_documents(self) -> tuple[WorkloadDoc, ...]:
        """Workload documents in force."""
        return self.active.documents.workloads if self.active else ()

    async def add(
        self, candidate: Draft, author: Actor, reason: str, roles: tuple[str, ...] = ()
    ) -> Revision:
        """Store `candidate` as the next revision and make it the one in force. `roles` are those it took."""
        stored = await self._records.add_revision(
            candidate.documents.text, candidate.hash, author, reason, roles
        )
        self.active = Revision(stored, active=True)
        # What was parsed and compiled to check it need not be so again.
        candidate.engine.revision = stored.revision
        self.active.__dict__.update(documents=candidate.documents, engine=candidate.engine)
        return self.active

    async def activated(self, revision: int) -> None:
        """This host enforces `revision` from now on."""
        await self._records.activated(revision)

    async def get(self, number: int) -> Revision:
        """A revision by number; SectoolError when there is none."""
        if self.active is not None and number == self.active.revision:
            return self.active
        return _found(await self._records.revision(number), f"revision {number}")

    async def at(self, moment_us: int) -> Revision:
        """The revision that was in force at a moment; SectoolError when there was none."""
        return _found(await self._records.revision_at(moment_us), "revision that was in force then")

    async def history(self) -> list[dict[str, Any]]:
        """All revisions, newest first."""
        current = self.active.revision if self.active else 0
        return [Revision(s, s.revision == current).summary() for s in await self._records.revisions()]


def _found(stored: Stored | None, what: str) -> Revision:
    if stored is None:
        raise SectoolError(f"there is no {what}", "sectool policy history lists all revisions")
    return Revision(stored)


class OfflineHistory:
    """The same answers from the control history itself, for when no daemon runs."""

    def __init__(self, path: Path) -> None:
        self._records = OfflineRecords(path)
        self._stored = self._records.revisions  # newest first

    def active(self) -> Revision | None:
        """The newest revision: what a daemon would enforce."""
        return Revision(self._stored[0], active=True) if self._stored else None

    def get(self, number: int) -> Revision:
        """A revision by number; SectoolError when there is none."""
        return _found(next((s for s in self._stored if s.revision == number), None), f"revision {number}")

    def at(self, moment_us: int) -> Revision:
        """The revision that was in force at a moment; SectoolError when there was none."""
        return _found(self._records.revision_at(moment_us), "revision that was in force then")

    def history(self) -> list[dict[str, Any]]:
        """All revisions, newest first."""
        return [Revision(s, i == 0).summary() for i, s in enumerate(self._stored)]
