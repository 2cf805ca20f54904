"""Control history: two axes of time, append-only, and tampering found."""

from __future__ import annotations

import random
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sectool.errors import StoreError
from store.control import Actor, ControlHistory, Version

ME = Actor(1000, "alice")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state" / "control.sqlite"


@pytest.fixture
def history(path: Path) -> Iterator[ControlHistory]:
    with ControlHistory(path) as opened:
        yield opened


def bodies(versions: list[Version]) -> dict[str, Any]:
    return {version.key: version.body["v"] for version in versions}


def test_versions_follow_each_other(history: ControlHistory, path: Path) -> None:
    first = history.append("policy", "1", {"v": "a"}, ME, "first", 100)
    second = history.append("policy", "1", {"v": "b"}, ME, "better", 200)
    history.append("policy", "2", {"v": "c"}, ME, "other", 300)
    history.close("policy", "2", ME, "gone", 400)
    assert (first.id, first.prev, second.prev) == (1, "0" * 64, first.hash)
    assert bodies(history.current("policy")) == {"1": "b"}
    assert history.current("trust") == []
    assert bodies(history.as_of("policy", 99)) == {}
    assert bodies(history.as_of("policy", 100)) == bodies(history.as_of("policy", 199)) == {"1": "a"}
    assert bodies(history.as_of("policy", 300)) == {"1": "b", "2": "c"}
    assert bodies(history.as_of("policy", 400)) == {"1": "b"}
    assert [
        (v.body["v"], v.valid_from, v.valid_to, v.tx_from, v.tx_to) for v in history.history("policy", "1")
    ] == [
        ("a", 100, None, 100, 200),
        ("a", 100, 200, 200, None),
        ("b", 200, None, 200, None),
    ]
    assert [t.reason for t in history.transactions()] == ["first", "better", "other", "gone"]
    assert history.transactions(3)[0].actor == ME
    assert history.verify() is None
    assert path.stat().st_mode & 0o777 == 0o600


def test_what_was_known_then(history: ControlHistory) -> None:
    history.append("workload", "w", {"v": "old"}, ME, "seen", 100)
    history.append("workload", "w", {"v": "new"}, ME, "found out late", 500, valid_from=200)
    assert bodies(history.as_of("workload", 300)) == {"w": "new"}
    assert bodies(history.as_of("workload", 300, known_us=400)) == {"w": "old"}
    assert bodies(history.as_of("workload", 150, known_us=600)) == {"w": "old"}
    history.append("workload", "w", {"v": "from the start"}, ME, "wrong all along", 600, valid_from=50)
    assert bodies(history.as_of("workload", 150)) == {"w": "from the start"}
    assert bodies(history.as_of("workload", 150, known_us=599)) == {"w": "old"}
    assert history.verify() is None


def test_time_never_runs_backwards(history: ControlHistory) -> None:
    history.append("policy", "1", {"v": 1}, ME, "", 1000)
    late = history.append("policy", "1", {"v": 2}, ME, "clock set back", 500)
    assert late.tx_us == 1000
    assert bodies(history.current("policy")) == {"1": 2}
    assert history.verify() is None


def test_closing_what_is_not_there(history: ControlHistory) -> None:
    with pytest.raises(StoreError, match="no policy '9'"):
        history.close("policy", "9", ME, "x", 100)
    assert history.transactions() == []


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["append", "append", "close"]),
        st.sampled_from("ab"),
        st.integers(0, 50),  # step of transaction time
        st.none() | st.integers(0, 400),  # valid time
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(operations=OPERATIONS)
def test_like_a_model(tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[Any, ...]]) -> None:
    """At every pair of times the history says what replaying the changes known by then, in order, says."""
    history = ControlHistory(tmp_path_factory.mktemp("model") / "c.sqlite")
    done: list[tuple[int, str, str, int, int]] = []
    now = 0
    for number, (action, key, step, valid) in enumerate(operations):
        now += step
        moment = now if valid is None else valid
        if action == "append":
            history.append("network", key, {"v": number}, ME, "", now, valid_from=moment)
        else:
            try:
                history.close("network", key, ME, "", now, valid_to=moment)
            except StoreError:
                continue
        done.append((now, action, key, moment, number))
    for known in range(0, now + 30, 29):
        for valid in range(0, 460, 23):
            want: dict[str, int] = {}
            for tx, action, key, moment, number in done:
                if tx <= known and moment <= valid:
                    want.pop(key, None)
                    if action == "append":
                        want[key] = number
            assert bodies(history.as_of("network", valid, known)) == want
    assert history.verify() is None
    history.close_file()


def filled(path: Path) -> ControlHistory:
    history = ControlHistory(path)
    for number in range(6):
        history.append("policy", str(number % 2), {"v": number}, ME, f"change {number}", 100 * number)
    history.close("policy", "1", ME, "gone", 700)
    return history


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM rows",
        "DELETE FROM transactions WHERE id = 7",
        "UPDATE transactions SET reason = 'x'",
        "UPDATE rows SET body = '{}'",
        "UPDATE rows SET valid_to = 5 WHERE valid_to IS NULL",
        "UPDATE rows SET tx_to = NULL, closed_by = NULL WHERE tx_to IS NOT NULL",
        "UPDATE rows SET tx_to = 5 WHERE tx_to IS NULL",
        "INSERT OR REPLACE INTO rows SELECT * FROM rows",
    ],
)
def test_triggers_refuse(path: Path, sql: str) -> None:
    filled(path).close_file()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA recursive_triggers = ON")
    with pytest.raises(sqlite3.Error):
        connection.execute(sql)


@pytest.mark.parametrize(
    ("sql", "place"),
    [
        ("UPDATE transactions SET reason = 'x' WHERE id = 3", "transaction 3 was edited"),
        ("UPDATE transactions SET actor = 'bob' WHERE id = 5", "transaction 5 was edited"),
        ("UPDATE transactions SET hash = replace(hash, 'a', 'b') WHERE id = 2", "transaction 2 was edited"),
        ("DELETE FROM transactions WHERE id = 4", "transaction 4 is missing"),
        ("UPDATE rows SET body = '{\"v\":99}' WHERE tx = 2", "transaction 2"),
        ("UPDATE rows SET valid_from = 1 WHERE tx = 6 AND valid_to IS NULL", "transaction 6"),
        ("UPDATE rows SET tx_to = tx_to + 1 WHERE closed_by = 4", "transaction 4"),
        ("UPDATE rows SET tx_from = 0 WHERE tx = 3", "transaction 3"),
        ("DELETE FROM rows WHERE tx = 5", "transaction 5"),
        ("UPDATE rows SET tx_to = NULL, closed_by = NULL WHERE closed_by = 7", "transaction 7"),
        ("UPDATE rows SET tx_to = 700, closed_by = 7 WHERE tx_to IS NULL", "transaction 7"),
        (
            "INSERT INTO rows (tx, kind, key, body, valid_from, tx_from) VALUES (3, 'policy', 'x', '{}', 0, 200)",
            "transaction 3",
        ),
        (
            "INSERT INTO rows (tx, kind, key, body, valid_from, tx_from) VALUES (99, 'policy', 'x', '{}', 0, 200)",
            "belongs to no transaction",
        ),
        ("UPDATE rows SET tx = 2 WHERE tx = 3", "transaction 2"),
    ],
)
def test_tampering_around_the_triggers_is_found(path: Path, sql: str, place: str) -> None:
    history = filled(path)
    assert history.verify() is None
    history.close_file()
    connection = sqlite3.connect(path)
    for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
        connection.execute(f"DROP TRIGGER {name}")
    assert connection.execute(sql).rowcount > 0
    connection.commit()
    connection.close()
    with ControlHistory(path, read_only=True) as again:
        assert place in str(again.verify())


@pytest.mark.parametrize("how", ["noise", "header", "page", "cut", "other", "newer"])
def test_a_file_that_cannot_be_read_is_left_alone(path: Path, how: str) -> None:
    history = filled(path)
    history._db.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    history.close_file()
    data = bytearray(path.read_bytes())
    noise = random.Random(1).randbytes
    if how == "noise":
        data = bytearray(noise(len(data)))
    elif how == "header":
        data[:16] = b"not a database!!"
    elif how == "page":
        data[100:4096] = noise(4096 - 100)
    elif how == "cut":
        del data[5000:]
    path.write_bytes(data)
    if how == "other":
        path.unlink()
        other = sqlite3.connect(path)
        other.execute("CREATE TABLE recipes (x)")
        other.close()
    elif how == "newer":
        newer = sqlite3.connect(path)
        newer.execute("PRAGMA user_version = 7")
        newer.close()
    before = path.read_bytes()
    with pytest.raises(StoreError) as refused:
        opened = ControlHistory(path)
        try:
            opened.append("policy", "1", {"v": 1}, ME, "x", 10_000)
            opened.history("policy")
        finally:
            opened.close_file()
    assert refused.value.hint
    if how in ("noise", "header", "other", "newer"):
        assert path.read_bytes() == before
    assert path.exists()


def test_read_only(path: Path) -> None:
    with pytest.raises(StoreError, match="no control history"):
        ControlHistory(path, read_only=True)
    assert not path.exists()
    with filled(path) as writer, ControlHistory(path, read_only=True) as reader:
        with pytest.raises(StoreError):
            reader.append("policy", "1", {}, ME, "x")
        writer.append("policy", "7", {"v": 7}, ME, "seen at once", 900)
        assert bodies(reader.current("policy"))["7"] == 7
        assert reader.verify() is None


def test_writers_in_several_processes(path: Path) -> None:
    ControlHistory(path).close_file()
    code = (
        "import sys; from pathlib import Path; from store.control import Actor, ControlHistory\n"
        "history = ControlHistory(Path(sys.argv[1]))\n"
        "for n in range(20): history.append('workload', sys.argv[2] + str(n), {'v': n}, Actor(1, 'x'), 'load')\n"
    )
    children = [subprocess.Popen([sys.executable, "-c", code, str(path), name]) for name in "abc"]
    assert [child.wait(60) for child in children] == [0, 0, 0]
    with ControlHistory(path, read_only=True) as history:
        assert len(history.current("workload")) == 60
        assert [t.id for t in history.transactions()] == list(range(1, 61))
        assert history.verify() is None


def test_a_failed_change_changes_nothing(history: ControlHistory) -> None:
    history.append("policy", "1", {"v": 1}, ME, "first", 100)
    with pytest.raises((TypeError, ValueError)):
        history.append("policy", "1", {"v": object()}, ME, "no JSON", 200)
    with pytest.raises(StoreError):
        history.append("policy", None, {"v": 2}, ME, "no key", 200)  # type: ignore[arg-type]
    assert bodies(history.current("policy")) == {"1": 1}
    assert len(history.transactions()) == 1
    history.append("policy", "1", {"v": 3}, ME, "goes on", 300)
    assert history.verify() is None


def test_it_may_be_used_from_another_thread(history: ControlHistory) -> None:
    thread = threading.Thread(target=lambda: history.append("policy", "1", {"v": 1}, ME, "x", 1))
    thread.start()
    thread.join()
    assert bodies(history.current("policy")) == {"1": 1}


def test_opening_is_what_takes_long_not_importing() -> None:
    code = "import sys, store.control; sys.exit('sqlite_utils' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
