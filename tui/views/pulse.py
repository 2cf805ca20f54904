"""Pulse: what is denied now, how much is decided, who talks for the first time, what was changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.widgets import Static

from sectool.clock import DAY, from_datetime, to_datetime
from sectool.events import Action, Phase, now_us
from tui.grid import Column, Grid, Row, clean_row
from tui.sentences import brief, event_line, reason_words
from tui.source import Source
from tui.view import View
from tui.words import ago, count, sparkline

BARS = 60
WIDEST = 2  # terminal columns a part may take
_ENDS = """
 coalesce(nullif(sl.text, ''), ip_text(g.sh, g.so)) AS source,
 coalesce(nullif(dl.text, ''), ip_text(g.dh, g.do_)) AS destination,
 CASE g.transport WHEN 6 THEN 'tcp' WHEN 17 THEN 'udp' WHEN 1 THEN 'icmp' WHEN 58 THEN 'icmpv6'
 ELSE g.transport::VARCHAR END AS transport, g.port
"""
_KEYS = """
 source_labels AS s, destination_labels AS d, transport,
 CASE WHEN transport IN (6, 17) THEN destination_port ELSE source_port END AS port,
 CASE WHEN source_labels = 0 THEN source_ip_hi END AS sh, CASE WHEN source_labels = 0 THEN source_ip_lo END AS so,
 CASE WHEN destination_labels = 0 THEN destination_ip_hi END AS dh,
 CASE WHEN destination_labels = 0 THEN destination_ip_lo END AS do_
"""
_JOINS = "LEFT JOIN labels sl ON sl.id = g.s AND g.s <> 0 LEFT JOIN labels dl ON dl.id = g.d AND g.d <> 0"


def _during(since: int, until: int) -> str:
    return (
        f"phase = {Phase.VERDICT:d} AND event_start >= make_timestamp({since})"
        f" AND event_start < make_timestamp({until})"
    )


def denied(source: Source, since: int, until: int) -> list[dict[str, Any]]:
    """Denied flows in groups, most first."""
    return source.query(
        f"""SELECT {_ENDS}, g.reason, g.flows, epoch_us(g.last_) AS last, g.example, r.text AS rule, r.policy
        FROM (SELECT {_KEYS}, drop_reason AS reason, sum(flow_count)::BIGINT AS flows, max(event_start) AS last_,
        event_uuid(max(event_start), arg_max(event_id, event_start))::VARCHAR AS example,
        arg_max(rule, event_start) AS rule_
        FROM flow_records WHERE {_during(since, until)} AND action = {Action.DENY:d} GROUP BY ALL
        ORDER BY flows DESC LIMIT 100) g {_JOINS} LEFT JOIN rules r ON r.id = g.rule_ AND g.rule_ <> 0
        ORDER BY g.flows DESC, source, destination, g.port""",  # noqa: S608 -- numbers only
        limit=100,
    ).items


def rates(source: Source, since: int, until: int) -> dict[str, list[int]]:
    """Flows allowed and denied, in 60 equal parts of the window."""
    width = max(1, (until - since) // BARS)
    rows = source.query(
        f"SELECT (epoch_us(event_start) - {since}) // {width} AS part, action = {Action.DENY:d} AS denied, "  # noqa: S608
        f"sum(flow_count)::BIGINT AS flows FROM flow_records WHERE {_during(since, until)} GROUP BY ALL"
    ).items
    out = {"allowed": [0] * BARS, "denied": [0] * BARS}
    for row in rows:
        part = min(max(int(row["part"]), 0), BARS - 1)
        out["denied" if row["denied"] else "allowed"][part] += row["flows"]
    return out


def newcomers(source: Source, since: int, until: int) -> list[dict[str, Any]]:
    """Who talked to whom for the first time within a day, allowed or not."""
    pair = "source_labels AS s, destination_labels AS d, transport, destination_port AS port"
    return source.query(
        f"""WITH now_ AS (SELECT {pair}, min(event_start) AS first_, min(action) AS action,
        event_uuid(min(event_start), arg_min(event_id, event_start))::VARCHAR AS example FROM flow_records
        WHERE {_during(since, until)} AND source_labels <> 0 AND destination_labels <> 0
        AND transport IN (6, 17) GROUP BY ALL),
        before_ AS (SELECT DISTINCT {pair} FROM flow_records WHERE {_during(max(0, since - DAY), since)})
        SELECT sl.text AS source, dl.text AS destination,
        CASE n.transport WHEN 6 THEN 'tcp' ELSE 'udp' END AS transport, n.port, n.action,
        epoch_us(n.first_) AS first, n.example
        FROM now_ n ANTI JOIN before_ b ON b.s = n.s AND b.d = n.d AND b.transport = n.transport AND b.port = n.port
        JOIN labels sl ON sl.id = n.s JOIN labels dl ON dl.id = n.d ORDER BY n.first_ DESC LIMIT 50""",  # noqa: S608
        limit=50,
    ).items


CHANGES = ("policy.*", "identity.revoked", "enforcer.*", "events.lost", "store.damaged", "alert.*", "trust.*")


class Pulse(View):
    """The landing view."""

    NAME = "pulse"
    TITLE = "Pulse"
    DEFAULT_CSS = """
    Pulse #rates { height: 2; padding: 0 1; }
    Pulse #denied-title { padding: 0 1; }
    Pulse #lower { height: 40%; }
    Pulse #lower Vertical { width: 1fr; }
    Pulse #lower .title { padding: 0 1; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._examples: dict[str, str] = {}
        self._rows: dict[str, dict[str, Any]] = {}
        self._count = 0

    def compose(self) -> ComposeResult:
        """Rates, denied, and below them news and changes."""
        yield Static(id="rates", markup=False)
        yield Static("Denied", classes="title", id="denied-title", markup=False)
        yield Grid(
            (
                Column("COUNT", 5, right=True),
                Column("LAST", 4, right=True),
                Column("FROM", 12, 2),
                Column("TO", 12, 2),
                Column("SERVICE", 9),
                Column("WHY", 14, 3),
            ),
            empty="nothing was denied in this window",
            id="denied",
        )
        with Horizontal(id="lower"):
            with Vertical():
                yield Static("First talk in a day", classes="title", markup=False)
                yield Grid(
                    (Column("AGE", 4, right=True), Column("WHO", 20, 1), Column("SERVICE", 9)),
                    empty="nobody talks that did not before",
                    id="news",
                )
            with Vertical():
                yield Static("Changes", classes="title", markup=False)
                yield Grid(
                    (Column("AGE", 4, right=True), Column("WHAT", 20, 1)),
                    empty="nothing was changed",
                    id="changes",
                )

    def reload(self) -> None:
        """Ask for all four."""
        since, until = self.bounds()
        source = self.source
        self.ask("rates", lambda: rates(source, since, until))
        self.ask("denied", lambda: denied(source, since, until))
        self.ask("changes", lambda: source.events(CHANGES, since=since, until=until, last=50).items)
        self.ask("news", lambda: newcomers(source, since, until))

    def got(self, what: str, answer: Any) -> None:
        """Show one of them."""
        until = self.cursor.at or now_us()
        if what == "rates":
            self._show_rates(answer)
        elif what == "denied":
            self._rows = {row["example"]: row for row in answer}
            self._count = sum(row["flows"] for row in answer)
            title = Text("Denied", style="bold")
            title.append(f"  {count(self._count)} in {self.cursor.span}" if self._count else "  none")
            self.query_one("#denied-title", Static).update(title)
            self._keep(self.query_one("#denied", Grid), [self._denied_row(row, until) for row in answer])
        elif what == "news":
            self.query_one("#news", Grid).show(
                [
                    clean_row(
                        Row(
                            row["example"],
                            (
                                ago(row["first"], until),
                                f"{brief(row['source'])} → {brief(row['destination'])}",
                                f"{row['transport']}/{row['port']}",
                            ),
                            ("dim", "bad" if row["action"] == Action.DENY else "", ""),
                        )
                    )
                    for row in answer
                ]
            )
        else:
            self.query_one("#changes", Grid).show([self._change_row(row, until) for row in reversed(answer)])

    def _keep(self, grid: Grid, rows: list[Row]) -> None:
        """The cursor stays with its group, though the group's newest example changes."""
        chosen = grid.key
        if chosen in self._examples:
            group = self._examples[chosen]
            found = next((row.key for row in rows if _group(self._rows[row.key]) == group), "")
            index = next((i for i, row in enumerate(rows) if row.key == found), None)
            if index is not None:
                grid.set_reactive(Grid.cursor, index)
                grid.rows = rows
        self._examples = {row.key: _group(self._rows[row.key]) for row in rows}
        grid.show(rows)

    def _denied_row(self, row: Mapping[str, Any], until: int) -> Row:
        why = reason_words(row["reason"])
        if row["rule"]:
            why = f"{why}: {row['policy']}: {row['rule']}"
        return clean_row(
            Row(
                row["example"],
                (
                    count(row["flows"]),
                    ago(row["last"], until),
                    brief(row["source"]),
                    brief(row["destination"]),
                    f"{row['transport']}/{row['port']}",
                    why,
                ),
                ("bad", "dim"),
            )
        )

    def _change_row(self, row: Mapping[str, Any], until: int) -> Row:
        try:
            body = json.loads(row["body"])
        except (TypeError, ValueError):
            body = {}
        text, style = event_line(row["type"], body if isinstance(body, dict) else {})
        at = row["ts"] if not isinstance(row["ts"], int) else to_datetime(row["ts"])
        from datetime import UTC

        us = from_datetime(at.replace(tzinfo=UTC) if at.tzinfo is None else at)
        return clean_row(Row(str(row["seq"]), (ago(us, until), text), ("dim", style)))

    def _show_rates(self, found: Mapping[str, list[int]]) -> None:
        room = max(10, min(BARS, self.size.width - 26))
        each = max(1, min(WIDEST, (self.size.width - 26) // BARS))
        text = Text(no_wrap=True)
        for name, style in (("allowed", "green"), ("denied", "red")):
            values = found[name]
            seconds = self.cursor.window_us / 1e6
            total = sum(values)
            per = total / seconds
            rate = f"{per:.0f}/s" if per >= 10 else f"{per:.1f}/s" if total else "0/s"
            text.append(f"{name:<8}", style="bold")
            text.append(f"{count(total):>6} {rate:>7}  ")
            text.append("".join(bar * each for bar in sparkline(values, room)), style=style)
            if name == "allowed":
                text.append("\n")
        self.query_one("#rates", Static).update(text)

    def first(self) -> Grid:
        """The denied flows."""
        return self.query_one("#denied", Grid)

    def on_grid_chosen(self, event: Grid.Chosen) -> None:
        """Enter opens why, or what changed."""
        event.stop()
        if event.grid.id in ("denied", "news"):
            self.console.explain(event.key)
        else:
            self.console.open_view("timeline")

    def selected_flow(self) -> str:
        """The newest of the chosen group."""
        news = self.query_one("#news", Grid)
        return news.key if news.has_focus else self.query_one("#denied", Grid).key

    def selected(self) -> Any:
        """The chosen group."""
        return self._rows.get(self.query_one("#denied", Grid).key)

    def cli(self) -> str:
        """Denied flows of the window."""
        return f"sectool flows --verdict deny {self.cursor.flags()}"

    def hint(self) -> str:
        """What can be done."""
        return "enter why  / filter  [ ] time  1-6 window  0 live  tab panes  ? help  q quit"


def _group(row: Mapping[str, Any]) -> str:
    return "|".join(str(row[key]) for key in ("source", "destination", "transport", "port", "reason"))
