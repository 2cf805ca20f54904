"""Flows: a window on all connections, followed live, held still when scrolled away from the newest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from rich.text import Text
from textual.app import ComposeResult
from textual.widgets import Static

from sectool.cli.flowrow import start_us
from sectool.cli.text import escape, fit
from sectool.filters import Filter
from tui.dialogs import Choose
from tui.grid import Column, Grid, Row, clean_row
from tui.sentences import end_of, reason_words
from tui.source import Source
from tui.view import View
from tui.words import clock, count, day_clock, octets

PAGE = 200  # flows asked for at a time
MOST = 2000  # held at once; older ones are asked for again

FlowRow = Mapping[str, Any]
STYLES = {"allow": "good", "deny": "bad", "audit": "warn", "error": "bad"}
SIGNS = {"allow": "✓", "deny": "✗", "audit": "~", "error": "!"}


def _verdict(row: FlowRow) -> str:
    action = str(row["event.action"] or "?")
    many = row["flow.count"] or 1
    return f"{SIGNS.get(action, '?')} {action}{f' x{count(many)}' if many > 1 else ''}"


def _service(row: FlowRow) -> str:
    if row["network.transport"] in ("tcp", "udp"):
        return f"{row['network.transport']}/{row['destination.port']}"
    return str(row["network.transport"])


def _why(row: FlowRow) -> str:
    rule = row["rule.text"] or row["peer_rule.text"] or ""
    if not row["drop_reason"]:
        return str(rule)
    by = reason_words(row["drop_reason"])
    if row["peer_reason"]:
        by = f"refused by the other end, {reason_words(row['peer_reason'])}"
    return f"{by}: {rule}" if rule else by


def _volume(row: FlowRow) -> str:
    total = (row["source.bytes"] or 0) + (row["destination.bytes"] or 0)
    return octets(total) if total else ""


def _took(row: FlowRow) -> str:
    ns = row["event.duration"]
    if row["open"]:
        return "open"
    if not ns:
        return ""
    return f"{ns / 1e6:.0f}ms" if ns < 1e9 else f"{ns / 1e9:.0f}s"


_COLUMNS: Final[dict[str, tuple[Column, Callable[[FlowRow], str]]]] = {
    "time": (Column("TIME", 8), lambda r: clock(start_us(r))),
    "date": (Column("DATE", 14), lambda r: day_clock(start_us(r))),
    "verdict": (Column("VERDICT", 8), _verdict),
    "source": (Column("FROM", 12, 2), lambda r: end_of(r, "source")),
    "source-ip": (Column("FROM ADDRESS", 15), lambda r: str(r["source.ip"])),
    "destination": (Column("TO", 12, 2), lambda r: end_of(r, "destination")),
    "destination-ip": (Column("TO ADDRESS", 15), lambda r: str(r["destination.ip"])),
    "service": (Column("SERVICE", 9), _service),
    "bytes": (Column("BYTES", 6, right=True), _volume),
    "took": (Column("TOOK", 6, right=True), _took),
    "encryption": (Column("CRYPTO", 9), lambda r: str(r["encryption.state"] or "")),
    "side": (Column("SEEN BY", 9), lambda r: str(r["observation_point"] or "")),
    "revision": (Column("REV", 4, right=True), lambda r: str(r["policy.revision"] or "")),
    "owner": (Column("OWNER", 10), lambda r: str(r["rule.owner"] or "")),
    "pending": (Column("STAGED", 7), lambda r: str(r["pending.action"] or "")),
    "why": (Column("WHY", 14, 4), _why),
}
CHOICES: Final = tuple((name, column.title) for name, (column, _) in _COLUMNS.items())
DEFAULT: Final = ("time", "verdict", "source", "destination", "service", "why", "bytes")


def columns_of(names: tuple[str, ...]) -> tuple[Column, ...]:
    """Columns by name."""
    return tuple(_COLUMNS[name][0] for name in names)


def grid_row(row: FlowRow, names: tuple[str, ...]) -> Row:
    """A flow as a line."""
    action = str(row["event.action"] or "")
    return clean_row(
        Row(
            row["event.id"],
            tuple(_COLUMNS[name][1](row) for name in names),
            tuple(
                STYLES.get(action, "")
                if name == "verdict"
                else "dim"
                if name in ("time", "date", "bytes", "took")
                else ""
                for name in names
            ),
        )
    )


def load(
    source: Source, filter_: Filter, since: int, until: int, last: int, names: tuple[str, ...]
) -> tuple[list[FlowRow], list[Row], bool, int]:
    """The newest flows of a window as data and lines, whether there are older ones, and the store's position."""
    position = source.position()
    found = source.flows(filter_, since=since, until=until, last=last)
    return list(found.items), [grid_row(row, names) for row in found.items], found.more, position


class Flows(View):
    """The table of flows."""

    NAME = "flows"
    TITLE = "Flows"
    DEFAULT_CSS = """
    Flows #flows-title { height: 1; padding: 0 1; }
    Flows #detail { height: auto; max-height: 11; padding: 0 1; border-top: solid $primary; display: none; }
    Flows #detail.-shown { display: block; }
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_id: dict[str, FlowRow] = {}
        self.more = False
        self.following = True
        self.wanted = PAGE
        self.position = 0
        self.arrived = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Columns shown."""
        chosen = tuple(name for name in self.console.settings.columns if name in _COLUMNS)
        return chosen or DEFAULT

    def compose(self) -> ComposeResult:
        """What is filtered for, the table, the details of one."""
        yield Static(id="flows-title", markup=False)
        yield Grid(columns_of(self.names), empty="no connection in this window fits the filter", id="flows")
        yield Static(id="detail", markup=False)

    def first(self) -> Grid:
        """The table."""
        return self.query_one("#flows", Grid)

    def reload(self) -> None:
        """Ask for the window, or only whether there is news when held still."""
        since, until = self.bounds()
        source, chosen, names, wanted = self.source, self.console.filter, self.names, self.wanted
        self.ask("flows", lambda: load(source, chosen, since, until, wanted, names))

    def tick(self) -> None:
        """Held still: only count what is new."""
        if self.following or not self.cursor.live:
            super().tick()
        elif not self._asking:
            self.ask("position", self.source.position)

    def got(self, what: str, answer: Any) -> None:
        """Show the window."""
        if what == "position":
            self.arrived = max(0, answer - self.position)
            self._title()
            return
        items, rows, self.more, self.position = answer
        self.arrived = 0
        self.by_id = {row["event.id"]: row for row in items}
        self.first().show(rows, follow=self.following, columns=columns_of(self.names))
        self._title()
        self._detail()

    def _title(self) -> None:
        text = Text(no_wrap=True)
        filter_ = str(self.console.filter)
        text.append("Flows", style="bold")
        shown = len(self.by_id)
        text.append(f"  {'newest ' if self.more else ''}{shown}{' of more' if self.more else ''}")
        if filter_:
            text.append("  / ")
            text.append(escape(filter_), style="bold")
        if not self.following and self.cursor.live:
            text.append(f"  HELD, {count(self.arrived)} new records; G goes on", style="bold yellow")
        text.truncate(max(10, self.size.width - 2), overflow="ellipsis")
        self.query_one("#flows-title", Static).update(text)

    def on_grid_moved(self, event: Grid.Moved) -> None:
        """Away from the newest holds the view still; beyond the oldest asks for older ones."""
        event.stop()
        self.following = event.edge > 0
        if event.edge < 0 and self.more and self.wanted < MOST:
            self.wanted = min(MOST, self.wanted * 2)
            self.reload()
        elif self.following:
            self.wanted = PAGE
            self.reload()
        self._title()
        self._detail()

    def on_grid_chosen(self, event: Grid.Chosen) -> None:
        """Enter shows and hides the details."""
        event.stop()
        self.query_one("#detail", Static).toggle_class("-shown")
        self.following = self.following and not self.query_one("#detail", Static).has_class("-shown")
        self._title()
        self._detail()

    def _detail(self) -> None:
        pane = self.query_one("#detail", Static)
        row = self.by_id.get(self.first().key)
        if row is not None and pane.has_class("-shown"):
            pane.update(detail(row, max(20, self.size.width - 2)))

    def do_back(self, argument: str) -> None:
        """Close the details, take away the filter, or go back."""
        pane = self.query_one("#detail", Static)
        if pane.has_class("-shown"):
            pane.remove_class("-shown")
        elif self.console.filter:
            self.console.set_filter("")
            self.reload()
        else:
            self.console.do_back(argument)

    def do_columns(self, _: str) -> None:
        """Choose columns, remembered."""

        def taken(names: list[str] | None) -> None:
            if names:
                self.console.settings.columns = names
                self.console.settings.save()
                self.reload()

        self.app.push_screen(Choose("Columns of Flows", CHOICES, self.names), taken)

    def selected_flow(self) -> str:
        """The row under the cursor."""
        return self.first().key

    def selected(self) -> Any:
        """Its flow; or all marked ones."""
        marked = [self.by_id[key] for key in self.first().marked if key in self.by_id]
        return marked or self.by_id.get(self.first().key)

    def cli(self) -> str:
        """The same flows."""
        return " ".join(
            part for part in ("sectool flows", self.console.filter_flags(), self.cursor.flags()) if part
        )

    def hint(self) -> str:
        """What can be done."""
        return "enter details  w why  / filter  c columns  space mark  G newest  ? help"


def detail(row: FlowRow, room: int) -> Text:
    """All that matters of one flow, in lines of two columns."""

    def end(side: str) -> str:
        who = row[f"{side}.identity"] or "no identity"
        labels = ",".join(f"{k}={v}" for k, v in (row[f"{side}.labels"] or {}).items())
        return f"{row[f'{side}.ip']}:{row[f'{side}.port']}  {who}  {labels}"

    facts = [
        (
            "verdict",
            f"{_verdict(row)}  {reason_words(row['drop_reason'])}  seen by the {row['observation_point']}",
        ),
        ("from", end("source")),
        ("to", end("destination")),
        ("rule", f"{row['rule.policy'] or ''}: {row['rule.text']}" if row["rule.text"] else "none matched"),
        ("owner", f"{row['rule.owner'] or '-'}   policy revision {row['policy.revision'] or '-'}"),
        (
            "staged",
            f"{row['pending.action']} by {row['pending.rule'] or 'default'}" if row["pending.action"] else "",
        ),
        (
            "traffic",
            f"{octets(row['source.bytes'] or 0)} out, {octets(row['destination.bytes'] or 0)} back, "
            f"{_took(row) or 'no time known'}, {row['encryption.state'] or 'plain'} {row['encryption.cipher'] or ''}",
        ),
        (
            "process",
            f"pid {row['process.pid'] or '-'}  uid {row['user.id'] if row['user.id'] is not None else '-'}",
        ),
        ("id", str(row["event.id"])),
    ]
    out = Text(no_wrap=True)
    for name, value in facts:
        if value:
            out.append(f"{name:<9}", style="bold")
            out.append(fit(escape(value), max(10, room - 9)) + "\n")
    out.right_crop(1)
    return out
