"""Map: who talks to whom in the window, by labels, drawn as a matrix, and below it as lines to drill into."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import Any, Final

from rich.text import Text
from textual.app import ComposeResult
from textual.widgets import Static

from sectool.filters import Filter, parse_text
from tui.grid import Column, Grid, Row, clean_row
from tui.matrix import LEGEND, matrix, verdict
from tui.source import Source
from tui.view import View
from tui.words import count, octets, plural

BY: Final = (("app", "env"), ("app",), ("env",), ("zone",), ("user",), ("exe",), ("unit",))
NO_ONE: Final = ("other addresses", "no such label")
ARROWS: Final = {"✓": ("─────▶ ", "good"), "±": ("──✗──▶ ", "warn"), "✗": ("──✗    ", "bad")}


def load(source: Source, by: tuple[str, ...], since: int, until: int) -> dict[str, Any]:
    """What `sectool map` tells of the window, the most denied pairs first."""
    document = source.ask("connectivity", by=list(by), since=since, until=until)
    edges = sorted(
        document["edges"], key=lambda e: (-e["denied"], -e["allowed"], e["source"], e["destination"])
    )
    return {**document, "edges": edges}


def condition(edge: dict[str, Any]) -> str:
    """The filter that finds the flows of a pair, as far as its ends have names; empty when none has."""
    parts = []
    for side, name in (("from", edge["source"]), ("to", edge["destination"])):
        if name in NO_ONE:
            continue
        try:
            ipaddress.ip_address(name)
        except ValueError:
            labels = name if "=" in name else f"exe={name}"
            parts.append(f"{side}-label={labels}")
        else:
            parts.append(f"{side}-ip={name}")
    return " ".join(parts)


class Map(View):
    """The matrix and the pairs."""

    NAME = "map"
    TITLE = "Map"
    DEFAULT_CSS = """
    Map #map-title { height: 1; padding: 0 1; }
    Map #matrix { height: auto; max-height: 60%; padding: 0 1; margin-bottom: 1; }
    """

    def __init__(self) -> None:
        super().__init__()
        self.by: tuple[str, ...] = BY[0]
        self.items: dict[str, dict[str, Any]] = {}
        self._found: dict[str, Any] | None = None

    def compose(self) -> ComposeResult:
        """Title, matrix, pairs."""
        yield Static(id="map-title", markup=False)
        yield Static(id="matrix", markup=False)
        yield Grid(
            (
                Column("FROM", 12, 1),
                Column("", 7),
                Column("TO", 12, 1),
                Column("ALLOWED", 7, right=True),
                Column("DENIED", 6, right=True),
                Column("SERVICES", 10, 1),
                Column("BYTES", 6, right=True),
                Column("CRYPTO", 6, right=True),
            ),
            empty="nobody talks in this window",
            id="map",
        )

    def first(self) -> Grid:
        """The pairs."""
        return self.query_one("#map", Grid)

    def reload(self) -> None:
        """Ask."""
        since, until = self.bounds()
        source, by = self.source, self.by
        self.ask("map", lambda: load(source, by, since, until))

    def got(self, what: str, answer: dict[str, Any]) -> None:
        """Show it."""
        self._found = answer
        self.items = {f"{row['source']}|{row['destination']}": row for row in answer["edges"]}
        self.first().show([_row(key, row) for key, row in self.items.items()])
        self._draw()

    def _draw(self) -> None:
        found = self._found
        if found is None:
            return
        edges = found["edges"]
        chosen = self.items.get(self.first().key)
        ends = (chosen["source"], chosen["destination"]) if chosen is not None else ("", "")
        rows = max(3, self.size.height * 6 // 10 - 1)
        self.query_one("#matrix", Static).update(matrix(edges, max(20, self.size.width - 2), rows, ends))
        title = Text("Map", style="bold", no_wrap=True, overflow="ellipsis")
        pairs = plural(len(edges), "pair")
        more = " of more" if found["truncated"] else ""
        title.append(
            f"  by {', '.join(found['by'])}  {pairs}{more} in {self.cursor.span}  ", style="not bold"
        )
        title.append(LEGEND, style="not bold dim")
        self.query_one("#map-title", Static).update(title)

    def on_resize(self) -> None:
        """Draw for the room there is."""
        self._draw()

    def on_grid_moved(self, event: Grid.Moved) -> None:
        """Show the pair in the matrix."""
        event.stop()
        self._draw()

    def do_label(self, argument: str) -> None:
        """Group by the next labels, or those named."""
        named = tuple(argument.replace(",", " ").split())
        self.by = named or BY[(BY.index(self.by) + 1) % len(BY) if self.by in BY else 0]
        self.forget()
        self.reload()

    @property
    def condition(self) -> str:
        """The filter for the chosen pair."""
        row = self.items.get(self.first().key)
        return condition(row) if row is not None else ""

    def on_grid_chosen(self, event: Grid.Chosen) -> None:
        """Enter shows the flows of the pair."""
        event.stop()
        self.console.set_filter(condition(self.items[event.key]))
        self.console.open_view("flows")

    def flow_to_find(self) -> Callable[[], str] | None:
        """The newest connection of the chosen pair; denied, if any was."""
        row = self.items.get(self.first().key)
        if row is None:
            return None
        since, until = self.bounds()
        source, wanted = (
            self.source,
            parse_text(f"{condition(row)} {'verdict=deny' if row['denied'] else ''}"),
        )
        return lambda: _newest(source, wanted, since, until)

    def selected(self) -> Any:
        """The pair."""
        return self.items.get(self.first().key)

    @property
    def by_flags(self) -> str:
        """The labels as flags of the CLI."""
        return " ".join(f"--by {key}" for key in self.by)

    def cli(self) -> str:
        """The same map."""
        return f"sectool map {self.by_flags} {self.cursor.flags()}"

    def hint(self) -> str:
        """What can be done."""
        return "enter flows of the pair  b by other labels  w why  [ ] time  Y as JSON  ? help"


def _newest(source: Source, wanted: Filter, since: int, until: int) -> str:
    found = source.flows(wanted, since=since, until=until, last=1).items
    return str(found[0]["event.id"]) if found else ""


def _row(key: str, row: dict[str, Any]) -> Row:
    sign, _ = verdict(row)
    arrow, style = ARROWS[sign]
    services = row["services"]
    shown = ",".join(services[:3]) + (f" +{len(services) - 3}" if len(services) > 3 else "")
    share = (
        f"{min(1.0, row['encrypted'] / row['allowed']):.0%}" if row["allowed"] and row["encrypted"] else ""
    )
    return clean_row(
        Row(
            key,
            (
                row["source"],
                arrow,
                row["destination"],
                count(row["allowed"]) if row["allowed"] else "",
                count(row["denied"]) if row["denied"] else "",
                shown,
                octets(row["bytes"]) if row["bytes"] else "",
                share,
            ),
            ("", style, "", "", "bad", "dim", "dim", "dim"),
        )
    )
