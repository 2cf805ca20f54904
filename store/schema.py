"""Tables of a segment, and the views that people query.

Each segment file has the tables of `SEGMENT_TABLES`. A process that reads has one in-memory catalog in which the
dictionaries are tables (each id once, from all segments) and `flow_records` and `events` are the segments' tables
put end to end; `flows` and `flows_open_at` are built on those. docs/store.md describes every column.
"""

# ruff: noqa: S608 -- built from the constants below and from names this package makes itself

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

from sectool.events import (
    FIELDS,
    FLAG_ADOPTED,
    FLAG_COALESCED,
    FLAG_DEFAULT_DENY,
    FLAG_OBSERVED,
    FLAG_RESTORED,
    Action,
    Auth,
    AuthResult,
    Cipher,
    ConnState,
    Decider,
    DropReason,
    Encryption,
    Phase,
    Point,
)
from store import flowidsql

SEGMENT_VERSION = 2
ROW_GROUP = 61_440  # rows; half of what is usual: a busy host fills one in less than a second
# Blocks of a quarter of what is usual, bytes: half a hundred columns leave less room unused in them.
LAYOUT = f"ROW_GROUP_SIZE {ROW_GROUP}, BLOCK_SIZE 65536"

_SQL = {"B": "UTINYINT", "H": "USMALLINT", "I": "UINTEGER", "q": "BIGINT", "Q": "UBIGINT"}
_RENAMED = {"start": "event_start", "end": "event_end"}
_TIMES = ("ts", "start", "end")
_ADDRESSES = ("source_ip", "destination_ip")
_UNSTORED = ("kind", "_pad")

# Columns that hold ids of a dictionary. On the ring they are 64-bit stable ids, the same on every host; the store gives
# each its own small number, for eight random bytes cannot be compressed and one record has nine of them.
REFERENCES: dict[str, str] = {
    "source_identity": "identities",
    "destination_identity": "identities",
    "source_labels": "labels",
    "destination_labels": "labels",
    "source_workload": "workloads",
    "destination_workload": "workloads",
    "rule": "rules",
    "peer_rule": "rules",
    "pending_rule": "rules",
}


def _columns(name: str, code: str) -> list[tuple[str, str]]:
    if name in _UNSTORED:
        return []
    if name in _TIMES:
        return [(_RENAMED.get(name, name), "TIMESTAMP")]
    if name in _ADDRESSES:  # two integers: half the size of text, and a network is a range of them
        return [(f"{name}_hi", "UBIGINT"), (f"{name}_lo", "UBIGINT")]
    if name in REFERENCES:
        return [(name, "UINTEGER")]
    special = {"event_id": "UBIGINT", "community": "USMALLINT", "history": "VARCHAR"}
    return [(name, special.get(name) or _SQL[code])]


RECORD_COLUMNS: tuple[tuple[str, str], ...] = (
    ("seq", "BIGINT"),
    *(column for name, code in FIELDS for column in _columns(name, code)),
)

# `id` is what records of this store say, `key` the stable id. An entry of which only these two are known is not on
# record yet (a record that names it came first), or its telling was lost.
DICTIONARIES: dict[str, tuple[tuple[str, str], ...]] = {
    "identities": (
        ("id", "BIGINT"),
        ("key", "BIGINT"),
        ("spiffe_id", "VARCHAR"),
        ("trust_domain", "VARCHAR"),
        ("labels_id", "BIGINT"),
        ("fingerprint", "VARCHAR"),
        ("serial", "VARCHAR"),
        ("not_before", "TIMESTAMP"),
        ("not_after", "TIMESTAMP"),
        ("issuer", "VARCHAR"),
    ),
    "labels": (("id", "BIGINT"), ("key", "BIGINT"), ("text", "VARCHAR"), ("labels", "MAP(VARCHAR, VARCHAR)")),
    "workloads": (
        ("id", "BIGINT"),
        ("key", "BIGINT"),
        ("name", "VARCHAR"),
        ("labels_id", "BIGINT"),
        ("uid", "BIGINT"),
        ("user", "VARCHAR"),
        ("executable", "VARCHAR"),
        ("sha256", "VARCHAR"),
        ("unit", "VARCHAR"),
        ("cgroup", "VARCHAR"),
    ),
    "rules": (
        ("id", "BIGINT"),
        ("key", "BIGINT"),
        ("policy", "VARCHAR"),
        ("kind", "VARCHAR"),
        ("owner", "VARCHAR"),
        ("index", "BIGINT"),
        ("text", "VARCHAR"),
        ("revision", "BIGINT"),
    ),
}

EVENT_COLUMNS = (("seq", "BIGINT"), ("ts", "TIMESTAMP"), ("type", "VARCHAR"), ("body", "VARCHAR"))
POSITION_COLUMNS = (("ring", "BIGINT"), ("next", "BIGINT"), ("lost", "BIGINT"))
# `first_id`: all ids of dictionary entries below it were given out when the segment began.
META_COLUMNS = (
    ("version", "INTEGER"),
    ("created", "TIMESTAMP"),
    ("first_seq", "BIGINT"),
    ("first_id", "BIGINT"),
)

SEGMENT_TABLES: dict[str, tuple[tuple[str, str], ...]] = {
    "meta": META_COLUMNS,
    "flow_records": RECORD_COLUMNS,
    **DICTIONARIES,
    "events": EVENT_COLUMNS,
    "positions": POSITION_COLUMNS,
}


def _ddl(columns: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f'"{name}" {kind}' for name, kind in columns)


def segment_ddl(alias: str) -> list[str]:
    """Statements that make the tables of a new segment attached as `alias`. No keys: they would slow ingest."""
    return [f"CREATE TABLE {alias}.{name} ({_ddl(columns)})" for name, columns in SEGMENT_TABLES.items()]


def catalog_ddl() -> list[str]:
    """Statements for a fresh in-memory catalog: dictionaries and macros."""
    tables = []
    for name, columns in DICTIONARIES.items():
        tables.append(f"CREATE TABLE {name} ({_ddl(columns)}, PRIMARY KEY (id))")
    return [*tables, *_MACROS]


def union_ddl(aliases: Iterable[str]) -> list[str]:
    """Statements that put the segments `aliases` end to end. The views on top refer to these by name, and stay."""
    aliases = list(aliases)
    out = []
    for table, columns in (("flow_records", RECORD_COLUMNS), ("events", EVENT_COLUMNS)):
        names = ", ".join(f'"{name}"' for name, _ in columns)
        parts = [f"SELECT {names} FROM {alias}.{table}" for alias in aliases]
        nothing = ", ".join(f'NULL::{kind} AS "{name}"' for name, kind in columns)
        body = " UNION ALL ".join(parts) or f"SELECT {nothing} WHERE false"
        out.append(f"CREATE OR REPLACE VIEW {table} AS {body}")
    return out


def flows_ddl() -> list[str]:
    """Statements that make the views on top of `flow_records`, once: planning them takes a tenth of a second."""
    return [
        f"CREATE VIEW flows AS {flows_sql('flow_records')}",
        f"CREATE MACRO flows_between(since, until) AS TABLE {_BETWEEN}",
        f"CREATE MACRO flows_open_at(moment) AS TABLE {_OPEN_AT}",
    ]


_HEXTET = "lower(to_hex((x >> {}) & 65535))"
_HALF = " || ':' || ".join(_HEXTET.format(shift) for shift in (48, 32, 16, 0))


def _compress(text: str) -> str:
    """RFC 5952, 4.2: the longest run of two or more zero groups (the first of equals) becomes `::`."""
    cases = []
    for zeros in range(8, 1, -1):
        run = f"(^|:)0(:0){{{zeros - 1}}}(:|$)"
        cases.append(f"WHEN regexp_matches({text}, '{run}') THEN regexp_replace({text}, '{run}', '::')")
    return f"CASE {' '.join(cases)} ELSE {text} END"


_MACROS = [
    *flowidsql.MACROS,
    f"CREATE MACRO ip6_half(x) AS {_HALF}",
    # The lambda names the text once: a macro would copy it into each of the cases, and planning would take long.
    f"CREATE MACRO ip6_short(whole) AS list_transform([whole], lambda t: {_compress('t')})[1]",
    "CREATE MACRO ip4_text(x) AS concat_ws('.', (x >> 24) & 255, (x >> 16) & 255, (x >> 8) & 255, x & 255)",
    "CREATE MACRO ip_text(hi, lo) AS CASE WHEN hi = 0 AND lo >> 32 = 65535 THEN ip4_text(lo & 4294967295) "
    "ELSE ip6_short(ip6_half(hi) || ':' || ip6_half(lo)) END",
]


def _word(kind: type[IntEnum], expression: str) -> str:
    """SQL turning a number into its name in lower case; NULL for 0 where that means none, and for unknown ones."""
    words: list[str] = []
    members = {member.value: member.name.lower() for member in kind}
    for value in range(max(members) + 1):
        name = members.get(value)
        words.append("NULL" if name in (None, "none") else f"'{name}'")
    return f"[{', '.join(words)}][{expression}::INTEGER + 1]"


def flows_sql(records: str) -> str:
    """A SELECT that makes one row per flow of the relation `records` (columns of flow_records).

    What was decided comes from the flow's first record (its verdict, unless that was lost), how it went on from
    the later ones. All records of a flow carry the same event_start, so a time range on it limits both sides.
    """
    return f"{_parts(records)}{_FLOW_COLUMNS}"


def merged_sql(records: str) -> str:
    """The same flows as `flows_sql`, in numbers: one row per flow with the columns of flow_records, what came later in
    place of what was known at first, and `duration_us` and `community_id`. store.wording puts them into words.
    """
    return f"{_parts(records)}{_MERGED_COLUMNS}"


def _parts(records: str) -> str:
    """Common table expressions: `base`, the first record of each flow, and `later`, what the others add."""
    return f"""
WITH base AS NOT MATERIALIZED (
    SELECT * FROM {records} WHERE phase = {Phase.VERDICT:d}
    UNION ALL
    (SELECT DISTINCT ON (event_start, event_id) o.* FROM {records} o
    ANTI JOIN (SELECT event_start, event_id FROM {records} WHERE phase = {Phase.VERDICT:d}) k
        ON o.event_start = k.event_start AND o.event_id = k.event_id
    WHERE o.phase > {Phase.VERDICT:d} ORDER BY event_start, event_id, seq)
), ended AS NOT MATERIALIZED (
    SELECT event_start, event_id, event_end, ts, source_bytes, source_packets, destination_bytes,
        destination_packets, conn_state, history, drop_reason, auth_result, encryption, cipher
    FROM {records} WHERE phase = {Phase.END:d}
), updated AS NOT MATERIALIZED (
    SELECT event_start, event_id, NULL::TIMESTAMP AS event_end, max(ts) AS ts,
        max(source_bytes) AS source_bytes, max(source_packets) AS source_packets,
        max(destination_bytes) AS destination_bytes, max(destination_packets) AS destination_packets,
        arg_max(conn_state, seq) AS conn_state, arg_max(history, seq) AS history,
        max(drop_reason) AS drop_reason, max(auth_result) AS auth_result, max(encryption) AS encryption,
        max(cipher) AS cipher
    FROM {records} WHERE phase = {Phase.UPDATE:d} GROUP BY event_start, event_id
), later AS NOT MATERIALIZED (
    SELECT * FROM ended UNION ALL
    SELECT u.* FROM updated u ANTI JOIN ended e ON u.event_start = e.event_start AND u.event_id = e.event_id
) """


_DURATION = "epoch_us(coalesce(l.event_end, l.ts, b.event_end, b.ts)) - epoch_us(b.event_start)"
_COUNTS = ("source_bytes", "source_packets", "destination_bytes", "destination_packets")
_LATEST = ("event_end", "conn_state", "history", *_COUNTS)
_HIGHEST = ("drop_reason", "auth_result", "encryption", "cipher")

_MERGED_COLUMNS = f"""
SELECT b.* REPLACE (
    {", ".join(f"coalesce(l.{name}, b.{name}) AS {name}" for name in _LATEST)},
    {", ".join(f"greatest(b.{name}, l.{name}) AS {name}" for name in _HIGHEST)},
    event_uuid(b.event_start, b.event_id)::VARCHAR AS event_id
), {_DURATION} AS duration_us, {flowidsql.community_of("b")} AS community_id
FROM base b LEFT JOIN later l ON l.event_start = b.event_start AND l.event_id = b.event_id
"""

_FLOW_COLUMNS = f"""
SELECT
    b.seq, event_uuid(b.event_start, b.event_id)::VARCHAR AS event_id, b.event_start,
    coalesce(l.event_end, b.event_end) AS event_end,
    {_DURATION} AS duration_us,
    coalesce(l.event_end, b.event_end) IS NULL AND b.action IN ({Action.ALLOW:d}, {Action.AUDIT:d}) AS open,
    {_word(Point, "b.point")} AS observation_point,
    {flowidsql.community_of("b")} AS community_id,
    ['outbound', 'inbound', 'internal'][b.direction::INTEGER] AS direction,
    CASE b.transport WHEN 6 THEN 'tcp' WHEN 17 THEN 'udp' WHEN 1 THEN 'icmp' WHEN 58 THEN 'icmpv6'
        ELSE b.transport::VARCHAR END AS transport,
    b.ip_version,
    ip_text(b.source_ip_hi, b.source_ip_lo) AS source_ip, b.source_port,
    ip_text(b.destination_ip_hi, b.destination_ip_lo) AS destination_ip, b.destination_port,
    si.spiffe_id AS source_identity, sl.text AS source_labels, sw.name AS source_workload,
    di.spiffe_id AS destination_identity, dl.text AS destination_labels, dw.name AS destination_workload,
    {_word(Action, "b.action")} AS action,
    {_word(DropReason, "greatest(b.drop_reason, l.drop_reason)")} AS drop_reason,
    {_word(DropReason, "b.peer_reason")} AS peer_reason,
    CASE WHEN b.decider > 0 THEN {_word(Decider, "b.decider")} END AS decider,
    r.text AS rule, r.policy AS policy, r.owner AS owner, pr.text AS peer_rule,
    b.flags & {FLAG_DEFAULT_DENY} <> 0 AS default_deny,
    {_word(Action, "b.pending_action")} AS pending_action, wr.text AS pending_rule,
    nullif(b.policy_revision, 0) AS policy_revision,
    CASE WHEN b.policy_hash <> 0 THEN lower(to_hex(b.policy_hash)) END AS policy_hash,
    {_word(Auth, "b.auth_method")} AS auth_method,
    {_word(AuthResult, "greatest(b.auth_result, l.auth_result)")} AS auth_result,
    {_word(Encryption, "greatest(b.encryption, l.encryption)")} AS encryption,
    {_word(Cipher, "greatest(b.cipher, l.cipher)")} AS cipher,
    upper({_word(ConnState, "coalesce(l.conn_state, b.conn_state)")}) AS conn_state,
    nullif(coalesce(l.history, b.history), '') AS history,
    coalesce(l.source_bytes, b.source_bytes) AS source_bytes,
    coalesce(l.source_packets, b.source_packets) AS source_packets,
    coalesce(l.destination_bytes, b.destination_bytes) AS destination_bytes,
    coalesce(l.destination_packets, b.destination_packets) AS destination_packets,
    coalesce(l.source_bytes, b.source_bytes) + coalesce(l.destination_bytes, b.destination_bytes) AS bytes,
    coalesce(l.source_packets, b.source_packets) + coalesce(l.destination_packets, b.destination_packets) AS packets,
    nullif(b.pid, 0) AS pid, nullif(b.uid, 4294967295) AS uid, nullif(b.cgroup, 0) AS cgroup,
    b.flow_count, b.missed,
    b.flags & {FLAG_ADOPTED} <> 0 AS adopted, b.flags & {FLAG_COALESCED} <> 0 AS coalesced,
    b.flags & {FLAG_RESTORED} <> 0 AS restored, b.flags & {FLAG_OBSERVED} <> 0 AS observed,
    coalesce(si.key, 0) AS source_identity_id, coalesce(di.key, 0) AS destination_identity_id,
    coalesce(sl.key, 0) AS source_labels_id, coalesce(dl.key, 0) AS destination_labels_id,
    coalesce(sw.key, 0) AS source_workload_id, coalesce(dw.key, 0) AS destination_workload_id,
    coalesce(r.key, 0) AS rule_id, coalesce(pr.key, 0) AS peer_rule_id, coalesce(wr.key, 0) AS pending_rule_id
FROM base b
LEFT JOIN later l ON l.event_start = b.event_start AND l.event_id = b.event_id
LEFT JOIN identities si ON si.id = b.source_identity
LEFT JOIN identities di ON di.id = b.destination_identity
LEFT JOIN labels sl ON sl.id = b.source_labels
LEFT JOIN labels dl ON dl.id = b.destination_labels
LEFT JOIN workloads sw ON sw.id = b.source_workload
LEFT JOIN workloads dw ON dw.id = b.destination_workload
LEFT JOIN rules r ON r.id = b.rule
LEFT JOIN rules pr ON pr.id = b.peer_rule
LEFT JOIN rules wr ON wr.id = b.pending_rule
"""


# Flows known to have ended later are found by their END record alone, which carries event_start. The rest, begun
# before and never ended, is what a search for an END finds nothing for.
OPEN_IDS = f"""
SELECT event_id, event_start FROM flow_records
    WHERE phase = {Phase.END:d} AND event_start <= $moment AND event_end > $moment
        AND action IN ({Action.ALLOW:d}, {Action.AUDIT:d})
UNION
SELECT v.event_id, v.event_start FROM flow_records v
    ANTI JOIN (SELECT event_id, event_start FROM flow_records WHERE phase = {Phase.END:d} AND event_start <= $moment) e
        ON v.event_start = e.event_start AND v.event_id = e.event_id
    WHERE v.phase < {Phase.END:d} AND v.event_start <= $moment AND v.action IN ({Action.ALLOW:d}, {Action.AUDIT:d})
"""

# As it was at that moment: later records are left out, so bytes and state are those known then.
_AT = f"""(
    SELECT f.* REPLACE (CASE WHEN f.event_end <= $moment THEN f.event_end END AS event_end)
    FROM flow_records f SEMI JOIN ({OPEN_IDS}) o ON f.event_start = o.event_start AND f.event_id = o.event_id
    WHERE f.event_start <= $moment AND (f.ts <= $moment OR f.phase = {Phase.VERDICT:d}))"""
_OPEN_AT = flows_sql(_AT.replace("$moment", "moment::TIMESTAMP"))

# The same rows as `flows` with a condition on event_start, but every scan is limited by it, not only the first.
_BETWEEN = flows_sql(
    "(SELECT * FROM flow_records WHERE event_start >= since::TIMESTAMP AND event_start < until::TIMESTAMP)"
)
