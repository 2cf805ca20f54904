"""What is different between two moments: policy, identities, workloads, trust, and who talks to whom.

State is compared as it was at each moment. Traffic is compared between two windows of one length, each ending at
its moment: pairs that are new, that vanished, and those whose verdicts or rates changed.
"""

# ruff: noqa: S608 -- SQL is put together from this package's own parts, values are parameters

from __future__ import annotations

from typing import Any

import duckdb

from sectool.clock import DAY, SECOND
from sectool.errors import UsageError
from sectool.filters import Filter
from store.catalog import Catalog
from store.entity import conditions
from store.pairs import KEY, add_up, named, volume_between
from store.past import History, open_history, version_row
from store.query import time_limit
from store.sentences import policy_changes
from store.talks import all_about_pairs

MAX_PAIRS = 1000
DEFAULT_PAIRS = 50
RATIO = 2  # a rate has changed when it is that many times the other …
LEAST = 10  # … and so many flows more or fewer
_STATE = ("identity", "workload", "trust", "network")
_QUIET = frozenset({"since", "until", "serial", "fingerprint", "not_before", "not_after", "id", "pids"})


def changes(
    catalog: Catalog,
    *,
    before: int,
    after: int,
    window: int | None = None,
    filter_: Filter | None = None,
    limit: int = DEFAULT_PAIRS,
    timeout_ms: int = 60_000,
) -> dict[str, Any]:
    """What changed from `before` to `after` (UTC microseconds); traffic in the `window` before each.

    Without a window: the time between the two, a day at most. Raises UsageError for moments out of order.
    """
    if not before < after:
        raise UsageError("--from has to be earlier than --to", "give --from an earlier time")
    if window is None:
        window = min(after - before, DAY)
    if not SECOND <= window <= before:
        raise UsageError("the window has to last a second or more", "write for example --window 1h")
    limit = min(max(1, limit), MAX_PAIRS)
    with open_history(catalog.events) as history:
        document: dict[str, Any] = {
            "from": before,
            "to": after,
            "window": window,
            "overlap": max(0, before - (after - window)),
            "policy": _policy(history, before, after),
            **{kind: _state(history, kind, before, after) for kind in _STATE},
            "warnings": [f"policy and identities cannot be compared: {history.why}"] if history.why else [],
        }
    with catalog.reading() as cursor, time_limit(cursor, timeout_ms):
        chosen, by_pairs = conditions(cursor, filter_ or Filter()), all_about_pairs(filter_ or Filter())
        for name, moment in (("was", before), ("became", after)):
            add_up(catalog, cursor, name, moment - window, moment, chosen, volume=False, by_pairs=by_pairs)
        document["traffic"] = traffic = _traffic(cursor, limit)
        for name, moment in (("before", before), ("after", after)):
            traffic[name]["bytes"] = volume_between(
                catalog, cursor, moment - window, moment, chosen, by_pairs=by_pairs
            )
    return document


def _policy(history: History, before: int, after: int) -> dict[str, Any]:
    old, new = history.in_force(before), history.in_force(after)
    one, two = (old.number if old else 0), (new.number if new else 0)
    lines = policy_changes(history, one, two) if one != two else []
    applied = [
        {"ts": t.tx_us, "by": t.actor.name, "reason": t.reason}
        for t in history.transactions()
        if t.kind == "policy" and before < t.tx_us <= after
    ]
    return {"from": one, "to": two, "changes": lines or [], "readable": lines is not None, "applied": applied}


def _state(history: History, kind: str, before: int, after: int) -> dict[str, list[dict[str, Any]]]:
    old = {v.key: version_row(v) for v in history.as_of(kind, before)}
    new = {v.key: version_row(v) for v in history.as_of(kind, after)}
    changed = []
    for key in sorted(old.keys() & new.keys()):
        a, b = old[key], new[key]
        fields = sorted(f for f in (a.keys() | b.keys()) - _QUIET if a.get(f) != b.get(f))
        if fields:
            changed.append(
                {
                    "key": key,
                    "name": _name(b),
                    "fields": fields,
                    "was": {f: a.get(f) for f in fields},
                    "is": {f: b.get(f) for f in fields},
                }
            )
    return {
        "new": [
            {"key": k, "name": _name(new[k]), "since": new[k]["since"]}
            for k in sorted(new.keys() - old.keys())
        ],
        "gone": [
            {"key": k, "name": _name(old[k]), "until": old[k]["until"]}
            for k in sorted(old.keys() - new.keys())
        ],
        "changed": changed,
    }


def _name(row: dict[str, Any]) -> str:
    return str(row.get("spiffe_id") or row.get("name") or row["key"])


def _traffic(cursor: duckdb.DuckDBPyConnection, limit: int) -> dict[str, Any]:
    same = " AND ".join(f"a.{c} IS NOT DISTINCT FROM b.{c}" for c in KEY.split(", "))
    keys = ", ".join(f"coalesce(a.{c}, b.{c}) AS {c}" for c in KEY.split(", "))
    counts = ", ".join(
        f"coalesce({side}.{c}, 0) AS {c}_{name}"
        for side, name in (("a", "before"), ("b", "after"))
        for c in ("allowed", "denied")
    )
    cursor.execute(
        f"CREATE OR REPLACE TEMP TABLE both_pairs AS SELECT {keys}, {counts}, a.transport IS NULL AS is_new,"
        f" b.transport IS NULL AS is_gone FROM was a FULL OUTER JOIN became b ON {same}"
    )
    many = "greatest(allowed_{0} + denied_{0}, 1)"
    unlike = (
        "(NOT is_new AND NOT is_gone AND ((denied_before > 0) <> (denied_after > 0) OR (allowed_before > 0) <>"
        f" (allowed_after > 0) OR (abs(allowed_after + denied_after - allowed_before - denied_before) >= {LEAST} AND"
        f" ({many.format('after')} >= {RATIO} * {many.format('before')} OR {many.format('before')} >= {RATIO} *"
        f" {many.format('after')}))))"
    )
    out: dict[str, Any] = {}
    for name, test, order in (
        ("new", "is_new", "denied_after + allowed_after DESC"),
        ("vanished", "is_gone", "denied_before + allowed_before DESC"),
        (
            "changed",
            unlike,
            "(denied_before > 0) = (denied_after > 0), abs(allowed_after + denied_after"
            " - allowed_before - denied_before) DESC",
        ),
    ):
        (count,) = cursor.execute(f"SELECT count(*) FROM both_pairs WHERE {test}").fetchall()[0]
        rows = named(
            cursor,
            f"(SELECT * EXCLUDE (is_new, is_gone) FROM both_pairs WHERE {test} ORDER BY {order}, {KEY} LIMIT {limit})",
        )
        out[name] = {"count": int(count), "pairs": rows}
    for table, name in (("was", "before"), ("became", "after")):
        row = cursor.execute(
            f"SELECT count(*), coalesce(sum(allowed), 0)::BIGINT, coalesce(sum(denied), 0)::BIGINT FROM {table}"
        ).fetchall()[0]
        out[name] = dict(zip(("pairs", "allowed", "denied"), map(int, row), strict=True))
    return out
