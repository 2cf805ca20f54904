"""Hosts under real daemons, amid encrypted and plain transfers: SVIDs rotate, host CAs are renewed, the root is rolled
over, daemons restart, and nothing is lost; then a host is revoked, and everything of its ends.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.kernel.conftest import wait_until
from tests.kernel.test_daemon_survival import (
    PATIENCE_S,
    SOME,
    Daemon,
    connect,
    daemons,
)
from tests.preloaded import sectool

pytestmark = pytest.mark.kernel

__all__ = ["daemons"]  # the fixture

FLOWS = 3


def at_ca(home: Path, *words: str) -> str:
    """A command where the root is; its data."""
    done = sectool(["--state", str(home), *words], os.environ)
    assert done.code == 0, done.err
    return done.out


def renew(home: Path, daemon: Daemon) -> None:
    """The host's CA anew, by files."""
    (home / "csr").write_text(daemon.sectool("-q", "host", "request", "--renew"))
    (home / "answer").write_text(at_ca(home, "ca", "sign", str(home / "csr")))
    daemon.sectool("host", "accept", str(home / "answer"))


def give_roots(home: Path, daemon: Daemon) -> None:
    """The roots as they are now."""
    (home / "roots").write_text(at_ca(home, "ca", "bundle"))
    daemon.sectool("host", "accept", str(home / "roots"))


def cut(daemon: Daemon) -> int:
    """How many live flows a revocation has ended."""
    return sum(
        int(worker["stats"]["reasons"].get("revoked_live", 0)) for worker in daemon.status()["workers"]
    )


@pytest.mark.long
def test_nothing_is_lost_by_rotation_rollover_and_restart_and_revocation_ends_it_all(
    daemons: tuple[Daemon, Daemon],
) -> None:
    home = daemons[0].folder.parent / "authority"
    transfers = connect(daemons, FLOWS)

    def goes_on(after: str) -> None:
        transfers.progress(SOME, PATIENCE_S)
        for daemon in daemons:
            assert daemon.stats("encrypted") >= FLOWS, after

    for daemon in daemons:
        daemon.sectool("identity", "rotate")
    goes_on("rotation")
    at_ca(home, "ca", "rollover", "begin")
    for daemon in daemons:
        give_roots(home, daemon)
    at_ca(home, "ca", "rollover", "switch")
    renew(home, daemons[0])  # which brings SVIDs by the new root at once
    daemons[1].restart()  # in the middle: one host is by the new root, the other by the old one
    goes_on("restart between two roots")
    connect(daemons, 1).finish(PATIENCE_S)
    renew(home, daemons[1])
    goes_on("switch to the new root")
    connect(daemons, 1).finish(PATIENCE_S)  # new connections under the new root
    at_ca(home, "ca", "rollover", "finish")
    for daemon in daemons:
        give_roots(home, daemon)
    goes_on("the old root's end")
    daemons[0].restart()
    goes_on("restart")
    assert transfers.finish(PATIENCE_S) > 0

    transfers = connect(daemons, FLOWS)
    (home / "list").write_text(at_ca(home, "ca", "revoke", "--host", "a", "--reason", "stolen"))
    began = time.monotonic()
    daemons[1].sectool("revocation", "import", str(home / "list"))
    wait_until(lambda: cut(daemons[1]) == 2 * FLOWS, "every flow's end")
    print(f"\nall flows ended {time.monotonic() - began:.2f} s after the list was given to the command")
    wait_until(
        lambda: all(end.over for pair in transfers.pairs for end in pair), "the programs to be told", 60
    )
