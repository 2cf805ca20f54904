"""Workloads found while they run, by a real daemon: list, show, tree, events, and what was in the past."""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import UTC, datetime
from typing import Any

import pytest

from .conftest import Host, until

pytestmark = pytest.mark.kernel

POLICY = """\
kind: Workload
name: sleeper
match: {executable: /usr/bin/sleep}
labels: {app: sleeper, env: dev}
---
kind: Policy
name: shop
owner: team-shop
rules:
  - allow app=web to call app=db on tcp/5432
"""
LISTEN = "import socket; s = socket.create_server(('127.0.0.1', 5432)); print(1, flush=True); s.accept()"


def named(host: Host, name: str, *args: object) -> list[Any]:
    return [w for w in host.json("workload", "list", *args)["items"] if w["name"] == name]


def test_a_workload_from_its_start_to_its_end(shared: Host) -> None:
    assert shared.apply(POLICY).code == 0
    process = shared.popen("sleep", "600")
    # Its identity is there before it opens any connection, and never will.
    until(
        lambda: [i for i in shared.json("identity", "list")["items"] if i["workload"] == "sleeper"],
        "it has an identity",
    )
    found = until(lambda: named(shared, "sleeper"), "it is listed")[0]
    assert found["pids"] == [process.pid]
    assert (
        found["labels"] == {"app": "sleeper", "env": "dev", "exe": "sleep", "user": "root"} | found["labels"]
    )
    assert found["origins"]["app"] == "operator"
    assert found["origins"]["exe"] == found["origins"]["user"] == "attested"
    until(lambda: named(shared, "sleeper")[0]["package"].startswith("coreutils "), "its package is known")
    running_us = time.time_ns() // 1000
    shown = shared.ok("workload", "show", process.pid).out
    assert "named by    Workload sleeper" in shown
    assert "exe=sleep    attested" in shown
    assert f"{process.pid} /usr/bin/sleep" in shared.ok("workload", "tree").out
    # Other rules, another workload; the process goes on.
    assert shared.apply(POLICY.replace("name: sleeper", "name: dozer")).code == 0
    until(lambda: named(shared, "dozer"), "it goes by its new name")
    process.kill()
    process.wait()
    until(lambda: not named(shared, "dozer"), "it has ended")
    events = until(
        lambda: found
        if (found := [e["type"] for e in shared.json("events", "--type", "workload.*")["items"]
                      if e["data"].get("workload") in ("sleeper", "dozer")])[-1] == "workload.stop"
        else [],
        "its end is on record",
    )  # fmt: skip
    assert events[0] == "workload.start"
    assert "workload.change" in events
    assert [w["name"] for w in named(shared, "dozer", "--ended")] == ["dozer"]
    then = datetime.fromtimestamp(running_us / 1e6, UTC).isoformat()
    assert [w["labels"]["app"] for w in named(shared, "sleeper", "--at", then)] == ["sleeper"]
    assert named(shared, "dozer", "--at", then) == []
    assert "/usr/bin/sleep  root  sleeper" in shared.ok("workload", "tree", "--at", then).out
    assert shared.json("workload", "show", "sleeper", "--at", then)["items"][0]["until"] is not None


def test_listeners_and_filters(shared: Host) -> None:
    process = shared.popen(
        sys.executable, "-m", "sectool", "run", "-l", "app=listener", "--", sys.executable, "-c", LISTEN,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        process.stdout.readline()
        rows = until(
            lambda: shared.json("workload", "list", "--port", "tcp/5432", "--named")["items"],
            "its port is seen",
        )
        assert [r["labels"]["app"] for r in rows] == ["listener"]
        assert shared.json("workload", "list", "--label", "app=listener,env!=prod")["items"] == rows
        assert shared.json("workload", "list", "--label", "app=nobody")["items"] == []
        assert shared.json("workload", "list", "--user", "nobody-there")["items"] == []
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["workload", "list", "--label", "app=="], "--label app=="),
        (["workload", "list", "--label", "any"], "names no labels"),
        (["workload", "list", "--ended", "--at", "1h"], "exclude each other"),
        (["workload", "show", "nobody-there"], "there is no workload 'nobody-there'"),
        (["run", "--label", "exe=nginx", "--", "true"], "attested of each workload"),
    ],
)
def test_mistakes_are_named(shared: Host, args: list[str], says: str) -> None:
    done = shared.sectool(*args)
    assert done.code == 2, done
    assert says in done.err
