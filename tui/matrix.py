"""Who talks to whom, drawn: callers down, called across, the verdict where they meet. Pure text.

Parties stand in the order of the calls (who calls others comes before who is called), so a line of calls reads from the
upper left to the lower right, and what goes back against it stands out. No line ever crosses another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from sectool.cli.drawing import layers
from sectool.cli.text import escape, fit, width
from tui.words import count

NAME = 22  # columns of a caller's name at most
LEAST, MOST = 9, 18  # columns of a called one's
GAP = 1
LEGEND = "✓ allowed  ✗ denied  ± both, so many each  · none"

Edge = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Shape:
    """What fits: callers, called ones, and how many columns each of these gets. `left_out` parties do not."""

    callers: tuple[str, ...]
    called: tuple[str, ...]
    name: int
    cell: int
    left_out: int


def verdict(edge: Edge) -> tuple[str, str]:
    """The sign of an edge and the style it is drawn in."""
    if not edge["denied"]:
        return "✓", "green"
    return ("±", "bold yellow") if edge["allowed"] else ("✗", "bold red")


def shape(edges: Sequence[Edge], columns: int, rows: int) -> Shape:
    """The parties in the order of calls; where they are too many, those of the first edges stay."""
    callers = list(dict.fromkeys(edge["source"] for edge in edges))
    called = list(dict.fromkeys(edge["destination"] for edge in edges))
    parties = len({*callers, *called})
    name = min(NAME, max((width(escape(each)) for each in callers), default=1))
    across = max(1, (columns - name - GAP) // (LEAST + GAP))
    kept_callers, kept_called = set(callers[: max(1, rows - 1)]), set(called[:across])
    order = [
        each
        for layer in layers(
            list(dict.fromkeys([*callers, *called])), [(e["source"], e["destination"]) for e in edges]
        )
        for each in layer
    ]
    down = tuple(each for each in order if each in kept_callers)
    right = tuple(each for each in order if each in kept_called)
    widest = max((width(escape(each)) for each in right), default=LEAST)
    cell = min(MOST, max(LEAST, widest), max(LEAST, (columns - name - GAP) // max(1, len(right)) - GAP))
    return Shape(down, right, name, cell, parties - len({*down, *right}))


def matrix(edges: Sequence[Edge], columns: int, rows: int, chosen: tuple[str, str] = ("", "")) -> Text:
    """At most `rows` lines of at most `columns` columns. Names are anybody's text: they are escaped here."""
    fits = shape(edges, columns, rows)
    by_ends = {(edge["source"], edge["destination"]): edge for edge in edges}
    out = Text(no_wrap=True)

    def put(text: str, room: int, style: str) -> None:
        shown = fit(text, room)
        out.append(shown, style=style)
        out.append(" " * (room - width(shown) + GAP))

    put("", fits.name, "")
    for name in fits.called:
        put(escape(name), fits.cell, "bold reverse" if name == chosen[1] else "bold")
    for caller in fits.callers:
        out.append("\n")
        put(escape(caller), fits.name, "bold reverse" if caller == chosen[0] else "bold")
        for name in fits.called:
            edge = by_ends.get((caller, name))
            if edge is None:
                put("·", fits.cell, "dim")
                continue
            sign, style = verdict(edge)
            told = "/".join(count(edge[what]) for what in ("allowed", "denied") if edge[what])
            put(
                f"{sign} {told}",
                fits.cell,
                f"{style}{' reverse' if (caller, name) == chosen else ''}",
            )
    return out
