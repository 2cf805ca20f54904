"""How a host stood at a moment: what was in force, who had an identity, what ran, what was open."""

# ruff: noqa: S608 -- SQL is this package's own, values are parameters

from __future__ import annotations

import json
from typing import Any

import duckdb

from store.catalog import Catalog
from store.narrowing import narrow_at
from store.past import open_history, version_row
from store.query import time_limit
from store.schema import OPEN_IDS


def state(catalog: Catalog, moment: int, timeout_ms: int = 30_000) -> dict[str, Any]:
    """Versions by kind, the policy in force, the enforcer's own state and open flows at `moment` (UTC microseconds)."""
    with open_history(catalog.events) as history:
        found = {kind: [version_row(v) for v in rows] for kind, rows in history.everything_at(moment).items()}
        for row in found["policy"]:
            row.pop("text", None)
        warnings = [f"policy, identities and workloads are not known: {history.why}"] if history.why else []
    with catalog.reading() as cursor, time_limit(cursor, timeout_ms):
        narrow_at(catalog, cursor, moment)
        opened = "SELECT count(*) FROM (" + OPEN_IDS.replace("$moment", "make_timestamp($1)") + ")"
        (flows,) = cursor.execute(opened, [moment]).fetchall()[0]
        enforcer = _enforcer(cursor, moment)
    return {"at": moment, **found, "enforcer": enforcer, "flows_open": int(flows), "warnings": warnings}


def _enforcer(cursor: duckdb.DuckDBPyConnection, moment: int) -> dict[str, Any]:
    """What its own events say: since when it enforced, and what was wrong with it."""
    rows = cursor.execute(
        "SELECT epoch_us(ts), type, body FROM events WHERE starts_with(type, 'enforcer.')"
        " AND ts <= make_timestamp(?) AND ts >= coalesce((SELECT max(ts) FROM events WHERE type IN"
        " ('enforcer.start', 'enforcer.stop') AND ts <= make_timestamp(?)), make_timestamp(0)) ORDER BY ts, seq",
        [moment, moment],
    ).fetchall()
    out: dict[str, Any] = {"state": "unknown", "since": None, "host": None, "problems": {}}
    for ts, type_, text in rows:
        try:
            body = json.loads(text)
        except ValueError:
            continue
        what = str(body.get("what", "?"))
        match type_:
            case "enforcer.start" | "enforcer.stop":
                running = type_ == "enforcer.start"
                out = {
                    "state": "enforcing" if running else "stopped",
                    "since": int(ts),
                    "host": body.get("host"),
                }
                out["problems"] = {}
            case "enforcer.degraded":
                out["problems"][what] = str(body.get("why", ""))
            case "enforcer.recovered":
                out["problems"].pop(what, None)
    if out["problems"] and out["state"] == "enforcing":
        out["state"] = "degraded"
    return out
