"""From attested facts to a credential: which workload is it, what may it claim, and a fresh SVID when needed.

    facts ──resolve──► workload ──issue──► credential ──► worker
                          │                    │
                    workload.start       identity.issued / .rotated      (events and control history)

Credentials are cached per workload and renewed at half life; the worker gets the new one for every socket key
that asked for that workload. Both tables are bounded: the workload that was silent longest gives way.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sectool.agent.worker import Key
from sectool.errors import SectoolError
from sectool.events import now_us
from sectool.identity.credential import Credential
from sectool.identity.workload import Facts, Workload

log = logging.getLogger("sectool.agent")

MAX_WORKLOADS = 4096
MAX_KEYS = 1024  # socket keys remembered per workload


@dataclass(slots=True)
class Issued:
    """A workload with the credential it presents now."""

    workload: Workload
    credential: Credential
    since_us: int
    pid: int
    keys: OrderedDict[Key, None] = field(default_factory=OrderedDict)
    rotations: int = 0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a worker is told about a socket key."""

    workload: Workload | None
    credential: Credential | None
    error: str = ""


class Identities:
    """The host's workloads and their credentials."""

    def __init__(
        self,
        resolve: Callable[[Facts], Workload],
        issue: Callable[[Workload], Credential],
        issued: Callable[[Issued, Credential | None], None],
    ) -> None:
        """`issued` hears of each new credential, with the one it replaces (None for a new workload)."""
        self._resolve = resolve
        self._issue = issue
        self._issued = issued
        self.by_workload: OrderedDict[int, Issued] = OrderedDict()
        self.refused = 0

    def identify(self, key: Key, facts: Mapping[str, Any]) -> Answer:
        """The credential for a socket with these facts; an answer with `error` when there can be none."""
        try:
            attested = read_facts(facts)
            workload = self._resolve(attested)
            entry = self.by_workload.get(workload.id)
            if entry is None:
                credential = self._issue(workload)
                entry = Issued(workload, credential, now_us(), attested.pid or 0)
                self._remember(entry)
                self._issued(entry, None)
            elif entry.credential.renew_at_us <= now_us():
                self._renew(entry)
        except SectoolError as error:
            self.refused += 1
            log.warning("no identity for %s: %s", facts.get("executable", "a socket"), error.message)
            return Answer(None, None, error.message)
        self.by_workload.move_to_end(workload.id)
        entry.keys[key] = None
        entry.keys.move_to_end(key)
        if len(entry.keys) > MAX_KEYS:
            entry.keys.popitem(last=False)
        return Answer(entry.workload, entry.credential)

    def _remember(self, entry: Issued) -> None:
        self.by_workload[entry.workload.id] = entry
        if len(self.by_workload) > MAX_WORKLOADS:
            self.by_workload.popitem(last=False)

    def _renew(self, entry: Issued) -> None:
        before = entry.credential
        entry.credential = self._issue(entry.workload)
        entry.rotations += 1
        self._issued(entry, before)

    def renew_due(self, now: int) -> list[Issued]:
        """Renew every credential past half its life (`now` in UTC microseconds); those renewed.

        A renewal that fails is tried again at the next call; the old credential stays good until it expires.
        """
        renewed: list[Issued] = []
        for entry in list(self.by_workload.values()):
            if entry.credential.renew_at_us > now:
                continue
            try:
                self._renew(entry)
            except SectoolError as error:
                log.error("cannot renew the identity of %s: %s", entry.workload.name, error.message)
                if entry.credential.not_after_us <= now:
                    del self.by_workload[entry.workload.id]
                continue
            renewed.append(entry)
        return renewed

    def forget(self) -> None:
        """After Workload documents changed: every socket is looked at again (credentials of unchanged workloads stay)."""
        for entry in self.by_workload.values():
            entry.keys.clear()


def read_facts(facts: Mapping[str, Any]) -> Facts:
    """A worker's JSON as Facts; SectoolError when it does not fit."""
    try:
        return Facts(**facts)
    except TypeError as error:
        raise SectoolError(f"the packet worker sent facts that do not fit: {error}") from None
