"""SQL: one SELECT over the event store, its rows, and the queries asked before."""

from __future__ import annotations

import shlex
from typing import Any, Final

from rich.text import Text
from textual.app import ComposeResult
from textual.widgets import Static, TextArea

from sectool.errors import SectoolError
from tui.grid import GAP, Column, Grid, Row, clean_row
from tui.source import Rows
from tui.view import View
from tui.words import plural

LIMIT: Final = 1000
STARTERS: Final = (
    "SELECT source_labels, destination_labels, destination_port, rule, count(*) AS denials\n"
    "FROM flows_between(now()::TIMESTAMP - INTERVAL 1 HOUR, now()::TIMESTAMP)\n"
    "WHERE action = 'deny' GROUP BY ALL ORDER BY denials DESC LIMIT 50",
    "SELECT * FROM flows_open_at(now()::TIMESTAMP) LIMIT 50",
    "SELECT type, count(*) AS n, max(ts) AS last FROM events GROUP BY ALL ORDER BY n DESC",
)


class Query(View):
    """Ask."""

    NAME = "query"
    TITLE = "SQL"
    DEFAULT_CSS = """
    Query TextArea { height: 6; border: none; border-bottom: solid $primary; padding: 0 1; }
    Query TextArea:focus { border: none; border-bottom: solid $accent; }
    Query #state { height: 1; padding: 0 1; color: $text-muted; }
    """

    def __init__(self) -> None:
        super().__init__()
        self.items: list[dict[str, Any]] = []
        self._place = 0

    def compose(self) -> ComposeResult:
        """Text, state, rows."""
        saved = self.console.settings.queries
        yield TextArea(
            saved[0] if saved else STARTERS[0], language=None, soft_wrap=True, tab_behavior="focus"
        )
        yield Static("F5 asks; tab goes to the rows, esc too", id="state", markup=False)
        yield Grid((Column("", 10, 1),), empty="nothing", id="rows")

    def reload(self) -> None:
        """Only when asked to."""

    def tick(self) -> None:
        """A query runs once."""

    def do_run(self, _: str) -> None:
        """Ask, and remember what was asked."""
        sql, source = self.query_one(TextArea).text, self.source
        self.forget()
        self._state("asking…  esc calls it off")
        self.ask("query", lambda: source.query(sql, limit=LIMIT))

    def do_refresh(self, argument: str) -> None:
        """The same."""
        self.do_run(argument)

    def do_cancel(self, _: str) -> None:
        """Call it off: the store stops working on it."""
        self._state("called off" if self.give_up() else "nothing is being asked")

    def give_up(self) -> bool:
        """A query is somebody's own: it is called off however short it has run."""
        asked = self.asking
        self.forget()
        return asked

    def forget(self) -> None:
        """Say what became of the query."""
        if self.asking:
            self._state("called off")
        super().forget()

    def _state(self, text: str) -> None:
        self.query_one("#state", Static).update(Text(text, no_wrap=True, overflow="ellipsis"))

    def failed(self, what: str, error: SectoolError) -> None:
        """Say why, and keep the rows."""
        from sectool.cli.text import escape

        self._state(escape(f"{error.message} {error.hint}".replace("\n", " ")))

    def got(self, what: str, answer: Rows) -> None:
        """Show the rows."""
        self.items = answer.items
        queries = self.console.settings.queries
        sql = self.query_one(TextArea).text
        self.console.settings.queries = [sql, *(q for q in queries if q != sql)][:20]
        self.console.settings.save()
        self._state(f"{plural(len(self.items), 'row')}{' (there are more)' if answer.more else ''}")
        names = list(self.items[0]) if self.items else [""]
        lines = [tuple("" if row[n] is None else str(row[n]) for n in names) for row in self.items]
        columns = []
        cap = max(8, (self.size.width - 2) // len(names) - GAP)  # else those on the right would vanish
        for index, name in enumerate(names):
            longest = max((len(line[index]) for line in lines), default=0)
            number = bool(self.items) and all(
                isinstance(r[name], int | float | None) for r in self.items[:50]
            )
            columns.append(Column(name, min(cap, max(len(name), longest)), 0 if number else 1, right=number))
        self.query_one("#rows", Grid).show(
            [clean_row(Row(str(i), line)) for i, line in enumerate(lines)], columns=columns
        )

    @property
    def sql(self) -> str:
        """What stands there."""
        return self.query_one(TextArea).text

    def first(self) -> TextArea:
        """The text."""
        return self.query_one(TextArea)

    def do_back(self, argument: str) -> None:
        """From the text to the rows, then back."""
        if self.query_one(TextArea).has_focus:
            self.query_one("#rows", Grid).focus()
        else:
            self.console.do_back(argument)

    def on_grid_chosen(self, event: Grid.Chosen) -> None:
        """Enter shows the whole row."""
        event.stop()
        from tui.dialogs import Shown

        row = self.items[int(event.key)]
        self.app.push_screen(Shown("row", "\n".join(f"{k}: {v}" for k, v in row.items())))

    def selected(self) -> Any:
        """The chosen row."""
        key = self.query_one("#rows", Grid).key
        return self.items[int(key)] if key else None

    def cli(self) -> str:
        """The same query."""
        return f"sectool query {shlex.quote(self.sql)}"

    def hint(self) -> str:
        """What can be done."""
        return "F5 run  F8 stop  tab rows, text  enter whole row  esc rows, then back"
