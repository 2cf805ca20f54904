"""`sectool metrics` without a daemon; with one: tests/sectool/agent/test_daemon.py."""

from __future__ import annotations

from tests.sectool.cli.conftest import Cli


def test_without_a_daemon(inside: Cli) -> None:
    done = inside("metrics")
    assert (done.code, done.out) == (3, "")
    assert "sectool up" in done.err


def test_other_hosts_are_not_served_unasked(inside: Cli) -> None:
    done = inside("metrics", "--listen", "0.0.0.0:0")
    assert done.code == 2
    assert "--allow-remote" in done.err
    assert inside("metrics", "--listen", "nowhere").code == 2
