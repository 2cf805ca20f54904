"""What systemd is told: ready once, alive as long as the loop turns and only if it wants to know."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from sectool.agent.logs import Announcer


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket that systemd listens on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.delenv("WATCHDOG_USEC", raising=False)
        yield sock


def test_ready_is_told_once_it_enforces(systemd: socket.socket) -> None:
    Announcer(None).enforcing(host="web")
    assert systemd.recv(100) == b"READY=1"


def test_the_watchdog_is_fed_where_there_is_one(
    systemd: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    Announcer(None).alive()
    with pytest.raises(BlockingIOError):
        systemd.recv(100)
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    Announcer(None).alive()
    assert systemd.recv(100) == b"WATCHDOG=1"


def test_systemd_that_has_gone_stops_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    monkeypatch.setenv("WATCHDOG_USEC", "1")
    Announcer(None).alive()
    monkeypatch.setenv("NOTIFY_SOCKET", "@sectool-nobody-listens-here")
    Announcer(None).enforcing()
