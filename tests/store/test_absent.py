"""A query ends with the connection that it was asked on, and with nothing less."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from sectool.api import wire
from sectool.api.client import Client
from sectool.errors import NoDaemonError
from store.serve import MAX_QUERIES
from tests.store.conftest import StoreLab

ENDLESS = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT max(n) FROM r"
PATIENCE_S = 60.0


def test_who_hangs_up_makes_room_for_others(tmp_path: Path) -> None:
    """As many endless queries as run at once; when nobody waits for them any more the next one gets its turn."""
    lab = StoreLab(tmp_path)
    lab.start()
    try:
        path = lab.run / "events.sock"
        clients = [Client(path, timeout=PATIENCE_S) for _ in range(MAX_QUERIES)]
        ended: list[Client] = []

        asked = [client._send("query", b"", {"sql": ENDLESS, "timeout_ms": 600_000}) for client in clients]

        def hear(client: Client, sock: socket.socket) -> None:
            with pytest.raises(NoDaemonError):
                client._receive(sock)
            ended.append(client)

        threads = [threading.Thread(target=hear, args=pair) for pair in zip(clients, asked, strict=True)]
        for thread in threads:
            thread.start()
        with Client(path, timeout=PATIENCE_S) as other:
            assert other.call("ping")["pid"]
            for client in clients:
                client.abort()
            for thread in threads:
                thread.join(PATIENCE_S)
            assert len(ended) == MAX_QUERIES
            assert other.call("query", sql="SELECT 42 AS answer")["rows"] == 1
    finally:
        lab.close()


def test_who_only_asks_no_more_is_answered(tmp_path: Path) -> None:
    lab = StoreLab(tmp_path)
    lab.start()
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(PATIENCE_S)
            sock.connect(str(lab.run / "events.sock"))
            sql = "SELECT count(*) FROM range(30000000) t(n) WHERE hash(n) % 7 = 3"
            sock.sendall(wire.encode({"op": "query", "sql": sql, "timeout_ms": 60_000}))
            sock.shutdown(socket.SHUT_WR)
            frame = wire.read(sock, 1 << 20)
            assert frame is not None
            assert frame.header["ok"] is True
    finally:
        lab.close()
