"""Events in DuckDB, control history in SQLite, queries and time travel.

For notebooks and scripts: `import store; s = store.open()`, then `s.query("SELECT …")`, `s.flows("verdict=deny")`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from store.archive import Archive

__all__ = ["open"]


def open(  # noqa: A001 -- `store.open(path)` is how it reads
    path: str | os.PathLike[str] | None = None, *, run: str | os.PathLike[str] | None = None
) -> Archive:
    """Open what a host recorded; see store.archive.open_archive."""
    from store.archive import open_archive

    return open_archive(path, run=run)
