"""Timeline: lanes of what happened over the window, and below them all of it, as `sectool timeline` tells it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.text import Text
from textual.app import ComposeResult
from textual.widgets import Static

from sectool.clock import SECOND
from sectool.events import now_us
from tui.dialogs import Choose, Shown
from tui.grid import Column, Grid, Row, clean_row
from tui.source import Source
from tui.view import View
from tui.views.pulse import rates
from tui.words import clock, count, day_clock, sparkline

LIMIT: Final = 500
NAMES: Final = 10  # columns of a lane's name
KINDS: Final = (
    "flow",
    "policy",
    "identity",
    "workload",
    "enforcer",
    "loss",
    "alert",
    "trust",
    "vulnerability",
    "capture",
    "other",
)

Entry = Mapping[str, Any]


def load(source: Source, since: int, until: int, kinds: Sequence[str]) -> dict[str, Any]:
    """The entries of a window, in the words of `sectool timeline`, and the rates of flows in `rates`."""
    document = source.ask("timeline", since=since, until=until, kinds=list(kinds), limit=LIMIT)
    return {**document, "rates": rates(source, since, until)}


def lanes(
    entries: Sequence[Entry], found: Mapping[str, list[int]], since: int, until: int, chosen: int, room: int
) -> Text:
    """Flows as bars, every other kind as marks (`!`: something bad), and where the chosen moment is."""
    across = max(10, room - NAMES)
    out = Text(no_wrap=True)

    def place(us: int) -> int:
        return min(across - 1, max(0, (us - since) * across // max(1, until - since)))

    for name, style in (("denied", "red"), ("allowed", "green")):
        out.append(f"{name:<{NAMES}}", style="bold")
        out.append(stretched(found[name], across) + "\n", style=style)
    for kind in KINDS[1:]:
        marks = [0] * across
        bad: set[int] = set()
        for entry in entries:
            if entry["kind"] == kind:
                at = place(entry["ts"])
                marks[at] += entry["count"]
                if entry["severity"] == "bad":
                    bad.add(at)
        if not any(marks):
            continue
        out.append(f"{kind[: NAMES - 1]:<{NAMES}}", style="bold")
        for at, number in enumerate(marks):
            sign = "!" if at in bad else "·" if not number else str(number) if number < 10 else "+"
            out.append(sign, style="bold red" if at in bad else "cyan" if number else "dim")
        out.append("\n")
    left, right = clock(since), clock(until)
    foot = list(left + " " * max(1, across - len(left) - len(right)) + right)
    if since <= chosen < until:
        at = place(chosen)
        out.append(" " * NAMES + " " * at + "▲\n", style="bold")
    out.append(" " * NAMES + "".join(foot), style="dim")
    return out


def stretched(values: list[int], room: int) -> str:
    """A sparkline of exactly `room` columns."""
    if room > len(values):
        values = [values[i * len(values) // room] for i in range(room)]
    return sparkline(values, room)


class Timeline(View):
    """All that happened."""

    NAME = "timeline"
    TITLE = "Timeline"
    DEFAULT_CSS = """
    Timeline #lanes { height: auto; padding: 0 1; }
    Timeline #told { height: 1; padding: 0 1; color: $text-muted; }
    """

    def __init__(self) -> None:
        super().__init__()
        self.kinds: tuple[str, ...] = ()
        self.by_key: dict[str, Entry] = {}
        self._found: dict[str, Any] | None = None

    def compose(self) -> ComposeResult:
        """Lanes and list."""
        yield Static(id="lanes", markup=False)
        yield Static(id="told", markup=False)
        yield Grid(
            (
                Column("TIME (UTC)", 14),
                Column("KIND", 9),
                Column("TIMES", 5, right=True),
                Column("WHAT", 20, 1),
            ),
            empty="nothing happened in this window",
            id="events",
        )

    def first(self) -> Grid:
        """The list."""
        return self.query_one("#events", Grid)

    def reload(self) -> None:
        """Ask for the window."""
        since, until = self.bounds()
        source, kinds = self.source, self.kinds
        self.ask("timeline", lambda: load(source, since, until, kinds))

    def got(self, what: str, answer: dict[str, Any]) -> None:
        """Show it, the newest first."""
        self._found = answer
        known: dict[str, int] = {}
        self.by_key = {}
        for entry in reversed(answer["entries"]):
            name = f"{entry['ts']}/{entry['type']}"
            known[name] = known.get(name, 0) + 1
            self.by_key[f"{name}/{known[name]}"] = entry
        self.first().show([_row(key, entry) for key, entry in self.by_key.items()])
        self._draw()

    def _draw(self) -> None:
        found = self._found
        if found is None:
            return
        chosen = self.by_key.get(self.first().key)
        room = max(20, self.size.width - 2)
        moment = chosen["ts"] if chosen is not None else -1
        drawn = lanes(found["entries"], found["rates"], found["since"], found["until"], moment, room)
        self.query_one("#lanes", Static).update(drawn)
        told = ["1 entry" if len(self.by_key) == 1 else f"{count(len(self.by_key))} entries"]
        if self.kinds:
            told.append(f"of {', '.join(self.kinds)}")
        if found["truncated"]:
            told.append("floods and the oldest are left out: z looks closer")
        told += found["warnings"]
        self.query_one("#told", Static).update(Text("  ".join(told), no_wrap=True, overflow="ellipsis"))

    def on_resize(self) -> None:
        """Draw for the width there is."""
        self._draw()

    def on_grid_moved(self, event: Grid.Moved) -> None:
        """Show where the chosen one is."""
        event.stop()
        self._draw()

    def on_grid_chosen(self, event: Grid.Chosen) -> None:
        """Enter explains a connection, and shows all of anything else."""
        event.stop()
        entry = self.by_key[event.key]
        flow = str(entry["data"].get("event_id") or "")
        if entry["kind"] == "flow" and flow:
            self.console.explain(flow)
            return
        data = json.dumps(
            {k: v for k, v in entry["data"].items() if v not in (None, "")}, indent=2, default=str
        )
        text = "\n".join([entry["text"], *(f"  {line}" for line in entry["more"]), "", data])
        self.app.push_screen(Shown(f"{entry['type']} at {day_clock(entry['ts'])} UTC", text))

    def do_time(self, text: str) -> None:
        """Without a moment given: to just before the chosen event."""
        entry = self.by_key.get(self.first().key)
        if text or entry is None:
            self.console.do_time(text)
        else:
            self.console.move_to(self.cursor.to(entry["ts"], now_us()))

    def do_zoom_in(self, _: str) -> None:
        """A shorter window, with the chosen entry where it was in it."""
        self._zoom(-1)

    def do_zoom_out(self, _: str) -> None:
        """A longer window."""
        self._zoom(1)

    def _zoom(self, by: int) -> None:
        entry = self.by_key.get(self.first().key)
        now = now_us()
        about = entry["ts"] if entry is not None else self.cursor.until(now) - SECOND
        self.console.move_to(self.cursor.zoom(by, about, now))

    def do_kinds(self, _: str) -> None:
        """Choose the kinds of entries."""

        def taken(names: list[str] | None) -> None:
            if names is not None:
                self.kinds = () if len(names) in (0, len(KINDS)) else tuple(names)
                self.forget()
                self.reload()

        options = tuple((kind, kind) for kind in KINDS)
        self.app.push_screen(Choose("Kinds of entries", options, self.kinds or KINDS), taken)

    def selected_flow(self) -> str:
        """The connection under the cursor, if it is one."""
        entry = self.by_key.get(self.first().key)
        return str(entry["data"].get("event_id") or "") if entry and entry["kind"] == "flow" else ""

    def selected(self) -> Any:
        """The entry."""
        entry = self.by_key.get(self.first().key)
        return None if entry is None else dict(entry)

    def cli(self) -> str:
        """The same entries."""
        return " ".join(("sectool timeline", *self.kind_flags, self.cursor.flags()))

    @property
    def kind_flags(self) -> list[str]:
        """The kinds as flags of the CLI."""
        return [f"--kind {kind}" for kind in self.kinds]

    def hint(self) -> str:
        """What can be done."""
        return "enter all of it  t just before it  z zoom in  Z out  c kinds  R replay  + - speed  ? help"


def _row(key: str, entry: Entry) -> Row:
    style = {"bad": "bad", "warn": "warn"}.get(entry["severity"], "")
    many = count(entry["count"]) if entry["count"] > 1 else ""
    sign = "✗ " if entry["severity"] == "bad" else ""
    return clean_row(
        Row(
            key,
            (day_clock(entry["ts"]), entry["kind"], many, sign + entry["text"]),
            ("dim", "", "dim", style),
        )
    )
