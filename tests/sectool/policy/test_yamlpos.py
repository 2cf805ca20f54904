"""Nodes and their places in every scalar style."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sectool.policy.yamlpos import Items, Scalar, Source, Table, bad_character, closest, compose


def root(text: str) -> Scalar:
    (node,) = compose(Source("f", text))
    assert isinstance(node, Scalar)
    return node


@pytest.mark.parametrize(
    ("text", "value", "word", "place"),
    [
        ("one two", "one two", "two", "f:1:5"),
        ("'it''s two'", "it's two", "two", "f:1:8"),
        ("'it''s'", "it's", "'s", "f:1:4"),
        ('"a\\tb two"', "a\tb two", "two", "f:1:7"),
        ('"\\x41\\u0042\\U00000043 two"', "ABC two", "C", "f:1:12"),
        ('"\\"two"', '"two', "two", "f:1:4"),
        ("one\n two", "one two", "two", "f:2:2"),
        ("'one\n\n two'", "one\ntwo", "two", "f:3:2"),
        ("|\n one\n  two", "one\n two", "two", "f:3:3"),
        (">2-\n  one\n  two", "one two", "two", "f:3:3"),
        ('"one \\\n  two"', "one two", "two", "f:2:3"),
    ],
)
def test_places_inside_a_scalar(text: str, value: str, word: str, place: str) -> None:
    scalar = root(text)
    assert scalar.value == value
    assert scalar.fail("x", "y", offset=value.index(word)).where == place


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text("ab'\"\\é𝄞{", min_size=1, max_size=4), min_size=1, max_size=6),
    st.sampled_from(["'", '"', '"u']),
    st.lists(st.sampled_from([" ", "  ", "\n  ", " \n "]), min_size=6, max_size=6),
)
def test_every_word_of_a_quoted_scalar_is_found_where_it_was_written(
    words: list[str], style: str, gaps: list[str]
) -> None:
    def spell(word: str) -> str:
        if style == "'":
            return word.replace("'", "''")
        if style == '"u':
            return "".join(f"\\U{ord(c):08x}" for c in word)
        return word.replace("\\", "\\\\").replace('"', '\\"')

    text = style[0]
    starts: list[int] = []
    for word, gap in zip(words, gaps, strict=False):
        starts.append(len(text))
        text += spell(word) + gap
    scalar = root(text.rstrip() + style[0])
    at = 0
    for word, start in zip(words, starts, strict=True):
        at = scalar.value.index(word, at)
        line = text.count("\n", 0, start) + 1
        column = start - (text.rfind("\n", 0, start) + 1) + 1
        assert scalar.fail("x", "y", offset=at).where == f"f:{line}:{column}" or at == 0
        at += len(word)


def test_structure() -> None:
    (node,) = compose(Source("f", "a: [b, {c: d}]\ne: |\n  f\n"))
    assert isinstance(node, Table)
    assert list(node.entries) == ["a", "e"]
    items = node.entries["a"][1]
    assert isinstance(items, Items)
    assert (items.line, items.column, len(items.items)) == (1, 4, 2)
    assert node.entries["e"][1].line == 2


@pytest.mark.parametrize(
    ("text", "at"), [("plain", -1), ("ünï 漢", -1), ("a\x1b", 1), ("\u202e", 0), ("a\u200bb", 1), ("\x9b", 0)]
)
def test_bad_character(text: str, at: int) -> None:
    assert bad_character(text) == at


@pytest.mark.parametrize(
    ("word", "hint"),
    [("Polcy", "did you mean 'Policy'?"), ("POLICY", "did you mean 'Policy'?"), ("zebra", "")],
)
def test_closest(word: str, hint: str) -> None:
    assert closest(word, ["Policy", "Guardrail"]) == hint
