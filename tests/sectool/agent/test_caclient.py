"""A daemon that joined with a token keeps up with its CA by itself: lists, a rolled over root, its own CA renewed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sectool.agent.conftest import Host, until

pytestmark = pytest.mark.kernel

URL = "https://127.0.0.1:8443"
POLICY = """\
kind: Policy
name: all
owner: lab
rules:
  - allow any to call any
"""


@pytest.mark.long
def test_a_host_that_joined_hears_of_everything_and_follows_a_rollover(host: Host, tmp_path: Path) -> None:
    away = ("--state", tmp_path / "away")  # where no daemon would take a list at once

    def at_ca(*words: str) -> str:
        return host.ok(*away, "ca", *words, "--ca", host.state / "ca").out

    def roots() -> int:
        return (host.state / "host/trust.pem").read_text().count("BEGIN CERTIFICATE")

    with (tmp_path / "ca.log").open("w") as log:
        ca = host.popen(
            sys.executable, "-m", "sectool", *away, "ca", "serve", "--listen", "127.0.0.1:8443",
            "--ca", host.state / "ca", stderr=log,
        )  # fmt: skip
    try:
        until(lambda: "serves at" in (tmp_path / "ca.log").read_text(), "the CA service")
        token = at_ca("token", "create", "--url", URL, "--label", "env=prod").strip()
        joined = host.ok(
            "host", "enroll", "--force", "--name", "web-9", "--network", "127.0.0.0/8", "--join", token
        )
        assert "web-9" in joined.err
        assert token.split(".")[1] not in joined.err
        again = host.sectool("host", "enroll", "--force", "--name", "web-9", "--join", token)
        assert again.code != 0 and "used" in again.err

        (host.folder / "all.yaml").write_text(POLICY)
        host.ok("up", "--background", "--policy", host.folder / "all.yaml")
        at_ca("revoke", "--serial", "aabbcc", "--host", "web-1", "--reason", "test")
        until(lambda: "aabbcc" in str(host.json("revocation", "list")), "the root's list")
        before = (host.state / "host/host.crt").read_bytes()
        at_ca("rollover", "begin")
        until(lambda: roots() == 2, "the next root")
        at_ca("rollover", "switch")
        until(lambda: (host.state / "host/host.crt").read_bytes() != before, "the host's new CA", 40)
        until(
            lambda: host.sectool(*away, "ca", "rollover", "finish", "--ca", host.state / "ca").code == 0,
            "the end",
        )
        until(lambda: roots() == 1, "the old root to go")
        status = host.status()
        assert status["state"] == "enforcing", status["problems"]
        assert "aabbcc" in str(host.json("revocation", "list"))  # of the new root by now
    finally:
        ca.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            ca.wait(10)
