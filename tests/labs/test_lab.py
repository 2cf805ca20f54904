"""The lab without enforcers: real namespaces and services; and every way down leaves nothing."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from labs import netns, place, residue
from labs.lab import SECTOOL, Lab, sweep
from labs.topology import SHOP, Topology, host
from sectool.errors import UsageError

pytestmark = pytest.mark.kernel
ROOT = Path(__file__).parents[2]
SMALL = Topology(hosts=(host("web", 10, None, "nginx"), host("db", 20, None), host("batch", 30, None)))


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A lab that is not up yet. Whatever the test does, nothing of it stays."""
    made = Lab(f"t{secrets.token_hex(4)}", SMALL)
    before = residue.take(made.name)
    yield made
    made.down()
    left = residue.left_behind(before, residue.take(made.name))
    # The very first namespace of a machine brings this mount; other tests may be using it now.
    assert [line for line in left if line != "left behind: mount: /run/netns"] == []


def test_the_shop_s_services_answer_over_both_families(lab: Lab) -> None:
    lab = Lab(lab.name, SHOP)
    lab.up(enforce=False)
    web, db, batch, plain = (lab[name] for name in ("web", "db", "batch", "plain"))
    for url in (f"http://{web.host.ip4}/", f"http://[{web.host.ip6}]/"):
        assert batch.execute(["curl", "-sS", url]).out == "hello from web\n"
    query = ["psql", "-X", "-At", "-U", "shop", "-c", "select count(*) from orders", "postgres"]
    for address in (db.host.ip4, db.host.ip6):
        assert web.execute([*query, "-h", address]).out == "1000\n"
    outside = str(plain.host.v4[1].ip)
    assert plain.execute(["curl", "-sS", "--interface", outside, f"http://{web.host.ip4}/"]).exit == 0
    assert web.execute(["curl", "-sS", f"http://{outside}:8080/"]).out == "hello from outside\n"
    # Each runs as its own user, in its host's namespace and cgroup.
    for node, group, user in ((web, "nginx", "www-data"), (db, "postgres", "postgres")):
        pids = {
            int(p) for p in (place.cgroup_of(lab.name, node.name, group) / "cgroup.procs").read_text().split()
        }
        assert pids
        assert {Path(f"/proc/{pid}").owner() for pid in pids} == {user}
        assert pids <= netns.processes({node.netns.stat().st_ino})


def test_nothing_is_added_to_the_namespace_it_is_made_from(lab: Lab) -> None:
    before = residue.take(lab.name)
    lab.up(enforce=False)
    new = residue.take(lab.name).things - before.things
    assert {thing.partition(":")[0] for thing in new} <= {"namespace", "mount", "cgroup", "process", "folder"}


def test_up_twice_is_refused_and_the_first_lives_on(lab: Lab) -> None:
    lab.up(enforce=False)
    with pytest.raises(UsageError, match="is up already"):
        Lab(lab.name, SMALL).up(enforce=False)
    assert lab["batch"].execute(["curl", "-sS", f"http://{lab['web'].host.ip4}/"]).exit == 0


def test_down_is_safe_to_repeat_and_without_a_lab(lab: Lab) -> None:
    lab.down()
    lab.up(enforce=False)
    lab.down()
    lab.down()
    assert not lab.exists()


def _builder(lab: Lab, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([SECTOOL, "lab", "up", "--bare", "--name", lab.name, *options], cwd=ROOT)


@pytest.mark.parametrize("moment", ["folder", "namespace", "service"])
def test_down_after_the_builder_was_killed(lab: Lab, moment: str) -> None:
    stages: dict[str, Callable[[], bool]] = {
        "folder": lambda: lab.record() is not None,
        "namespace": lambda: len(netns.existing(lab.name)) >= 2,
        "service": lambda: bool(place.processes(lab.name)),
    }
    reached = stages[moment]
    builder = _builder(lab)
    end = time.monotonic() + 30
    while not reached() and time.monotonic() < end:
        pass
    builder.kill()
    builder.wait()
    assert lab.exists()
    assert subprocess.run([SECTOOL, "lab", "down", "--name", lab.name], check=False).returncode == 0
    assert not lab.exists()


def test_down_needs_no_bookkeeping(lab: Lab) -> None:
    lab.up(enforce=False)
    (lab.folder / "lab.json").unlink()
    Lab(lab.name).down()
    assert not lab.exists()


def test_a_temporary_lab_of_a_dead_owner_is_swept_and_others_are_not(lab: Lab) -> None:
    kept = Lab(f"t{secrets.token_hex(4)}", SMALL)
    try:
        netns_only = (
            "import sys; from labs.lab import Lab; Lab(sys.argv[1]).up(enforce=False, temporary=True)"
        )
        subprocess.run([sys.executable, "-c", netns_only, lab.name], check=True, cwd=ROOT)
        kept.up(enforce=False, temporary=True)  # its owner is this process
        sweep()
        assert not lab.exists()
        assert kept.exists()
    finally:
        kept.down()


def test_exec_runs_on_the_host_and_passes_the_exit_code(lab: Lab) -> None:
    lab.up(enforce=False)
    command = [SECTOOL, "lab", "exec", "--name", lab.name, "db", "--", "sh", "-c"]
    done = subprocess.run(
        [*command, "ip -4 -br address show eth0; exit 7"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 7
    assert lab["db"].host.ip4 in done.stdout


def test_status_tells_hosts_and_fails_without_a_lab(lab: Lab) -> None:
    command = [SECTOOL, "lab", "status", "--name", lab.name]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
    lab.up(enforce=False)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for node in lab.nodes.values():
        assert node.host.ip6 in done.stdout


def test_a_damaged_record_does_not_stop_anything(lab: Lab) -> None:
    lab.up(enforce=False)
    (lab.folder / "lab.json").write_text("{")
    assert lab.record() is None
    sweep()
    assert lab.exists()


def test_killing_with_sigterm_leaves_nothing(lab: Lab) -> None:
    """`up` that is told to stop half-way cleans up after itself."""
    script = "import sys; from labs.lab import Lab; Lab(sys.argv[1]).up(enforce=False)"
    builder = subprocess.Popen([sys.executable, "-c", script, lab.name], cwd=ROOT, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 30
    while len(netns.existing(lab.name)) < 3 and time.monotonic() < end:
        pass
    os.kill(builder.pid, signal.SIGINT)
    assert builder.wait(timeout=30) != 0
    assert not lab.exists()


@pytest.mark.parametrize("name", ["", "UP", "a-b", "x" * 17, "../etc"])
def test_names_that_could_mean_something_else_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        Lab(name)


def test_record_says_who_made_it(lab: Lab) -> None:
    lab.up(enforce=False)
    record = json.loads((lab.folder / "lab.json").read_text())
    assert record["owner"] == os.getpid()
    assert record["phase"] == "up"
