"""Pictures of connectivity: every party placed, every name escaped, whatever names there are."""

from __future__ import annotations

import re
from typing import Any
from unicodedata import category
from xml.etree import ElementTree

from hypothesis import given, settings
from hypothesis import strategies as st

from sectool.cli.drawing import bars_svg, graphviz, layers, mermaid, svg

NAMES = st.lists(st.text(max_size=12), min_size=1, max_size=8, unique=True)


def _graph(names: list[str], links: list[tuple[int, int]]) -> tuple[list[Any], list[Any]]:
    edges = [
        {
            "source": names[a % len(names)],
            "destination": names[b % len(names)],
            "services": [names[0], "tcp/1"],
            "allowed": a,
            "denied": b,
            "encrypted": 0,
            "bytes": 0,
        }
        for a, b in links
    ]
    return [{"name": name, "identified": len(name) % 2 == 0} for name in names], edges


@settings(max_examples=60, deadline=None)
@given(NAMES, st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=14))
def test_any_names_and_cycles(names: list[str], links: list[tuple[int, int]]) -> None:
    nodes, edges = _graph(names, links)
    columns = layers(names, [(e["source"], e["destination"]) for e in edges])
    assert sorted(name for column in columns for name in column) == sorted(names)
    tree = ElementTree.fromstring(svg(nodes, edges, names[0]))
    assert {e.tag.rpartition("}")[2] for e in tree.iter()} <= {
        "svg",
        "title",
        "rect",
        "defs",
        "marker",
        "path",
        "text",
        "g",
    }
    assert len(tree.findall("{http://www.w3.org/2000/svg}path")) == len(edges)
    for text in (graphviz(nodes, edges), mermaid(nodes, edges)):
        assert all(c == "\n" or category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in text)
    for line in graphviz(nodes, edges).splitlines()[3:-1]:
        assert re.sub(r'"(?:[^"\\]|\\.)*"', "Q", line) in {
            "  Q;",
            "  Q [style=dashed];",
            "  Q -> Q [label=Q];",
            "  Q -> Q [label=Q, color=red, fontcolor=red, style=dashed];",
        }
    for line in mermaid(nodes, edges).splitlines()[1:]:
        assert re.fullmatch(r'  n\d+(\["[^"\]|]*"\]| -\.?->\|"[^"\]|]*"\| n\d+)', line)


def test_callers_stand_left() -> None:
    assert layers(["db", "web", "api"], [("web", "api"), ("api", "db"), ("web", "db")]) == [
        ["web"],
        ["api"],
        ["db"],
    ]
    assert layers(["a", "b"], [("a", "b"), ("b", "a")]) == [["a"], ["b"]]
    assert layers([], []) == []


def test_bars_say_their_numbers() -> None:
    text = bars_svg("per minute <b>", [("02:00", 3, 0), ("02:01", 1, 7)])
    assert len(ElementTree.fromstring(text).findall("{http://www.w3.org/2000/svg}rect")) == 3
    assert "02:01: 7 denied" in text
    assert "<b>" not in text
    ElementTree.fromstring(bars_svg("nothing", []))
