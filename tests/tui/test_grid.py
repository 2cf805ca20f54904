"""The table: widths fill the line and never exceed it, whatever is in the cells."""

from __future__ import annotations

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from tui.grid import GAP, Column, Row, clean_row, spread

columns = st.lists(
    st.builds(Column, st.just("X"), st.integers(1, 30), st.integers(0, 4)), min_size=1, max_size=10
)


@given(columns, st.integers(1, 300))
def test_widths_fit(given_columns: list[Column], room: int) -> None:
    widths = spread(given_columns, room)
    shown = [w for w in widths if w]
    assert len(widths) == len(given_columns)
    assert widths[: len(shown)] == shown  # they vanish from the right
    if len(shown) > 1 or shown[0] <= room:
        used = sum(shown) + GAP * (len(shown) - 1)
        assert used <= room or len(shown) == 1
        if any(c.share for c in given_columns[: len(shown)]) and used <= room:
            assert used == room


@given(st.text())
def test_cells_are_harmless(text: str) -> None:
    (cell,) = clean_row(Row("k", (text,))).cells
    assert not {unicodedata.category(c) for c in cell} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
