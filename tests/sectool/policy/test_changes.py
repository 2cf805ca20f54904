"""Differences between sets."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sectool.policy import diff, parse

OLD = """
kind: Policy
name: p
owner: o
rules:
  - allow a to call b
  - allow a to call c
---
kind: Network
name: lan
cidrs: [10.0.0.0/8]
---
kind: Workload
name: w
match: {user: u}
labels: {app: a}
---
kind: Test
name: t
allow: ['a=1 -> b=1 tcp/1']
---
kind: Guardrail
name: g
owner: s
rules: [deny a to call b]
"""


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (("", ""), []),
        (
            ("allow a to call c", "allow a to call d"),
            ["  Policy p (owner o): rules changed", "-   allow a to call c", "+   allow a to call d"],
        ),
        (("  - allow a to call c\n", ""), ["  Policy p (owner o): rules removed", "-   allow a to call c"]),
        (
            ("  - allow a to call c\n", "  - allow a to call c\n  - deny x to call y\n"),
            ["  Policy p (owner o): rules added", "+   deny x to call y"],
        ),
        (
            (
                "  - allow a to call b\n  - allow a to call c\n",
                "  - allow a to call c\n  - allow a to call b\n",
            ),
            [
                "  Policy p (owner o): order of rules changed",
                "-   allow a to call b",
                "-   allow a to call c",
                "+   allow a to call c",
                "+   allow a to call b",
            ],
        ),
        (("owner: o\n", "owner: q\n"), ["  Policy p (owner q): owner changed", "-   o", "+   q"]),
        (
            ("owner: o\n", "owner: o\nmode: stage\n"),
            ["  Policy p (owner o): mode changed", "-   enforce", "+   stage"],
        ),
        (
            ("owner: o\n", "owner: o\ndescription: hi\n"),
            ["  Policy p (owner o): description added", "+   hi"],
        ),
        (("10.0.0.0/8", "11.0.0.0/8"), ["  Network lan: cidrs changed", "-   10.0.0.0/8", "+   11.0.0.0/8"]),
        (("app: a", "app: b"), ["  Workload w: labels changed", "-   app=a", "+   app=b"]),
        (
            ("b=1 tcp/1", "b=1 tcp/2"),
            ["  Test t: allow changed", "-   a=1 -> b=1 tcp/1", "+   a=1 -> b=1 tcp/2"],
        ),
        (
            ("name: p\n", "name: q\n"),
            [
                "- Policy p (owner o)",
                "-   mode: enforce",
                "-   rules:",
                "-     allow a to call b",
                "-     allow a to call c",
                "+ Policy q (owner o)",
                "+   mode: enforce",
                "+   rules:",
                "+     allow a to call b",
                "+     allow a to call c",
            ],
        ),
    ],
)
def test_lines(change: tuple[str, str], lines: list[str]) -> None:
    new = OLD.replace(*change, 1) if change[0] else OLD
    found = diff(parse(OLD), parse(new))
    assert [line for one in found for line in one.lines()] == lines


PARTS = OLD.split("---\n")


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(0, 4)), st.sets(st.integers(0, 4)), st.booleans())
def test_empty_exactly_when_the_hash_is_equal(one: set[int], two: set[int], edit: bool) -> None:
    old, new = ("---\n".join(PARTS[i] for i in sorted(chosen)) for chosen in (one, two))
    if edit:
        new = new.replace("deny a to call b", "deny a to call c")
    a, b = parse(old), parse(new)
    assert (diff(a, b) == []) == (a.hash == b.hash)
    assert len(diff(a, b)) == len(diff(b, a))
