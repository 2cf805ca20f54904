"""Sets that rules are made of: the values one label may have, and ranges of numbers (addresses, services).

Both are closed under intersection and subtraction, know whether they are empty, and give an element if not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from sectool.labels import LabelError, check_label
from sectool.policy.selector import Clause, Op

_NOTHING: Final[frozenset[str]] = frozenset()
_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_/-.:@+"
_INNER: Final = frozenset("-.:@+")  # may stand inside a value, not at its end
_LONGEST: Final = 128


@dataclass(frozen=True, slots=True)
class Values:
    """What a label may be: absent (if `absent`), or one of `only`, or (`only` is None) any other value that
    starts with `prefix`, is not in `but` and starts with none of `but_prefixes`."""

    absent: bool = True
    only: frozenset[str] | None = None
    prefix: str = ""
    but: frozenset[str] = _NOTHING
    but_prefixes: frozenset[str] = _NOTHING

    def holds(self, value: str | None) -> bool:
        """Whether this value, or the label's absence (None), is in the set."""
        if value is None:
            return self.absent
        if self.only is not None:
            return value in self.only
        return (
            value.startswith(self.prefix)
            and value not in self.but
            and not any(value.startswith(p) for p in self.but_prefixes)
        )

    def meet(self, other: Values) -> Values:
        """What is in both."""
        absent = self.absent and other.absent
        if self.only is not None or other.only is not None:
            if self.only is not None and other.only is not None:
                return Values(absent, self.only & other.only)
            finite, rest = (self, other) if self.only is not None else (other, self)
            assert finite.only is not None
            return Values(absent, frozenset(v for v in finite.only if rest.holds(v)))
        long, short = (
            (self.prefix, other.prefix)
            if len(self.prefix) >= len(other.prefix)
            else (other.prefix, self.prefix)
        )
        if not long.startswith(short):
            return Values(absent, _NOTHING)
        return Values(absent, None, long, self.but | other.but, self.but_prefixes | other.but_prefixes)

    def minus(self, other: Values) -> Iterator[Values]:
        """What is here and not in `other`, as disjoint sets; some may be empty."""
        if self.absent and not other.absent:
            yield Values(True, _NOTHING)
        here = Values(False, self.only, self.prefix, self.but, self.but_prefixes)
        if self.only is not None:
            yield Values(False, frozenset(v for v in self.only if not other.holds(v)))
        elif other.only is not None:
            yield Values(False, None, self.prefix, self.but | other.only, self.but_prefixes)
        else:
            if other.prefix:
                yield here.meet(Values(False, None, "", _NOTHING, frozenset((other.prefix,))))
            inside = here.meet(Values(False, None, other.prefix))
            shut = sorted(other.but_prefixes)
            yield inside.meet(
                Values(False, frozenset(v for v in other.but if not any(v.startswith(p) for p in shut)))
            )
            for number, prefix in enumerate(shut):
                yield inside.meet(Values(False, None, prefix, _NOTHING, frozenset(shut[:number])))

    @property
    def empty(self) -> bool:
        """Whether nothing is in it, not even absence."""
        return not self.absent and self.some() is None

    def some(self) -> str | None:
        """A value that is in it (never absence), or None; the plainest that was found."""
        if self.only is not None:
            return min(self.only, key=lambda v: (len(v), v), default=None)
        return _search(self.prefix, self.but, self.but_prefixes)


ALL_VALUES: Final = Values()
PRESENT: Final = Values(False)
_ABSENT: Final = Values(True, _NOTHING)


def values_of(clause: Clause) -> Values:
    """The values with which a clause holds."""
    match clause.op:
        case Op.EQ | Op.IN:
            return Values(False, frozenset(clause.values))
        case Op.NE | Op.NOTIN:
            return Values(True, None, "", frozenset(clause.values))
        case Op.EXISTS:
            return PRESENT
        case Op.ABSENT:
            return _ABSENT
        case Op.PREFIX:
            return Values(False, None, clause.values[0])


@lru_cache(maxsize=4096)
def _search(prefix: str, but: frozenset[str], but_prefixes: frozenset[str]) -> str | None:
    """A label value with this prefix outside what is excluded, or None when there is none.

    Exhaustive: letters at which no exclusion goes on are alike, so one of each sort stands for them (one that
    may end a value, one that may only stand inside).
    """
    waiting = [prefix] if prefix else ["", "other"]  # a word reads better than a letter
    while waiting:
        value = waiting.pop()
        if value[:1] in _INNER or any(value.startswith(shut) for shut in but_prefixes):
            continue
        if value and value not in but and _valid(value):
            return value
        if len(value) >= _LONGEST:
            continue
        at = len(value)
        spoken = {p[at] for p in (*but_prefixes, *but) if len(p) > at and p.startswith(value)}
        fresh = [c for c in _ALPHABET if c not in spoken]
        waiting.extend(value + c for c in sorted(spoken))
        waiting.extend(value + c for c in [c for c in fresh if c in _INNER][:1])
        waiting.extend(value + c for c in [c for c in fresh if c not in _INNER][:1])
    nothing_shut = "" not in but_prefixes
    return "" if not prefix and "" not in but and nothing_shut else None


def _valid(value: str) -> bool:
    try:
        check_label("x", value)
    except LabelError:
        return False
    return True


Ranges = tuple[tuple[int, int], ...]  # inclusive, in order, apart from each other


def ranges(pairs: Iterable[tuple[int, int]]) -> Ranges:
    """Any pairs (low, high), put in order and joined where they touch."""
    out: list[tuple[int, int]] = []
    for low, high in sorted(pairs):
        if out and low <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(out[-1][1], high))
        else:
            out.append((low, high))
    return tuple(out)


def both(one: Ranges, other: Ranges) -> Ranges:
    """Numbers in both."""
    if one is other:
        return one
    out: list[tuple[int, int]] = []
    i = j = 0
    while i < len(one) and j < len(other):
        low, high = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if low <= high:
            out.append((low, high))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return tuple(out)


def without(one: Ranges, other: Ranges) -> Ranges:
    """Numbers in `one` and not in `other`."""
    if one is other:
        return ()
    out: list[tuple[int, int]] = []
    j = 0
    for start, end in one:
        low = start
        while j < len(other) and other[j][1] < low:
            j += 1
        k = j
        while k < len(other) and other[k][0] <= end:
            if other[k][0] > low:
                out.append((low, other[k][0] - 1))
            low = max(low, other[k][1] + 1)
            k += 1
        if low <= end:
            out.append((low, end))
    return tuple(out)
