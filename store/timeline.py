"""Everything that happened around a moment or an entity, merged and in order of time.

Flows that say the same thing (same parties, service, verdict, reason and rule) and follow each other closely
become one entry with a count: a flood is one line, not a page. Changes of policy and identity become sentences.
"""

# ruff: noqa: S608 -- SQL is put together from this package's own parts, values are parameters

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import duckdb

from sectool.clock import MINUTE, SECOND
from sectool.errors import UsageError
from sectool.events import Action, DropReason, Phase
from store.catalog import Catalog
from store.entity import Entity, Sort, find_entity
from store.narrowing import narrow, widen
from store.past import History, open_history
from store.query import small, time_limit
from store.sentences import KINDS, kind_of, sentence, severity_of

MAX_ENTRIES = 5000
DEFAULT_ENTRIES = 200
AROUND = 5 * MINUTE  # on each side of a moment
_SLICES = 240  # a window is cut into so many; what repeats in neighbouring ones is one entry
_ALWAYS = ("policy", "enforcer", "loss", "trust", "alert", "capture")  # context of any entity


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a timeline. Times are UTC microseconds; `until` is the last of `count` alike."""

    ts: int
    until: int
    kind: str
    type: str
    text: str
    count: int = 1
    severity: str = ""
    more: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Timeline:
    """Entries in order of time. `warnings` name what could not be read."""

    since: int
    until: int
    entries: tuple[Entry, ...]
    truncated: bool
    warnings: tuple[str, ...] = ()
    about: str = ""

    def document(self) -> dict[str, Any]:
        """Plain data."""
        return {**asdict(self), "entries": [asdict(entry) for entry in self.entries]}


def timeline(
    catalog: Catalog,
    *,
    since: int | None = None,
    until: int | None = None,
    at: int | None = None,
    around: int = AROUND,
    about: str = "",
    kinds: Sequence[str] = (),
    limit: int = DEFAULT_ENTRIES,
    timeout_ms: int = 30_000,
) -> Timeline:
    """What happened in [since, until), or `around` (microseconds) a moment `at`, as far as it concerns `about`.

    Without a time: the last hour on record, or all of a flow's life. Raises UsageError for unknown names.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"there is no kind of event {kind!r}", f"kinds: {', '.join(KINDS)}")
    if at is not None and (since is not None or until is not None):
        raise UsageError("--at and --since/--until exclude each other", "--around says how far from --at")
    limit = min(max(1, limit), MAX_ENTRIES)
    with open_history(catalog.events) as history, catalog.reading() as cursor, time_limit(cursor, timeout_ms):
        entity = find_entity(catalog, cursor, about) if about else None
        begin, end = _window(cursor, entity, since, until, at, around)
        entries: list[Entry] = []
        if not kinds or "flow" in kinds:
            narrow(catalog, cursor, begin, end)
            entries += _flows(cursor, entity, begin, end, limit)
            widen(cursor)
        entries += _events(cursor, history, entity, begin, end, limit, kinds)
        warnings = [f"the control history is not told of: {history.why}"] if history.why else []
    entries.sort(key=lambda e: (e.ts, e.kind))
    more = len(entries) > limit
    if more:  # what is rare tells more than what is common: floods are cut first, then the oldest
        kept = sorted(entries, key=lambda e: (e.kind == "flow" and not e.severity, -e.ts))[:limit]
        entries = sorted(kept, key=lambda e: (e.ts, e.kind))
    return Timeline(begin, end, tuple(entries), more, tuple(warnings), about)


def _window(
    cursor: duckdb.DuckDBPyConnection,
    entity: Entity | None,
    since: int | None,
    until: int | None,
    at: int | None,
    around: int,
) -> tuple[int, int]:
    if at is not None:
        return max(0, at - around), at + around
    if since is None and entity is not None and entity.begun is not None:
        since = max(0, entity.begun - MINUTE)
        if until is None:
            condition = entity.condition(cursor)
            row = cursor.execute(
                f"SELECT epoch_us(max(ts)) FROM flow_records WHERE {condition[0]} AND event_start >= make_timestamp(?)",
                [*condition[1], since],
            ).fetchall()[0]
            until = int(row[0] or entity.begun) + MINUTE
    if until is None:
        row = cursor.execute(
            "SELECT epoch_us(greatest((SELECT max(ts) FROM flow_records), (SELECT max(ts) FROM events)))"
        ).fetchall()[0]
        until = int(row[0] or 0) + 1
    if since is None:
        since = max(0, until - 60 * MINUTE)
    if since >= until:
        raise UsageError("the window is empty: it ends before it begins", "give --since an earlier time")
    return since, until


_GROUP = (
    "source_labels, destination_labels, source_identity, destination_identity, source_workload, destination_workload,"
    " transport, service, action, drop_reason, peer_reason, rule, from_hi, from_lo, to_hi, to_lo"
)


def _flows(
    cursor: duckdb.DuckDBPyConnection, entity: Entity | None, since: int, until: int, limit: int
) -> list[Entry]:
    condition, values = entity.condition(cursor) if entity is not None else ("true", [])
    phases = f"phase = {Phase.VERDICT:d}"
    if entity is not None and entity.sort is Sort.FLOW:
        phases = f"phase IN ({Phase.VERDICT:d}, {Phase.END:d})"
    width = max(SECOND, (until - since) // _SLICES)
    cursor.execute(
        f"""
CREATE OR REPLACE TEMP TABLE told AS
WITH chosen AS (
    SELECT *, CASE WHEN transport IN (1, 58) THEN source_port * 256 + destination_port ELSE destination_port END
            AS service,
        -- an address stands for a party that has no labels; those that have are one party wherever they are
        CASE WHEN source_labels = 0 THEN source_ip_hi END AS from_hi,
        CASE WHEN source_labels = 0 THEN source_ip_lo END AS from_lo,
        CASE WHEN destination_labels = 0 THEN destination_ip_hi END AS to_hi,
        CASE WHEN destination_labels = 0 THEN destination_ip_lo END AS to_lo,
        CASE WHEN phase = {Phase.END:d} THEN event_end ELSE event_start END AS moment
    FROM flow_records WHERE {phases} AND event_start >= make_timestamp(?) AND event_start < make_timestamp(?)
        AND ({condition})
), slices AS (
    SELECT {_GROUP}, phase, epoch_us(moment) // {width} AS slice, sum(flow_count)::BIGINT AS n,
        epoch_us(min(moment)) AS first, epoch_us(max(moment)) AS last, arg_min(event_id, seq) AS event_id,
        arg_min(event_start, seq) AS begun, min(policy_revision) AS revision,
        sum(source_bytes + destination_bytes)::BIGINT AS bytes,
        any_value(source_ip_hi) AS sh, any_value(source_ip_lo) AS sl,
        any_value(destination_ip_hi) AS dh, any_value(destination_ip_lo) AS dl, any_value(pid) AS pid
    FROM chosen GROUP BY {_GROUP}, phase, slice
), islands AS (
    SELECT *, sum(gap) OVER (PARTITION BY {_GROUP}, phase ORDER BY slice) AS island FROM (
        SELECT *, CASE WHEN slice - lag(slice) OVER (PARTITION BY {_GROUP}, phase ORDER BY slice) <= 2 THEN 0 ELSE 1 END
            AS gap FROM slices))
SELECT {_GROUP}, phase, island, sum(n)::BIGINT AS n, min(first) AS first, max(last) AS last,
    event_uuid(arg_min(begun, first), arg_min(event_id, first))::VARCHAR AS event_id, min(revision) AS revision,
    sum(bytes)::BIGINT AS bytes, any_value(sh) AS sh, any_value(sl) AS sl, any_value(dh) AS dh, any_value(dl) AS dl,
    any_value(pid) AS pid
FROM islands GROUP BY {_GROUP}, phase, island
""",
        [since, until, *values],
    )
    rows = small(
        cursor,
        f"""
SELECT t.*, a.text AS source_text, b.text AS destination_text, si.spiffe_id AS source_id,
    di.spiffe_id AS destination_id, r.text AS rule_text, r.policy AS policy, r.owner AS owner,
    ip_text(sh, sl) AS source_address, ip_text(dh, dl) AS destination_address,
    sw.name AS source_name, dw.name AS destination_name
FROM (SELECT * FROM told ORDER BY action = {Action.ALLOW:d}, n DESC, first LIMIT {limit + 1}) t
LEFT JOIN labels a ON a.id = t.source_labels LEFT JOIN labels b ON b.id = t.destination_labels
LEFT JOIN identities si ON si.id = t.source_identity LEFT JOIN identities di ON di.id = t.destination_identity
LEFT JOIN workloads sw ON sw.id = t.source_workload LEFT JOIN workloads dw ON dw.id = t.destination_workload
LEFT JOIN rules r ON r.id = t.rule
""",
    )
    return [_flow_entry(row) for row in rows.to_pylist()]


def party(labels: str | None, name: str | None, identity: str | None, address: str) -> str:
    """How a sentence calls one end of a flow: its telling labels, else workload, identity or address."""
    if labels:
        known = dict(part.partition("=")[::2] for part in labels.split(","))
        telling = [f"{key}={known[key]}" for key in ("app", "env") if key in known]
        if telling:
            return ",".join(telling)
        if "exe" in known:
            return known["exe"]
    return name or (identity or "").rpartition("/")[2] or address


_VERBS = {
    Action.ALLOW: "reached",
    Action.DENY: "was denied",
    Action.AUDIT: "reached (audit)",
    Action.ERROR: "failed at",
}


def service_text(transport: int, service: int) -> str:
    """`tcp/443`; for ICMP type and code."""
    name = {6: "tcp", 17: "udp", 1: "icmp", 58: "icmpv6"}.get(transport, str(transport))
    return f"{name} type {service >> 8} code {service & 255}" if transport in (1, 58) else f"{name}/{service}"


def reason_text(code: int) -> str:
    """A drop reason in lower case; its number when this release does not know it."""
    try:
        return DropReason(code).name.lower() if code else ""
    except ValueError:
        return str(code)


def _flow_entry(row: Mapping[str, Any]) -> Entry:
    source = party(row["source_text"], row["source_name"], row["source_id"], row["source_address"])
    destination = party(
        row["destination_text"], row["destination_name"], row["destination_id"], row["destination_address"]
    )
    service, count = service_text(row["transport"], row["service"]), int(row["n"])
    reason = reason_text(row["drop_reason"])
    if row["phase"] == Phase.END:
        text, severity = f"{source} -> {destination} {service} ended, {row['bytes']} bytes", ""
    else:
        verb = _VERBS.get(row["action"], "met")
        text = f"{source} {verb} {destination} {service}"
        severity = "bad" if row["action"] in (Action.DENY, Action.ERROR) else ""
        if reason:
            peer = reason_text(row["peer_reason"])
            text += f": {reason}{f' ({peer} there)' if peer else ''}"
        if row["rule_text"]:
            text += f" by {row['policy']}: {row['rule_text']}"
    data = {
        "event_id": row["event_id"],
        "source": row["source_text"],
        "source_identity": row["source_id"],
        "source_ip": row["source_address"],
        "destination": row["destination_text"],
        "destination_identity": row["destination_id"],
        "destination_ip": row["destination_address"],
        "service": service,
        "reason": reason or None,
        "rule": row["rule_text"],
        "policy": row["policy"],
        "owner": row["owner"],
        "policy_revision": row["revision"] or None,
        "pid": row["pid"] or None,
    }
    type_ = "flow.end" if row["phase"] == Phase.END else f"flow.{_action(row['action'])}"
    return Entry(row["first"], row["last"], "flow", type_, text, count, severity, (), data)


def _action(code: int) -> str:
    return Action(code).name.lower() if code in Action.__members__.values() else str(code)


def _events(
    cursor: duckdb.DuckDBPyConnection,
    history: History,
    entity: Entity | None,
    since: int,
    until: int,
    limit: int,
    kinds: Sequence[str],
) -> list[Entry]:
    rows = cursor.execute(
        "SELECT epoch_us(ts), type, body FROM events WHERE ts >= make_timestamp(?) AND ts < make_timestamp(?)"
        f" ORDER BY ts DESC, seq DESC LIMIT {limit * 20}",
        [since, until],
    ).fetchall()
    mine = _ids(cursor, entity)
    out: list[Entry] = []
    for ts, type_, text in rows:
        kind = kind_of(type_)
        if kinds and kind not in kinds:
            continue
        body = _body(text)
        if entity is not None and not _concerns(entity, kind, body, text, mine):
            continue
        words, more = sentence(type_, body, history)
        out.append(Entry(int(ts), int(ts), kind, type_, words, 1, severity_of(type_), tuple(more), body))
    return _collapse(reversed(out))[-limit - 1 :]


def _body(text: str) -> dict[str, Any]:
    try:
        body = json.loads(text)
    except ValueError:
        return {"unreadable": text}
    return body if isinstance(body, dict) else {"value": body}


def _ids(cursor: duckdb.DuckDBPyConnection, entity: Entity | None) -> tuple[set[str], set[int]]:
    """SPIFFE ids and workloads (stable ids, as events say them) that the entity's flows carry."""
    if entity is None or entity.sort in (Sort.POLICY, Sort.ADDRESS):
        return set(), set()
    condition, values = entity.condition(cursor)
    both = "SELECT {0}_identity AS i, {0}_workload AS w FROM flow_records WHERE ({1})"
    if entity.sort is Sort.WORKLOAD:
        rows = cursor.execute("SELECT key FROM workloads WHERE name GLOB ?", [entity.text]).fetchall()
        return set(), {int(row[0]) for row in rows}
    if entity.sort is Sort.IDENTITY:
        return {entity.text}, set()
    rows = cursor.execute(
        f"SELECT DISTINCT s.spiffe_id, w.key FROM ({both.format('source', condition)} UNION ALL"
        f" {both.format('destination', condition)}) f LEFT JOIN identities s ON s.id = f.i"
        " LEFT JOIN workloads w ON w.id = f.w LIMIT 1000",
        [*values, *values],
    ).fetchall()
    return {row[0] for row in rows if row[0]}, {int(row[1]) for row in rows if row[1]}


def _concerns(
    entity: Entity, kind: str, body: Mapping[str, Any], text: str, mine: tuple[set[str], set[int]]
) -> bool:
    if kind in _ALWAYS:
        return True
    if entity.sort is Sort.ADDRESS:
        return json.dumps(entity.text) in text
    identities, workloads = mine
    return (
        body.get("spiffe_id") in identities
        or body.get("workload_id") in workloads
        or (entity.sort is Sort.WORKLOAD and body.get("workload") == entity.text)
    )


def _collapse(entries: Iterable[Entry]) -> list[Entry]:
    """Equal sentences that follow each other become one with a count."""
    out: list[Entry] = []
    for entry in entries:
        last = out[-1] if out else None
        if last is not None and (last.type, last.text) == (entry.type, entry.text):
            out[-1] = replace(last, until=entry.until, count=last.count + 1)
        else:
            out.append(entry)
    return out
