"""What lies in the folder of segments, by the chain and the files alone: nothing is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sectool.errors import StoreError
from store import segment


def inventory(events: Path) -> list[dict[str, Any]]:
    """One row per file, oldest first: name, state (sealed, compact, live, damaged), bytes, and what a seal says of it.

    Times are UTC microseconds. Raises StoreError when there is no such folder.
    """
    if not events.is_dir():
        raise StoreError(
            f"there are no events in {events}",
            "start the daemon with `sectool up`, or name its folder with --state",
        )
    known = segment.sealed(events)
    rows = []
    for path in segment.segment_files(events):
        entry = known.get(path.name)
        state = "live" if entry is None else "compact" if segment.compact(path) else "sealed"
        rows.append(_row(path, state, entry))
    return rows + [_row(path, "damaged", None) for path in sorted(events.glob("*.damaged-*"))]


def _row(path: Path, state: str, entry: dict[str, Any] | None) -> dict[str, Any]:
    about = entry or {}
    return {
        "name": path.name,
        "state": state,
        "bytes": segment.size_of(path) + segment.size_of(segment.wal_of(path)),
        "rows": int(about["records"]) + int(about["events"]) if about else None,
        "first_us": about.get("first_us"),
        "last_us": about.get("last_us"),
        "first_seq": about.get("first_seq"),
        "last_seq": about.get("last_seq"),
        "sha256": about.get("sha256"),
    }
