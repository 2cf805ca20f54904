"""A daemon of its own in a throwaway network namespace, driven by the command line alone."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from sectool.api.client import Client
from sectool.errors import SectoolError
from tests import preloaded
from tests.preloaded import Done, sectool

DEADLINE = 20.0

POLICY = """\
kind: Policy
name: shop
owner: team-shop
rules:
  - allow app=web to call app=db on tcp/5432
"""


def until(condition: Callable[[], Any], what: str, deadline: float = DEADLINE) -> Any:
    """Wait until `condition` gives something true, and return it.

    Between two looks it rests twice as long as one takes: many are commands, and what is waited for needs processors.
    """
    end = time.monotonic() + deadline
    while True:
        began = time.monotonic()
        found = condition()
        if found:
            return found
        assert time.monotonic() < end, f"not within {deadline} s: {what}"
        time.sleep(min(0.5, max(0.02, 2 * (time.monotonic() - began))))


@dataclass
class Host:
    """A network namespace with state and run folders of its own."""

    folder: Path
    name: str = field(default_factory=lambda: f"st-{secrets.token_hex(4)}")

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SECTOOL_STATE": str(self.state), "SECTOOL_RUN": str(self.run)}

    def argv(self, *args: object) -> list[str]:
        return ["nsenter", f"--net=/run/netns/{self.name}", *map(str, args)]

    def shell(self, *args: object, **more: Any) -> Done:
        """Run any program inside."""
        done = subprocess.run(
            self.argv(*args),
            capture_output=True,
            text=True,
            timeout=60,
            env=self.environment,
            check=False,
            stdin=subprocess.DEVNULL,
            **more,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def sectool(self, *args: object) -> Done:
        """Run the command line inside."""
        done = sectool(
            [str(arg) for arg in args], self.environment, cwd=Path.cwd(), netns=Path("/run/netns", self.name)
        )
        assert "Traceback" not in done.err, done.err
        return done

    def ok(self, *args: object) -> Done:
        """Run the command line inside; it has to succeed."""
        done = self.sectool(*args)
        assert done.code == 0, done
        return done

    def json(self, *args: object) -> Any:
        """The answer of a command as data, whatever its exit code."""
        done = self.sectool(*args, "-o", "json")
        assert done.out, done
        return json.loads(done.out)

    def status(self) -> dict[str, Any]:
        """What `sectool status` shows, asked of daemon and store themselves: tests wait for it over and over."""
        try:
            with Client(self.run / "control.sock", timeout=60) as control:
                found = control.call("status").header
        except SectoolError as error:
            raise AssertionError(str(error)) from None
        try:
            with Client(self.run / "events.sock", timeout=3) as store:
                found["store"] |= store.call("stats").header
        except SectoolError as error:
            found["store"]["error"] = error.message
        return found

    def enforces(self) -> bool:
        """Whether a daemon is there and all is well."""
        try:
            found = self.status()
        except AssertionError:
            return False
        return bool(found["enforcing"] and found["state"] == "enforcing")

    def popen(self, *args: object, **more: Any) -> subprocess.Popen[str]:
        """Start any program inside."""
        return subprocess.Popen(
            self.argv(*args), env=self.environment, text=True, stdin=subprocess.DEVNULL, **more
        )

    def apply(self, text: str, *args: object) -> Done:
        path = self.folder / "policy.yaml"
        path.write_text(text)
        return self.sectool("policy", "apply", path, *args)

    def rules(self) -> str:
        return self.shell("iptables-save").out + self.shell("ip6tables-save").out

    def kill_daemon(self) -> None:
        """kill -9, and wait until it and its children are gone."""
        status = self.status()
        pids = [status["pid"], status["store"]["pid"], *(w["pid"] for w in status["workers"])]
        os.kill(status["pid"], signal.SIGKILL)
        until(lambda: not any(alive(pid) for pid in pids), "daemon, store and workers end")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def make(folder: Path) -> Host:
    """An enrolled host, not up yet."""
    host = Host(folder)
    subprocess.run(["ip", "netns", "add", host.name], check=True)
    subprocess.run(["ip", "-n", host.name, "link", "set", "lo", "up"], check=True)
    host.ok("ca", "init", "--trust-domain", "shop.example")
    host.ok("host", "enroll", "--name", "web-1", "--label", "env=dev", "--network", "127.0.0.0/8")
    return host


def remove(host: Host) -> None:
    """Take it down, daemon and namespace, whatever state it is in."""
    try:
        host.sectool("down")
    finally:
        subprocess.run(["ip", "netns", "del", host.name], check=True)


@pytest.fixture(scope="session", autouse=True)
def _preloaded() -> None:
    """Commands are forked from a process that starts here, outside what tests make."""
    preloaded.start()


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    made = make(tmp_path)
    yield made
    remove(made)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """One running daemon for the tests of a module that leave it as they found it."""
    made = make(tmp_path_factory.mktemp("host"))
    made.ok("up", "--background")
    yield made
    remove(made)
