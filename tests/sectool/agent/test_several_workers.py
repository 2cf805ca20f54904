"""A daemon with several packet workers: one policy for all, and another number of them after a restart."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from .conftest import POLICY, Host, until

pytestmark = pytest.mark.kernel

FLOWS = 12
SERVER = (
    "import socket, threading\n"
    "s = socket.create_server(('127.0.0.1', 5432), backlog=64)\n"
    "print('listening', flush=True)\n"
    "def serve(c):\n"
    "    try:\n"
    "        while data := c.recv(100): c.sendall(data)\n"
    "    except OSError: pass\n"
    "while True: threading.Thread(target=serve, args=(s.accept()[0],), daemon=True).start()\n"
)
# Opens connections, and says on each line of its input how many of them still echo.
CLIENT = (
    "import socket, sys\n"
    f"cs = [socket.create_connection(('127.0.0.1', 5432), timeout=10) for _ in range({FLOWS})]\n"
    "def echoes(c):\n"
    "    try:\n"
    "        c.sendall(b'x')\n"
    "        return c.recv(1) == b'x'\n"
    "    except OSError: return False\n"
    "while True:\n"
    "    print(sum(map(echoes, cs)), flush=True)\n"
    "    if not sys.stdin.readline(): break\n"
)


def live(host: Host) -> list[int]:
    """How many flows each worker knows."""
    return [worker["stats"]["live"] for worker in host.status()["workers"]]


def revisions(status: Any) -> set[int]:
    """What the workers enforce."""
    return {worker["revision"] for worker in status["workers"]}


def start(host: Host, label: str, program: str) -> subprocess.Popen[str]:
    """A program with a label, whose lines can be read and written."""
    return subprocess.Popen(
        host.argv(
            sys.executable, "-m", "sectool", "run", "--label", label, "--", sys.executable, "-c", program
        ),
        env=host.environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def echoing(client: subprocess.Popen[str]) -> int:
    """How many of its connections work."""
    assert client.stdin is not None
    assert client.stdout is not None
    client.stdin.write("\n")
    client.stdin.flush()
    return int(client.stdout.readline())


def test_one_policy_for_all_and_another_number_after_a_restart(host: Host) -> None:
    (host.state / "sectool.yaml").write_text("workers: 2\n")
    host.ok("up", "--background")
    host.apply(POLICY)
    status = host.status()
    assert len(status["workers"]) == 2
    assert revisions(status) == {1}
    server, client = start(host, "app=db", SERVER), None
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "listening\n"
        client = start(host, "app=web", CLIENT)
        assert client.stdout is not None
        assert int(client.stdout.readline()) == FLOWS
        counts = live(host)
        assert sum(counts) == FLOWS
        assert min(counts) > 0, "each has its share"
        assert host.apply(POLICY.replace("name: shop", "name: store")).code == 0
        assert revisions(host.status()) == {2}
        assert echoing(client) == FLOWS
        (host.state / "sectool.yaml").write_text("workers: 3\n")
        host.kill_daemon()
        host.ok("up", "--background")
        counts = live(host)
        assert len(counts) == 3
        assert sum(counts) == FLOWS
        assert echoing(client) == FLOWS
        assert host.apply(POLICY.replace("allow", "deny")).code == 0
        assert until(lambda: echoing(client) == 0, "all to be cut, whichever worker has them")
    finally:
        for process in (server, client):
            if process is not None:
                process.kill()
                process.wait()
