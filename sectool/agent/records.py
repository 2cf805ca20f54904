"""What the agent puts on record: policy revisions, activations, identities, workloads and trust.

All of it happens on one thread of its own, in the order it was asked for: a slow disk holds up the record, never a
packet and never the agent. Events for the store go with it (sectool.agent.eventlog).
"""

from __future__ import annotations

import asyncio
import logging
import os
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
    from store.control import Actor, ControlHistory, Version

log = logging.getLogger("sectool.agent")

T = TypeVar("T")
# Of one trust domain: `roots` (fingerprints), and of a federated one all else there is to know.
TrustRecord = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Stored:
    """A policy revision as it is on record; `applied_us` in UTC microseconds."""

    revision: int
    hash: str
    text: str
    author: str
    reason: str
    applied_us: int
    roles: tuple[str, ...] = ()  # of the author, as far as the change took them


class Records:
    """The control history of a running daemon."""

    def __init__(self, path: Path, host: str) -> None:
        """Open or make the history at `path`. Raises StoreError when it cannot be read or written."""
        from store.control import Actor

        self._host = host
        self._agent = Actor(os.geteuid(), "sectool agent")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="records")
        try:
            self._history: ControlHistory = self._thread.submit(_open, path).result()
        except BaseException:
            self._thread.shutdown()
            raise

    async def close(self) -> None:
        """Finish what is under way."""
        await self._do(self._history.close_file)
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
        return await self._do(_revision_at, self._history, self._host, moment_us)

    async def revisions(self) -> list[Stored]:
        """All revisions, newest first."""
        return await self._do(_revisions, self._history)

    async def add_revision(
        self, text: str, digest: str, author: Actor, reason: str, roles: tuple[str, ...] = ()
    ) -> Stored:
        """Store the next revision. Raises StoreError, and then nothing is stored."""
        return await self._do(_add, self._history, text, digest, author, reason, roles)

    async def activated(self, revision: int) -> None:
        """This host enforces `revision` from now on."""
        await self._do(_activated, self._history, self._host, revision, self._agent)
        log.info("revision %d is in force", revision)

    def activated_later(self, revision: int) -> None:
        """The same, without waiting."""
        self._later(_activated, self._history, self._host, revision, self._agent)

    def trusted(self, domains: dict[str, TrustRecord], actor: Actor | None = None, reason: str = "") -> None:
        """Trust domains trusted from now on, and no others; `actor` is who asked for the change, if anybody."""
        self._later(_put_trust, self._history, domains, actor or self._agent, reason)

    def revoked(self, taken: dict[str, Any], actor: Actor | None, reason: str) -> None:
        """A revocation list is in force, in place of its issuer's one before."""
        self._later(_put_revocation, self._history, taken, actor or self._agent, reason)

    # Workloads and identities.

    def issued(
        self, events: EventLog, entry: Issued, credential: Credential, before: Credential | None
    ) -> None:
        """A credential was issued: dictionary entries, events, and a row each in the history."""
        peer = credential.peer
        events.define(Type.DICT_LABELS, peer.labels.id, labels=dict(peer.labels))
        identity = {
            "spiffe_id": peer.spiffe_id,
            "trust_domain": peer.trust_domain,
            "labels_id": peer.labels.id,
            "fingerprint": peer.fingerprint.hex(),
            "serial": peer.serial,
            "not_before": peer.not_before_us,
            "not_after": peer.not_after_us,
            "issuer": peer.host,
        }
        events.define(Type.DICT_IDENTITY, peer.id, **identity)
        events.define(Type.DICT_WORKLOAD, entry.workload_id, **entry.describe())
        events.emit(
            Type.IDENTITY_ISSUED if before is None else Type.IDENTITY_ROTATED,
            identity_id=peer.id,
            spiffe_id=peer.spiffe_id,
            serial=peer.serial,
            not_after=peer.not_after_us,
            workload_id=entry.workload_id,
            replaces=before.peer.id if before else None,
        )
        labels = dict(peer.labels)
        self._later(_put_identity, self._history, {**identity, "id": peer.id, "labels": labels}, self._agent)

    def workload(self, number: int, body: dict[str, Any], since_us: int, reason: str) -> None:
        """A workload is so since a moment."""
        self._later(_put_workload, self._history, number, body, since_us, reason, self._agent)

    def workload_ended(self, number: int, moment_us: int) -> None:
        """A workload ended at a moment."""
        self._later(_end_workload, self._history, number, moment_us, self._agent)

    async def workloads_open(self) -> dict[int, dict[str, Any]]:
        """Workloads that run, as far as is on record."""
        return await self._do(_workloads_open, self._history)

    async def workloads_at(self, moment_us: int) -> list[tuple[int, int, int | None, dict[str, Any]]]:
        """Workloads of a moment: id, since when, until when (None: no end known), what they were."""
        return await self._do(_workloads_at, self._history, moment_us)


def _complain(done: Future[None]) -> None:
    error = done.exception()
    if error is not None:
        log.error("not put on record: %s", error.message if isinstance(error, SectoolError) else error)


# What follows runs on the thread of the records (or in a command that reads offline).


def _open(path: Path) -> ControlHistory:
    from store.control import ControlHistory

    return ControlHistory(path)


def _stored(version: Version) -> Stored:
    body = version.body
    return Stored(
        int(body["revision"]),
        body["hash"],
        body["text"],
        body["author"],
        body["reason"],
        version.valid_from,
        tuple(body.get("roles", ())),
    )


def _revisions(history: ControlHistory) -> list[Stored]:
    return sorted(map(_stored, history.history("policy")), key=lambda s: -s.revision)


def _newest(history: ControlHistory) -> Stored | None:
    return next(iter(_revisions(history)), None)


def _revision(history: ControlHistory, number: int) -> Stored | None:
    return next(map(_stored, history.history("policy", str(number))), None)


def _revision_at(history: ControlHistory, host: str, moment_us: int) -> Stored | None:
    for version in history.as_of("activation", moment_us):
        if version.key == host:
            return _revision(history, int(version.body["revision"]))
    return None


def _add(
    history: ControlHistory, text: str, digest: str, author: Actor, reason: str, roles: tuple[str, ...]
) -> Stored:
    newest = _newest(history)
    number = newest.revision + 1 if newest else 1
    moment = now_us()
    body = {
        "revision": number,
        "hash": digest,
        "text": text,
        "author": author.name,
        "reason": reason,
        "roles": list(roles),
    }
    history.append("policy", str(number), body, author, reason, moment)
    return Stored(number, digest, text, author.name, reason, moment, roles)


def _activated(history: ControlHistory, host: str, revision: int, agent: Actor) -> None:
    history.append("activation", host, {"revision": revision}, agent, "the packet workers switched")


def _put_identity(history: ControlHistory, identity: dict[str, Any], agent: Actor) -> None:
    history.append("identity", identity["spiffe_id"], identity, agent, "issued")


def _put_workload(
    history: ControlHistory, number: int, body: dict[str, Any], since_us: int, reason: str, agent: Actor
) -> None:
    history.append("workload", str(number), body, agent, reason, valid_from=since_us)


def _end_workload(history: ControlHistory, number: int, moment_us: int, agent: Actor) -> None:
    history.close("workload", str(number), agent, "its last process has ended", valid_to=moment_us)


def _workloads_open(history: ControlHistory) -> dict[int, dict[str, Any]]:
    return {int(version.key): version.body for version in history.current("workload")}


def _workloads_at(
    history: ControlHistory, moment_us: int
) -> list[tuple[int, int, int | None, dict[str, Any]]]:
    return [(int(v.key), v.valid_from, v.valid_to, v.body) for v in history.as_of("workload", moment_us)]


def _put_revocation(history: ControlHistory, taken: dict[str, Any], actor: Actor, reason: str) -> None:
    history.append("revocation", str(taken["issuer"]), taken, actor, reason)


def _put_trust(history: ControlHistory, domains: dict[str, TrustRecord], actor: Actor, reason: str) -> None:
    known = {version.key: version.body for version in history.current("trust")}
    for domain, body in domains.items():
        if known.get(domain) != body:
            history.append("trust", domain, body, actor, reason or "trusted")
    for domain in known.keys() - domains.keys():
        history.close("trust", domain, actor, reason or "not trusted any more")


class OfflineRecords:
    """The same facts from the file at `path`, read without a daemon."""

    def __init__(self, path: Path) -> None:
        """Raises StoreError when it cannot be read."""
        from store.control import ControlHistory

        with ControlHistory(path, read_only=True) as history:
            self.revisions = _revisions(history)  # newest first
            self._activations = [
                (v.valid_from, v.valid_to, v.body) for v in history.history("activation") if v.tx_to is None
            ]
            self._trust = [v for v in history.history("trust") if v.tx_to is None]

    def trusted_at(self, moment_us: int) -> dict[str, TrustRecord]:
        """Trust domains trusted at a moment."""
        return {
            v.key: v.body
            for v in self._trust
            if v.valid_from <= moment_us and (v.valid_to is None or moment_us < v.valid_to)
        }

    def revision_at(self, moment_us: int) -> Stored | None:
        """The revision that was in force at a moment."""
        for start, end, body in self._activations:
            if start <= moment_us and (end is None or moment_us < end):
                return next((s for s in self.revisions if s.revision == body["revision"]), None)
        return None
