"""Which labels recorded workloads would have had under other Workload documents.

A workload's labels are those of its host, of the first Workload document that its facts match, and the attested ones.
So where another document matches under the candidate, the labels of the one that matched are taken off and those of the
other put on. Workloads named by `sectool run` or by a container keep their labels: no document gave them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from sectool.labels import LabelError, LabelSet
from sectool.policy.model import WorkloadDoc
from store.situations import Words

_ATTESTED: Final = frozenset({"exe", "user", "unit"})
_FACTS: Final = {
    "systemd.unit": "unit",
    "user": "user",
    "executable": "executable",
    "sha256": "sha256",
    "cgroup": "cgroup",
}


class Relabel:
    """From a workload's recorded labels to those it would have."""

    def __init__(self, before: Sequence[WorkloadDoc], after: Sequence[WorkloadDoc], words: Words) -> None:
        self.needed = _meaning(before) != _meaning(after)
        self._changes: dict[int, tuple[Mapping[str, str], Mapping[str, str]]] = {}
        self._made: dict[tuple[int, LabelSet], LabelSet] = {}
        self._labels = words.labels
        self._own: dict[int, int] = {}
        if not self.needed:
            return
        for number, entry in words.workloads.items():
            facts = {key: str(entry[name] or "") for key, name in _FACTS.items()}
            old = next((doc for doc in before if doc.matches(facts)), None)
            name = str(entry["name"])
            if old.name != name if old is not None else not _automatic(name):
                continue  # named by somebody else
            new = next((doc for doc in after if doc.matches(facts)), None)
            gone = dict(old.labels) if old is not None else {}
            come = dict(new.labels) if new is not None else {}
            if gone != come:
                self._changes[number] = (gone, come)
                self._own[number] = int(entry["labels_id"] or 0)

    def labels(self, workload: int, recorded: LabelSet) -> LabelSet:
        """The labels that this workload, recorded with these, would have."""
        change = self._changes.get(workload)
        if change is None:
            return recorded
        key = (workload, recorded)
        made = self._made.get(key)
        if made is None:
            gone, come = change
            kept = {k: v for k, v in recorded.items() if k in _ATTESTED or gone.get(k) != v}
            extra = {k: v for k, v in come.items() if k not in _ATTESTED}
            try:
                made = LabelSet({**kept, **extra})
            except LabelError:
                made = (
                    recorded  # more labels than there may be: its identity would be refused, its flows stay
                )
            self._made[key] = made
        return made

    def made(self) -> Iterable[LabelSet]:
        """All label sets that come of it."""
        for workload, own in self._own.items():
            recorded = self._labels.get(own)
            if recorded is not None:
                yield self.labels(workload, recorded)


def _automatic(name: str) -> bool:
    """Whether a name is that of a workload no document matched: EXE-8 hexadecimal digits."""
    tail = name.rpartition("-")[2]
    return len(tail) == 8 and all(c in "0123456789abcdef" for c in tail)


def _meaning(documents: Sequence[WorkloadDoc]) -> list[tuple[Any, ...]]:
    return [(doc.name, doc.match, doc.labels) for doc in documents]
