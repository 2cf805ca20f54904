"""What a question can be about: an address, an identity, a workload, labels, a policy, or one flow.

10.0.0.7              an address (also a network: 10.0.0.0/24)
spiffe://lab/web      an identity; * stands for any text
app=web,env=prod      all with these labels
019aab3c-7f52-…       a flow by its event.id; 1:hO+sN4H… by its community id
policy:shop           a policy document;  workload:web  a workload
shop                  a workload of that name, else a policy of that name
"""

# ruff: noqa: S608 -- columns are named by this module alone, values are parameters

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
import uuid
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

import duckdb

from sectool.errors import UsageError
from sectool.filters import FLAGS as FILTER_FLAGS
from sectool.filters import Field, Filter, FilterError, Side, build, flag_name
from store.filtersql import Condition, compile_filter
from store.flowidsql import COMMUNITY_COLUMNS, community_of, low_half
from store.narrowing import narrow, widen

if TYPE_CHECKING:
    from store.catalog import Catalog

MAX_TEXT = 2048
_COMMUNITY = re.compile(r"1:[A-Za-z0-9+/]{27}=")
_ALL = Filter()
_OF_COMMUNITY = f"community = ? AND community_text({COMMUNITY_COLUMNS}) = ?"


class Sort(StrEnum):
    """What an entity is."""

    ADDRESS = "ip"
    IDENTITY = "identity"
    WORKLOAD = "workload"
    LABELS = "labels"
    POLICY = "policy"
    FLOW = "flow"


@dataclass(frozen=True, slots=True)
class Entity:
    """Something asked about. `begun` (UTC microseconds) is known of a flow alone."""

    sort: Sort
    text: str
    filter: Filter = _ALL
    community: str = ""
    begun: int | None = None

    def condition(self, cursor: duckdb.DuckDBPyConnection) -> Condition:
        """Which flow_records speak of it."""
        if self.sort is Sort.FLOW:
            return _OF_COMMUNITY, [_prefix(self.community), self.community]
        if self.sort is Sort.POLICY:
            ids = [
                row[0]
                for row in cursor.execute("SELECT id FROM rules WHERE policy = ?", [self.text]).fetchall()
            ]
            test = "list_contains(?::BIGINT[], {})"
            return " OR ".join(test.format(c) for c in ("rule", "peer_rule", "pending_rule")), [ids] * 3
        return conditions(cursor, self.filter)


def conditions(cursor: duckdb.DuckDBPyConnection, filter_: Filter) -> Condition:
    """A filter as SQL over flow_records, its names looked up with `cursor`."""
    return compile_filter(
        filter_, lambda sql, values: [int(row[0]) for row in cursor.execute(sql, values).fetchall()]
    )


def find_entity(catalog: Catalog, cursor: duckdb.DuckDBPyConnection, text: str) -> Entity:
    """What `text` names. Raises UsageError when nothing on record has that name."""
    text = text.strip()
    if not text or len(text) > MAX_TEXT:
        raise UsageError("name an address, identity, workload, policy, flow, or labels k=v")
    with_prefix, _, rest = text.partition(":")
    if with_prefix in ("policy", "workload") and rest and not rest.startswith("/"):
        return _named(Sort(with_prefix), rest)
    if text.startswith("spiffe://"):
        return Entity(Sort.IDENTITY, text, _filter(Field.IDENTITY, text))
    if _COMMUNITY.fullmatch(text):
        return _flow(catalog, cursor, text, _OF_COMMUNITY, [_prefix(text), text], None)
    try:
        number = uuid.UUID(text) if len(text) == 36 else None
    except ValueError:
        number = None
    if number is not None:
        return _flow(
            catalog, cursor, str(number), "event_id = ?", [low_half(number)], (number.int >> 80) * 1000
        )
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        pass
    else:
        field = Field.NET if "/" in text else Field.IP
        return Entity(
            Sort.ADDRESS, text if field is Field.NET else str(network.network_address), _filter(field, text)
        )
    if "=" in text:
        return Entity(Sort.LABELS, text, _filter(Field.LABEL, text))
    return _bare(cursor, text)


def _bare(cursor: duckdb.DuckDBPyConnection, text: str) -> Entity:
    for sort, table, column in ((Sort.WORKLOAD, "workloads", "name"), (Sort.POLICY, "rules", "policy")):
        if cursor.execute(f"SELECT 1 FROM {table} WHERE {column} = ? LIMIT 1", [text]).fetchall():
            return _named(sort, text)
    import difflib  # only on the way to an error

    names = cursor.execute("SELECT name FROM workloads UNION SELECT policy FROM rules LIMIT 5000").fetchall()
    near = difflib.get_close_matches(text, [row[0] for row in names if row[0]], 3, 0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise UsageError(
        f"nothing on record is called {text!r}",
        f"{hint}Name an address, spiffe://… identity, workload, policy, labels k=v, or the event.id of a flow",
    )


def _named(sort: Sort, name: str) -> Entity:
    return Entity(sort, name, _filter(Field.WORKLOAD, name) if sort is Sort.WORKLOAD else _ALL)


def _filter(field: Field, text: str) -> Filter:
    try:
        return build([(FILTER_FLAGS[flag_name(field, Side.ANY)], text, False)])
    except FilterError as error:
        raise UsageError(error.message, error.hint) from None


def _prefix(text: str) -> int:
    """What records keep of a community id: few rows have it, and of those the whole is worked out."""
    try:
        return int.from_bytes(base64.b64decode(text[2:], validate=True)[:2], "big")
    except binascii.Error:
        raise UsageError(f"{text!r} is no community id") from None


def _flow(
    catalog: Catalog,
    cursor: duckdb.DuckDBPyConnection,
    text: str,
    test: str,
    values: list[object],
    begun: int | None,
) -> Entity:
    """A flow's community id and begin; the id holds the millisecond, so that few segments are looked at."""
    since, until = (None, None) if begun is None else (begun - 1000, begun + 2001)
    narrow(catalog, cursor, since, until)
    near = (
        ""
        if begun is None
        else f" AND event_start BETWEEN make_timestamp({since}) AND make_timestamp({until})"
    )
    rows = cursor.execute(
        f"SELECT {community_of('r')}, epoch_us(event_start) FROM flow_records r WHERE {test}{near}"
        " ORDER BY seq DESC LIMIT 1",
        values,
    ).fetchall()
    widen(cursor)
    if not rows:
        raise UsageError(
            f"no flow {text} is on record",
            "it may be older than what is kept; `sectool flows -o wide` lists what there is",
        )
    return Entity(Sort.FLOW, text, community=str(rows[0][0]), begun=int(rows[0][1]))
