"""The demo as a whole, every way out of it, and that its judge can say no."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from labs import place
from labs.cases import CASES, Case, Seen
from labs.judge import judge
from labs.lab import ROOT as LABS
from labs.lab import Lab
from labs.topology import SHOP, Topology, host

pytestmark = pytest.mark.kernel
ROOT = Path(__file__).parents[2]
FIRST = CASES[0]


def _leftovers(name: str) -> list[str]:
    lab = Lab(name)
    return [str(lab.folder)] * lab.folder.exists() + [str(pid) for pid in place.processes(name)]


@pytest.mark.long
def test_the_demo_passes_and_leaves_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "labs.demo"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAIL" not in done.stdout
    total = re.search(r"(\d+) of (\d+) cases as expected", done.stdout)
    assert total is not None
    assert total[1] == total[2]
    assert int(total[2]) > len(CASES)
    assert (
        "rules, interfaces, routes, mounts, namespaces, cgroups, processes, files: as before" in done.stdout
    )
    name = re.search(r"building lab (\w+)", done.stdout)
    assert name is not None
    assert _leftovers(name[1]) == []


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing(number: signal.Signals) -> None:
    demo = subprocess.Popen(
        [sys.executable, "-u", "-m", "labs.demo"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert demo.stdout is not None
    alarm = threading.Timer(240, demo.kill)
    alarm.start()
    try:
        name = ""
        for line in demo.stdout:
            if found := re.search(r"building lab (\w+)", line):
                name = found[1]
            if "enforcers on" in line:
                os.kill(demo.pid, number)
                break
        rest = demo.stdout.read()
        assert demo.wait() == 130, rest
        assert "interrupted" in rest
        assert name
        assert _leftovers(name) == []
    finally:
        alarm.cancel()
        demo.kill()
        demo.wait()


def test_a_demo_that_was_killed_is_cleaned_up_by_the_next_lab_user() -> None:
    demo = subprocess.Popen(
        [sys.executable, "-u", "-m", "labs.demo"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert demo.stdout is not None
    name = ""
    for line in demo.stdout:
        if found := re.search(r"building lab (\w+)", line):
            name = found[1]
        if "services:" in line:
            break
    demo.kill()
    demo.wait()
    assert (LABS / name).exists()
    subprocess.run([sys.executable, "-c", "from labs.lab import sweep; sweep()"], cwd=ROOT, check=True)
    assert _leftovers(name) == []


@pytest.fixture(scope="module")
def enforced() -> Iterator[Lab]:
    """Two hosts of the shop with their enforcers."""
    small = replace(SHOP, hosts=(SHOP.host("web"), SHOP.host("batch")))
    lab = Lab(f"t{secrets.token_hex(4)}", small)
    lab.up()
    yield lab
    lab.down()
    assert not lab.exists()


def test_the_judge_says_yes_to_the_truth(enforced: Lab) -> None:
    outcome = judge(enforced, FIRST)
    assert outcome.ok, outcome


@pytest.mark.parametrize(
    "wrong",
    [
        replace(FIRST, exit=28),
        replace(FIRST, says="something else"),
        replace(FIRST, events=(Seen("web", "deny"),)),
        replace(FIRST, events=(Seen("web", "allow", rule="allow any to call any"),)),
        replace(FIRST, events=(Seen("web", "allow", peer="spiffe://rogue.example/"),)),
        replace(FIRST, port=81),
    ],
    ids=["exit", "words", "verdict", "rule", "identity", "port"],
)
def test_the_judge_says_no_to_anything_else(
    enforced: Lab, wrong: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("labs.records.DEADLINE", 1.0)
    outcome = judge(enforced, wrong)
    assert not outcome.ok
    assert outcome.got != outcome.expected


def test_without_enforcers_the_same_traffic_passes() -> None:
    """What the demo shows is the enforcers' doing: on the same hosts without them a denied case gets through."""
    denied = next(case for case in CASES if case.name == "denied by intent")
    bare = Topology(hosts=(host("web", 10, None, "nginx"), host("batch", 30, None)))
    lab = Lab(f"t{secrets.token_hex(4)}", bare)
    lab.up()
    try:
        assert judge(lab, replace(denied, exit=0, says="hello from web", events=())).ok
        assert not judge(lab, replace(denied, events=())).ok
    finally:
        lab.down()
