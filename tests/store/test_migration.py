"""Segments of version 1 become such as are written now: the same flows, in the chain, found by the index."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import duckdb
import pytest

from sectool.labels import LabelSet, stable_id
from store import migration, segment
from store.query import run
from store.verify import verify

T0 = 1_772_323_200_000_000
NAME = "flows-20260301T000000Z-1.duckdb"
WEB, DB = LabelSet.parse("app=web"), LabelSet.parse("app=db")
RULE = stable_id(b"allow app=web to call app=db")

# As version 1 made them.
TABLES = """
CREATE TABLE meta (version INTEGER, created TIMESTAMP, first_seq BIGINT);
CREATE TABLE flow_records (seq BIGINT, phase UTINYINT, point UTINYINT, action UTINYINT, transport UTINYINT,
    direction UTINYINT, auth_method UTINYINT, auth_result UTINYINT, encryption UTINYINT, cipher UTINYINT,
    conn_state UTINYINT, decider UTINYINT, pending_action UTINYINT, flags UTINYINT, drop_reason USMALLINT,
    peer_reason USMALLINT, source_port USMALLINT, destination_port USMALLINT, ip_version USMALLINT,
    policy_revision UINTEGER, flow_count UINTEGER, missed UINTEGER, pid UINTEGER, uid UINTEGER, ts TIMESTAMP,
    event_start TIMESTAMP, event_end TIMESTAMP, event_id UUID, source_ip_hi UBIGINT, source_ip_lo UBIGINT,
    destination_ip_hi UBIGINT, destination_ip_lo UBIGINT, community BLOB, history VARCHAR, source_bytes UBIGINT,
    source_packets UBIGINT, destination_bytes UBIGINT, destination_packets UBIGINT, source_identity BIGINT,
    destination_identity BIGINT, source_labels BIGINT, destination_labels BIGINT, source_workload BIGINT,
    destination_workload BIGINT, rule BIGINT, peer_rule BIGINT, pending_rule BIGINT, policy_hash BIGINT,
    cgroup UBIGINT);
CREATE TABLE identities (id BIGINT, spiffe_id VARCHAR, trust_domain VARCHAR, labels_id BIGINT, fingerprint VARCHAR,
    serial VARCHAR, not_before TIMESTAMP, not_after TIMESTAMP, issuer VARCHAR);
CREATE TABLE labels (id BIGINT, text VARCHAR, labels MAP(VARCHAR, VARCHAR));
CREATE TABLE workloads (id BIGINT, name VARCHAR, labels_id BIGINT, uid BIGINT, "user" VARCHAR, executable VARCHAR,
    sha256 VARCHAR, unit VARCHAR, cgroup VARCHAR);
CREATE TABLE rules (id BIGINT, policy VARCHAR, kind VARCHAR, owner VARCHAR, "index" BIGINT, text VARCHAR,
    revision BIGINT);
CREATE TABLE events (seq BIGINT, ts TIMESTAMP, type VARCHAR, body VARCHAR);
CREATE TABLE positions (ring BIGINT, next BIGINT, lost BIGINT);
"""


def record(seq: int, *, phase: int = 1, source: int = WEB.id) -> dict[str, Any]:
    return {
        "seq": seq,
        "phase": phase,
        "point": 1,
        "action": 1,
        "transport": 6,
        "direction": 1,
        "ip_version": 4,
        "flow_count": 1,
        "uid": 1000,
        "ts": T0,
        "event_start": T0,
        "event_end": T0 + 9 if phase == 3 else None,
        "event_id": "019ca6b1-dc00-7000-8000-0000000000aa",
        "source_ip_lo": 0xFFFF0A000001,
        "destination_ip_lo": 0xFFFF0A000002,
        "source_port": 40000,
        "destination_port": 443,
        "community": bytes(20),
        "history": "S",
        "source_bytes": 7,
        "source_labels": source,
        "destination_labels": DB.id,
        "rule": RULE,
        "peer_rule": 77,
    }


def write(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with duckdb.connect(str(path)) as connection:
        connection.execute(TABLES)
        connection.execute("INSERT INTO meta VALUES (1, make_timestamp(?), 1)", [T0])
        types = dict(
            connection.execute(
                "SELECT column_name, data_type FROM duckdb_columns() WHERE table_name = 'flow_records'"
            ).fetchall()
        )
        for row in (
            record(1),
            record(2, phase=3),
        ):
            whole = {name: row.get(name, "" if kind == "VARCHAR" else 0) for name, kind in types.items()}
            places = ", ".join("make_timestamp(?)" if types[name] == "TIMESTAMP" else "?" for name in whole)
            connection.execute(f"INSERT INTO flow_records VALUES ({places})", list(whole.values()))
        for labels in (WEB, DB):
            connection.execute(
                "INSERT INTO labels VALUES (?, ?, MAP {'app': ?})", [labels.id, str(labels), labels["app"]]
            )
        connection.execute("INSERT INTO workloads VALUES (5, 'web', ?, 1, 'u', '/x', '', '', '/')", [WEB.id])
        connection.execute("INSERT INTO rules VALUES (?, 'shop', 'intent', 'team', 0, 'allow it', 3)", [RULE])
        connection.execute("INSERT INTO events VALUES (3, make_timestamp(?), 'enforcer.start', '{}')", [T0])
        connection.execute("CHECKPOINT")


@pytest.mark.parametrize("form", ["sealed", "left by a dead store", "compact"])
def test_it_is_read_as_before(lab: Any, form: str) -> None:
    events = lab.state / "events"
    path = events / NAME
    write(path)
    if form != "left by a dead store":
        segment.seal(events, path, segment.Summary(2, 1, 1, 3, T0, T0))
    if form == "compact":
        with duckdb.connect(str(path)) as connection:
            folder = path.with_suffix(".parquet")
            folder.mkdir()
            tables = [
                row[0] for row in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()
            ]
            for table in tables:
                connection.execute(f"COPY {table} TO '{folder}/{table}.parquet' (FORMAT parquet)")
        entry = {"segment": folder.name, "replaces": NAME, "sha256": segment.file_hash(folder), "bytes": 1}
        segment.append_entry(events, {**entry, "records": 2, "events": 1, "first_seq": 1, "last_seq": 3})
        path.unlink()
    lab.labels("app=db")
    lab.ring().put(lab.record(flow=9, start=T0 + 1_000_000, source_labels=WEB.id, destination_labels=DB.id))
    store = lab.inside()
    store.step()
    rows = run(
        store.catalog,
        "SELECT event_id, source_labels, destination_labels, rule, rule_id, peer_rule, peer_rule_id, event_end IS NULL"
        " AS open, source_bytes, seq FROM flows ORDER BY seq",
    ).table.to_pylist()
    assert [row["seq"] for row in rows] == [1, 4]
    old, new = rows
    assert old == {
        "event_id": "019ca6b1-dc00-7000-8000-0000000000aa",
        "source_labels": "app=web",
        "destination_labels": "app=db",
        "rule": "allow it",
        "rule_id": RULE,
        "peer_rule": None,
        "peer_rule_id": 77,
        "open": False,
        "source_bytes": 7,
        "seq": 1,
    }
    assert (new["source_labels"], new["destination_labels"]) == ("app=web", "app=db")
    workload = run(
        store.catalog, "SELECT w.key, l.text FROM workloads w JOIN labels l ON l.id = w.labels_id"
    ).table
    assert workload.to_pylist() == [{"key": 5, "text": "app=web"}]
    assert run(store.catalog, "SELECT type FROM events WHERE seq = 3").table.to_pylist() == [
        {"type": "enforcer.start"}
    ]
    store.close()
    assert verify(lab.state).problems == ()
    assert [migration.version_of(file) for file in segment.segment_files(events)] == [2, 2]


def test_what_cannot_be_converted_stays(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    events = lab.state / "events"
    path = events / NAME
    write(path)
    segment.seal(events, path, segment.Summary(2, 1, 1, 3, T0, T0))
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(migration, "_value", lambda name, _: "0" if name == "source_bytes" else f'r."{name}"')
    lab.ring().put(lab.record(flow=9))
    store = lab.inside()
    store.step()
    assert store.shelf.unopened == {NAME}
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    assert not list(events.glob("*.new*"))
    assert run(store.catalog, "SELECT count(*) AS n FROM flows").table.to_pylist() == [{"n": 1}]
    store.close()
    assert verify(lab.state).problems == ()
