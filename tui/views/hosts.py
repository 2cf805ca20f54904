"""Health: is everything enforced, does the store keep up, what was lost, what expires."""

from __future__ import annotations

from typing import Any

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.widgets import Static

from sectool.cli.text import escape
from sectool.events import now_us
from tui.view import View
from tui.words import ago, count, left, octets


class Hosts(View):
    """Facts of this host in lines."""

    NAME = "hosts"
    TITLE = "Health"
    DEFAULT_CSS = "Hosts VerticalScroll { padding: 0 1; } Hosts #health { height: auto; }"

    def __init__(self) -> None:
        super().__init__()
        self.facts: dict[str, Any] = {}

    def compose(self) -> ComposeResult:
        """The lines."""
        with VerticalScroll():
            yield Static(id="health", markup=False)

    def reload(self) -> None:
        """Ask."""
        self.ask("health", self.source.status)

    def got(self, what: str, answer: Any) -> None:
        """Show it."""
        self.facts = answer
        self.query_one("#health", Static).update(health(answer, now_us()))

    def selected(self) -> Any:
        """All of it."""
        return self.facts

    def cli(self) -> str:
        """The same."""
        return "sectool status; sectool doctor"

    def hint(self) -> str:
        """What can be done."""
        return "j k scroll  Y as JSON  y as command (sectool doctor says how to mend)  ? help"


def health(s: dict[str, Any], now: int) -> Text:
    """The facts of `status`, good ones quiet, bad ones not."""
    out = Text()

    def title(text: str) -> None:
        out.append(("\n" if out else "") + text + "\n", style="bold underline")

    def row(name: str, value: str, style: str = "") -> None:
        sign = {"bold red": "✗", "bold green": "✓"}.get(style, " ")
        out.append(f"{sign} {name:<16}", style="bold" if sign != " " else "")
        out.append(escape(value) + "\n", style=style)

    if "workers" in s:
        title("Enforcement")
        good = bool(s["enforcing"]) and s["state"] == "enforcing"
        row("state", str(s["state"]), "bold green" if good else "bold red")
        for problem in s["problems"]:
            row("problem", f"{problem['what']}: {problem['why']}", "bold red")
        rules = s["rules_installed"]
        row(
            "kernel rules",
            "installed" if rules else "NOT INSTALLED: nothing is enforced",
            "" if rules else "bold red",
        )
        row(
            "host", f"{s['host']} in {s['trust_domain']}, version {s['version']}, up {ago(s['started'], now)}"
        )
        policy = s["policy"]
        row(
            "policy",
            f"revision {policy['revision']} by {policy['author']}, {ago(policy['applied'], now)} ago"
            if policy
            else "none yet: everything is denied",
            "" if policy else "bold red",
        )
        row("networks", ", ".join(s["enforced_networks"]) or "none")
        expires = s["host_ca_expires"]
        row("host CA", f"expires {left(expires, now)}", "bold red" if expires < now else "")
        title("Workers")
        for worker in s["workers"]:
            stats = worker["stats"]
            queue = stats.get("queue") or {}
            packets = stats.get("packets", 0) + stats.get("bulk", {}).get("packets", 0)
            state = f"r{worker['revision']}" if worker["enforcing"] else "NOT ENFORCING"
            row(
                f"worker {worker['number']}",
                f"{state}, {count(packets)} packets, {count(stats.get('live', 0))} live flows "
                f"({count(stats.get('encrypted', 0))} encrypted), {worker['restarts']} restarts",
                "bold green" if worker["enforcing"] else "bold red",
            )
            dropped = queue.get("dropped", 0) + queue.get("user_dropped", 0)
            if dropped:
                row("", f"{count(dropped)} packets dropped by a full queue", "bold red")
        lost = s["events_lost_by_agent"] + sum(w["stats"].get("lost", 0) for w in s["workers"])
        row("events lost", str(lost), "bold red" if lost else "bold green")
        row("workloads", f"{s['workloads']} with an identity, {s['identities_refused']} refused one")
    title("Store")
    store = s.get("store", {})
    if "error" in store:
        row("store", f"not answering: {store['error']}", "bold red")
        return out
    events = store.get("events", 0) + store.get("flow_records", 0)
    row(
        "kept",
        f"{count(events)} records in {store.get('segments', '?')} file(s), {octets(store.get('bytes', 0))}",
    )
    if store.get("restarts"):
        row("restarts", str(store["restarts"]), "bold red")
    if store.get("degraded"):
        row("state", str(store["degraded"]), "bold red" if "workers" in s else "")
    for name in store.get("unopened_segments", ()):
        row("unreadable", str(name), "bold red")
    return out
