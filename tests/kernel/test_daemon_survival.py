"""Hosts under real daemons, amid encrypted and plain transfers both ways. Whatever is killed, restarted or upgraded:

no connection is lost, no byte is wrong, no counter comes again. SECTOOL_SURVIVAL_FLOWS=200 makes it 200 of each kind.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sectool.api.client import Client
from sectool.errors import SectoolError
from tests.kernel.conftest import Namespace, make_pair, wait_until
from tests.kernel.hosts import as_user, own_cgroup
from tests.kernel.transfers import CounterWatch, Transfers, environment_size
from tests.preloaded import sectool

pytestmark = pytest.mark.kernel

FLOWS = environment_size(10)
SOME = 20_000  # bytes that every end must get for a transfer to count as going on
PATIENCE_S = 60.0 + FLOWS / 2
WEB, BATCH, DB = 20_000, 20_001, 20_002
POLICY = f"""
kind: Policy
name: shop
owner: team-shop
rules:
  - allow user={WEB} to call user={DB} encrypted
  - allow user={BATCH} to call user={DB}
"""


class Daemon:
    """A real daemon in a namespace, driven by the command line."""

    def __init__(self, space: Namespace, name: str, folder: Path, authority: Path) -> None:
        self.space = space
        self.folder = folder / name
        self.run = self.folder / "run"
        self._environment = {
            **os.environ,
            "SECTOOL_STATE": str(self.folder / "state"),
            "SECTOOL_RUN": str(self.run),
        }
        self.sectool(
            "host",
            "enroll",
            "--name",
            name,
            "--ca",
            str(authority),
            "--network",
            "10.0.0.0/8",
            "--network",
            "fd00::/8",
        )

    def sectool(self, *args: str) -> str:
        """Run a command; its output. Fails the test with its words."""
        done = sectool(list(args), self._environment, netns=self.space.path, timeout=120)
        assert done.code == 0, f"sectool {' '.join(args)}: {done.err}\n{self.log()}"
        return done.out + done.err

    def log(self) -> str:
        """The end of its log."""
        try:
            return (self.run / "agent.log").read_text()[-2000:]
        except OSError:
            return ""

    def status(self) -> dict[str, Any]:
        """What `sectool status` shows, asked of the daemon itself: it costs the processors less than a command."""
        try:
            with Client(self.run / "control.sock", timeout=60) as control:
                return control.call("status").header
        except SectoolError as error:
            raise AssertionError(f"{error}\n{self.log()}") from None

    def stats(self, what: str) -> int:
        """A counter of all its workers together."""
        return sum(int(worker["stats"].get(what, 0)) for worker in self.status()["workers"])

    def kill_worker(self) -> None:
        """SIGKILL to every packet worker; the agent starts others."""
        before = {worker["number"]: worker["pid"] for worker in self.status()["workers"]}
        for pid in before.values():
            os.kill(pid, signal.SIGKILL)

        def back() -> bool:
            with contextlib.suppress(AssertionError):
                return all(
                    w["enforcing"] and w["pid"] != before[w["number"]] for w in self.status()["workers"]
                )
            return False

        wait_until(back, "the workers to be back", 30)

    def kill(self) -> None:
        """SIGKILL to the agent, whose children end with it; and a new start."""
        os.kill(self.status()["pid"], signal.SIGKILL)
        self.sectool("up", "--background")

    def stop_and_start(self) -> None:
        """As `systemctl restart` does it."""
        pid = self.status()["pid"]
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not (self.run / "agent.pid").exists(), "the daemon's end", 30)
        wait_until(lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid), "the process's end", 30)
        self.sectool("up", "--background")

    def restart(self) -> None:
        """As after an upgrade."""
        self.sectool("restart")


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.fixture(scope="module")
def daemons() -> Iterator[tuple[Daemon, Daemon]]:
    """Both hosts, enforcing; all gone afterwards."""
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as made,
        own_cgroup(secrets.token_hex(4)),
        make_pair() as pair,
        contextlib.ExitStack() as stack,
    ):
        folder = Path(made)
        home = folder / "authority"
        subprocess.run(
            (
                sys.executable,
                "-m",
                "sectool",
                "--state",
                str(home),
                "ca",
                "init",
                "--trust-domain",
                "lab.example",
            ),
            check=True,
            capture_output=True,
        )
        (folder / "policy.yaml").write_text(POLICY)
        both = Daemon(pair.a, "a", folder, home / "ca"), Daemon(pair.b, "b", folder, home / "ca")
        for daemon in both:
            stack.callback(daemon.sectool, "down")
            daemon.sectool("up", "--background", "--policy", str(folder / "policy.yaml"))
        yield both


def connect(daemons: tuple[Daemon, Daemon], count: int) -> Transfers:
    """`count` encrypted and `count` plain transfers, IPv4 and IPv6 in turn."""
    a, b = (daemon.space for daemon in daemons)
    with as_user(DB):
        listeners = {v6: b.listen(v6=v6) for v6 in (False, True)}
    pairs = []
    for number in range(2 * count):
        v6 = number // 2 % 2 == 1
        with as_user(BATCH if number % 2 else WEB):
            client = a.connect(b.v6 if v6 else b.v4, int(listeners[v6].getsockname()[1]))
        pairs.append((client, listeners[v6].accept()[0]))
    transfers = Transfers(pairs)
    transfers.start()
    transfers.progress(SOME, PATIENCE_S)
    return transfers


BLOWS: dict[str, Callable[[Daemon], None]] = {
    "worker killed": Daemon.kill_worker,
    "daemon killed": Daemon.kill,
    "stopped and started": Daemon.stop_and_start,
    "restarted in place": Daemon.restart,
}


@pytest.mark.long
def test_no_transfer_notices_what_befalls_the_daemons(daemons: tuple[Daemon, Daemon], tmp_path: Path) -> None:
    watch = CounterWatch(daemons[0].space, "eth0", tmp_path / "wire.pcap")
    transfers = connect(daemons, FLOWS)
    for what, blow in BLOWS.items():
        for daemon in daemons:
            began = time.monotonic()
            blow(daemon)
            back = time.monotonic() - began
            transfers.progress(SOME, PATIENCE_S)
            took = time.monotonic() - began
            assert daemon.stats("restored") == 2 * FLOWS, daemon.log()
            assert daemon.stats("forgotten") == 0
            assert daemon.stats("encrypted") == FLOWS
            print(
                f"\n{what}, {daemon.folder.name}: back after {back:.2f} s, all transfers went on after {took:.2f} s"
            )
    total = transfers.finish(PATIENCE_S)
    seen, lost = watch.stop()
    print(f"\n{total >> 20} MiB, {sum(len(flow.records) for flow in seen.values())} records")
    assert lost == 0
    assert len(seen) == 2 * FLOWS, "every encrypted flow, both ways"
    for flow in seen.values():
        assert flow.reused == []
        assert flow.leaps() >= len(BLOWS)
