"""Sets of label values and of numbers, against the plain reading of membership."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sectool.labels import check_label
from sectool.policy.selector import Clause, Op
from sectool.policy.valuesets import Values, both, ranges, values_of, without

WORDS = ("", "1", "2", "12", "123", "x", "xy", "xyz", "_", "a/b")

clauses = st.one_of(
    st.builds(lambda op, v: Clause("k", op, (v,)), st.sampled_from((Op.EQ, Op.NE)), st.sampled_from(WORDS)),
    st.builds(
        lambda op, v: Clause("k", op, tuple(v)),
        st.sampled_from((Op.IN, Op.NOTIN)),
        st.lists(st.sampled_from(WORDS), min_size=1, unique=True),
    ),
    st.builds(lambda v: Clause("k", Op.PREFIX, (v,)), st.sampled_from(("1", "12", "x", "xy", "a/"))),
    st.sampled_from((Clause("k", Op.EXISTS), Clause("k", Op.ABSENT))),
)
EVERY = (None, *WORDS, "other", "1a", "12-4", "xyzz")


def labels(value: str | None) -> dict[str, str]:
    return {} if value is None else {"k": value}


@given(st.lists(clauses, min_size=1, max_size=4))
@settings(max_examples=100, deadline=None)
def test_meeting_is_holding_together(found: list[Clause]) -> None:
    values = values_of(found[0])
    for clause in found[1:]:
        values = values.meet(values_of(clause))
    for value in EVERY:
        assert values.holds(value) == all(c.holds(labels(value)) for c in found)
    if values.empty:
        assert not any(all(c.holds(labels(v)) for c in found) for v in EVERY)
    elif not values.absent:
        some = values.some()
        assert some is not None
        check_label("k", some)
        assert all(c.holds(labels(some)) for c in found)


@given(st.lists(clauses, min_size=1, max_size=3), st.lists(clauses, min_size=1, max_size=3))
@settings(max_examples=100, deadline=None)
def test_what_is_left_is_a_partition(one: list[Clause], other: list[Clause]) -> None:
    def joined(found: list[Clause]) -> Values:
        values = Values()
        for clause in found:
            values = values.meet(values_of(clause))
        return values

    a, b = joined(one), joined(other)
    parts = list(a.minus(b))
    for value in EVERY:
        assert sum(part.holds(value) for part in parts) == (a.holds(value) and not b.holds(value))


def test_a_prefix_whose_every_value_is_excluded_is_empty() -> None:
    assert Values(False, None, "ab", frozenset(), frozenset({"a"})).empty
    assert Values(False, None, "ab", frozenset({"ab"}), frozenset()).some() not in (None, "ab")
    full = "a" * 128
    assert Values(False, None, full).some() == full
    assert Values(False, None, full, frozenset({full})).empty
    assert Values(False, None, "", frozenset(), frozenset({"other"})).some() not in (None, "other")
    every = frozenset("abcdefghijklmnopqrstuvwxyz0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ_/")
    assert Values(False, None, "", frozenset(), every).some() == ""
    assert Values(False, None, "", frozenset({""}), every).empty


pairs = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 6)).map(lambda p: (p[0], p[0] + p[1])), max_size=6
)


@given(pairs, pairs)
@settings(max_examples=100, deadline=None)
def test_ranges(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> None:
    def members(found: tuple[tuple[int, int], ...]) -> set[int]:
        return {n for low, high in found for n in range(low, high + 1)}

    a, b = ranges(one), ranges(other)
    assert members(a) == members(tuple(one))
    assert all(a[i][1] + 1 < a[i + 1][0] for i in range(len(a) - 1))
    assert members(both(a, b)) == members(a) & members(b)
    assert members(without(a, b)) == members(a) - members(b)
