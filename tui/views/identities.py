"""Identities: who this host vouches for, by which labels, and until when."""

from __future__ import annotations

from typing import Any

from textual.app import ComposeResult
from textual.widgets import Static

from sectool.clock import HOUR
from sectool.events import now_us
from tui.dialogs import Shown
from tui.grid import Column, Grid, Row, clean_row
from tui.sentences import brief
from tui.view import View
from tui.words import day_clock, left


class Identities(View):
    """The list of identities."""

    NAME = "identities"
    TITLE = "Identities"
    DEFAULT_CSS = "Identities #count { height: 1; padding: 0 1; text-style: bold; }"

    def __init__(self) -> None:
        super().__init__()
        self.items: dict[str, dict[str, Any]] = {}

    def compose(self) -> ComposeResult:
        """How many, and the list."""
        yield Static(id="count", markup=False)
        yield Grid(
            (
                Column("WHO", 14, 1),
                Column("WORKLOAD", 12, 1),
                Column("EXPIRES", 8, right=True),
                Column("ROTATED", 7, right=True),
                Column("SPIFFE ID", 24, 3),
            ),
            empty="no identity has been issued yet",
            id="identities",
        )

    def reload(self) -> None:
        """Ask."""
        self.ask("identities", self.source.identities)

    def got(self, what: str, answer: Any) -> None:
        """Show them."""
        now = now_us()
        self.items = {}
        rows = []
        for number, item in enumerate(answer):
            labels = item["labels"]
            text = ",".join(f"{k}={v}" for k, v in labels.items()) if isinstance(labels, dict) else labels
            until = item["not_after"]
            us = until if isinstance(until, int) else 0
            key = f"{item.get('serial')}-{number}"
            self.items[key] = item
            style = "bad" if us and us < now else "warn" if us and us < now + HOUR // 12 else ""
            rows.append(
                clean_row(
                    Row(
                        key,
                        (
                            brief(text),
                            str(item.get("workload", "") or ""),
                            left(us, now) if us else "",
                            str(item.get("rotations", "")),
                            item["spiffe_id"],
                        ),
                        ("", "", style, "dim", "dim"),
                    )
                )
            )
        self.query_one("#count", Static).update(f"Identities  {len(rows)}")
        self.query_one("#identities", Grid).show(rows)

    def on_grid_chosen(self, event: Grid.Chosen) -> None:
        """Enter shows all of one."""
        event.stop()
        item = self.items[event.key]
        lines = []
        for name, value in item.items():
            if isinstance(value, dict):
                lines.append(f"{name}")
                lines += [f"    {k} = {v}" for k, v in value.items()]
            elif name in ("not_before", "not_after", "renew_at") and isinstance(value, int):
                lines.append(f"{name:<12} {day_clock(value)} UTC")
            else:
                lines.append(f"{name:<12} {value}")
        self.app.push_screen(Shown("identity", "\n".join(lines)))

    def selected(self) -> Any:
        """The chosen one."""
        return self.items.get(self.query_one("#identities", Grid).key)

    def cli(self) -> str:
        """The same list."""
        return "sectool identity list"

    def hint(self) -> str:
        """What can be done."""
        return "enter all of it  Y as JSON  y as command  ? help"
