"""Health: is everything enforced, do workers, queues and store keep up, what expires, what the doctor says.

Away from live: how the host stood at that moment, by what is on record.
"""

from __future__ import annotations

import time
from typing import Any

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Container, VerticalScroll
from textual.widgets import Static

from sectool.errors import SectoolError
from sectool.events import now_us
from tui import health
from tui.source import Source
from tui.view import View

WIDE = 120  # columns from which on there are two sides
DOCTOR_S = 60.0  # between two examinations while the view is open


def load(source: Source, at: int | None) -> dict[str, Any]:
    """Status, identities and revocation lists of now, or the state of a moment under `then`."""
    if at is not None:
        return {"then": source.ask("state", at=at)}
    status = source.status()
    if source.offline:
        return {"status": status, "then": source.ask("state", at=now_us())}
    return {"status": status, "identities": source.identities()[0], "lists": source.revocations()}


class Hosts(View):
    """Facts of this host in lines."""

    NAME = "hosts"
    TITLE = "Health"
    BESIDE = frozenset({"doctor"})
    DEFAULT_CSS = """
    Hosts VerticalScroll { padding: 0 1; }
    Hosts #sides { height: auto; layout: vertical; }
    Hosts #sides.-wide { layout: horizontal; }
    Hosts #sides Static { height: auto; padding-bottom: 1; }
    Hosts #sides.-wide Static { width: 1fr; padding-right: 2; }
    """

    def __init__(self) -> None:
        super().__init__()
        self.facts: dict[str, Any] = {}
        self.findings: list[dict[str, Any]] | None = None
        self._why_none = ""
        self._examined = 0.0

    def compose(self) -> ComposeResult:
        """Two sides of lines; the second below the first where there is no room."""
        with VerticalScroll(), Container(id="sides"):
            yield Static(id="health", markup=False)
            yield Static(id="more", markup=False)

    def reload(self) -> None:
        """Ask; the doctor less often, since it takes a while."""
        source, at = self.source, self.cursor.at
        self.ask("health", lambda: load(source, at))
        due = not self._examined or time.monotonic() - self._examined > DOCTOR_S
        if due and at is None and not source.offline:
            self._examined = time.monotonic()
            self.ask("doctor", source.doctor)

    def forget(self) -> None:
        """An examination that was called off has not been made."""
        if "doctor" in self._asking:
            self._examined = 0.0
        super().forget()

    def do_refresh(self, _: str) -> None:
        """Ask anew, and examine."""
        self.forget()
        self._examined = 0.0
        self.reload()

    def got(self, what: str, answer: Any) -> None:
        """Show it."""
        if what == "doctor":
            self.findings, self._why_none = answer, ""
        else:
            self.facts = answer
        self._draw()

    def failed(self, what: str, error: SectoolError) -> None:
        """The doctor's own trouble is shown in its place."""
        if what == "doctor":
            self._why_none = f"{error.message} {error.hint}".strip()
            self._draw()
        else:
            super().failed(what, error)

    def on_resize(self) -> None:
        """One side or two, and lines broken for the width there is."""
        self.query_one("#sides").set_class(self.size.width >= WIDE, "-wide")
        self._draw()

    def _draw(self) -> None:
        facts, now = self.facts, now_us()
        room = self.size.width - 4
        if self.size.width >= WIDE:
            room = room // 2 - 2
        one, other = Text(), Text()
        if "then" in facts:
            one = health.then(facts["then"], room)
        if "status" in facts:
            status = facts["status"]
            live = "workers" in status
            if live:
                one = health.enforcement(status, now, room)
            one.append("\n")
            one.append_text(health.store(status.get("store", {}), room, live=live))
            if live:
                other = health.certificates(status, facts["identities"], facts["lists"], now, room)
                other.append("\n")
                other.append_text(health.findings(self.findings, room, self._why_none))
        one.right_crop(1)
        other.right_crop(1)
        self.query_one("#health", Static).update(one)
        self.query_one("#more", Static).update(other)

    def selected(self) -> Any:
        """All of it."""
        return {**self.facts, "doctor": self.findings}

    def cli(self) -> str:
        """The same."""
        return (
            "sectool status; sectool doctor"
            if self.cursor.live
            else f"sectool status {self.cursor.at_flag()}"
        )

    def hint(self) -> str:
        """What can be done."""
        return "j k scroll  r examine anew  Y as JSON  y as command  [ ] time  ? help"
