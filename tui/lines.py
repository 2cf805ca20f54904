"""The lines around the views: whose host this is and how it does, the views by their keys, trouble. Pure text."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from rich.text import Text

from sectool.cli.text import escape, fit
from sectool.errors import NoDaemonError, SectoolError
from tui.actions import VIEWS
from tui.cursor import Cursor
from tui.words import ago

ROOMY = 100  # columns from which on there is space between words, and for what is nice to know


def head(
    facts: Mapping[str, Any],
    cursor: Cursor,
    *,
    lost: bool,
    read_only: bool,
    paused: bool,
    now_us: int,
    room: int,
) -> Text:
    """Host, state and policy on the left; window and moment on the right."""
    state = str(facts.get("state", "unreachable" if lost else "starting"))
    sign, style = {"enforcing": ("●", "bold green"), "files": ("■", "bold")}.get(state, ("▲", "bold red"))
    if lost:
        sign, state, style = "▲", "no daemon", "bold red"
    left = Text(" sectool ", style="bold")
    left.append(escape(str(facts.get("host", "…"))))
    left.append("  ")
    left.append(f"{sign} {'stored files' if state == 'files' else state}", style=style)
    if read_only:
        left.append("  read-only")
    policy = facts.get("policy")
    if policy and room >= ROOMY:
        left.append(f"  policy r{policy['revision']}, {ago(policy['applied'], now_us)} old")
    if paused:
        left.append("  PAUSED", style="bold yellow")
    right = Text(f"{cursor.span} ")
    right.append(f" {cursor.badge} ", style="bold reverse green" if cursor.live else "bold black on yellow")
    left.truncate(max(0, room - right.cell_len), overflow="ellipsis")
    left.append(" " * max(0, room - left.cell_len - right.cell_len))
    return left + right


def views(chosen: str, room: int) -> Text:
    """Every view with its key; with blanks on both sides where there is room."""
    out = Text("", no_wrap=True)
    for name, key, title, *_ in VIEWS:
        here = name == chosen
        out.append(
            f" {key} {title}{' ' if here or room >= ROOMY else ''}", style="bold reverse" if here else ""
        )
    return out


def no_daemon(error: SectoolError, every_s: float) -> Text:
    """The banner of a daemon that does not answer."""
    what = "NO DAEMON" if isinstance(error, NoDaemonError) else "NO ANSWER"
    return Text(
        f" {what}  {escape(error.message)}. What is shown is from before; trying again every {every_s:g} s."
    )


def store_trouble(facts: Mapping[str, Any]) -> str:
    """That the daemon answers and its store does not; empty when that is not so."""
    error = (facts.get("store") or {}).get("error")
    return f"STORE DOES NOT ANSWER: {error}. Packets are judged; events wait in the rings." if error else ""


def one_line(text: str) -> Text:
    """Anybody's text, harmless and in one line."""
    return Text(escape(f" {text}"), no_wrap=True, overflow="ellipsis")


def hint(text: str, refused: Collection[str], room: int) -> Text:
    """What can be done: `key what  key what`. What is refused stands in brackets, struck out."""
    out = Text(" ", no_wrap=True)
    for number, part in enumerate(fit(escape(text), max(0, room - 1)).split("  ")):
        if number:
            out.append("  ")
        if part.partition(" ")[0] in refused:
            out.append(f"({part})", style="dim strike")
        else:
            out.append(part)
    out.truncate(room, overflow="ellipsis")
    return out
