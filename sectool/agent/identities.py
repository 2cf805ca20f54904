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
from sectool.labels import LabelError, stable_id

log = logging.getLogger("sectool.agent")

MAX_WORKLOADS = 4096
MAX_KEYS = 1024  # socket keys remembered per workload


@dataclass(slots=True)
class Issued:
    """A workload with the credential it presents now. `workload_id` names it in events."""

    workload_id: int
    workload: Workload
    facts: Facts
    credential: Credential
    since_us: int
    keys: OrderedDict[Key, None] = field(default_factory=OrderedDict)
    rotations: int = 0

    def describe(self) -> dict[str, Any]:
        """The fields of a dictionary entry (sectool.events.Type.DICT_WORKLOAD)."""
        return {
            "name": self.workload.name,
            "labels_id": self.credential.peer.labels.id,
            "uid": self.facts.uid,
            "user": self.facts.user,
            "executable": self.facts.executable,
            "sha256": self.facts.sha256,
            "unit": self.facts.unit,
            "cgroup": self.facts.cgroup,
        }


def workload_id(workload: Workload, facts: Facts) -> int:
    """Content id of a workload: where it stands, what it claims, and what is attested but for pid and cgroup."""
    attested = (str(facts.uid), facts.executable, facts.sha256, facts.unit)
    return stable_id(
        "\0".join((workload.path, str(workload.labels), *attested)).encode("utf-8", "surrogateescape")
    )


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

    def identify(self, key: Key, raw: Mapping[str, Any] | Facts) -> Issued:
        """The workload and credential for a socket with these facts. Raises SectoolError when there can be none."""
        try:
            facts = raw if isinstance(raw, Facts) else read_facts(raw)
            found = self.resolve(facts)
            if isinstance(found, SectoolError):
                raise found
            entry = self._entry(*found, facts)
        except SectoolError:
            self.refused += 1
            raise
        entry.keys[key] = None
        entry.keys.move_to_end(key)
        if len(entry.keys) > MAX_KEYS:
            entry.keys.popitem(last=False)
        return entry

    def resolve(self, facts: Facts) -> tuple[int, Workload] | SectoolError:
        """Id and workload for these facts; the error when their labels do not fit together."""
        try:
            workload = self._resolve(facts)
        except LabelError as error:
            return SectoolError(f"labels do not fit together: {error}")
        except SectoolError as error:
            return error
        return workload_id(workload, facts), workload

    def ahead(self, number: int, workload: Workload, facts: Facts) -> Issued:
        """The credential of a workload that was found running, before anything asks for it. Raises SectoolError."""
        return self._entry(number, workload, facts)

    def _entry(self, number: int, workload: Workload, facts: Facts) -> Issued:
        entry = self.by_workload.get(number)
        if entry is None:
            entry = Issued(number, workload, facts, self._issue(workload), now_us())
            self._remember(entry)
            self._issued(entry, None)
        elif entry.credential.renew_at_us <= now_us():
            self._renew(entry)
        self.by_workload.move_to_end(number)
        return entry

    def _remember(self, entry: Issued) -> None:
        self.by_workload[entry.workload_id] = entry
        if len(self.by_workload) > MAX_WORKLOADS:
            self.by_workload.popitem(last=False)

    def _renew(self, entry: Issued) -> None:
        before = entry.credential
        entry.credential = self._issue(entry.workload)
        entry.rotations += 1
        self._issued(entry, before)

    def renew_due(self, now: int, wanted: Callable[[int], bool] = lambda _: True) -> list[Issued]:
        """Renew every credential past half its life (`now` in UTC microseconds) that is wanted; those renewed.

        One that is not (its workload has ended) is forgotten when it expires.
        A renewal that fails is tried again at the next call; the old credential stays good until it expires.
        """
        renewed: list[Issued] = []
        for entry in list(self.by_workload.values()):
            if entry.credential.renew_at_us > now:
                continue
            if not wanted(entry.workload_id):
                if entry.credential.not_after_us <= now:
                    del self.by_workload[entry.workload_id]
                continue
            try:
                self._renew(entry)
            except SectoolError as error:
                log.error("cannot renew the identity of %s: %s", entry.workload.name, error.message)
                if entry.credential.not_after_us <= now:
                    del self.by_workload[entry.workload_id]
                continue
            renewed.append(entry)
        return renewed

    def reissue(self, which: Callable[[Issued], bool]) -> list[Issued]:
        """Replace credentials at once, whatever their age; those replaced. One that cannot be is forgotten."""
        renewed = []
        for entry in [e for e in self.by_workload.values() if which(e)]:
            try:
                self._renew(entry)
            except SectoolError as error:
                log.error("no new identity for %s: %s", entry.workload.name, error.message)
                del self.by_workload[entry.workload_id]
                continue
            renewed.append(entry)
        return renewed

    def move(self, key: Key, before: int, now: int) -> Issued | None:
        """A socket key is of workload `now`, no longer `before`: its entry, if somebody holds the old credential."""
        old, entry = self.by_workload.get(before), self.by_workload.get(now)
        if old is None or entry is None or key not in old.keys:
            return None
        del old.keys[key]
        entry.keys[key] = None
        return entry

    def forget_sockets(self) -> None:
        """After the Workload documents changed every socket is asked for again; credentials stay for who needs them."""
        for entry in self.by_workload.values():
            entry.keys.clear()

    def forget_cgroup(self, cgroup: str) -> list[Issued]:
        """A program's cgroup is gone: its workloads are over. Those forgotten."""
        below = cgroup.rstrip("/") + "/"
        gone = [e for e in self.by_workload.values() if (e.facts.cgroup + "/").startswith(below)]
        for entry in gone:
            del self.by_workload[entry.workload_id]
        return gone


def read_facts(raw: Mapping[str, Any]) -> Facts:
    """A worker's JSON as Facts; SectoolError when it does not fit. What is known of containers, the agent adds."""
    try:
        return Facts(**{**raw, "more": ()})
    except TypeError as error:
        raise SectoolError(f"the packet worker sent facts that do not fit: {error}") from None
