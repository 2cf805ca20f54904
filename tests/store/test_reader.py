"""With or without the store process: the same questions, the same answers; and the socket they come through."""

from __future__ import annotations

import os
import pwd
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest

from sectool.api import wire
from sectool.api.client import Client
from sectool.api.server import Peer
from sectool.errors import NoDaemonError, SectoolError, StoreError, UsageError
from sectool.filters import parse_text
from store.reader import LiveReader, from_ipc, open_reader
from store.serve import allowed


@pytest.fixture
def filled(lab: Any) -> Any:
    """Flows and events in two segments, the second one live."""
    labels = [lab.labels("app=web"), lab.labels("app=db")]
    rule = lab.rule("allow app=web to call app=db")
    lab.start("--segment-bytes", "1")
    for flow in range(60):
        fields = {"flow": flow, "start": lab.T0 + flow * 1000, "action": 1 + (flow % 5 == 0), "rule": rule}
        lab.ring().put(lab.record(**fields, source_labels=labels[flow % 2], destination_labels=labels[0]))
        if flow % 3 == 0:
            end = fields["start"] + 5000
            lab.ring().put(lab.record(**fields, phase=3, ts=end, end=end, source_bytes=flow, conn_state=3))
        if flow == 30:
            lab.stored(41)
            lab.wait("a second segment", lambda: lab.live().stats()["segments"] == 2)
    lab.ring().put_blob({"type": "workload.start", "ts": lab.T0, "name": "web"})
    lab.ring().put_blob({"type": "policy.applied", "ts": lab.T0 + 5, "revision": 3})
    lab.stored(80, 2)
    return lab


def test_both_ways_answer_alike(filled: Any) -> None:
    lab = filled
    questions: list[Callable[[Any], Any]] = [
        lambda r: r.flows(last=1000),
        lambda r: r.flows(first=7),
        lambda r: r.flows(parse_text("from-label=app=web verdict=deny")),
        lambda r: r.flows(since=lab.T0 + 10_000, until=lab.T0 + 30_000),
        lambda r: r.flows(at=lab.T0 + 20_500, last=100),
        lambda r: r.events(),
        lambda r: r.events(["workload.*"], last=1),
        lambda r: r.query(
            "SELECT action, open, count(*) n, sum(bytes) b FROM flows GROUP BY ALL ORDER BY ALL"
        ),
        lambda r: r.query("SELECT * FROM flows ORDER BY event_start", limit=5),
        lambda r: r.query("SELECT * FROM labels ORDER BY id"),
    ]
    live = lab.live()
    online = [ask(live) for ask in questions]
    assert [result.table.num_rows for result in online] == [60, 7, 6, 20, 12, 2, 1, 3, 5, 2]
    lab.kill()  # with a log left behind
    reader = lab.reader()
    assert not reader.live
    for ask, want in zip(questions, online, strict=True):
        got = ask(reader)
        assert got.table.equals(want.table)
        assert got.truncated == want.truncated
    assert reader.warnings == []
    assert reader.stats()["flow_records"] == 80
    with pytest.raises(NoDaemonError):
        reader.tail()
    lab.start()
    lab.stop()
    sealed = lab.reader()
    for ask, want in zip(questions, online, strict=True):
        assert ask(sealed).table.equals(want.table)


def test_errors_are_the_same_on_both_ways(filled: Any) -> None:
    def errors(reader: Any) -> list[tuple[str, type[SectoolError]]]:
        out = []
        for sql in ("SELECT nonsense FROM flows", "DROP VIEW flows", "SELECT 1; SELECT 2"):
            with pytest.raises(SectoolError) as refused:
                reader.query(sql)
            out.append((refused.value.message, type(refused.value)))
        with pytest.raises(UsageError):
            reader.flows(first=1, last=1)
        return out

    online = errors(filled.live())
    filled.stop()
    assert errors(filled.reader()) == online


def test_nothing_to_read(lab: Any) -> None:
    with pytest.raises(StoreError) as refused:
        lab.reader()
    assert "sectool up" in refused.value.hint


class Following(threading.Thread):
    """Collects what `tail` gives."""

    def __init__(self, reader: LiveReader, text: str = "", from_seq: int | None = None) -> None:
        super().__init__(daemon=True)
        self.rows: list[dict[str, Any]] = []
        self.frames = self.gap = 0
        self.ended = False
        self._stream = reader.tail(parse_text(text), from_seq)
        self.begin = next(self._stream).next_seq
        self.start()

    def run(self) -> None:
        for frame in self._stream:
            self.frames += 1
            self.gap += frame.gap
            self.rows += frame.table.to_pylist() if frame.table is not None else []
        self.ended = True


def test_following(filled: Any) -> None:
    lab = filled
    following = Following(lab.live(), "from-label=app=web")
    everything = Following(lab.live(), from_seq=0)
    for flow in range(100, 110):
        labels = lab.labels("app=web" if flow % 2 else "app=db")
        lab.ring().put(lab.record(flow=flow, source_labels=labels, start=lab.T0 + 10**9 + flow))
    lab.wait("new flows arrive", lambda: len(following.rows) >= 5)
    lab.wait("old flows arrive", lambda: len(everything.rows) >= 70)
    assert [row["event_start"] for row in following.rows] == sorted(
        row["event_start"] for row in following.rows
    )
    assert {row["source_labels"] for row in following.rows} == {"app=web"}
    assert len(following.rows) == 5
    assert len(everything.rows) == 70
    assert len({row["seq"] for row in everything.rows}) == 70
    stored = {
        row["seq"]: row
        for row in lab.live().flows(parse_text("from-label=app=web"), last=5).table.to_pylist()
    }
    assert [stored[row["seq"]] for row in following.rows] == following.rows, "the same row as in `flows`"
    lab.stop()
    lab.wait("the stream ends", lambda: following.ended)


def test_a_follower_that_does_not_read_holds_up_nobody(lab: Any) -> None:
    lab.start()
    sock = socket.socket(socket.AF_UNIX)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(str(lab.run / "events.sock"))
    sock.sendall(wire.encode({"op": "tail", "from_seq": 0}))
    ring = lab.ring()
    for flow in range(20_000):
        while not ring.put(lab.record(flow=flow, start=lab.T0 + flow)):
            lab.wait("room", lambda: ring.pending < ring.capacity)
    lab.stored(20_000 - ring.lost)
    assert lab.live().query("SELECT 1 AS x").table.num_rows == 1
    sock.close()
    assert lab.stop() == 0


def ask(lab: Any, data: bytes) -> list[wire.Frame]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(lab.run / "events.sock"))
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        frames = []
        while (frame := wire.read(sock)) is not None:
            frames.append(frame)
        return frames


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"op": None},
        {"op": "nope"},
        {"op": ["query"]},
        {"op": "query"},
        {"op": "query", "sql": 5},
        {"op": "query", "sql": "SELECT 1", "limit": -1},
        {"op": "query", "sql": "SELECT 1", "limit": True},
        {"op": "query", "sql": "SELECT 1", "timeout_ms": 1 << 70},
        {"op": "query", "sql": "SELECT '\ud800'"},
        {"op": "flows", "filter": "x"},
        {"op": "flows", "filter": [{"field": "label", "any": []}]},
        {"op": "flows", "since": "5m"},
        {"op": "flows", "first": 1, "last": 1},
        {"op": "events", "types": [1]},
        {"op": "events", "types": "x"},
        {"op": "tail", "filter": 7},
    ],
    ids=str,
)
def test_bad_requests_get_an_answer(module_lab: Any, header: dict[str, Any]) -> None:
    (answer,) = ask(module_lab, wire.encode(header))
    assert answer.header["ok"] is False
    assert answer.header["error"]
    assert answer.header["exit"] in (1, 2, 4)
    assert ask(module_lab, wire.encode({"op": "ping"}))[0].header["ok"] is True


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n\r\n", b"\0\0\0\x02[]", b"\xff" * 100, b"\0\0\0\x05{", b"\0"]
)
def test_bad_bytes_end_one_conversation_only(module_lab: Any, data: bytes) -> None:
    for frame in ask(module_lab, data):
        assert frame.header["ok"] is False
    assert ask(module_lab, wire.encode({"op": "ping"}) * 2)[1].header["ok"] is True


@pytest.fixture(scope="module")
def module_lab(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Any:
    """One store for the tests that only ask."""
    lab = request.getfixturevalue("make_lab")(tmp_path_factory.mktemp("asked"))
    lab.ring().put(lab.record())
    lab.start()
    lab.stored(1)
    yield lab
    lab.close()


def test_many_at_once(module_lab: Any) -> None:
    lab, answers = module_lab, []

    def question() -> None:
        while True:
            try:
                with Client(lab.run / "events.sock", timeout=60) as client:
                    answer = client.call("query", sql="SELECT count(*) n FROM flows")
            except SectoolError as error:
                assert "busy" in error.message, error  # on a slow machine: it says to try again
                continue
            answers.extend(from_ipc(answer.payload)["n"].to_pylist())
            return

    threads = [threading.Thread(target=question) for _ in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [1] * 30


def test_too_many_connections_are_hung_up_on(module_lab: Any) -> None:
    socks = [socket.socket(socket.AF_UNIX) for _ in range(80)]
    for sock in socks:
        sock.connect(str(module_lab.run / "events.sock"))
        sock.settimeout(10)
    assert socks[-1].recv(1) == b""
    for sock in socks:
        sock.close()
    module_lab.wait("it answers again", module_lab.answers)


def test_the_socket_and_its_group(module_lab: Any) -> None:
    status = (module_lab.run / "events.sock").stat()
    assert status.st_mode & 0o777 == 0o660
    other = next(user for user in pwd.getpwall() if user.pw_uid not in (0, os.geteuid()))
    path = module_lab.run / "events.sock"
    assert allowed(Peer(1, 0, 0), path)
    assert allowed(Peer(1, other.pw_uid, status.st_gid), path)
    assert not allowed(Peer(1, other.pw_uid, other.pw_gid), path)
    assert not allowed(Peer(1, 4_000_000, 4_000_000), path)


def test_a_stranger_is_refused_by_credentials_too(module_lab: Any) -> None:
    """Even when file permissions let him connect."""
    code = (
        "import socket, sys, json, struct\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
        "try: s.sendall(struct.pack('>I', 13) + b'{\"op\":\"ping\"}')\n"
        "except BrokenPipeError: pass\n"  # the refusal may be here before the question is out
        "n, = struct.unpack('>I', s.recv(4)); print(s.recv(n).decode())\n"
    )
    path = module_lab.run / "events.sock"
    path.chmod(0o666)
    for folder in (module_lab.base, module_lab.run):
        folder.chmod(0o755)
    other = next(user for user in pwd.getpwall() if user.pw_uid not in (0, os.geteuid()))
    answer = subprocess.run(
        [sys.executable, "-I", "-c", code, str(path)],
        user=other.pw_uid,
        group=other.pw_gid,
        extra_groups=[],
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )
    path.chmod(0o660)
    assert '"ok":false' in answer.stdout, answer.stderr
    assert "may not read events" in answer.stdout


def test_answers_that_are_no_arrow() -> None:
    for payload in (b"", b"x", struct.pack("<I", 0xFFFFFFFF) * 10):
        with pytest.raises(StoreError):
            from_ipc(payload)
    table = pa.table({"x": [1]})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert from_ipc(bytes(sink.getvalue())).equals(table)


def test_open_reader_prefers_the_store(module_lab: Any) -> None:
    reader = open_reader(module_lab.state, module_lab.run)
    assert reader.live
    assert reader.stats()["segments"] == 1
    reader.close()
