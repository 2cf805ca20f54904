"""Who may ask and means harm: after each attack the store still takes events in, and answers others.

One running store, attacked over its socket. What SQL is refused, and by which layer, is in test_query.py.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import resource
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest

from sectool.api import wire
from sectool.api.client import Client
from sectool.api.server import Peer
from sectool.errors import SectoolError, StoreError, UsageError
from store import bounds, query
from store.query import time_limit
from store.serve import MAX_CLIENTS, MAX_OTHERS, MAX_OTHERS_QUERIES, MAX_QUERIES, Server
from tests.store.conftest import StoreLab

PATIENCE_S = 60.0
ENDLESS = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT max(n) FROM r"


class Target:
    """A running store, and what says that it is well."""

    def __init__(self, lab: StoreLab) -> None:
        self.lab = lab
        self.flows = 0
        self.path = lab.run / "events.sock"
        assert lab.process is not None
        self.pid = lab.process.pid

    def ask(self, sql: str, **fields: Any) -> Any:
        """One query on a connection of its own."""
        with Client(self.path, timeout=PATIENCE_S) as client:
            return client.call("query", sql=sql, **fields)

    def is_well(self) -> None:
        """The same process takes in an event and tells of it."""
        self.flows += 1
        self.lab.ring().put(self.lab.record(flow=self.flows))
        self.lab.stored(self.flows)
        with Client(self.path, timeout=PATIENCE_S) as client:
            assert client.call("ping")["pid"] == self.pid
            stats = client.call("stats")
        assert (stats["lost"], stats["degraded"]) == (0, "")


@pytest.fixture(scope="module")
def target(
    tmp_path_factory: pytest.TempPathFactory, make_lab: Callable[[Path], StoreLab]
) -> Iterator[Target]:
    """The store under attack."""
    lab = make_lab(tmp_path_factory.mktemp("attacked"))
    lab.start()
    yield Target(lab)
    lab.close()


REFUSED = [
    "SELECT getenv('PATH')",
    "SELECT * FROM read_parquet('{events}/*')",
    "SELECT * FROM parquet_metadata('{events}/x.parquet')",
    "SELECT * FROM read_json('{events}/chain.jsonl')",
    "SELECT * FROM read_text('{events}/../control.sqlite')",
    'SELECT * FROM "{events}/chain.jsonl"',
    "SELECT * FROM read_duckdb('{events}/x.duckdb')",
    "SELECT * FROM arrow_scan(1, 2, 3)",
    "SELECT * FROM seq_scan('flows')",
    "SELECT * FROM duckdb_logs()",
    "SELECT * FROM pragma_user_agent()",
    "SELECT * FROM which_secret('x', 's3')",
    "COPY s1.events FROM '/etc/passwd'",
    "WITH c AS (COPY (SELECT 1) TO '{events}/x.csv') FROM c",
    "WITH c AS (COPY (SELECT 1) TO '{events}/chain.jsonl' (FORMAT csv)) SELECT 1",
    "SELECT (WITH c AS (COPY (SELECT 1) TO '{events}/x.csv') FROM c)",
    "FROM (WITH c AS (COPY (SELECT 1) TO '{events}/x.csv') FROM c) UNION ALL SELECT 2",
    "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL (WITH c AS (COPY (SELECT 1) TO '{events}/x.csv') FROM c)) FROM r",
    "WITH c AS (COPY s1.events FROM '{events}/chain.jsonl') FROM c",
    "DESCRIBE '{events}/chain.jsonl'",
    "SUMMARIZE '{events}/chain.jsonl'",
    "IMPORT DATABASE '{events}'",
    "CREATE SECRET s (TYPE s3)",
    "MERGE INTO s1.events e USING (SELECT 1) x ON true WHEN MATCHED THEN DELETE",
    "WITH m AS (MERGE INTO s1.events e USING (SELECT 1) x ON true WHEN MATCHED THEN DELETE RETURNING *) FROM m",
    "EXECUTE p",
    "DEALLOCATE p",
    "VACUUM",
    "ANALYZE",
    "UPDATE EXTENSIONS",
    "SELECT $1",
    "SELECT set_config('memory_limit', '1TB', false)",
    "SELECT nextval('x')",
    "SELECT 1 INTO x",
    "SELECT '" + "x" * query.MAX_SQL + "'",
]


def test_what_is_no_question_is_refused_by_every_operation(target: Target) -> None:
    before = sorted(path.name for path in target.lab.events.iterdir() if path.suffix != ".wal")
    with Client(target.path, timeout=PATIENCE_S) as client:
        for template in REFUSED:
            sql = template.format(events=target.lab.events) if "{" in template else template
            for operation in ("query", "explain"):
                with pytest.raises((UsageError, StoreError)) as refused:
                    client.call(operation, sql=sql, analyze=True)
                assert refused.value.message, sql
                assert "failed in the store" not in refused.value.message, sql
    assert sorted(path.name for path in target.lab.events.iterdir() if path.suffix != ".wal") == before
    target.is_well()


NESTED = {
    "parentheses": "SELECT " + "(" * 20_000 + "1" + ")" * 20_000,
    "not": "SELECT " + "NOT " * 20_000 + "true",
    "minus": "SELECT " + "- " * 40_000 + "1",
    "lists": "SELECT " + "[" * 20_000 + "]" * 20_000,
    "subqueries": "SELECT * FROM " + "(SELECT * FROM " * 900 + "(SELECT 1)" + ")" * 900,
    "joins": "SELECT count(*) FROM " + ", ".join(f"range(10) t{i}" for i in range(3000)),
    "values": "VALUES " + ",".join(["(1)"] * 20_000),
    "ctes": "WITH c0 AS (SELECT 1), "
    + ", ".join(f"c{i} AS (SELECT 1 FROM c{i - 1} a, c{i - 1} b)" for i in range(1, 30))
    + " SELECT count(*) FROM c29",
}


@pytest.mark.parametrize("how", NESTED)
def test_no_text_is_too_deep(target: Target, how: str) -> None:
    try:
        target.ask(NESTED[how], timeout_ms=200)
    except SectoolError as error:
        assert "failed in the store" not in error.message
    target.is_well()


BOMBS = {
    "endless recursion": ENDLESS,
    "endless join": "SELECT count(*) FROM range(10000000000) a, range(100000) b",
    "endless sort": "SELECT * FROM range(2000000000) r(i) ORDER BY hash(i)",
    "one list": "SELECT range(1000000000)",
    "one list, counted": "SELECT list_aggregate(range(1000000000), 'sum')",
    "one list, unpacked": "SELECT unnest(range(2000000000))",
    "wide rows": "SELECT repeat('x', 10000000) || i FROM range(2048) r(i)",
    "gathered": "SELECT string_agg(repeat('x', 1000), ',') FROM range(100000000)",
    "map": "SELECT histogram(i) FROM range(300000000) r(i)",
    "doubled": "WITH RECURSIVE t(i, s) AS (SELECT 1, [1] UNION ALL SELECT i + 1, s || s FROM t WHERE i < 40)"
    " SELECT max(len(s)) FROM t",
}


@pytest.mark.parametrize("how", BOMBS)
def test_time_and_memory_are_bounded(target: Target, how: str) -> None:
    with pytest.raises(StoreError, match=r"longer than|more memory"):
        target.ask(BOMBS[how], timeout_ms=200)
    target.is_well()


def test_the_process_has_a_limit_of_memory(target: Target) -> None:
    limit, _ = resource.prlimit(target.pid, resource.RLIMIT_DATA)
    assert bounds.LEAST_ROOM < limit < 8 << 30


def test_beyond_its_memory_a_process_fails_to_allocate_and_goes_on() -> None:
    code = (
        "from store import bounds\nbounds.limit_memory(64 << 20)\n"
        "try: bytearray(100 << 20)\nexcept MemoryError: print('goes on')\nbytearray(1 << 20)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "goes on\n"


def test_a_query_that_does_not_stop_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine hears no interrupt within one call of a function."""
    given_up = threading.Event()
    monkeypatch.setattr(bounds, "STUCK_S", 0.1)
    monkeypatch.setattr(query, "WHEN_STUCK", [given_up.set])
    with duckdb.connect() as engine:
        with pytest.raises(SectoolError), time_limit(engine, 10):
            engine.execute(
                "SELECT levenshtein(repeat('a', 20000), repeat('b', 20000) || i) FROM range(1) r(i)"
            )
        assert given_up.is_set()
        given_up.clear()
        with pytest.raises(SectoolError), time_limit(engine, 10):  # this one hears it
            engine.execute("SELECT count(*) FROM range(100000000000) a, range(10)")
        assert not given_up.is_set()


def test_who_gives_up_ends_at_once() -> None:
    code = "from store import bounds\ntry: bounds.give_up()\nfinally: print('not reached')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (bounds.STUCK_EXIT, "")
    assert "cannot be stopped" in done.stderr


def test_half_sent_questions_and_readers_that_do_not_read(target: Target) -> None:
    with contextlib.ExitStack() as open_:
        socks = [open_.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(20)]
        whole = wire.encode(
            {"op": "query", "sql": "SELECT repeat('x', 1000) FROM range(50000)", "limit": 50_000}
        )
        for number, sock in enumerate(socks):
            sock.connect(str(target.path))
            if number < MAX_QUERIES - 1:
                sock.sendall(whole)  # 50 MB that nobody takes
            else:
                sock.sendall(whole[: number + 1])
        target.is_well()
    target.is_well()


def test_one_question_more_than_there_are_places_waits_for_nobody(target: Target) -> None:
    """All places taken by endless queries: events still come in, and what needs no place is answered."""
    with contextlib.ExitStack() as open_:
        clients = [open_.enter_context(Client(target.path, timeout=PATIENCE_S)) for _ in range(MAX_QUERIES)]
        for client in clients:
            client._send("query", b"", {"sql": ENDLESS, "timeout_ms": 600_000})
        with Client(target.path, timeout=PATIENCE_S) as other:
            before = other.call("ping")["next_seq"]
            target.flows += 1
            target.lab.ring().put(target.lab.record(flow=target.flows))
            target.lab.wait("it comes in", lambda: other.call("ping")["next_seq"] > before)
        for client in clients:
            client.abort()
    target.is_well()


AS_OTHER = """
import json, socket, struct, sys
def ask(question):
    s = socket.socket(socket.AF_UNIX)
    s.connect(sys.argv[1])
    data = json.dumps(question).encode()
    s.sendall(struct.pack(">I", len(data)) + data)
    return s
def answer(s):
    try: head = s.recv(4, socket.MSG_WAITALL)
    except ConnectionResetError: head = b""
    return json.loads(s.recv(struct.unpack(">I", head)[0], socket.MSG_WAITALL)) if head else "hung up"
"""


def as_other(target: Target, code: str, group: int) -> list[str]:
    """The lines that `code` prints as user 65534 with that group and no other, and its last word on stderr."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", AS_OTHER + code, str(target.path)],
        user=65534,
        group=group,
        extra_groups=[],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    return done.stdout.splitlines() + done.stderr.splitlines()[-1:]


def test_other_users(target: Target) -> None:
    if os.geteuid() != 0:
        pytest.fail("the tests of this folder are run by root")
    group = 64_123  # nobody's
    for folder in (target.lab.base, target.lab.run):
        folder.chmod(0o755)
    assert "PermissionError" in as_other(target, "ask({'op': 'ping'})", group)[-1]
    os.chown(target.path, -1, group)
    try:
        outside = next(user.pw_gid for user in pwd.getpwall() if user.pw_uid == 65534)
        assert "PermissionError" in as_other(target, "ask({'op': 'ping'})", outside)[-1]
        reads = "print(answer(ask({'op': 'query', 'sql': 'SELECT 1'}))['ok'])"
        assert as_other(target, reads, group) == ["True"]
        for op in ("prune", "compact"):
            changes = f"a = answer(ask({{'op': '{op}', 'keep_bytes': 0}})); print(a['ok'], a['error'])"
            (line,) = as_other(target, changes, group)
            assert line.startswith("False")
            assert f"may not {op}" in line
        crowd = (
            f"crowd = [ask({{'op': 'ping'}}) for _ in range({MAX_OTHERS + 5})]\n"
            "print(sum(answer(s) == 'hung up' for s in crowd))"
        )
        with contextlib.ExitStack() as open_:
            for _ in range(
                MAX_CLIENTS - MAX_OTHERS - 2
            ):  # root's share is taken, but for what `is_well` needs
                open_.enter_context(Client(target.path, timeout=PATIENCE_S)).call("ping")
            (hung_up,) = as_other(target, crowd, group)
            assert int(hung_up) >= 5
            target.is_well()
    finally:
        os.chown(target.path, -1, 0)
    target.is_well()


def test_places_that_are_not_for_everybody(lab: Any) -> None:
    """Readers by their group alone leave a place among connections and queries to root."""
    server = Server(lab.inside(), lab.run / "events.sock")
    try:
        root, other = Peer(1, os.geteuid(), 0), Peer(2, 65534, 65534)
        pairs = [socket.socketpair() for _ in range(MAX_CLIENTS)]
        with contextlib.ExitStack() as open_:
            for ours, theirs in pairs:
                open_.enter_context(ours)
                open_.enter_context(theirs)
            for ours, _ in pairs[:MAX_OTHERS]:
                assert server._admit(other)
                server._clients[ours] = other
            assert not server._admit(other)
            for ours, _ in pairs[MAX_OTHERS:]:
                assert server._admit(root)
                server._clients[ours] = root
            assert not server._admit(root)
            server._clients.clear()
        with contextlib.ExitStack() as taken:
            for _ in range(MAX_OTHERS_QUERIES):
                taken.enter_context(server._place(other))
            taken.enter_context(server._place(root))
            assert not server._queries.acquire(blocking=False)
        assert server._queries.acquire(blocking=False)
    finally:
        server.close()


def test_streams_that_nobody_takes_and_one_that_somebody_does(target: Target) -> None:
    """More than an answer holds passes by; who does not read, or leaves in the middle, holds up nobody.

    The last test: it needs every place among the queries, so none of the attacks before has kept one.
    """
    sql = "SELECT repeat('x', 10000) AS x, i FROM range(15000) r(i)"
    reader = target.lab.live()
    with contextlib.ExitStack() as open_:
        for _ in range(MAX_QUERIES - 1):
            sock = open_.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(target.path))
            sock.sendall(wire.encode({"op": "stream", "sql": sql, "timeout_ms": 600_000}))
        numbers = [n for table in reader.stream(sql, timeout_ms=60_000) for n in table["i"].to_pylist()]
        assert numbers == list(range(15_000))
        target.is_well()
    left = iter(reader.stream("SELECT * FROM range(100000000000)", timeout_ms=600_000))
    assert next(left).num_rows
    del left  # its connection with it
    (nothing,) = reader.stream("SELECT 1 AS one WHERE false")
    assert (nothing.num_rows, nothing.column_names) == (0, ["one"])
    with pytest.raises(StoreError, match="longer than"):
        list(reader.stream("SELECT * FROM range(100000000000)", timeout_ms=300))
    with pytest.raises(UsageError, match="only SELECT"):
        list(reader.stream("WITH c AS (COPY (SELECT 1) TO 'x') FROM c"))
    target.is_well()
