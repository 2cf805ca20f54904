"""The ids of flows as SQL makes them: the same as those the enforcer gives."""

from __future__ import annotations

import base64
import struct
import uuid

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sectool.flowids import ICMP_ANSWERS, community_id, new_event_id
from store.flowidsql import MACROS, low_half

PORTS = st.integers(0, 65535)


@pytest.fixture(scope="module")
def sql() -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect()
    for macro in MACROS:
        connection.execute(macro)
    return connection


@given(
    st.one_of(
        st.tuples(st.binary(min_size=4, max_size=4), st.binary(min_size=4, max_size=4)),
        st.tuples(st.binary(min_size=16, max_size=16), st.binary(min_size=16, max_size=16)),
    ),
    PORTS,
    PORTS,
    st.sampled_from([6, 17, 1, 58, 132, 255]),
    st.sampled_from([None, *ICMP_ANSWERS[1], *ICMP_ANSWERS[58], 3, 200]),
)
@settings(max_examples=300, deadline=None)
def test_community_ids(
    sql: duckdb.DuckDBPyConnection,
    ends: tuple[bytes, bytes],
    sport: int,
    dport: int,
    proto: int,
    kind: int | None,
) -> None:
    sport = sport if kind is None else kind
    halves = [struct.unpack(">QQ", end if len(end) == 16 else bytes(10) + b"\xff\xff" + end) for end in ends]
    row = sql.execute(
        "SELECT community_text(?::UBIGINT, ?::UBIGINT, ?::USMALLINT, ?::UBIGINT, ?::UBIGINT, ?::USMALLINT,"
        " ?::UTINYINT, ?::UTINYINT)",
        [*halves[0], sport, *halves[1], dport, proto, 4 if len(ends[0]) == 4 else 6],
    ).fetchone()
    wanted = base64.b64encode(community_id(*ends, sport, dport, proto)).decode()
    assert row == (f"1:{wanted}",)


def test_a_known_community_id(sql: duckdb.DuckDBPyConnection) -> None:
    """From the specification's baseline: tcp.pcap."""
    source, destination = bytes([128, 232, 110, 120]), bytes([66, 35, 250, 204])
    assert base64.b64encode(community_id(source, destination, 34855, 80)) == b"LQU9qZlK+B5F3KDmev6m5PMibrg="


@given(st.integers(0, 253_402_300_799_000_000))
@settings(max_examples=200, deadline=None)
def test_event_ids_follow_from_begin_and_their_last_half(sql: duckdb.DuckDBPyConnection, start: int) -> None:
    made = uuid.UUID(bytes=new_event_id(start))
    row = sql.execute(
        "SELECT event_uuid(make_timestamp(?), ?::UBIGINT)::VARCHAR", [start, low_half(made)]
    ).fetchone()
    assert row == (str(made),)
    assert made.version == 7 and made.variant == uuid.RFC_4122
