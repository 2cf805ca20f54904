"""The documented views: what a flow's records become."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sectool.events import FLAG_DEFAULT_DENY, Action, Cipher, ConnState, DropReason, Encryption, Phase
from store import schema
from store.query import run


@pytest.fixture(scope="module")
def macros() -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect()
    for statement in schema.catalog_ddl():
        connection.execute(statement)
    return connection


GROUPS = st.lists(st.sampled_from([0, 0, 1, 0x2001, 65535]), min_size=8, max_size=8)
ADDRESSES = st.integers(0, (1 << 128) - 1) | GROUPS.map(
    lambda groups: sum(group << (16 * place) for place, group in enumerate(groups))
)


@settings(max_examples=300, deadline=None)
@given(number=ADDRESSES)
def test_addresses_are_written_as_python_writes_them(macros: duckdb.DuckDBPyConnection, number: int) -> None:
    row = macros.execute(
        "SELECT ip_text(?::UBIGINT, ?::UBIGINT)", [number >> 64, number & (1 << 64) - 1]
    ).fetchall()
    address = ipaddress.IPv6Address(number)
    assert row == [(str(address.ipv4_mapped or address),)]


@pytest.fixture
def one_flow(lab: Any) -> dict[str, Any]:
    """A flow with a verdict, two updates and an end, in one row."""
    ring = lab.ring()
    labels, others = lab.labels("app=web,env=prod"), lab.labels("app=db")
    ids = {
        "source_labels": labels,
        "destination_labels": others,
        "source_identity": lab.identity("spiffe://lab.example/web", labels),
        "source_workload": lab.workload("web", labels),
        "rule": lab.rule("allow app=web to call app=db"),
    }
    common = {**ids, "policy_revision": 3, "policy_hash": 0xABC, "cgroup": 99}
    ring.put(lab.record(**common))
    ring.put(lab.record(**common, phase=Phase.UPDATE, ts=lab.T0 + 10, source_bytes=5, destination_bytes=6))
    ring.put(lab.record(**common, phase=Phase.UPDATE, ts=lab.T0 + 20, source_bytes=50, destination_bytes=60))
    end = {"ts": lab.T0 + 30, "end": lab.T0 + 30, "source_bytes": 500, "destination_bytes": 600}
    packets = {
        "source_packets": 3,
        "destination_packets": 4,
        "conn_state": ConnState.SF,
        "history": b"ShADadFf",
    }
    ring.put(lab.record(**common, **end, **packets, phase=Phase.END))
    store = lab.inside()
    assert store.step() > 0
    (row,) = run(store.catalog, "FROM flows").table.to_pylist()
    return dict(row)


def test_one_row_per_flow_with_names_and_words(one_flow: dict[str, Any]) -> None:
    want = {
        "source_ip": "10.0.0.1",
        "source_port": 40000,
        "destination_ip": "10.0.0.2",
        "destination_port": 443,
        "source_labels": "app=web,env=prod",
        "destination_labels": "app=db",
        "source_workload": "web",
        "source_identity": "spiffe://lab.example/web",
        "destination_identity": None,
        "rule": "allow app=web to call app=db",
        "owner": "team-a",
        "policy": "shop",
        "action": "allow",
        "drop_reason": None,
        "default_deny": False,
        "encryption": "plain",
        "cipher": None,
        "auth_method": "noise_ix",
        "auth_result": "proven",
        "conn_state": "SF",
        "history": "ShADadFf",
        "source_bytes": 500,
        "destination_bytes": 600,
        "bytes": 1100,
        "packets": 7,
        "duration_us": 30,
        "open": False,
        "direction": "outbound",
        "observation_point": "initiator",
        "transport": "tcp",
        "policy_revision": 3,
        "policy_hash": "abc",
        "uid": 1000,
        "pid": 7,
        "cgroup": 99,
        "flow_count": 1,
        "community_id": "1:UWHKJ/x6OQ1YiVv4rIl0t3yhjg8=",
    }
    assert {name: one_flow[name] for name in want} == want


def test_words_of_a_denial(lab: Any) -> None:
    for flow, reason in enumerate(DropReason, 1):
        lab.ring().put(
            lab.record(
                flow=flow,
                action=Action.DENY,
                drop_reason=reason,
                flags=FLAG_DEFAULT_DENY,
                decider=2,
                uid=0xFFFFFFFF,
            )
        )
    store = lab.inside()
    store.step()
    rows = run(
        store.catalog, "SELECT drop_reason, action, decider, default_deny, uid, open FROM flows ORDER BY seq"
    ).table
    assert rows["drop_reason"].to_pylist() == [None, *(r.name.lower() for r in DropReason if r)]
    assert set(rows["decider"].to_pylist()) == {"peer"}
    assert set(rows["uid"].to_pylist()) == {None}
    assert not any(rows["open"].to_pylist())


def test_a_flow_cut_later_shows_why(lab: Any) -> None:
    lab.ring().put(lab.record())
    lab.ring().put(lab.record(phase=Phase.END, end=lab.T0 + 5, drop_reason=DropReason.POLICY_CHANGED))
    store = lab.inside()
    store.step()
    (row,) = run(store.catalog, "SELECT action, drop_reason, open FROM flows").table.to_pylist()
    assert row == {"action": "allow", "drop_reason": "policy_changed", "open": False}


def test_flows_whose_verdict_was_lost_are_shown_once(lab: Any) -> None:
    lab.ring().put(lab.record(flow=1, phase=Phase.UPDATE, source_bytes=7, ts=lab.T0 + 1))
    lab.ring().put(lab.record(flow=1, phase=Phase.UPDATE, source_bytes=9, ts=lab.T0 + 2))
    lab.ring().put(lab.record(flow=2, phase=Phase.END, source_bytes=8, end=lab.T0 + 3))
    store = lab.inside()
    store.step()
    rows = run(store.catalog, "SELECT source_bytes, open FROM flows ORDER BY source_bytes").table.to_pylist()
    assert rows == [{"source_bytes": 8, "open": False}, {"source_bytes": 9, "open": True}]


def test_encryption_words(lab: Any) -> None:
    lab.ring().put(lab.record(encryption=Encryption.ENCRYPTED, cipher=Cipher.AES_256_GCM))
    store = lab.inside()
    store.step()
    (row,) = run(store.catalog, "SELECT encryption, cipher FROM flows").table.to_pylist()
    assert row == {"encryption": "encrypted", "cipher": "aes_256_gcm"}


def test_open_at_a_moment(lab: Any) -> None:
    second = 1_000_000
    ring, at = lab.ring(), lab.T0
    ring.put(lab.record(flow=1, start=at))  # still open
    ring.put(lab.record(flow=2, start=at))
    ring.put(lab.record(flow=2, start=at, phase=Phase.UPDATE, ts=at + 4 * second, source_bytes=4))
    ring.put(lab.record(flow=2, start=at, phase=Phase.UPDATE, ts=at + 6 * second, source_bytes=6))
    ring.put(
        lab.record(flow=2, start=at, phase=Phase.END, ts=at + 9 * second, end=at + 9 * second, source_bytes=9)
    )
    ring.put(lab.record(flow=3, start=at + 7 * second))  # begins later
    ring.put(lab.record(flow=4, start=at, action=Action.DENY))  # never open
    store = lab.inside()
    store.step()

    def open_at(moment: int) -> list[tuple[int, bool, int]]:
        sql = f"SELECT event_id, open, source_bytes FROM flows_open_at(make_timestamp({moment})) ORDER BY event_id"
        rows = run(store.catalog, sql).table.to_pylist()
        return [
            (int(row["event_id"].replace("-", "")[16:], 16), row["open"], row["source_bytes"]) for row in rows
        ]

    assert open_at(at - 1) == []
    assert open_at(at + 5 * second) == [(1, True, 0), (2, True, 4)]
    assert open_at(at + 8 * second) == [(1, True, 0), (2, True, 6), (3, True, 0)]
    assert open_at(at + 9 * second) == [(1, True, 0), (3, True, 0)]
    between = f"SELECT count(*) n FROM flows_between(make_timestamp({at}), make_timestamp({at + 7 * second}))"
    assert run(store.catalog, between).table["n"][0].as_py() == 3


def test_the_documentation_names_every_column(lab: Any) -> None:
    text = (Path(__file__).parents[2] / "docs" / "store.md").read_text()
    store = lab.inside()
    for view in ("flows", "flow_records", "events", *schema.DICTIONARIES):
        columns = run(store.catalog, f"SELECT * FROM {view} LIMIT 0").table.column_names
        missing = [name for name in columns if f"`{name}`" not in text]
        assert not missing, f"docs/store.md does not describe {missing} of {view}"
