"""Hosts that are broken on purpose, each a network namespace: the doctor finds what is wrong and says what to do."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nfq.queue import PacketQueue
from tests.kernel.conftest import Namespace

pytestmark = pytest.mark.kernel

BINARY = str(Path(sys.executable).with_name("sectool"))
Break = Callable[[Namespace], contextlib.AbstractContextManager[object]]


def examined(space: Namespace, folder: Path) -> list[dict[str, str]]:
    """What `sectool doctor -o json` says there. It exits 1 when something is bad."""
    command = f"{BINARY} --state {folder}/state --run {folder}/run doctor -o json || test $? = 1"
    items: list[dict[str, str]] = json.loads(space.run("sh", "-c", command))["items"]
    return items


def ran(*command: str) -> Break:
    """A host on which this has been run."""

    def breaking(space: Namespace) -> contextlib.AbstractContextManager[object]:
        space.run(*command)
        return contextlib.nullcontext()

    return breaking


@contextlib.contextmanager
def queue_taken(space: Namespace) -> Iterator[None]:
    with space.enter():
        queue = PacketQueue(5300, lambda packet: packet.drop())
    yield
    queue.close()


@contextlib.contextmanager
def rules_without_daemon(space: Namespace) -> Iterator[None]:
    space.run("iptables", "-t", "mangle", "-N", "SECTOOL-OUT")
    space.run("iptables", "-t", "mangle", "-A", "OUTPUT", "-j", "SECTOOL-OUT")
    yield


BROKEN: dict[str, tuple[Break, str, str, str]] = {
    "marks": (
        ran(
            "iptables",
            "-t",
            "mangle",
            "-A",
            "PREROUTING",
            "-j",
            "MARK",
            "--set-xmark",
            "0x30000000/0x30000000",
        ),
        "packet marks",
        "bad",
        "rules of others write the mark bits",
    ),
    "queue": (queue_taken, "queue 5300", "bad", "bound by"),
    "rules left": (rules_without_daemon, "kernel rules", "bad", "without a daemon"),
    "mtu": (
        ran("sh", "-c", "ip link add d0 type veth && ip link set d0 mtu 600 up"),
        "MTU",
        "bad",
        "d0 (600)",
    ),
    "forwarding": (ran("sysctl", "-qw", "net.ipv4.ip_forward=1"), "forwarding", "note", "forwards"),
    "liberal": (
        ran("sysctl", "-qw", "net.netfilter.nf_conntrack_tcp_be_liberal=1"),
        "connection tracking",
        "warning",
        "be_liberal",
    ),
    "another enforcer's queue": (
        ran("iptables", "-A", "INPUT", "-p", "udp", "-j", "NFQUEUE", "--queue-balance", "5290:5301"),
        "packet queues",
        "bad",
        "uses our queues",
    ),
    "another program judges": (
        ran("iptables", "-A", "INPUT", "-p", "udp", "-j", "NFQUEUE", "--queue-num", "0"),
        "packet queues",
        "note",
        "another program judges",
    ),
    "ufw": (ran("iptables", "-N", "ufw-before-input"), "ufw", "note", "ufw is active"),
    "firewalld": (
        ran("nft", "add", "table", "inet", "firewalld"),
        "firewalld",
        "note",
        "firewalld is active",
    ),
    "docker": (ran("iptables", "-N", "DOCKER-USER"), "Docker", "note", "published ports"),
    "kubernetes": (ran("iptables", "-N", "KUBE-SERVICES"), "Kubernetes", "note", "network plugin"),
}


# What a host lacks, taken away in a mount namespace of its own.
LACKING: dict[str, tuple[str, str, str]] = {
    "cgroup v2": (
        "umount -l -R /sys/fs/cgroup && { findmnt -rn -t cgroup2 -o TARGET | xargs -r umount -l; }",
        "cgroup v2",
        "not mounted",
    ),
    "avx": (
        "sed 's/ avx / /' /proc/cpuinfo >/dev/shm/cpuinfo-$$ && mount --bind /dev/shm/cpuinfo-$$ /proc/cpuinfo"
        " && rm /dev/shm/cpuinfo-$$",
        "processor",
        "no AVX",
    ),
    "iptables": (
        'mount --bind /dev/null "$(readlink -f "$(command -v iptables-restore)")"',
        "iptables",
        "cannot run",
    ),
    "tmpfs": ("umount -l /dev/shm && mount --bind / /dev/shm", "memory for keys", "on a tmpfs"),
}


@pytest.mark.parametrize("case", LACKING)
def test_what_is_lacking_is_found(namespace: Namespace, tmp_path: Path, case: str) -> None:
    taken, check, words = LACKING[case]
    state = tmp_path / "state"
    state.mkdir()
    doctor = f"{BINARY} --state {state} --run {tmp_path}/run doctor -o json || test $? = 1"
    command = f"PATH=$PATH:/usr/sbin; {taken} && {{ {doctor}; }}"
    out = namespace.run("unshare", "--mount", "sh", "-c", command)
    findings: list[dict[str, str]] = json.loads(out)["items"]
    matching = [f for f in findings if f["check"] == check and f["level"] == "bad"]
    assert any(words in f["message"] for f in matching), findings
    assert all(f["hint"] for f in matching)


def test_a_host_in_order_has_nothing_bad_from_its_kernel(namespace: Namespace, tmp_path: Path) -> None:
    findings = examined(namespace, tmp_path)
    assert {f["check"] for f in findings if f["area"] == "kernel"} >= {
        "iptables",
        "netfilter queue",
        "socket lookup",
    }
    assert [f for f in findings if f["area"] in ("kernel", "daemon") and f["level"] == "bad"] == []


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_found(namespace: Namespace, tmp_path: Path, case: str) -> None:
    breaking, check, level, words = BROKEN[case]
    with breaking(namespace):
        findings = examined(namespace, tmp_path)
    matching = [f for f in findings if f["check"] == check and f["level"] == level]
    assert any(words in f["message"] for f in matching), findings
    assert all(f["hint"] for f in matching)
