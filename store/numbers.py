"""The store's own small ids for the entries of its dictionaries.

Workers and agent name identities, label sets, workloads and rules by stable 64-bit ids, the same on every host. Records
in the store say a number counted from one instead (one count for all dictionaries). A number is given out with the
first record or entry that names a stable id, is never given out again in this folder, and is on disk, in the segment
that uses it, in the same transaction as the first row that says it.
"""

# ruff: noqa: S608 -- names are constants of store.schema and aliases of the catalog

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from store.schema import DICTIONARIES
from store.segment import one

if TYPE_CHECKING:
    import duckdb

    from store.catalog import Catalog

# What tells a whole entry from one of which only the stable id is known.
_TELLING = {"identities": "spiffe_id", "labels": "text", "workloads": "name", "rules": "text"}
_REFERS = {"identities": "labels_id", "workloads": "labels_id"}  # to an entry of `labels`
UNKNOWN_SEGMENT = 1 << 18  # numbers left free for a segment that cannot be opened now


class Numbers:
    """Which stable id has which number, as the attached segments say. Used by the thread that writes."""

    def __init__(self, cursor: duckdb.DuckDBPyConnection, catalog: Catalog) -> None:
        self._ids: dict[str, dict[int, int]] = {}
        self._whole: dict[str, set[int]] = {}  # stable ids of entries of which everything is known
        self.next = 1
        for table in DICTIONARIES:
            rows = cursor.execute(f"SELECT id, key, {_TELLING[table]} IS NOT NULL FROM {table}").fetchall()
            self._ids[table] = {key: number for number, key, _ in rows}
            self._whole[table] = {key for _, key, whole in rows if whole}
            self.next = max(self.next, *(number + 1 for number, _, _ in rows), 1)
        for name in catalog.segments:
            self.next = max(
                self.next, one(cursor, f"SELECT max(first_id) FROM {catalog.alias(name)}.meta")[0]
            )

    def skip(self) -> None:
        """Leave free what a segment that cannot be opened now may have given out."""
        self.next += UNKNOWN_SEGMENT

    @contextlib.contextmanager
    def giving(self) -> Iterator[Given]:
        """What one transaction gives out: kept when it ends well, else given out anew."""
        given = Given(self)
        yield given
        for table, numbers in given.ids.items():
            self._ids[table].update(numbers)
        for table, rows in given.rows.items():
            self._whole[table].update(row["key"] for row in rows.values() if len(row) > 2)
        self.next = given.next

    def known(self, table: str, key: int) -> int | None:
        """The number of a stable id; None when it has none yet."""
        return self._ids[table].get(key)

    def whole(self, table: str, key: int) -> bool:
        """Whether the entry is on record, not only its stable id."""
        return key in self._whole[table]


@dataclass(slots=True)
class Given:
    """Numbers and entries that one transaction adds. `rows`: by table and stable id."""

    of: Numbers
    ids: dict[str, dict[int, int]] = field(default_factory=dict)
    rows: dict[str, dict[int, dict[str, Any]]] = field(default_factory=dict)
    next: int = field(init=False)

    def __post_init__(self) -> None:
        self.next = self.of.next

    def number(self, table: str, key: int) -> int:
        """The number of a stable id. One not seen before gets a row with nothing but these two."""
        known = self.of.known(table, key)
        if known is None:
            known = self.ids.setdefault(table, {}).get(key)
        if known is None:
            known = self.next
            self.next += 1
            self.ids[table][key] = known
            self.rows.setdefault(table, {})[key] = {"id": known, "key": key}
        return known

    def enter(self, table: str, entry: dict[str, Any]) -> None:
        """Add an entry of a dictionary, unless it is on record. It names itself, and labels, by stable ids."""
        key = entry["key"]
        if self.of.whole(table, key):
            return
        row = {"id": self.number(table, key), **entry}
        refers = _REFERS.get(table)
        if refers is not None and row[refers]:
            row[refers] = self.number("labels", row[refers])
        self.rows.setdefault(table, {})[key] = row
