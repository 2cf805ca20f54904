"""Finds rules that may overlap with a region, without looking at all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from sectool.policy.algebra import Parties, Proof, Region
from sectool.policy.rules import CompiledRule

_Entry = tuple[CompiledRule, Region]


class _Shelf:
    """Entries by what they ask of one side: a few values of one label, or something else."""

    def __init__(self) -> None:
        self.loose: list[_Entry] = []
        self.by_label: dict[str, dict[str, list[_Entry]]] = {}
        self.sizes: dict[str, int] = {}

    def add(self, entry: _Entry, parties: Parties) -> None:
        best: tuple[int, str] | None = None
        for key, values in parties.labels.items():
            if values.only and not values.absent and (best is None or len(values.only) < best[0]):
                best = (len(values.only), key)
        if best is None:
            self.loose.append(entry)
            return
        key = best[1]
        for value in parties.labels[key].only or ():
            self.by_label.setdefault(key, {}).setdefault(value, []).append(entry)
        self.sizes[key] = self.sizes.get(key, 0) + best[0]

    def size(self, parties: Parties) -> int:
        """About how many entries `near` would give."""
        total = len(self.loose)
        for key, size in self.sizes.items():
            bound = parties.labels.get(key)
            total += size if bound is None or bound.only is None else len(bound.only)
        return total

    def near(self, parties: Parties) -> Iterator[_Entry]:
        yield from self.loose
        if parties.proof is Proof.NONE:
            return
        for key, drawers in self.by_label.items():
            bound = parties.labels.get(key)
            if bound is not None and bound.only is not None:
                for value in sorted(bound.only):
                    yield from drawers.get(value, ())
            else:
                for value, entries in drawers.items():
                    if bound is None or bound.holds(value):
                        yield from entries


class Overlaps:
    """Rules with their regions. `near` gives each that may overlap, and some that do not."""

    def __init__(self, entries: Iterable[_Entry]) -> None:
        self._source, self._destination = _Shelf(), _Shelf()
        self._count = 0
        for entry in entries:
            self._source.add(entry, entry[1].source)
            self._destination.add(entry, entry[1].destination)
            self._count += 1

    def __len__(self) -> int:
        return self._count

    def near(self, region: Region) -> Iterator[_Entry]:
        """Candidates for an overlap with `region`; one may come twice."""
        if self._source.size(region.source) <= self._destination.size(region.destination):
            return self._source.near(region.source)
        return self._destination.near(region.destination)
