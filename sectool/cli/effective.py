"""`sectool policy diff --effective`: what differs in effect."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sectool.cli.backtest import opened
from sectool.cli.context import Session
from sectool.cli.output import Column, Format, emit
from sectool.errors import SectoolError

if TYPE_CHECKING:
    from sectool.labels import LabelSet
    from sectool.policy import DocumentSet

SCHEMA = "sectool.policy-effective-diff/1"


def show(at: Session, old: DocumentSet, new: DocumentSet, store: Path | None, output: Format) -> bool:
    """Print what differs in effect; whether anything does."""
    from sectool.events import now_us
    from sectool.policy import Engine
    from sectool.policy.effective import effective

    known = _known(at, store)
    found = effective(Engine(old), Engine(new), known, now_us())
    rows: list[dict[str, Any]] = [
        {**asdict(one), "effect": str(one.effect).replace(" ", "_"), "known": bool(one.pairs)}
        for one in (*found.known, *found.possible)
    ]
    if output in (Format.TABLE, Format.WIDE):
        columns = [
            Column("EFFECT", lambda r: r["effect"].replace("_", " "), _style),
            Column("PAIRS", lambda r: r["pairs"] or "e.g.", right=True),
            Column("FROM", lambda r: r["source"]),
            Column("TO", lambda r: r["destination"]),
            Column("SERVICES", lambda r: r["services"]),
            Column("DECIDED BEFORE", lambda r: r["before"], wide=True),
            Column("DECIDES AFTER", lambda r: r["after"]),
        ]
        if rows:
            emit(rows, columns, output, SCHEMA, color=at.color)
            at.say(
                f"{len(found.known)} differences between workloads known here ({len(known)} label sets); "
                f"{len(found.possible)} examples (e.g.) of all that could be"
            )
        else:
            at.say("no difference in effect, whatever labels and addresses there may be")
    else:
        emit(rows, (), output, SCHEMA, extra={"label_sets": len(known), "notes": list(found.notes)})
    for note in found.notes:
        at.warn(note)
    return bool(found)


def _style(row: Any) -> str:
    return "bad" if row["effect"] in ("newly_denied", "no_longer_encrypted") else "warn"


def _known(at: Session, store: Path | None) -> list[LabelSet]:
    """Label sets of all workloads that the history knows; none when there is no history."""
    try:
        with opened(at, store) as history:
            return list(history.words().labels.values())
    except SectoolError:
        if store is not None:
            raise
        return []
