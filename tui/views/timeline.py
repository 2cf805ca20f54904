"""Timeline: lanes of what happened over the window, and every event in order below them."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC
from typing import Any, Final

from rich.text import Text
from textual.app import ComposeResult
from textual.widgets import Static

from sectool.cli.text import escape_block
from sectool.clock import from_datetime
from tui.dialogs import Shown
from tui.grid import Column, Grid, Row, clean_row
from tui.sentences import event_line
from tui.source import Source
from tui.view import View
from tui.views.pulse import rates
from tui.words import clock, day_clock, sparkline

LANES: Final = ("policy", "enforcer", "workload", "identity", "trust", "alert", "other")


def load(source: Source, since: int, until: int) -> tuple[list[dict[str, Any]], dict[str, list[int]], bool]:
    """Events with `us`, flow rates, and whether there are more events."""
    found = source.events((), since=since, until=until, last=500)
    for row in found.items:
        at = row["ts"]
        row["us"] = from_datetime(at.replace(tzinfo=UTC) if at.tzinfo is None else at)
    return found.items, rates(source, since, until), found.more


class Timeline(View):
    """All that happened."""

    NAME = "timeline"
    TITLE = "Timeline"
    DEFAULT_CSS = "Timeline #lanes { height: auto; padding: 0 1; margin-bottom: 1; }"

    def __init__(self) -> None:
        super().__init__()
        self.by_seq: dict[str, dict[str, Any]] = {}

    def compose(self) -> ComposeResult:
        """Lanes and list."""
        yield Static(id="lanes", markup=False)
        yield Grid(
            (Column("TIME (UTC)", 14), Column("KIND", 9), Column("WHAT", 20, 1)),
            empty="nothing happened in this window",
            id="events",
        )

    def reload(self) -> None:
        """Ask for the window."""
        since, until = self.bounds()
        source = self.source
        self.ask("timeline", lambda: (*load(source, since, until), since, until))

    def got(self, what: str, answer: Any) -> None:
        """Show it."""
        items, found, _, since, until = answer
        self.by_seq = {str(row["seq"]): row for row in items}
        room = max(20, self.size.width - 12)
        out = Text(no_wrap=True)
        for name, style in (("denied", "red"), ("allowed", "green")):
            out.append(f"{name:<9} ", style="bold")
            out.append(_stretched(found[name], room), style=style)
            out.append("\n")
        lanes: dict[str, Counter[int]] = {}
        for row in items:
            kind = row["type"].partition(".")[0]
            lane = kind if kind in LANES else "other"
            place = min(room - 1, max(0, (row["us"] - since) * room // max(1, until - since)))
            lanes.setdefault(lane, Counter())[place] += 1
        for lane in LANES:
            if lane in lanes:
                marks = (lanes[lane].get(i, 0) for i in range(room))
                out.append(f"{lane:<9} ", style="bold")
                out.append(
                    "".join("·" if not n else str(n) if n < 10 else "+" for n in marks) + "\n", style="cyan"
                )
        left, right = clock(since), clock(until)
        out.append(" " * 10 + left + " " * max(1, room - len(left) - len(right)) + right, style="dim")
        self.query_one("#lanes", Static).update(out)
        self.query_one("#events", Grid).show([self._row(row) for row in reversed(items)])

    def _row(self, row: dict[str, Any]) -> Row:
        try:
            body = json.loads(row["body"])
        except (TypeError, ValueError):
            body = {}
        text, style = event_line(row["type"], body if isinstance(body, dict) else {})
        return clean_row(
            Row(
                str(row["seq"]),
                (day_clock(row["us"]), row["type"].partition(".")[0], text),
                ("dim", "", style),
            )
        )

    def first(self) -> Grid:
        """The list."""
        return self.query_one("#events", Grid)

    def on_grid_chosen(self, event: Grid.Chosen) -> None:
        """Enter shows all of it."""
        event.stop()
        row = self.by_seq[event.key]
        try:
            text = json.dumps(json.loads(row["body"]), indent=2)
        except (TypeError, ValueError):
            text = str(row["body"])
        self.app.push_screen(Shown(f"{row['type']} at {day_clock(row['us'])} UTC", escape_block(text)))

    def do_time(self, text: str) -> None:
        """Without a moment given: to just before the chosen event."""
        row = self.by_seq.get(self.first().key)
        if text or row is None:
            self.console.do_time(text)
        else:
            from sectool.events import now_us

            self.console.move_to(self.cursor.to(row["us"], now_us()))

    def selected(self) -> Any:
        """The event."""
        row = self.by_seq.get(self.first().key)
        return (
            None
            if row is None
            else {"seq": row["seq"], "type": row["type"], "ts": str(row["ts"]), "body": row["body"]}
        )

    def cli(self) -> str:
        """The same events."""
        return f"sectool events {self.cursor.flags()}"

    def hint(self) -> str:
        """What can be done."""
        return "enter all of it  t to just before it  [ ] time  R replay  + - speed  ? help"


def _stretched(values: list[int], room: int) -> str:
    if room <= len(values):
        return sparkline(values, room)
    wide = [values[i * len(values) // room] for i in range(room)]
    return sparkline(wide, room)
