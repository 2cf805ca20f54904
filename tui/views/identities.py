"""Identities: who this host vouches for, by which labels and on whose word, until when, and who talks to them.

chosen ──x──► reason typed ──► question ──y──► revoked: no new connection, live ones cut, no SVID any more
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Horizontal, VerticalScroll
from textual.widgets import Static

from sectool.cli.text import escape, fit
from sectool.clock import MINUTE
from sectool.events import Action, Phase, now_us
from sectool.labels import DOMAIN_LABEL, FEDERATED_LABEL
from tui.grid import Column, Grid, Row, clean_row
from tui.prompt import Prompt
from tui.sentences import brief
from tui.source import Source
from tui.view import View
from tui.words import ago, count, day_clock, left

SOON = 5 * MINUTE
MAX_PEERS = 100
VERIFIER = "verifier"  # gives the labels that no issuer may give

Identity = dict[str, Any]


def peers_statement(spiffe_id: str, since: int, until: int) -> str:
    """Who talked with an identity in the window, on which service, and what was decided, most denied first."""
    name = spiffe_id.replace("'", "''")
    passed = f"action IN ({Action.ALLOW:d}, {Action.AUDIT:d})"
    mine = "(SELECT id FROM me)"
    return (
        f"WITH me AS (SELECT id FROM identities WHERE spiffe_id = '{name}'), "  # noqa: S608 -- quoted above
        f"mine AS (SELECT *, source_identity IN {mine} AS outward FROM flow_records WHERE phase = {Phase.VERDICT:d} "
        f"AND event_start >= make_timestamp({since}) AND event_start < make_timestamp({until}) "
        f"AND (source_identity IN {mine} OR destination_identity IN {mine})), "
        "ends AS (SELECT outward, action, flow_count, event_start, "
        "if(outward, destination_labels, source_labels) AS other, "
        "if(outward, ip_text(destination_ip_hi, destination_ip_lo), ip_text(source_ip_hi, source_ip_lo)) AS address, "
        "CASE transport WHEN 6 THEN 'tcp/' || destination_port WHEN 17 THEN 'udp/' || destination_port "
        "WHEN 1 THEN 'icmp' WHEN 58 THEN 'icmpv6' ELSE transport::VARCHAR END AS service FROM mine) "
        "SELECT e.outward, coalesce(nullif(l.text, ''), e.address) AS who, e.service, "
        f"coalesce(sum(e.flow_count) FILTER (WHERE {passed}), 0)::BIGINT AS allowed, "
        f"coalesce(sum(e.flow_count) FILTER (WHERE NOT {passed}), 0)::BIGINT AS denied, "
        "epoch_us(max(e.event_start)) AS last FROM ends e LEFT JOIN labels l ON l.id = e.other AND e.other <> 0 "
        f"GROUP BY ALL ORDER BY denied DESC, allowed DESC, who, e.service LIMIT {MAX_PEERS}"
    )


def with_origins(identities: Iterable[Identity], workloads: Iterable[Mapping[str, Any]]) -> list[Identity]:
    """Each identity with `origins` of its labels, as its workload has them."""
    by_path: dict[str, Mapping[str, Any]] = {}
    for row in workloads:
        by_path.setdefault(str(row.get("path", "")), row)
    out = []
    for item in identities:
        path = "/" + item["spiffe_id"].partition("://")[2].partition("/")[2]
        origins = dict(by_path.get(path, {}).get("origins", {}))
        origins |= {key: VERIFIER for key in (DOMAIN_LABEL, FEDERATED_LABEL) if key in item["labels"]}
        out.append({**item, "origins": origins})
    return out


class Identities(View):
    """The list of identities, and all of the chosen one."""

    NAME = "identities"
    TITLE = "Identities"
    DEFAULT_CSS = """
    Identities #count { height: 1; padding: 0 1; }
    Identities #identities { height: 2fr; min-height: 5; }
    Identities #papers { height: 3fr; border-top: solid $primary; }
    Identities #papers VerticalScroll { width: 1fr; padding: 0 1; scrollbar-size-vertical: 1; }
    Identities #papers Static { height: auto; }
    """

    def __init__(self) -> None:
        super().__init__()
        self.items: dict[str, Identity] = {}
        self._peers: tuple[str, list[dict[str, Any]]] = ("", [])

    def compose(self) -> ComposeResult:
        """How many, the list, and below it labels and certificate of one, and its peers."""
        yield Static(id="count", markup=False)
        yield Grid(
            (
                Column("WHO", 14, 1),
                Column("WORKLOAD", 12, 1),
                Column("EXPIRES", 8, right=True),
                Column("STATE", 9),
                Column("SPIFFE ID", 24, 3),
            ),
            empty="no identity was in use then",
            id="identities",
        )
        with Horizontal(id="papers"):
            with VerticalScroll():
                yield Static(id="paper", markup=False)
            with VerticalScroll():
                yield Static(id="peers", markup=False)

    def first(self) -> Grid:
        """The list."""
        return self.query_one("#identities", Grid)

    def reload(self) -> None:
        """Ask for the identities of the moment."""
        source, at = self.source, self.cursor.at
        self.ask("identities", lambda: with_origins(*source.identities(at)))

    def got(self, what: str, answer: Any) -> None:
        """Show them, or the peers of one."""
        if what == "revoke":
            until = day_clock(answer["next_update"])
            self.console.tell(
                f"revoked: list {answer['number']}, fresh until {until}; other hosts need it, too", 10.0
            )
            self.reload()
        elif what == "peers":
            self._peers = answer
            self._show_peers()
        else:
            now = self.cursor.at or now_us()
            self.items = {f"{item.get('serial')}-{n}": item for n, item in enumerate(answer)}
            title = Text("Identities", style="bold")
            title.append(f"  {len(self.items)}{'' if self.cursor.live else ' then'}")
            self.query_one("#count", Static).update(title)
            self.first().show([_row(key, item, now) for key, item in self.items.items()])
            self._show_chosen()

    @property
    def chosen(self) -> Identity | None:
        """The one under the cursor."""
        return self.items.get(self.first().key)

    def on_grid_moved(self, event: Grid.Moved) -> None:
        """Show the one under the cursor."""
        event.stop()
        self._show_chosen()

    def on_resize(self) -> None:
        """Fit it into the room there is."""
        self._show_chosen()

    def _show_chosen(self) -> None:
        item = self.chosen
        room = max(20, self.size.width // 2 - 3)
        self.query_one("#paper", Static).update(Text() if item is None else paper(item, now_us(), room))
        self._show_peers()
        if item is not None:
            spiffe_id, source, bounds = item["spiffe_id"], self.source, self.bounds()
            self.ask("peers", lambda: (spiffe_id, _peers(source, spiffe_id, *bounds)))

    def _show_peers(self) -> None:
        item = self.chosen
        known, rows = self._peers
        pane = self.query_one("#peers", Static)
        if item is None or item["spiffe_id"] != known:
            pane.update(Text())
        else:
            room = max(20, self.size.width // 2 - 3)
            pane.update(peers(rows, self.cursor.span, self.cursor.at or now_us(), room))

    def on_grid_chosen(self, event: Grid.Chosen) -> None:
        """Enter goes to its connections."""
        event.stop()
        self.console.set_filter(f"identity={self.items[event.key]['spiffe_id']}")
        self.console.open_view("flows")

    def do_revoke(self, reason: str) -> None:
        """Ask for a reason, then for a yes."""
        item = self.chosen
        if item is None:
            self.console.tell("choose an identity first")
        elif not self.cursor.live:
            self.console.tell("0 goes back to now: what was then cannot be revoked")
        elif not reason.strip():
            say = f"why {item['spiffe_id']} is revoked, for the record; esc leaves it"
            self.console.query_one(Prompt).open("reason", say, lambda text: self._confirm(item, text.strip()))
        else:
            self._confirm(item, reason.strip())

    def _confirm(self, item: Identity, reason: str) -> None:
        if not reason:
            self.console.tell("nothing was revoked: a revocation takes a reason")
            return
        spiffe_id, source = item["spiffe_id"], self.source
        self.console.confirm(
            f"Revoke {spiffe_id}?",
            [
                "From now on it gets no SVID, no new connection passes, and its live connections are cut.",
                "This cannot be taken back here: the workload needs another name.",
                f"Reason: {reason}",
                "",
                revocation(spiffe_id, reason),
            ],
            lambda: self.ask("revoke", lambda: source.revoke(spiffe_id, reason), lasting=True),
        )

    def selected(self) -> Any:
        """The chosen one."""
        return self.chosen

    def cli(self) -> str:
        """The same list; of the past, as of then."""
        return "sectool identity list" + ("" if self.cursor.live else f" {self.cursor.at_flag()}")

    def hint(self) -> str:
        """What can be done."""
        return "enter its flows  x revoke  Y as JSON  y as command  [ ] time  ? help"


def revocation(spiffe_id: str, reason: str) -> str:
    """The command that revokes."""
    return f"sectool identity revoke {shlex.quote(spiffe_id)} --reason {shlex.quote(reason)}"


def _peers(source: Source, spiffe_id: str, since: int, until: int) -> list[dict[str, Any]]:
    return source.query(peers_statement(spiffe_id, since, until), limit=MAX_PEERS).items


def _row(key: str, item: Identity, now: int) -> Row:
    until = item.get("not_after")
    us = until if isinstance(until, int) else 0
    state, style = "holds", "good"
    if item.get("refused"):
        state, style = "✗ refused", "bad"
    elif us and us <= now:
        state, style = "✗ over", "bad"
    elif us and us < now + SOON:
        state, style = "! soon", "warn"
    labels = ",".join(f"{k}={v}" for k, v in item["labels"].items())
    workload = str(item.get("workload") or item["spiffe_id"].rpartition("/")[2])
    cells = (brief(labels), workload, left(us, now) if us else "", state, item["spiffe_id"])
    return clean_row(Row(key, cells, ("", "", style if style != "good" else "dim", style, "dim")))


def paper(item: Identity, now: int, room: int) -> Text:
    """Labels with their origins, and what the certificate says, in lines of `room` columns."""
    out = Text(no_wrap=True)
    out.append("Labels and who says so\n", style="bold underline")
    labels = item["labels"]
    wide = min(max((len(escape(f"{k}={v}")) for k, v in labels.items()), default=0), max(8, room - 11))
    for key, value in labels.items():
        out.append(f"{fit(escape(f'{key}={value}'), wide):<{wide}}  ")
        out.append(escape(item["origins"].get(key, "-")) + "\n", style="dim")
    out.append("\nCertificate\n", style="bold underline")

    def line(name: str, value: object, style: str = "") -> None:
        if value not in (None, ""):
            text, across = escape(value), max(8, room - 12)
            for begin in range(0, len(text), across):
                out.append(f"{'' if begin else name:<12}", style="bold")
                out.append(text[begin : begin + across] + "\n", style=style)

    for name in ("not_before", "not_after", "renew_at"):
        us = item.get(name)
        if isinstance(us, int):
            title = {"not_before": "valid from", "not_after": "valid until", "renew_at": "renewed at"}[name]
            more = f", {left(us, now)}" if name != "not_before" else ""
            line(title, f"{day_clock(us)}{more}", "bold red" if name == "not_after" and us <= now else "")
    line("state", item.get("refused") or "holds", "bold red" if item.get("refused") else "green")
    line("serial", item.get("serial"))
    line("fingerprint", item.get("fingerprint"))
    line("rotated", f"{count(item['rotations'])} times" if item.get("rotations") else "")
    line("in a SYN", f"{item['bytes']} bytes" if item.get("bytes") else "")
    out.right_crop(1)
    return out


def peers(rows: list[dict[str, Any]], span: str, now: int, room: int) -> Text:
    """Who talked with it: direction, verdict, service, how often, how long ago."""
    out = Text(no_wrap=True)
    out.append(f"Peers in {span}\n", style="bold underline")
    if not rows:
        out.append("nobody", style="dim")
        return out
    for row in rows:
        bad = row["denied"] and not row["allowed"]
        sign, style = ("✗", "bold red") if bad else ("±", "bold yellow") if row["denied"] else ("✓", "green")
        out.append(f"{sign} ", style=style)
        out.append("to   " if row["outward"] else "from ", style="dim")
        verdicts = ", ".join(
            part
            for part in (
                f"{count(row['denied'])} denied" if row["denied"] else "",
                f"{count(row['allowed'])} allowed" if row["allowed"] else "",
            )
            if part
        )
        tail = f"  {row['service']}  {verdicts}" + (f"  {ago(row['last'], now)}" if room >= 50 else "")
        out.append(fit(escape(brief(row["who"])), max(6, room - 7 - len(tail))))
        out.append(escape(tail) + "\n", style="dim" if not row["denied"] else "")
    out.right_crop(1)
    return out
