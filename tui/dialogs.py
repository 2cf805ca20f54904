"""Screens over the console: help, a question before a change, text to read, a choice of columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import SelectionList, Static
from textual.widgets.selection_list import Selection

from sectool.cli.text import escape_block
from tui.actions import GROUPS, MOVES, available
from tui.rights import Rights

# Part of the app's style sheet: one that a screen brings along has everything parsed and styled again as it opens.
CSS = """
.dialog { align: center middle; }
.dialog > Vertical { width: 76; max-width: 96%; height: auto; max-height: 90%; border: round $primary;
    background: $surface; padding: 0 1; }
.dialog .title { text-style: bold; height: auto; }
.dialog VerticalScroll { height: auto; max-height: 1fr; }
.dialog .foot { color: $text-muted; height: 1; }
Confirm.dialog > Vertical { border: round $warning; }
Choose SelectionList { height: auto; max-height: 1fr; border: none; }
"""


class Help(ModalScreen[None]):
    """What the keys do in the view below."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,question_mark,enter", "dismiss", show=False),
        Binding("j,down", "scroll(1)", show=False),
        Binding("k,up", "scroll(-1)", show=False),
    ]

    def __init__(self, view: str, rights: Rights) -> None:
        super().__init__(classes="dialog")
        self.view = view
        self.rights = rights

    def compose(self) -> ComposeResult:
        """One line an action, in groups."""
        text = Text()
        for keys, what in MOVES:
            text.append(f"{keys:>14}", style="bold")
            text.append(f"  {what}\n")
        actions = available(self.view)
        told: set[str] = set()
        for group, title in sorted(GROUPS.items(), key=lambda g: g[0] != "do"):
            text.append(f"\n{title}\n", style="bold underline")
            for action in sorted((a for a in actions if a.group == group), key=lambda a: not a.views):
                why = self.rights.why_not(action.needs)
                text.append(f"{action.shown_keys:>14}", style="dim strike" if why else "bold")
                what = action.help if group != "go" else action.help.partition(":")[0]
                text.append(f"  {what}\n", style="dim" if why else "")
                if why and why not in told:
                    told.add(why)
                    text.append(f"{'':>16}not possible: {escape_block(why)}\n", style="italic")
        with Vertical():
            yield Static(f"Help: {self.view}", classes="title", markup=False)
            with VerticalScroll(id="body"):
                yield Static(text, markup=False)
            yield Static("esc closes, j k scroll", classes="foot", markup=False)

    def action_scroll(self, by: int) -> None:
        """Scroll."""
        self.query_one("#body", VerticalScroll).scroll_relative(y=by * 3, animate=False)


class Shown(ModalScreen[None]):
    """Text to read."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,enter", "dismiss", show=False),
        Binding("j,down", "scroll(1)", show=False),
        Binding("k,up", "scroll(-1)", show=False),
    ]

    def __init__(self, title: str, text: str) -> None:
        super().__init__(classes="dialog")
        self.heading, self.text = title, text

    def compose(self) -> ComposeResult:
        """The text."""
        with Vertical():
            yield Static(self.heading, classes="title", markup=False)
            with VerticalScroll(id="body"):
                yield Static(Text(escape_block(self.text)), markup=False)
            yield Static("esc closes, j k scroll", classes="foot", markup=False)

    def action_scroll(self, by: int) -> None:
        """Scroll."""
        self.query_one("#body", VerticalScroll).scroll_relative(y=by * 3, animate=False)


class Confirm(ModalScreen[bool]):
    """A question before something is changed: `y` does it, everything else does not."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("y", "dismiss(True)", show=False),
        Binding("escape,n,q", "dismiss(False)", show=False),
    ]

    def __init__(self, question: str, lines: Sequence[str]) -> None:
        super().__init__(classes="dialog")
        self.question, self.lines = question, tuple(lines)

    def compose(self) -> ComposeResult:
        """Question, what it means, the keys."""
        with Vertical():
            yield Static(Text(escape_block(self.question)), classes="title", markup=False)
            with VerticalScroll():
                yield Static(Text(escape_block("\n".join(self.lines))), markup=False)
            yield Static("y  do it     n esc  leave everything as it is", classes="foot", markup=False)


class Choose(ModalScreen[list[str]]):
    """Which of several to show."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q", "dismiss", show=False),
        Binding("enter", "take", show=False, priority=True),
    ]

    def __init__(self, title: str, options: Sequence[tuple[str, str]], chosen: Sequence[str]) -> None:
        super().__init__(classes="dialog")
        self.heading, self.options, self.chosen = title, options, chosen

    def compose(self) -> ComposeResult:
        """The list."""
        with Vertical():
            yield Static(self.heading, classes="title", markup=False)
            yield SelectionList[str](
                *(Selection(Text(text), value, value in self.chosen) for value, text in self.options)
            )
            yield Static("space chooses, enter takes, esc leaves as it was", classes="foot", markup=False)

    def action_take(self) -> None:
        """Done."""
        picked = set(self.query_one(SelectionList).selected)
        self.dismiss([value for value, _ in self.options if value in picked])
