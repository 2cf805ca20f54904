"""A table that draws only what is on the screen.

Rows are given whole as text by the view (a window on a query, made in a thread), so drawing one line is a matter of
cutting and padding. The same row stays under the cursor when rows arrive, by its key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.strip import Strip

from sectool.cli.text import escape, fit, width

GAP = 2


@dataclass(frozen=True, slots=True)
class Column:
    """A column of `least` terminal columns that takes `share` of what is left over."""

    title: str
    least: int
    share: int = 0
    right: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One line. `styles` are names of the grid's component classes (good, bad, warn, dim), or empty.

    Cells are anybody's text: they are escaped here.
    """

    key: str
    cells: tuple[str, ...]
    styles: tuple[str, ...] = ()


def clean_row(row: Row) -> Row:
    """The same row with every cell safe to show."""
    return Row(row.key, tuple(escape(cell) for cell in row.cells), row.styles)


def spread(columns: Sequence[Column], room: int) -> list[int]:
    """Widths that fill `room`. Columns from the right vanish (width 0) when there is not enough."""
    shown = list(columns)
    while len(shown) > 1 and sum(c.least for c in shown) + GAP * (len(shown) - 1) > room:
        shown.pop()
    left = max(0, room - sum(c.least for c in shown) - GAP * (len(shown) - 1))
    shares = sum(c.share for c in shown)
    widths = [c.least + (left * c.share // shares if shares else 0) for c in shown]
    if shares:
        last = max(i for i, c in enumerate(shown) if c.share)
        widths[last] += left - sum(left * c.share // shares for c in shown)
    return [*widths, *([0] * (len(columns) - len(shown)))]


class Grid(ScrollView, can_focus=True):
    """A table with a cursor."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "grid--head",
        "grid--cursor",
        "grid--marked",
        "grid--good",
        "grid--bad",
        "grid--warn",
        "grid--dim",
    }
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j,down", "move(1)", "down", show=False),
        Binding("k,up", "move(-1)", "up", show=False),
        Binding("ctrl+d,pagedown", "page(1)", "page down", show=False),
        Binding("ctrl+u,pageup", "page(-1)", "page up", show=False),
        Binding("g,home", "edge(0)", "first", show=False),
        Binding("G,end", "edge(1)", "last", show=False),
        Binding("enter", "choose", "open", show=False),
        Binding("space", "mark", "mark", show=False),
    ]
    DEFAULT_CSS = """
    Grid { height: 1fr; background: $background; overflow-x: hidden; scrollbar-size-vertical: 1; }
    Grid > .grid--head { text-style: bold; color: $text-muted; }
    Grid > .grid--cursor { text-style: reverse; }
    Grid > .grid--marked { text-style: bold; }
    Grid > .grid--good { color: $text-success; }
    Grid > .grid--bad { color: $text-error; text-style: bold; }
    Grid > .grid--warn { color: $text-warning; }
    Grid > .grid--dim { color: $text-muted; }
    """

    cursor: reactive[int] = reactive(0, repaint=True)

    class Chosen(Message):
        """Enter or a click on a row."""

        def __init__(self, grid: Grid, key: str) -> None:
            super().__init__()
            self.grid = grid
            self.key = key

    class Moved(Message):
        """The cursor is on another row. `edge`: -1 at the first row, 1 at the last, else 0."""

        def __init__(self, grid: Grid, key: str, edge: int) -> None:
            super().__init__()
            self.grid = grid
            self.key = key
            self.edge = edge

    def __init__(
        self,
        columns: Sequence[Column],
        *,
        empty: str = "nothing here",
        id: str | None = None,  # noqa: A002
    ) -> None:
        super().__init__(id=id)
        self.columns = tuple(columns)
        self.rows: list[Row] = []
        self.empty = empty
        self.marked: set[str] = set()
        self.ends_at: Callable[[], bool] | None = None

    # --- content ---------------------------------------------------------------------------------------------

    def show(
        self, rows: Sequence[Row], *, follow: bool = False, columns: Sequence[Column] | None = None
    ) -> None:
        """Replace the rows (already clean). The cursor stays on its row, or goes to the last with `follow`."""
        if columns is not None:
            self.columns = tuple(columns)
        key = self.key
        self.rows = list(rows)
        self.virtual_size = Size(self.size.width, len(self.rows) + 1)
        place = max(0, len(self.rows) - 1) if follow else self._place(key)
        if place != self.cursor:
            self.set_reactive(Grid.cursor, place)
        self._reveal()
        self.refresh()

    def _place(self, key: str) -> int:
        if key:
            for index, row in enumerate(self.rows):
                if row.key == key:
                    return index
        return min(self.cursor, max(0, len(self.rows) - 1))

    @property
    def key(self) -> str:
        """The key under the cursor, or empty."""
        return self.rows[self.cursor].key if 0 <= self.cursor < len(self.rows) else ""

    # --- moving ----------------------------------------------------------------------------------------------

    def _go(self, place: int) -> None:
        last = max(0, len(self.rows) - 1)
        before = self.cursor
        self.cursor = min(max(place, 0), last)
        self._reveal()
        beyond = -1 if place < 0 or self.cursor == 0 else 1 if place > last or self.cursor == last else 0
        if self.cursor != before or beyond:
            self.post_message(self.Moved(self, self.key, beyond))

    def _reveal(self) -> None:
        height = max(1, self.size.height - 1)
        top = round(self.scroll_y)
        if self.cursor < top:
            self.scroll_to(y=self.cursor, animate=False, force=True)
        elif self.cursor >= top + height:
            self.scroll_to(y=self.cursor - height + 1, animate=False, force=True)

    def action_move(self, by: int) -> None:
        """One row on."""
        self._go(self.cursor + by)

    def action_page(self, by: int) -> None:
        """One screenful on."""
        self._go(self.cursor + by * max(1, self.size.height - 2))

    def action_edge(self, end: int) -> None:
        """To the first or last row."""
        self._go(len(self.rows) - 1 if end else 0)

    def action_choose(self) -> None:
        """Open the row."""
        if self.key:
            self.post_message(self.Chosen(self, self.key))

    def action_mark(self) -> None:
        """Mark the row, or take the mark away, and go on."""
        if self.key:
            self.marked ^= {self.key}
            self._go(self.cursor + 1)
            self.refresh()

    def on_click(self, event: events.Click) -> None:
        """A click chooses the row; on the chosen one it opens it."""
        place = event.y - 1 + round(self.scroll_y)
        if event.y < 1 or not 0 <= place < len(self.rows):
            return
        if place == self.cursor and event.chain > 1:
            self.action_choose()
        else:
            self._go(place)

    def on_resize(self) -> None:
        """Keep the cursor in sight."""
        self._reveal()

    # --- drawing ---------------------------------------------------------------------------------------------

    def render_line(self, y: int) -> Strip:
        """The head stays; the rest scrolls."""
        room = self.scrollable_content_region.width or self.size.width
        base = self.rich_style
        widths = spread(self.columns, room - 1)
        if y == 0:
            return self._line(
                [c.title for c in self.columns], widths, [self._style("head")] * len(widths), base
            )
        place = y - 1 + round(self.scroll_y)
        if not self.rows and y == 1:
            return Strip([Segment(fit(f" {self.empty}", room), self._style("dim"))]).adjust_cell_length(
                room, base
            )
        if place >= len(self.rows):
            return Strip.blank(room, base)
        row = self.rows[place]
        styles = [
            self._style(row.styles[i]) if i < len(row.styles) and row.styles[i] else base
            for i in range(len(widths))
        ]
        if place == self.cursor and self.has_focus:
            mark = self._style("cursor")
            base, styles = mark, [mark] * len(widths)
        elif row.key in self.marked:
            mark = self._style("marked")
            styles = [style + mark for style in styles]
        sign = "*" if row.key in self.marked else " "
        return self._line(row.cells, widths, styles, base, sign)

    def _style(self, name: str) -> Style:
        return self.get_component_rich_style(f"grid--{name}", default=Style())

    def _line(
        self, cells: Sequence[str], widths: list[int], styles: list[Style], base: Style, sign: str = " "
    ) -> Strip:
        parts = [Segment(sign, base)]
        for index, room in enumerate(widths):
            if not room:
                break
            text = fit(cells[index] if index < len(cells) else "", room)
            pad = " " * (room - width(text))
            column = self.columns[index]
            parts.append(Segment(pad + text if column.right else text + pad, styles[index]))
            parts.append(Segment(" " * GAP, base))
        return Strip(parts).adjust_cell_length(self.scrollable_content_region.width or self.size.width, base)

    def watch_cursor(self) -> None:
        """Draw anew."""
        self.refresh(Region(0, 0, self.size.width, self.size.height))
