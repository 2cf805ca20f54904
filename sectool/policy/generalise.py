"""From pairs that were seen to talk, to the few label selectors that say who may.

One service at a time. A seed pair, with all its labels as clauses, is widened by leaving out clauses, one after the
other, as long as the flows bear it out; what it then covers is done, and the next pair not covered is the next seed.

A clause `key=value` may go when the workloads that this lets in, looked at value by value of `key`, were seen to talk
as well. Of the pairs let in about as large a part must have been seen as of those before (but for instances); values
of which nothing was seen must be few, and it must be likely to have missed them if they are allowed:

    kind of key                          nothing seen of at most      and likely to be missed
    instance (host, pod, version, …)     half of the pairs            not asked: policies are not about instances
    role (app, tier, team, …)            a fifth of the pairs         5 % or more
    boundary (env, namespace, domain)    a fifth of the pairs         5 % or more, and two values were seen

So a boundary is only left out where flows crossed it; the same holds for the name (app) and for the last role that
is asked for. Everything is in a fixed order: the same flows give the same
selectors. Sets of workloads are bit masks, so that thousands of them cost little.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sectool.labels import DOMAIN_LABEL, FEDERATED_LABEL, LabelSet

INSTANCE_KEYS: Final = frozenset(
    {
        *("host", "hostname", "node", "pod", "instance", "id", "replica", "container"),
        *("version", "release", "build", "revision", "sha", "image", "tag"),
        *("k8s.pod", "k8s.node", "k8s.container"),
        *("k8s.label.pod-template-hash", "k8s.label.controller-revision-hash"),
    }
)
BOUNDARY_KEYS: Final = frozenset(
    {
        *("env", "environment", "stage", "tenant", "pci", "compliance"),
        *(DOMAIN_LABEL, FEDERATED_LABEL, "k8s.ns", "k8s.namespace"),
    }
)
NAME_KEYS: Final = ("app", "k8s.label.app", "k8s.label.app.kubernetes.io/name", "service")
ATTESTED_KEYS: Final = frozenset({"exe", "user", "unit"})
_UNSEEN: Final = 0.2  # of the pairs let in, at most so many of values never seen
_UNSEEN_INSTANCES: Final = 0.5
_LIKELY: Final = 0.05
_AS_DENSE: Final = 0.75

Clauses = tuple[tuple[str, str | None], ...]  # key, value; None: the key is there


@dataclass(frozen=True, slots=True)
class Evidence:
    """Flows of one pair. Times are UTC microseconds."""

    flows: int
    first: int
    last: int
    encrypted: bool = False

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(
            self.flows + other.flows,
            min(self.first, other.first),
            max(self.last, other.last),
            self.encrypted and other.encrypted,
        )


@dataclass(frozen=True, slots=True)
class Found:
    """A selector for either side (None: that side is not learned here), and the pairs that it covers."""

    source: Clauses | None
    destination: Clauses | None
    seen: int  # pairs observed among those covered
    covered: int
    evidence: Evidence
    example: tuple[int, int]  # the pair seen most


class Universe:
    """All known workloads, by what their labels say."""

    def __init__(self, members: Iterable[LabelSet]) -> None:
        self.members: tuple[LabelSet, ...] = tuple(sorted(set(members), key=str))
        self.number = {labels: n for n, labels in enumerate(self.members)}
        self.everybody = (1 << len(self.members)) - 1
        self._having: dict[str, dict[str, int]] = {}
        for n, labels in enumerate(self.members):
            for key, value in labels.items():
                row = self._having.setdefault(key, {})
                row[value] = row.get(value, 0) | 1 << n
        self._ours = self.everybody & ~self._there(FEDERATED_LABEL)
        self.instance = {
            key for key, values in self._having.items() if key in INSTANCE_KEYS or all(map(_digest, values))
        }
        self.common = self._common()

    def _common(self) -> str | None:
        """A key that every workload has, to say 'every workload' by."""
        total = len(self.members)
        keys = [
            k for k, values in self._having.items() if sum(m.bit_count() for m in values.values()) == total
        ]
        return min(
            keys, key=lambda k: (k not in NAME_KEYS, k in ATTESTED_KEYS, k in self.instance, k), default=None
        )

    def _there(self, key: str) -> int:
        out = 0
        for mask in self._having.get(key, {}).values():
            out |= mask
        return out

    def mask(self, clauses: Mapping[str, str | None]) -> int:
        """Whom a rule that allows means by these labels: of our own trust domain, unless it names another."""
        out = self.everybody if {DOMAIN_LABEL, FEDERATED_LABEL} & set(clauses) else self._ours
        for key, value in clauses.items():
            out &= self._having.get(key, {}).get(value, 0) if value is not None else self._there(key)
        return out

    def clauses(self, labels: LabelSet) -> dict[str, str | None]:
        """All that can be asked of a workload: its own domain is understood."""
        return {k: v for k, v in labels.items() if k != DOMAIN_LABEL or FEDERATED_LABEL in labels}

    def by_value(self, key: str, among: int) -> list[int]:
        """Those `among`, divided by their value of `key`; who lacks it comes last."""
        out = []
        rest = among
        for _, mask in sorted(self._having.get(key, {}).items()):
            if mask & among:
                out.append(mask & among)
                rest &= ~mask
        return [*out, rest] if rest else out

    def order(self, labels: LabelSet) -> list[str]:
        """The keys of a workload in the order in which they are tried to be left out."""

        def rank(key: str) -> tuple[int, int, str]:
            if key in BOUNDARY_KEYS:
                kind = 3
            elif key in self.instance:
                kind = 0
            else:
                kind = 1 if key in ATTESTED_KEYS else 2
            return kind, -len(self._having[key]), key

        return sorted(labels, key=rank)


@dataclass(frozen=True, slots=True)
class _Side:
    """How one side's clauses stand."""

    clauses: dict[str, str | None]
    mask: int


class Learner:
    """Covers the pairs of one service. A side that is not learned has one member, number 0."""

    def __init__(
        self,
        universe: Universe,
        pairs: Mapping[tuple[int, int], Evidence],
        *,
        learn_source: bool = True,
        learn_destination: bool = True,
    ) -> None:
        self.universe = universe
        self.pairs = dict(pairs)
        self.learn = (learn_source, learn_destination)
        self._rows: dict[int, int] = {}
        self._columns: dict[int, int] = {}
        for source, destination in self.pairs:
            self._rows[source] = self._rows.get(source, 0) | 1 << destination
            self._columns[destination] = self._columns.get(destination, 0) | 1 << source

    def cover(self) -> list[Found]:
        """Selectors that cover all pairs."""
        left = dict(self.pairs)
        out: list[Found] = []
        while left:
            seed = min(left, key=lambda pair: (-left[pair].flows, pair))
            sides = self._widen(seed)
            inside = [
                pair for pair in self.pairs if sides[0].mask >> pair[0] & 1 and sides[1].mask >> pair[1] & 1
            ]
            evidence = self.pairs[inside[0]]
            for pair in inside[1:]:
                evidence = evidence + self.pairs[pair]
            for pair in inside:
                left.pop(pair, None)
            out.append(
                Found(
                    _said(sides[0]) if self.learn[0] else None,
                    _said(sides[1]) if self.learn[1] else None,
                    len(inside),
                    sides[0].mask.bit_count() * sides[1].mask.bit_count(),
                    evidence,
                    seed,
                )
            )
        return out

    def _widen(self, seed: tuple[int, int]) -> tuple[_Side, _Side]:
        sides: list[_Side] = []
        keys: list[tuple[int, str]] = []
        for side, learned in enumerate(self.learn):
            if not learned:
                sides.append(_Side({}, 1))
                continue
            labels = self.universe.members[seed[side]]
            clauses = self.universe.clauses(labels)
            sides.append(_Side(clauses, self.universe.mask(clauses)))
            keys += [(side, key) for key in self.universe.order(labels)]
        if all(self.learn):  # both sides take turns: the most particular keys of either go first
            ranks = [
                {k: n for n, k in enumerate(self.universe.order(self.universe.members[s]))} for s in seed
            ]
            keys.sort(key=lambda entry: (self._class(entry[1]), ranks[entry[0]][entry[1]], entry[0]))
        # Instances first and for good: where roles are left out of a sentence about one host, it stays with that host.
        for stage in (True, False):
            changed = True
            while changed:
                changed = False
                for side, key in keys:
                    if key in sides[side].clauses and (key in self.universe.instance) is stage:
                        wider = self._without(sides, side, key)
                        if wider is not None:
                            sides[side] = wider
                            changed = True
        return sides[0], sides[1]

    def _class(self, key: str) -> int:
        return 0 if key in self.universe.instance else 2 if key in BOUNDARY_KEYS else 1

    def _without(self, sides: Sequence[_Side], side: int, key: str) -> _Side | None:
        """The side without its clause on `key`, if the flows bear it out."""
        clauses = {k: v for k, v in sides[side].clauses.items() if k != key}
        if FEDERATED_LABEL in clauses and key == DOMAIN_LABEL:
            return None  # who is not of our own domain is always named by its domain
        if not clauses:
            if self.universe.common is None:
                return None
            clauses = {self.universe.common: None}
            if key == self.universe.common and sides[side].clauses[key] is None:
                return None
        mask = self.universe.mask(clauses)
        other = sides[1 - side].mask
        width = other.bit_count()
        links = self._rows if side == 0 else self._columns
        seen = empty = rare = 0
        values = 0
        for group in self.universe.by_value(key, mask):
            count = 0
            for member in _bits(group):
                linked = links.get(member, 0) & other
                if linked:
                    count += linked.bit_count()
                    rare += self._seldom(side, member, linked)
            if count:
                values += 1
                seen += count
            else:
                empty += group.bit_count() * width
        total = mask.bit_count() * width
        if key in self.universe.instance:
            return _Side(clauses, mask) if empty <= _UNSEEN_INSTANCES * total else None
        before = sides[side].mask.bit_count() * width
        known = sum((links.get(member, 0) & other).bit_count() for member in _bits(sides[side].mask))
        if (seen - known) * before < _AS_DENSE * known * (total - before):
            return None  # who is let in talks, but much less of them than of those who are in already
        if empty > _UNSEEN * total or (values < 2 and self._must_be_crossed(sides[side], key)):
            return None
        missed = (rare + 1) / (
            seen + 2
        )  # of a pair that may talk, that it is not seen: about as many are seen once
        return _Side(clauses, mask) if missed**empty >= _LIKELY else None

    def _must_be_crossed(self, side: _Side, key: str) -> bool:
        """Whether this clause stays although nobody else is known whom it keeps out: names and boundaries do."""
        named = key in BOUNDARY_KEYS or key in NAME_KEYS
        others = [k for k in side.clauses if k not in self.universe.instance and k not in BOUNDARY_KEYS]
        return named or others == [key]

    def _seldom(self, side: int, member: int, linked: int) -> int:
        out = 0
        for other in _bits(linked):
            pair = (member, other) if side == 0 else (other, member)
            out += self.pairs[pair].flows == 1
        return out


def _digest(value: str) -> bool:
    """Whether a value looks like a hash: names nothing that a policy would speak of."""
    return len(value) >= 8 and all(c in "0123456789abcdef-" for c in value) and any(map(str.isdigit, value))


def _said(side: _Side) -> Clauses:
    return tuple(sorted(side.clauses.items(), key=lambda entry: (_spoken_rank(entry[0]), entry[0])))


def _spoken_rank(key: str) -> int:
    return 0 if key in NAME_KEYS else 2 if key in BOUNDARY_KEYS else 1


def _bits(mask: int) -> Iterable[int]:
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
