"""Flow filters (sectool.filters) as conditions on flow_records.

Names and labels are looked up in the dictionaries first: a condition on the records compares numbers only, which
DuckDB answers from a column's minima and maxima for whole row groups. Values travel as parameters, never as SQL.
"""

# ruff: noqa: S608 -- columns are named by this module alone, values are parameters

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import Any

from sectool.events import Encryption
from sectool.filters import (
    Address,
    Clause,
    Field,
    Filter,
    InNetwork,
    IsEncrypted,
    IsProtocol,
    IsReason,
    IsVerdict,
    LabelMatch,
    Pattern,
    PortRange,
    Side,
    Value,
)

Lookup = Callable[[str, list[Any]], list[int]]  # SQL giving ids and its parameters, to the ids
Condition = tuple[str, list[Any]]

_MAPPED = 0xFFFF << 32
_U64 = (1 << 64) - 1


def compile_filter(filter_: Filter, lookup: Lookup) -> Condition:
    """SQL over the columns of flow_records, with `?` for each of the parameters that come along."""
    parts: list[str] = []
    parameters: list[Any] = []
    for clause in filter_.clauses:
        sql, values = _clause(clause, lookup)
        parts.append(f"NOT ({sql})" if clause.negated else f"({sql})")
        parameters += values
    return " AND ".join(parts) or "true", parameters


def _clause(clause: Clause, lookup: Lookup) -> Condition:
    ends = {Side.FROM: ("source",), Side.TO: ("destination",), Side.ANY: ("source", "destination")}[
        clause.side
    ]
    conditions = [_value(clause.field, value, end, lookup) for value in clause.values for end in ends]
    return " OR ".join(sql for sql, _ in conditions), [p for _, values in conditions for p in values]


def _value(field: Field, value: Value, end: str, lookup: Lookup) -> Condition:
    match value:
        case LabelMatch():
            return _among(f"{end}_labels", _label_ids(value, lookup))
        case Pattern() if field is Field.IDENTITY:
            return _among(f"{end}_identity", _name_ids("identities", "spiffe_id", value, lookup))
        case Pattern():
            return _among(f"{end}_workload", _name_ids("workloads", "name", value, lookup))
        case Address():
            hi, lo = _halves(value.address)
            return f"({end}_ip_hi = ? AND {end}_ip_lo = ?)", [hi, lo]
        case InNetwork():
            return _network(value, end)
        case PortRange():
            return f"{end}_port BETWEEN ? AND ?", [value.low, value.high]
        case IsVerdict():
            return "action = ?", [int(value.action)]
        case IsReason():
            return "(drop_reason = ? OR peer_reason = ?)", [int(value.reason)] * 2
        case IsProtocol():
            return "transport = ?", [value.number]
        case IsEncrypted():
            return f"encryption {'=' if value.yes else '<>'} ?", [int(Encryption.ENCRYPTED)]


def _label_ids(match: LabelMatch, lookup: Lookup) -> list[int]:
    tests: list[str] = []
    parameters: list[str] = []
    for key, value in match.labels:
        if value is None:
            tests.append("map_contains(labels, ?)")
            parameters.append(key)
        else:
            tests.append("labels[?] = ?")
            parameters += [key, value]
    return lookup(f"SELECT id FROM labels WHERE {' AND '.join(tests)}", list(parameters))


def _name_ids(table: str, column: str, pattern: Pattern, lookup: Lookup) -> list[int]:
    text = pattern.text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_").replace("*", "%")
    return lookup(f"SELECT id FROM {table} WHERE {column} LIKE ? ESCAPE '\\'", [text])


def _among(column: str, ids: list[int]) -> Condition:
    if not ids:
        return "false", []
    if len(ids) <= 64:
        return f"{column} IN ({', '.join('?' * len(ids))})", list(ids)
    return f"{column} IN (SELECT unnest(?::BIGINT[]))", [ids]


def _halves(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> tuple[int, int]:
    """The two columns an address is stored in (IPv4 as ::ffff:a.b.c.d)."""
    number = int(address)
    return (0, _MAPPED | number) if address.version == 4 else (number >> 64, number & _U64)


def _network(value: InNetwork, end: str) -> Condition:
    first = _halves(value.network.network_address)
    last = _halves(value.network.broadcast_address)
    if first[0] == last[0]:
        sql, values = f"{end}_ip_hi = ? AND {end}_ip_lo BETWEEN ? AND ?", [first[0], first[1], last[1]]
    else:
        sql, values = f"{end}_ip_hi BETWEEN ? AND ?", [first[0], last[0]]
    if value.network.version == 6 and first[0] == 0 and first[1] < _MAPPED:
        # A network around ::ffff:0:0/96 holds the place where IPv4 is kept here, but no IPv4.
        sql += f" AND NOT ({end}_ip_hi = 0 AND {end}_ip_lo BETWEEN ? AND ?)"
        values += [_MAPPED, _MAPPED | 0xFFFFFFFF]
    return f"({sql})", values
