"""What the rules against floods refer to, on a real kernel: sets of known addresses, the counter, rates by source."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6

from nfq import rules
from nfq.rules import RulesConfig
from nfq.shed import AGAIN_US, Shed, set_name
from tests.kernel.conftest import Namespace, wait_until
from tests.kernel.hosts import Lan

pytestmark = pytest.mark.kernel

RATE = 20
BURST = 2 * (RATE // 4)  # of strangers in one prefix
SENT = 100


@pytest.fixture
def shed(namespace: Namespace) -> Iterator[Shed]:
    """Of an empty namespace."""
    with namespace.enter(), contextlib.closing(Shed()) as made:
        yield made


def sets(space: Namespace) -> str:
    """The rules that name sets, as the kernel takes them."""
    lines = [f"-A INPUT -m set --match-set {set_name(False)} src -j ACCEPT"]
    space.run("iptables-restore", "--noflush", stdin="\n".join(["*mangle", *lines, "COMMIT"]) + "\n")
    return space.run("iptables-save", "-t", "mangle")


def test_sets_and_counter_are_made_once_and_taken_away(namespace: Namespace, shed: Shed) -> None:
    assert shed.turned_away() == 0, "no counter is no error"
    shed.known(bytes((10, 0, 0, 1)), 0)
    shed.prepare()
    shed.prepare()
    assert "sectool-known4" in sets(namespace)
    namespace.run("iptables", "-t", "mangle", "-F", "INPUT")
    shed.remove()
    shed.remove()
    with pytest.raises(AssertionError, match="sectool-known4"):
        sets(namespace)


@pytest.mark.parametrize("config", [RulesConfig(strangers=RATE), RulesConfig(strangers=RATE, workers=3)])
def test_removal_leaves_no_trace(namespace: Namespace, tmp_path: Path, config: RulesConfig) -> None:
    with namespace.enter():
        before = rules.snapshot()
        rules.install(config, tmp_path)
        assert rules.installed()
        assert "SECTOOL-NEW" in rules.snapshot()
        rules.install(RulesConfig(), tmp_path)
        assert "sectool-known4" not in rules.snapshot(), "switched off"
        rules.install(config, tmp_path)
        rules.remove(tmp_path)
        assert rules.snapshot() == before
    with pytest.raises(AssertionError, match="sectool-known4"):
        sets(namespace)


@pytest.mark.parametrize("v6", [False, True], ids=["v4", "v6"])
def test_strangers_are_bounded_and_whoever_is_known_is_not(lan: Lan, tmp_path: Path, v6: bool) -> None:
    """The worker's own count says what reached it."""
    with lan.b.space.enter():
        rules.install(RulesConfig(strangers=RATE), lan.b.run)
        shed = Shed()
    source = "fd77::99" if v6 else "10.77.0.99"
    raw = bytes.fromhex("fd77" + "00" * 13 + "99") if v6 else bytes((10, 77, 0, 99))
    with contextlib.closing(shed):

        def reached(first_port: int) -> int:
            before = lan.b.status()["packets"]
            for port in range(first_port, first_port + SENT):
                ip = (IPv6 if v6 else IP)(src=source, dst=lan.b.address(v6))
                lan.wire.send("b", ip / TCP(sport=port, dport=9, flags="S", options=[(253, b"\x5e\xc7")]))
            return int(lan.b.status()["packets"] - before)

        assert BURST <= reached(20_000) < SENT // 2
        wait_until(lambda: lan.b.status()["reasons"].get("rate_limited", 0) >= SENT // 2, "the count")
        shed.known(raw, AGAIN_US)
        assert reached(30_000) == SENT


def test_the_programs_that_need_them_are_not_needed_here() -> None:
    """iptables is: it has the extensions that the rules name."""
    for extension in ("set", "nfacct", "hashlimit", "limit", "conntrack"):
        done = subprocess.run(
            ["iptables", "-m", extension, "--help"], capture_output=True, text=True, check=False
        )
        assert f"{extension} match options" in done.stdout.lower(), extension
