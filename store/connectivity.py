"""Who talks to whom, drawn by labels: nodes are parties with the same values of chosen labels, edges their flows."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from sectool.clock import HOUR
from sectool.errors import UsageError
from sectool.filters import Filter
from sectool.labels import LabelError, check_label
from store.catalog import Catalog
from store.entity import conditions
from store.pairs import add_up, add_up_open, named
from store.query import time_limit
from store.talks import all_about_pairs

DEFAULT_BY = ("app", "env")
MAX_ROWS = 20_000
MAX_ADDRESSES = 24  # parties without labels that get a node of their own; the rest share one
_BUSIEST = f"(SELECT * FROM talk ORDER BY allowed + denied DESC LIMIT {MAX_ROWS + 1})"  # noqa: S608 -- a constant
OTHERS = "other addresses"
UNNAMED = "no such label"
_COUNTS = ("allowed", "denied", "encrypted", "bytes")


def connectivity(
    catalog: Catalog,
    *,
    by: Sequence[str] = DEFAULT_BY,
    since: int | None = None,
    until: int | None = None,
    at: int | None = None,
    filter_: Filter | None = None,
    timeout_ms: int = 60_000,
) -> dict[str, Any]:
    """Nodes and edges of the flows begun in [since, until), or open `at` a moment (UTC microseconds).

    `by`: label keys. Without a time: the last hour on record. Raises UsageError for what is no label key.
    """
    for key in by:
        try:
            check_label(key, "x")
        except LabelError as error:
            raise UsageError(str(error), "--by takes label keys: --by app --by zone") from None
    if not by:
        by = DEFAULT_BY
    if at is not None and (since is not None or until is not None):
        raise UsageError("--at and --since/--until exclude each other")
    with catalog.reading() as cursor, time_limit(cursor, timeout_ms):
        chosen, by_pairs = conditions(cursor, filter_ or Filter()), all_about_pairs(filter_ or Filter())
        if at is not None:
            add_up_open(catalog, cursor, "talk", at, chosen)
        else:
            if until is None:
                row = cursor.execute("SELECT epoch_us(max(event_start)) FROM flow_records").fetchall()[0]
                until = int(row[0] or 0) + 1
            since = max(0, until - HOUR) if since is None else since
            add_up(catalog, cursor, "talk", since, until, chosen, by_pairs=by_pairs)
        rows = named(cursor, _BUSIEST)
    truncated = len(rows) > MAX_ROWS
    return {
        "at": at,
        "since": since,
        "until": until,
        "by": list(by),
        "truncated": truncated,
        **_draw(rows[:MAX_ROWS], by),
    }


def _draw(rows: Iterable[dict[str, Any]], by: Sequence[str]) -> dict[str, Any]:
    rows = list(rows)
    weight: Counter[str] = Counter()
    for row in rows:
        for end in ("source", "destination"):
            if row[f"{end}_labels"] is None and row[f"{end}_ip"]:
                weight[row[f"{end}_ip"]] += row["allowed"] + row["denied"] + 1
    alone = {address for address, _ in weight.most_common(MAX_ADDRESSES)}

    @functools.cache  # thousands of pairs, of a few hundred label sets
    def by_labels(text: str) -> str:
        labels = dict(part.partition("=")[::2] for part in text.split(",") if part)
        named_ = ",".join(f"{key}={labels[key]}" for key in by if key in labels)
        return named_ or (labels.get("exe") or UNNAMED)

    def node(labels: str | None, address: str) -> str:
        if labels is None:
            return address if address in alone else OTHERS
        return by_labels(labels)

    edges: dict[tuple[str, str], dict[str, Any]] = {}
    services: dict[tuple[str, str], dict[str, None]] = {}
    for row in rows:
        key = (
            node(row["source_labels"], row["source_ip"]),
            node(row["destination_labels"], row["destination_ip"]),
        )
        edge = edges.setdefault(
            key, {"source": key[0], "destination": key[1], "services": [], **dict.fromkeys(_COUNTS, 0)}
        )
        services.setdefault(key, {})[row["service"]] = None
        for count in _COUNTS:
            edge[count] += row[count]
    for key, used in services.items():
        edges[key]["services"] = list(used)
    texts = {row[f"{end}_labels"] for row in rows for end in ("source", "destination")}
    labelled = {by_labels(text) for text in texts if text is not None}
    names = sorted({name for key in edges for name in key})
    return {
        "nodes": [{"name": name, "identified": name in labelled} for name in names],
        "edges": sorted(
            edges.values(), key=lambda e: (-(e["allowed"] + e["denied"]), e["source"], e["destination"])
        ),
    }
