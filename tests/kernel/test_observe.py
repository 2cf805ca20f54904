"""Two hosts that observe, then enforce, then have their glass broken: what curl gets, and what is on record."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kernel.conftest import make_pair, wait_until
from tests.kernel.hosts import own_cgroup
from tests.kernel.test_daemon_survival import Daemon
from tests.preloaded import sectool

pytestmark = pytest.mark.kernel

WEB, BATCH, DB, PORT = 20_000, 20_001, 20_002, 8000
POLICY = f"""
kind: Policy
name: shop
owner: team-shop
rules:
  - allow user={WEB} to call user={DB} on tcp/{PORT}
"""


@pytest.fixture(scope="module")
def daemons() -> Iterator[tuple[Daemon, Daemon]]:
    """Both hosts, observing; a web server on the second."""
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as made,
        own_cgroup(secrets.token_hex(4)),
        make_pair() as pair,
        contextlib.ExitStack() as stack,
    ):
        folder = Path(made)
        home = folder / "authority"
        environment = {**os.environ, "SECTOOL_STATE": str(home)}
        assert sectool(["ca", "init", "--trust-domain", "lab.example"], environment).code == 0
        (folder / "policy.yaml").write_text(POLICY)
        both = Daemon(pair.a, "a", folder, home / "ca"), Daemon(pair.b, "b", folder, home / "ca")
        for daemon in both:
            stack.callback(daemon.sectool, "down")
            said = daemon.sectool(
                "up", "--background", "--mode", "observe", "--policy", str(folder / "policy.yaml")
            )
            assert "OBSERVING: nothing is denied" in said
        pair.b.popen(
            *("setpriv", f"--reuid={DB}", "--clear-groups"),
            *(sys.executable, "-m", "http.server", str(PORT), "--directory", "/"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        yield both


def curl(daemon: Daemon, user: int, seconds: int = 10) -> bool:
    """Whether a program of that user gets a page from the other host."""
    command = ("curl", "-s", "-o", "/dev/null", "--max-time", str(seconds), f"http://10.77.0.2:{PORT}/")
    with daemon.space.enter():
        return (
            subprocess.run(("setpriv", f"--reuid={user}", "--clear-groups", *command), check=False).returncode
            == 0
        )


def flows(daemon: Daemon, verdict: str) -> list[dict[str, Any]]:
    items: list[dict[str, Any]] = json.loads(daemon.sectool("flows", "--verdict", verdict, "-o", "json"))[
        "items"
    ]
    return items


def test_from_observe_to_enforce_and_through_a_broken_glass(daemons: tuple[Daemon, Daemon]) -> None:
    a, b = daemons
    wait_until(lambda: curl(a, WEB), "the web server")

    # Nothing is denied; both sides record who it was, and that it would have been denied.
    assert curl(a, BATCH)
    for daemon in daemons:
        row = wait_for(lambda d=daemon: [r for r in flows(d, "audit") if r["drop_reason"] == "default_deny"])[
            0
        ]
        assert row["observed"]
        assert row["source.labels"]["user"] == str(BATCH)
        assert row["destination.labels"]["user"] == str(DB)
        assert "would-deny" in daemon.sectool("flows")
    suggested = a.sectool("policy", "suggest")
    assert f"user={BATCH}" in suggested

    for daemon in daemons:
        daemon.sectool("mode", "enforce", "--reason", "looked at")
    assert curl(a, WEB)
    assert not curl(a, BATCH, seconds=1)
    assert flows(b, "deny")

    # The side that denies breaks the glass: the other one goes on to deny what it denies.
    for daemon in daemons:
        daemon.sectool("break-glass", "--for", "1h", "--reason", "INC-4711")
    assert curl(a, BATCH)
    os.kill(int((b.run / "agent.pid").read_text()), signal.SIGKILL)
    b.sectool("up", "--background")
    assert b.status()["break_glass"]["reason"] == "INC-4711", "it outlives the daemon"
    assert curl(a, BATCH)
    for daemon in daemons:
        daemon.sectool("break-glass", "--end", "--reason", "found")
    assert not curl(a, BATCH, seconds=1)
    assert curl(a, WEB)


def wait_for(found: Any) -> list[dict[str, Any]]:
    """What comes on record in a moment."""
    wait_until(found, "the record")
    rows: list[dict[str, Any]] = found()
    return rows
