"""The map as a matrix: it fits, whatever the names; every pair in it has its sign; what does not fit is left out."""

from __future__ import annotations

import unicodedata
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from tui.matrix import LEAST, matrix, shape, verdict
from tui.views.map import condition


def edge(source: str, destination: str, allowed: int = 0, denied: int = 0) -> dict[str, Any]:
    return {"source": source, "destination": destination, "allowed": allowed, "denied": denied}


def test_callers_stand_down_and_the_called_across_in_the_order_of_calls() -> None:
    edges = [edge("api", "db", 7), edge("web", "api", 3, 1), edge("web", "db", 0, 12_345)]
    lines = matrix(edges, 60, 10, ("web", "db")).plain.split("\n")
    assert [line.split() for line in lines] == [
        ["api", "db"],
        ["web", "±", "3/1", "✗", "12.3k"],
        ["api", "·", "✓", "7"],
    ]
    chosen = [span for span in matrix(edges, 60, 10, ("web", "db")).spans if "reverse" in str(span.style)]
    assert len(chosen) == 3  # both names, and the cell
    assert [verdict(e)[0] for e in edges] == ["✓", "±", "✗"]


names = st.text(min_size=1, max_size=30)
edges_ = st.lists(
    st.builds(edge, names, names, st.integers(0, 10**9), st.integers(0, 10**9)),
    max_size=30,
    unique_by=lambda e: (e["source"], e["destination"]),
)


@given(edges_, st.integers(20, 200), st.integers(2, 40))
def test_it_fits_and_is_harmless(edges: list[dict[str, Any]], columns: int, rows: int) -> None:
    drawn = matrix(edges, columns, rows).plain
    lines = drawn.split("\n")
    assert len(lines) <= rows
    fits = shape(edges, columns, rows)
    assert all(cell_len(line) <= max(columns, fits.name + 2 + LEAST) for line in lines)
    assert not {unicodedata.category(c) for c in drawn.replace("\n", "")} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    parties = {e[end] for e in edges for end in ("source", "destination")}
    assert fits.left_out + len({*fits.callers, *fits.called}) == len(parties)


def test_pairs_become_filters() -> None:
    assert condition(edge("app=web,env=prod", "10.0.0.9")) == "from-label=app=web,env=prod to-ip=10.0.0.9"
    assert condition(edge("/usr/bin/curl", "fd00::1")) == "from-label=exe=/usr/bin/curl to-ip=fd00::1"
    assert condition(edge("other addresses", "no such label")) == ""
