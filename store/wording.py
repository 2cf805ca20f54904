"""Flows in words, for lists and followers: what the view `flows` says of them, without asking SQL for it.

Planning the view takes the engine tens of milliseconds, most of them for the order of nine joins with dictionaries.
Tests hold the two to the same rows.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sectool.events import (
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
    Point,
)

# Columns of the view `flows`, in its order: a run of names of one type after the other.
_COLUMNS: tuple[tuple[pa.DataType, str], ...] = (
    (pa.int64(), "seq"),
    (pa.string(), "event_id"),
    (pa.timestamp("us"), "event_start event_end"),
    (pa.int64(), "duration_us"),
    (pa.bool_(), "open"),
    (pa.string(), "observation_point community_id direction transport"),
    (pa.uint16(), "ip_version"),
    (pa.string(), "source_ip"),
    (pa.uint16(), "source_port"),
    (pa.string(), "destination_ip"),
    (pa.uint16(), "destination_port"),
    (
        pa.string(),
        "source_identity source_labels source_workload destination_identity destination_labels "
        "destination_workload action drop_reason peer_reason decider rule policy owner peer_rule",
    ),
    (pa.bool_(), "default_deny"),
    (pa.string(), "pending_action pending_rule"),
    (pa.uint32(), "policy_revision"),
    (pa.string(), "policy_hash auth_method auth_result encryption cipher conn_state history"),
    (pa.uint64(), "source_bytes source_packets destination_bytes destination_packets bytes packets"),
    (pa.uint32(), "pid uid"),
    (pa.uint64(), "cgroup"),
    (pa.uint32(), "flow_count missed"),
    (pa.bool_(), "adopted coalesced restored observed"),
    (
        pa.int64(),
        "source_identity_id destination_identity_id source_labels_id destination_labels_id "
        "source_workload_id destination_workload_id rule_id peer_rule_id pending_rule_id",
    ),
)
FLOWS_SCHEMA = pa.schema([(name, kind) for kind, names in _COLUMNS for name in names.split()])

_TRANSPORT = {6: "tcp", 17: "udp", 1: "icmp", 58: "icmpv6"}
_LAST_MAPPED = 0xFFFF_FFFF


def _vocabulary(kind: type[IntEnum]) -> pa.Array:
    """Names by number, NULL where there is none."""
    names = {member.value: member.name.lower() for member in kind}
    return pa.array([names.get(n) if names.get(n) != "none" else None for n in range(256)], pa.string())


_WORDS: dict[type[IntEnum], pa.Array] = {
    kind: _vocabulary(kind)
    for kind in (Point, Action, Decider, DropReason, Auth, AuthResult, Encryption, Cipher)
}
_STATES = pc.utf8_upper(_vocabulary(ConnState))
_DIRECTIONS = pa.array([None, "outbound", "inbound", "internal", *[None] * 252])
_TRANSPORTS = pa.array([_TRANSPORT.get(n, str(n)) for n in range(256)])


class Names:
    """Dictionary entries by id, asked for once each: a whole one never changes. The first column asked for tells it."""

    def __init__(self) -> None:
        self._known: dict[str, dict[int, tuple[Any, ...]]] = {}

    def of(
        self, cursor: duckdb.DuckDBPyConnection, table: str, columns: Sequence[str], ids: pa.Array
    ) -> list[pa.Array]:
        """One array per column: the entries' fields in the order of `ids`, NULL for unknown ones; of `key`, 0."""
        known = self._known.setdefault(table, {})
        different = ids.dictionary_encode()
        numbers = different.dictionary.to_pylist()
        found: dict[int, tuple[Any, ...]] = {}
        missing = [number for number in numbers if number and number not in known]
        if missing:
            listed = ", ".join(columns)
            told = cursor.execute(
                f"SELECT id, {listed} FROM {table} WHERE id IN (SELECT unnest(?::BIGINT[]))",  # noqa: S608
                [missing],
            ).fetchall()
            if len(known) > 100_000:
                known.clear()
            found = {row[0]: row[1:] for row in told}
            known.update({number: row for number, row in found.items() if row[0] is not None})
        nothing = tuple(0 if name == "key" else None for name in columns)
        rows = [known.get(number) or found.get(number, nothing) for number in numbers]
        out = []
        for place, name in enumerate(columns):
            kind = pa.int64() if name == "key" else pa.string()
            out.append(pa.array([row[place] for row in rows], kind).take(different.indices))
        return out


def word(kind: type[IntEnum], codes: pa.Array) -> pa.Array:
    """Names of numbers."""
    return _WORDS[kind].take(pc.fill_null(pc.if_else(pc.less(codes, 256), codes, 255), 255))


def address_text(high: pa.Array, low: pa.Array) -> pa.Array:
    """Addresses from the two columns that hold them."""
    seen: dict[tuple[int, int], str] = {}
    out = []
    for pair in zip(high.to_pylist(), low.to_pylist(), strict=True):
        text = seen.get(pair)
        if text is None:
            mapped = pair[0] == 0 and pair[1] >> 32 == 0xFFFF
            number = pair[1] & _LAST_MAPPED if mapped else pair[0] << 64 | pair[1]
            text = str(ipaddress.IPv4Address(number) if mapped else ipaddress.IPv6Address(number))
            seen[pair] = text
        out.append(text)
    return pa.array(out, pa.string())


def _unless(column: pa.Array, value: int) -> pa.Array:
    return pc.if_else(pc.equal(column, pa.scalar(value, column.type)), None, column)


def flows_table(cursor: duckdb.DuckDBPyConnection, records: pa.Table, names: Names) -> pa.Table:
    """Rows of the view flows: of `store.schema.merged_sql`, or of VERDICT records with nothing later (and
    `community_id`)."""
    table = records.combine_chunks()
    raw: Callable[[str], pa.Array] = lambda name: table.column(name).combine_chunks()  # noqa: E731
    flags = np.asarray(raw("flags"))
    start, ts = (raw(name).cast(pa.int64()) for name in ("event_start", "ts"))
    allowed = pc.is_in(raw("action"), pa.array([Action.ALLOW.value, Action.AUDIT.value], pa.uint8()))
    rules = {
        name: names.of(cursor, "rules", ("text", "policy", "owner", "key"), raw(name))
        for name in ("rule", "peer_rule", "pending_rule")
    }
    columns: dict[str, Any] = {
        "seq": raw("seq"),
        "event_id": raw("event_id"),
        "event_start": raw("event_start"),
        "event_end": raw("event_end"),
        "duration_us": raw("duration_us")
        if "duration_us" in table.column_names
        else pc.subtract(pc.coalesce(raw("event_end").cast(pa.int64()), ts), start),
        "open": pc.and_(pc.is_null(raw("event_end")), allowed),
        "observation_point": word(Point, raw("point")),
        "community_id": raw("community_id"),
        "direction": _DIRECTIONS.take(raw("direction")),
        "transport": _TRANSPORTS.take(raw("transport")),
        "action": word(Action, raw("action")),
        "drop_reason": word(DropReason, raw("drop_reason")),
        "peer_reason": word(DropReason, raw("peer_reason")),
        "decider": word(Decider, raw("decider")),
        "policy": rules["rule"][1],
        "owner": rules["rule"][2],
        **{name: columns[0] for name, columns in rules.items()},
        **{f"{name}_id": columns[3] for name, columns in rules.items()},
        "default_deny": pa.array(flags & FLAG_DEFAULT_DENY != 0),
        "pending_action": word(Action, raw("pending_action")),
        "policy_revision": _unless(raw("policy_revision"), 0),
        "policy_hash": pa.array(
            [f"{n & (1 << 64) - 1:x}" if n else None for n in raw("policy_hash").to_pylist()], pa.string()
        ),
        "auth_method": word(Auth, raw("auth_method")),
        "auth_result": word(AuthResult, raw("auth_result")),
        "encryption": word(Encryption, raw("encryption")),
        "cipher": word(Cipher, raw("cipher")),
        "conn_state": _STATES.take(raw("conn_state")),
        "history": pc.if_else(pc.equal(raw("history"), ""), None, raw("history")),
        "bytes": pc.add(raw("source_bytes"), raw("destination_bytes")),
        "packets": pc.add(raw("source_packets"), raw("destination_packets")),
        "pid": _unless(raw("pid"), 0),
        "uid": _unless(raw("uid"), 0xFFFF_FFFF),
        "cgroup": _unless(raw("cgroup"), 0),
        "adopted": pa.array(flags & FLAG_ADOPTED != 0),
        "coalesced": pa.array(flags & FLAG_COALESCED != 0),
        "restored": pa.array(flags & FLAG_RESTORED != 0),
        "observed": pa.array(flags & FLAG_OBSERVED != 0),
    }
    for end in ("source", "destination"):
        columns[f"{end}_ip"] = address_text(raw(f"{end}_ip_hi"), raw(f"{end}_ip_lo"))
    for dictionary, name, ids in (
        ("identities", "spiffe_id", "identity"),
        ("labels", "text", "labels"),
        ("workloads", "name", "workload"),
    ):
        for end in ("source", "destination"):
            column = f"{end}_{ids}"
            columns[column], columns[f"{column}_id"] = names.of(
                cursor, dictionary, (name, "key"), raw(column)
            )
    for column in FLOWS_SCHEMA.names:
        if column not in columns:
            columns[column] = raw(column)
    return pa.table({name: columns[name] for name in FLOWS_SCHEMA.names}).cast(FLOWS_SCHEMA)
