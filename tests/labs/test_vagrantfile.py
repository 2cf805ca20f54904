"""The Vagrantfile: Vagrant itself takes it, and what its machines are told agrees with the lab's topology."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from labs.topology import ENFORCED, SHOP, TRAINING
from labs.vm.acceptance import DB, WEB
from labs.vm.machines import MACHINES
from sectool.policy.documents import load

ROOT = Path(__file__).parents[2]
FILE = (ROOT / "Vagrantfile").read_text()
PROVISION = (ROOT / "labs/vm/provision.sh").read_text()


@pytest.mark.kernel  # where ./dev test has installed Vagrant
@pytest.mark.parametrize("driver", ["kvm", "qemu"])
def test_vagrant_takes_it(tmp_path: Path, driver: str) -> None:
    env = {
        **os.environ,
        "HOME": str(tmp_path),
        "VAGRANT_HOME": str(tmp_path),
        "VAGRANT_DOTFILE_PATH": str(tmp_path / "dot"),
        "VAGRANT_CHECKPOINT_DISABLE": "1",
        "SECTOOL_VM_DRIVER": driver,
        "SECTOOL_VM_ROGUE": "1",
    }
    done = subprocess.run(
        ["vagrant", "validate", "--ignore-provider"],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "validated successfully" in done.stdout


def test_machines_have_the_addresses_that_scenarios_expect() -> None:
    numbers = dict(re.findall(r'"(\w+)" => (\d+)', FILE)) | dict(
        re.findall(r'MACHINES\["(\w+)"\] = (\d+)', FILE)
    )
    assert {name: f"10.77.0.{n}" for name, n in numbers.items()} == {
        host.name: host.ip4 for host in TRAINING if host.name in numbers
    }
    assert set(numbers) == {*MACHINES, "rogue"}
    assert (SHOP.host("web").ip4, SHOP.host("db").ip4) == (WEB, DB)


@pytest.mark.parametrize(
    ("machine", "host"), [("web", "web"), ("db", "db"), ("ops", "batch"), ("rogue", "rogue")]
)
def test_machines_may_vouch_for_what_their_hosts_may(machine: str, host: str) -> None:
    said = re.search(rf"^  {machine}\) printf '%s\\n' (.*) ;;$", PROVISION, re.MULTILINE)
    assert said is not None
    words = said[1].replace("'", "").split()
    enforcer = SHOP.host(host).enforcer
    assert enforcer is not None
    expected = [("--label", one) for one in enforcer.labels] + [
        ("--allow", one) for one in enforcer.allow_labels
    ]
    assert list(zip(words[::2], words[1::2], strict=True)) == expected


def test_enforced_networks_are_the_labs() -> None:
    assert tuple(re.findall(r"--network (\S+?)[ )]", PROVISION)) == ENFORCED


@pytest.mark.parametrize("shared", ["shop.yaml", "rogue.yaml"])
def test_policy_is_whole_with_what_machines_need(shared: str) -> None:
    both = load([ROOT / "labs/policies" / shared, ROOT / "labs/vm/machines.yaml"])
    assert {policy.name for policy in both.policies} >= {"machines"}


def test_provisioning_says_how_it_is_used(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", ROOT / "labs/vm/provision.sh"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "provision.sh machine NAME" in done.stderr
