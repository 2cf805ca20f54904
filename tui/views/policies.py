"""Policies: revisions, the text in force at the cursor, what it changed, staged documents, the way back."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text
from textual.app import ComposeResult, SuspendNotSupported
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widgets import Static

from sectool.cli.text import escape, escape_block
from sectool.errors import SectoolError
from sectool.events import now_us
from tui.grid import Column, Grid, Row, clean_row
from tui.source import Revision, Source
from tui.view import View
from tui.words import ago, day_clock

KEYWORDS = frozenset(
    ("allow", "deny", "audit", "require", "to", "call", "on", "encrypted", "where", "until", "because")
)


@dataclass(frozen=True, slots=True)
class Shown:
    """A revision, what it changed against the one before, and its documents as (kind, name, owner, mode, rules)."""

    revision: Revision
    changes: tuple[str, ...]
    documents: tuple[tuple[str, str, str, str, int], ...]


def load(source: Source, number: int | None, at: int | None) -> tuple[list[dict[str, Any]], Shown]:
    """All revisions, and the one wanted."""
    from sectool.policy import diff, parse
    from sectool.policy.model import DocumentSet

    history = source.revisions()
    found = source.revision(number=number, at=at)
    current = int(found.facts["revision"])
    documents = parse(found.text, f"revision {current}")
    before = DocumentSet()
    if any(facts["revision"] == current - 1 for facts in history):
        before = parse(source.revision(number=current - 1).text, f"revision {current - 1}")
    changes = tuple(line for change in diff(before, documents) for line in change.lines())
    listed = tuple(
        (str(d.kind), d.name, d.owner, str(getattr(d, "mode", "")), len(getattr(d, "rules", ())))
        for d in documents.documents()
    )
    return history, Shown(found, changes, listed)


class Policies(View):
    """Revisions on the left, the chosen one on the right."""

    NAME = "policies"
    TITLE = "Policies"
    DEFAULT_CSS = """
    Policies #left { width: 40%; min-width: 34; max-width: 60; }
    Policies #right { width: 1fr; padding-left: 1; }
    Policies .title { padding: 0 1; }
    Policies #text-title { padding: 0; }
    Policies VerticalScroll { scrollbar-size-vertical: 1; }
    Policies #documents { height: 40%; }
    Policies #text { height: auto; }
    """

    def __init__(self) -> None:
        super().__init__()
        self.number: int | None = None
        self.shown: Shown | None = None
        self.history: list[dict[str, Any]] = []
        self.with_diff = False
        self._edited = ("", Path())
        self._at: int | None = None

    def compose(self) -> ComposeResult:
        """History and documents; text."""
        with Horizontal():
            with Vertical(id="left"):
                yield Static("Revisions", classes="title", markup=False)
                yield Grid(
                    (Column("REV", 4, right=True), Column("AGE", 4, right=True), Column("BY, WHY", 12, 1)),
                    empty="none yet: everything is denied",
                    id="revisions",
                )
                yield Static("Documents", classes="title", markup=False)
                yield Grid(
                    (Column("MODE", 7), Column("RULES", 5, right=True), Column("DOCUMENT", 12, 1)),
                    empty="none",
                    id="documents",
                )
            with Vertical(id="right"):
                yield Static(id="text-title", classes="title", markup=False)
                with VerticalScroll():
                    yield Static(id="text", markup=False)

    def first(self) -> Grid:
        """The revisions."""
        return self.query_one("#revisions", Grid)

    def reload(self) -> None:
        """Ask for the history and the chosen revision, or the one in force at the cursor."""
        if self.cursor.at != self._at:
            self._at, self.number = self.cursor.at, None
        source, number, at = self.source, self.number, self.cursor.at
        self.ask("policy", lambda: load(source, number, None if number else at))

    def tick(self) -> None:
        """Policy changes are rare: look every two seconds."""
        self._rest_until = max(self._rest_until, 0.0)
        super().tick()

    def got(self, what: str, answer: Any) -> None:
        """Show it."""
        if what == "check":
            self._checked(answer)
            return
        if what != "policy":
            self.console.tell(f"revision {answer['revision']} is in force", 8.0)
            self.number = None
            self.reload()
            return
        self.history, self.shown = answer
        self._rest_until += 2.0
        assert self.shown is not None
        now = now_us()
        chosen = str(self.shown.revision.facts["revision"])
        grid = self.first()
        rows = [
            clean_row(
                Row(
                    str(facts["revision"]),
                    (
                        f"{facts['revision']}{'*' if facts['active'] else ' '}",
                        ago(facts["applied"], now),
                        f"{facts['author']}: {facts['reason']}" if facts["reason"] else facts["author"],
                    ),
                    ("good" if facts["active"] else "", "dim"),
                )
            )
            for facts in self.history
        ]
        grid.set_reactive(Grid.cursor, next((i for i, row in enumerate(rows) if row.key == chosen), 0))
        grid.rows = rows
        grid.show(rows)
        self.query_one("#documents", Grid).show(
            [
                clean_row(
                    Row(
                        f"{kind}/{name}",
                        (
                            mode or "-",
                            str(rules or ""),
                            f"{kind} {name}{f', {owner}' if owner else ''}",
                        ),
                        ("warn" if mode == "stage" else "dim" if mode == "off" else "",),
                    )
                )
                for kind, name, owner, mode, rules in self.shown.documents
            ]
        )
        self._text()

    def _text(self) -> None:
        assert self.shown is not None
        facts = self.shown.revision.facts
        title = f"Revision {facts['revision']}, {day_clock(facts['applied'])} UTC by {facts['author']}"
        self.query_one("#text-title", Static).update(
            Text(escape(title), style="bold", no_wrap=True, overflow="ellipsis")
        )
        out = Text()
        if self.with_diff:
            out.append("what it changed\n", style="bold underline")
            for line in self.shown.changes or ("nothing in meaning",):
                style = (
                    "green"
                    if line.startswith(("+", "added"))
                    else "red"
                    if line.startswith(("-", "removed"))
                    else ""
                )
                out.append(escape(line) + "\n", style=style)
            out.append("\n")
        out.append_text(highlighted(self.shown.revision.text))
        self.query_one("#text", Static).update(out)

    def on_grid_moved(self, event: Grid.Moved) -> None:
        """The revision under the cursor is the one shown."""
        event.stop()
        if event.grid.id == "revisions" and event.key:
            self.number = int(event.key)
            self.reload()

    def on_grid_chosen(self, event: Grid.Chosen) -> None:
        """Enter on a document goes to its text; on a revision shows what it changed."""
        event.stop()
        if event.grid.id == "revisions":
            self.do_diff("")
        elif self.shown is not None:
            name = event.key.rpartition("/")[2]
            lines = self.shown.revision.text.split("\n")
            place = next((i for i, line in enumerate(lines) if line.strip() == f"name: {name}"), 0)
            extra = len(self.shown.changes) + 3 if self.with_diff else 0
            self.query_one(VerticalScroll).scroll_to(y=max(0, place - 1 + extra), animate=False)

    def do_diff(self, _: str) -> None:
        """Show or hide what the revision changed."""
        self.with_diff = not self.with_diff
        if self.shown is not None:
            self._text()

    def _step(self, by: int) -> None:
        if self.shown is not None:
            wanted = int(self.shown.revision.facts["revision"]) + by
            if any(facts["revision"] == wanted for facts in self.history):
                self.number = wanted
                self.reload()

    def do_previous(self, _: str) -> None:
        """One revision back."""
        self._step(-1)

    def do_next(self, _: str) -> None:
        """One revision on."""
        self._step(1)

    def do_rollback(self, _: str) -> None:
        """Return to the one shown, after a question."""
        if self.shown is None:
            return
        number, source = int(self.shown.revision.facts["revision"]), self.source
        self.console.confirm(
            f"Return to revision {number}?",
            [
                "Its text becomes a new revision, in force at once.",
                "Live connections that it denies are cut.",
            ],
            lambda: self.ask("rollback", lambda: source.rollback(number, ""), lasting=True),
        )

    def do_promote(self, name: str) -> None:
        """Enforce the chosen staged document, after a question."""
        key = name or self.query_one("#documents", Grid).key
        staged = self.shown is not None and any(
            f"{kind}/{doc}" == key and mode == "stage" for kind, doc, _, mode, _ in self.shown.documents
        )
        if not staged and not name:
            self.console.tell("choose a document of mode stage (tab goes to Documents)")
            return
        self.console.confirm(
            f"Enforce {key}?",
            ["From now on its rules decide.", *self._pending_lines()],
            lambda: self.ask("promote", lambda: self.source.promote([key], ""), lasting=True),
        )

    @property
    def document(self) -> str:
        """The chosen one, as KIND/NAME; empty when none is."""
        return self.query_one("#documents", Grid).key

    def _pending_lines(self) -> list[str]:
        return ["sectool policy staged-report lists the recorded connections it would change."]

    def do_edit(self, _: str) -> None:
        """Edit a copy in $EDITOR; a sound one is shown as a difference and applied after a question."""
        if self.shown is None:
            return
        editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
        with tempfile.NamedTemporaryFile("w", prefix="sectool-", suffix=".yaml", delete=False) as file:
            file.write(self.shown.revision.text)
        path = Path(file.name)
        try:
            with self.app.suspend():
                subprocess.run([*shlex.split(editor), str(path)], check=False)
        except SuspendNotSupported:
            path.unlink()
            self.console.tell(
                "an editor needs a terminal: sectool policy show > FILE, and sectool policy apply FILE"
            )
            return
        except (OSError, ValueError) as error:
            self.console.tell(f"cannot start {editor}: {error}")
            return
        text = path.read_text(errors="replace")
        if text == self.shown.revision.text:
            self.console.tell("nothing was changed")
            path.unlink()
            return
        source = self.source
        self._edited = (text, path)
        self.ask("check", lambda: source.check(text), lasting=True)

    def _checked(self, found: dict[str, Any]) -> None:
        source, (text, _) = self.source, self._edited
        self.console.confirm(
            "Apply this text?",
            [*found["changes"], *found.get("conflict_lines", ())] or ["nothing changes in meaning"],
            lambda: self.ask("apply", lambda: source.apply(text, "edited in sectool top"), lasting=True),
        )

    def failed(self, what: str, error: SectoolError) -> None:
        """A text that is refused is kept."""
        if what == "check":
            self.console.tell(f"{error.message}; kept as {self._edited[1]}", 15.0)
        else:
            super().failed(what, error)

    def selected(self) -> Any:
        """Facts and text."""
        return None if self.shown is None else {**self.shown.revision.facts, "text": self.shown.revision.text}

    def cli(self) -> str:
        """The same text."""
        return f"sectool policy show --rev {self.shown.revision.facts['revision'] if self.shown else 1}"

    def hint(self) -> str:
        """What can be done."""
        return "d what it changed  e edit  B roll back  P promote  tab panes  ? help"


def highlighted(text: str) -> Text:
    """Policy text with keys, verbs and comments told apart."""
    out = Text()
    for line in escape_block(text).split("\n"):
        stripped = line.lstrip()
        if stripped.startswith("#"):
            out.append(line, style="dim")
        elif stripped.startswith("- "):
            verb = stripped.split(" ")[1] if len(stripped.split(" ")) > 1 else ""
            for number, word in enumerate(line.split(" ")):
                style = ""
                if word in KEYWORDS:
                    style = {"deny": "bold red", "allow": "bold green", "audit": "bold yellow"}.get(
                        word if word == verb else "", "dim" if word in ("to", "on") else "bold"
                    )
                out.append((" " if number else "") + word, style=style)
        else:
            key, colon, rest = line.partition(":")
            out.append(
                key + colon, style="bold" if key.strip() in ("kind", "name") else "dim" if colon else ""
            )
            out.append(rest)
        out.append("\n")
    return out
