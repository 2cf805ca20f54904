"""Map: who talks to whom in the window, grouped by one label."""

from __future__ import annotations

from typing import Any, Final

from rich.text import Text
from textual.app import ComposeResult
from textual.widgets import Static

from sectool.cli.text import escape
from sectool.events import Action, Phase
from tui.grid import Column, Grid, Row, clean_row
from tui.source import Source
from tui.view import View
from tui.words import count, octets

LABELS: Final = ("app", "env", "zone", "user", "exe", "unit")


def statement(label: str, since: int, until: int) -> str:
    """Pairs with their counts of verdicts."""
    name = "coalesce({e}l.labels['{label}'], CASE WHEN {e}l.text IS NULL THEN 'no identity' ELSE 'no {label}' END)"
    source, destination = (name.format(e=e, label=label) for e in "sd")
    return (
        f"SELECT {source} AS source, {destination} AS destination, "  # noqa: S608 -- numbers and a fixed list
        "sum(g.allowed)::BIGINT AS allowed, sum(g.denied)::BIGINT AS denied, sum(g.audited)::BIGINT AS audited, "
        "list_sort(list_distinct(flatten(list(g.ports)))) AS ports, sum(g.bytes)::BIGINT AS bytes, "
        "any_value(g.example) AS example "
        "FROM (SELECT source_labels AS s, destination_labels AS d, "
        f"sum(flow_count) FILTER (WHERE phase = {Phase.VERDICT:d} AND action = {Action.ALLOW:d}) AS allowed, "
        f"sum(flow_count) FILTER (WHERE phase = {Phase.VERDICT:d} AND action IN ({Action.DENY:d}, {Action.ERROR:d})) "
        "AS denied, "
        f"sum(flow_count) FILTER (WHERE phase = {Phase.VERDICT:d} AND action = {Action.AUDIT:d}) AS audited, "
        "list(DISTINCT destination_port) AS ports, "
        f"sum(source_bytes + destination_bytes) FILTER (WHERE phase = {Phase.END:d}) AS bytes, "
        "arg_max(event_id, event_start)::VARCHAR AS example FROM flow_records "
        f"WHERE event_start >= make_timestamp({since}) AND event_start < make_timestamp({until}) GROUP BY ALL) g "
        "LEFT JOIN labels sl ON sl.id = g.s AND g.s <> 0 LEFT JOIN labels dl ON dl.id = g.d AND g.d <> 0 "
        "GROUP BY 1, 2 ORDER BY denied DESC NULLS LAST, source, destination LIMIT 500"
    )


def load(source: Source, label: str, since: int, until: int) -> list[dict[str, Any]]:
    """The pairs."""
    return source.query(statement(label, since, until), limit=500).items


class Map(View):
    """Edges of the map as lines, drawn as arrows with their verdict."""

    NAME = "map"
    TITLE = "Map"
    DEFAULT_CSS = "Map #map-title { height: 1; padding: 0 1; }"

    def __init__(self) -> None:
        super().__init__()
        self.label = self.grouped_by = LABELS[0]
        self.items: dict[str, dict[str, Any]] = {}

    def compose(self) -> ComposeResult:
        """Title and edges."""
        yield Static(id="map-title", markup=False)
        yield Grid(
            (
                Column("FROM", 12, 1),
                Column("", 7),
                Column("TO", 12, 1),
                Column("ALLOWED", 7, right=True),
                Column("DENIED", 6, right=True),
                Column("AUDIT", 5, right=True),
                Column("PORTS", 8, 1),
                Column("BYTES", 6, right=True),
            ),
            empty="nobody talks in this window",
            id="map",
        )

    def reload(self) -> None:
        """Ask."""
        since, until = self.bounds()
        source, label = self.source, self.label
        self.ask("map", lambda: (label, load(source, label, since, until)))

    def got(self, what: str, answer: Any) -> None:
        """Show it."""
        self.grouped_by, answer = answer
        self.items = {f"{row['source']}|{row['destination']}": row for row in answer}
        title = Text(no_wrap=True)
        title.append("Map", style="bold")
        title.append(
            f"  by {self.grouped_by} (b: by another label)  {len(answer)} pairs in {self.cursor.span}"
        )
        self.query_one("#map-title", Static).update(title)
        rows = []
        for key, row in self.items.items():
            denied, allowed = row["denied"] or 0, row["allowed"] or 0
            arrow, style = (
                ("──✗    ", "bad")
                if denied and not allowed
                else ("──✗──▶ ", "warn")
                if denied
                else ("─────▶ ", "good")
            )
            ports = [p for p in row["ports"] if p]
            shown = ",".join(map(str, ports[:3])) + (f" +{len(ports) - 3}" if len(ports) > 3 else "")
            rows.append(
                clean_row(
                    Row(
                        key,
                        (
                            row["source"],
                            arrow,
                            row["destination"],
                            count(allowed) if allowed else "",
                            count(denied) if denied else "",
                            count(row["audited"]) if row["audited"] else "",
                            shown,
                            octets(row["bytes"]) if row["bytes"] else "",
                        ),
                        ("", style, "", "", "bad", "warn", "dim", "dim"),
                    )
                )
            )
        self.query_one("#map", Grid).show(rows)

    def do_label(self, argument: str) -> None:
        """Group by the next label, or the one named."""
        self.label = argument if argument in LABELS else LABELS[(LABELS.index(self.label) + 1) % len(LABELS)]
        self.forget()
        self.reload()

    def on_grid_chosen(self, event: Grid.Chosen) -> None:
        """Enter shows the flows of the pair."""
        event.stop()
        row = self.items[event.key]
        parts = [
            f"{side}-label={self.grouped_by}={name}"
            for side, name in (("from", row["source"]), ("to", row["destination"]))
            if name != "no identity" and name != f"no {self.grouped_by}"
        ]
        if not parts:
            self.console.open_view("flows")
        else:
            self.console.set_filter(" ".join(parts))

    def selected_flow(self) -> str:
        """An example of the pair."""
        row = self.items.get(self.query_one("#map", Grid).key)
        return str(row["example"]) if row else ""

    def selected(self) -> Any:
        """The pair."""
        return self.items.get(self.query_one("#map", Grid).key)

    def cli(self) -> str:
        """The same pairs."""
        import shlex

        return f"sectool query {shlex.quote(statement(self.label, *self.bounds()))}"

    def hint(self) -> str:
        """What can be done."""
        return escape("enter flows of the pair  b another label  w why  [ ] time  ? help")
