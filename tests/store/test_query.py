"""Somebody else's SQL can read the events and do nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sectool.errors import SectoolError, UsageError
from store.query import StoppedError, explain, run, time_limit


def filled(lab: Any) -> Any:
    """A store in this process with ten flows and an event."""
    for flow in range(10):
        lab.ring().put(lab.record(flow=flow))
    lab.ring().put_blob({"type": "workload.start", "ts": lab.T0})
    store = lab.inside()
    store.step()
    return store


@pytest.fixture
def store(lab: Any) -> Any:
    """One of the test's own."""
    return filled(lab)


@pytest.fixture(scope="module")
def asked(make_lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One for all questions that leave it as it was, which each test makes sure of."""
    lab = make_lab(tmp_path_factory.mktemp("asked"))
    yield filled(lab)
    lab.close()


def untouched(store: Any) -> None:
    """All rows are still there, and ingest still works."""
    table = run(
        store.catalog, "SELECT (SELECT count(*) FROM flow_records) r, (SELECT count(*) FROM events) e"
    ).table
    assert table.to_pylist() == [{"r": 10, "e": 1}]
    with store.catalog.reading() as cursor:
        assert cursor.execute("SELECT current_setting('enable_external_access')").fetchall() == [(False,)]


HOSTILE = [
    "WITH gone AS (DELETE FROM s1.flow_records RETURNING *) SELECT * FROM gone",
    "WITH x AS (INSERT INTO s1.events SELECT * FROM s1.events RETURNING *) SELECT * FROM x",
    "WITH x AS (UPDATE s1.events SET type = 'x' RETURNING *) SELECT * FROM x",
    "DELETE FROM s1.flow_records",
    "DROP VIEW flows",
    "CREATE TABLE x (i INT)",
    "CREATE TEMP TABLE x (i INT)",
    "CREATE MACRO flows_between(a, b) AS TABLE SELECT 1",
    "COPY (SELECT 1) TO '{events}/x.csv'",
    "COPY flows TO '/tmp/x.csv'",
    "EXPORT DATABASE '{events}/x'",
    "ATTACH '{events}/x.duckdb' AS x",
    "ATTACH ':memory:' AS x",
    "DETACH s1",
    "USE s1",
    "CHECKPOINT s1",
    "SELECT * FROM force_checkpoint('s1')",
    "SELECT * FROM checkpoint('s1')",
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_blob('{events}/*')",
    "SELECT * FROM read_parquet('/etc/passwd')",
    "SELECT * FROM glob('/*')",
    "SELECT * FROM sniff_csv('/etc/passwd')",
    "SELECT * FROM '/etc/passwd'",
    "SELECT * FROM '{events}/chain.jsonl'",
    "SELECT (SELECT content FROM read_text('/etc/passwd'))",
    "SELECT * FROM flows WHERE rule IN (SELECT content FROM read_text('/etc/passwd'))",
    "SELECT * FROM query('SELECT * FROM read_text(''/etc/passwd'')')",
    "SELECT * FROM query_table('flows')",
    "SELECT * FROM json_execute_serialized_sql('{{}}')",
    "SELECT * FROM duckdb_secrets()",
    "SELECT * FROM enable_logging()",
    "SELECT * FROM enable_profiling()",
    "PRAGMA database_list",
    "PRAGMA enable_profiling",
    "SET memory_limit = '1TB'",
    "SET enable_external_access = true",
    "RESET ALL",
    "INSTALL httpfs",
    "LOAD '/tmp/x.so'",
    "CALL pragma_version()",
    "EXPLAIN ANALYZE DELETE FROM s1.flow_records",
    "EXPLAIN SELECT 1",
    "PREPARE p AS SELECT 1",
    "BEGIN",
    "COMMIT",
    "ROLLBACK; DELETE FROM s1.flow_records",
    "SELECT 1; SELECT 2",
    "",
    "  ;  ",
    "-- nothing",
    "SELECT",
    "SELECT * FROM nowhere",
    "SELECT 1 " + "+ 1" * 50_000,
    "(" * 5000,
]


@pytest.mark.parametrize("sql", HOSTILE, ids=lambda sql: sql[:40] or "empty")
def test_refused(asked: Any, sql: str) -> None:
    before = {path.name for path in asked.events.iterdir()}
    with pytest.raises(SectoolError) as refused:
        run(asked.catalog, sql.format(events=asked.events) if "{" in sql else sql, timeout_ms=5000)
    assert refused.value.message
    assert {path.name for path in asked.events.iterdir()} == before
    untouched(asked)


def test_without_the_outer_checks_the_engine_still_refuses(asked: Any) -> None:
    """Each layer for itself: read-only transaction, no external access, locked settings."""
    with asked.catalog.reading() as cursor:
        cursor.execute("BEGIN TRANSACTION READ ONLY")
        for sql in (
            "WITH gone AS (DELETE FROM s1.flow_records RETURNING *) SELECT * FROM gone",
            "SELECT * FROM read_text('/etc/passwd')",
            "ATTACH '/tmp/st-no-such.duckdb'",
            "COPY (SELECT 1) TO '/tmp/st-no-such.csv'",
            "SET enable_external_access = true",
            "SET memory_limit = '1TB'",
            "INSTALL httpfs",
            "LOAD '/tmp/x.so'",
        ):
            with pytest.raises(duckdb.Error):
                cursor.execute(sql)
            cursor.execute("ROLLBACK")
            cursor.execute("BEGIN TRANSACTION READ ONLY")
        cursor.execute("ROLLBACK")
    untouched(asked)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1 AS x",
        "FROM flows",
        "VALUES (1), (2)",
        "SELECT action, count(*) FROM flows GROUP BY ALL ORDER BY ALL; -- with a remark",
        "WITH RECURSIVE t(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM t WHERE i < 5) SELECT * FROM t",
        "SELECT * FROM flows_between(TIMESTAMP '2026-01-01', TIMESTAMP '2027-01-01')",
        "SELECT * FROM flows_open_at(TIMESTAMP '2027-01-01')",
        "SELECT body->>'name', json_extract(body, '$.x') FROM events",
        "SELECT s.i, f.* FROM range(3) s(i), flows f",
        "SELECT * FROM flows f ASOF JOIN events e ON f.event_start >= e.ts",
        "DESCRIBE flows",
        "SHOW TABLES",
        "SELECT time_bucket(INTERVAL 1 MINUTE, event_start) AS minute, count(*) FROM flows GROUP BY 1",
    ],
)
def test_allowed(asked: Any, sql: str) -> None:
    assert run(asked.catalog, sql).table.num_columns > 0


def test_limits(store: Any) -> None:
    result = run(store.catalog, "SELECT * FROM range(1000000000000) r(i)", limit=5000)
    assert result.table.num_rows == 5000
    assert result.truncated
    assert not run(store.catalog, "SELECT * FROM range(10)", limit=10).truncated
    started = time.monotonic()
    with pytest.raises(StoppedError, match=r"longer than 0\.3 s"):
        run(store.catalog, "SELECT count(*) FROM range(100000000000) a, range(1000000) b", timeout_ms=300)
    assert time.monotonic() - started < 5
    with pytest.raises(StoppedError, match="memory"):
        run(
            store.catalog,
            "SELECT list(repeat('x', 10000) || i) FROM range(100000000) r(i)",
            timeout_ms=60_000,
        )
    wide = run(store.catalog, "SELECT repeat('x', 10000) AS x FROM range(100000)", limit=100_000)
    assert wide.truncated
    assert wide.table.nbytes < 200 << 20
    untouched(store)


def test_plans_of_what_may_be_asked(store: Any) -> None:
    assert "Projection" in explain(store.catalog, "SELECT source_port + 1 FROM flow_records")
    assert "Total Time" in explain(store.catalog, "SELECT count(*) FROM flow_records -- remark", analyze=True)
    for sql in (
        "DELETE FROM s1.events",
        "ANALYZE DELETE FROM s1.events",
        "SELECT 1; SELECT 2",
        "(FORMAT json)",
    ):
        with pytest.raises(UsageError):
            explain(store.catalog, sql, analyze=True)
    with pytest.raises(StoppedError, match="longer than"):
        explain(
            store.catalog,
            "SELECT count(*) FROM range(100000000000) a, range(10)",
            analyze=True,
            timeout_ms=200,
        )
    untouched(store)


def test_ingest_goes_on_beside_a_heavy_query(store: Any, lab: Any) -> None:
    with store.catalog.reading() as cursor, pytest.raises(StoppedError), time_limit(cursor, 60_000):

        def ingest() -> None:
            for flow in range(100, 120):
                lab.ring().put(lab.record(flow=flow))
                store.step()
            store.catalog.interrupt_queries()

        thread = threading.Thread(target=ingest)
        thread.start()
        try:
            cursor.execute("SELECT count(*) FROM range(100000000000) a, range(1000000) b").fetchall()
        finally:
            thread.join()
    assert run(store.catalog, "SELECT count(*) n FROM flow_records").table["n"].to_pylist() == [30]


WORDS = [
    "SELECT",
    "*",
    "FROM",
    "flows",
    "(",
    ")",
    "1",
    ",",
    "x",
    "'",
    ";",
    "WITH",
    "AS",
    "read_text",
    "WHERE",
]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sql=st.text(max_size=60) | st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join))
def test_any_text_gives_rows_or_one_of_our_errors(asked: Any, sql: str) -> None:
    """Invariant: a result within the limits, or a SectoolError."""
    try:
        result = run(asked.catalog, sql, limit=10, timeout_ms=2000)
    except SectoolError:
        return
    assert result.table.num_rows <= 10


def test_errors_are_for_people(asked: Any) -> None:
    with pytest.raises(UsageError) as refused:
        run(asked.catalog, "SELECT sorce_ip FROM flows")
    assert "sorce_ip" in refused.value.message
    assert "source_ip" in refused.value.hint
