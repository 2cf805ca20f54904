"""Packet workers killed amid transfers, encrypted and plain: none is lost, no byte is wrong, no counter comes again.

SECTOOL_SURVIVAL_FLOWS=200 makes it 200 of each kind instead of a few.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.conftest import wait_until
from tests.kernel.hosts import POLICY, Lan, accept, port_of
from tests.kernel.transfers import Counters, CounterWatch, Transfers, environment_size

pytestmark = pytest.mark.kernel

FLOWS = environment_size(10)  # of each kind
SOME = 20_000  # bytes that every end must get for a transfer to count as going on
PATIENCE_S = 30.0 + FLOWS / 2
ENCRYPTED = POLICY.replace("app=web to call app=db", "app=web to call app=db encrypted")


@pytest.fixture(scope="module")
def encrypting(running_lan: Lan) -> Lan:
    """Both hosts under a policy by which `web` is encrypted and `batch` is not."""
    for host in running_lan.hosts:
        host.policy(ENCRYPTED)
    return running_lan


@pytest.fixture
def hosts(encrypting: Lan) -> Iterator[Lan]:
    """These, tidied after each test."""
    yield encrypting
    encrypting.wire.reset()
    for host in encrypting.hosts:
        if host.worker.poll() is not None:
            host.restart(ENCRYPTED)
        host.reset(ENCRYPTED)


def begin(lan: Lan, count: int) -> Transfers:
    """`count` encrypted and `count` plain transfers under way, IPv4 and IPv6 in turn."""
    batch = lan.a.user(app="batch")
    listeners = {v6: lan.b.listen(v6=v6) for v6 in (False, True)}
    pairs = []
    for number in range(2 * count):
        v6 = number // 2 % 2 == 1
        client = lan.a.connect(lan.b.address(v6), port_of(listeners[v6]), uid=batch if number % 2 else 0)
        pairs.append((client, accept(listeners[v6])))
    transfers = Transfers(pairs)
    transfers.start()
    transfers.progress(SOME, PATIENCE_S)
    for host in lan.hosts:
        wait_until(lambda h=host: h.status()["live"] == 2 * count, "all flows to be live")  # type: ignore[misc]
        assert host.status()["encrypted"] == count
    return transfers


def check(seen: dict[bytes, Counters], lost: int, count: int, leaps: int) -> None:
    """Every encrypted flow was seen both ways, and none of its counters with two contents."""
    assert lost == 0
    assert len(seen) == 2 * count
    for flow in seen.values():
        assert flow.reused == []
        assert flow.leaps() >= leaps


@pytest.mark.parametrize(("who", "times"), [("a", 1), ("b", 1), ("ab", 2)])
def test_a_worker_killed_amid_transfers_costs_none_of_them(
    hosts: Lan, tmp_path: Path, who: str, times: int
) -> None:
    lan = hosts
    watch = CounterWatch(lan.wire.space, "leg-a", tmp_path / "wire.pcap")
    transfers = begin(lan, FLOWS)
    ends = [host for host in lan.hosts if host.name in who]
    for _ in range(times):
        for host in ends:
            host.kill()
        began = time.monotonic()
        for host in ends:
            host.restart(ENCRYPTED)
        gap = time.monotonic() - began
        transfers.progress(SOME, PATIENCE_S)
        took = time.monotonic() - began
        for host in ends:
            status = host.status()
            assert (status["restored"], status["forgotten"]) == (2 * FLOWS, 0)
            assert (status["live"], status["encrypted"]) == (2 * FLOWS, FLOWS)
        print(
            f"\nworker of {who} back after {gap:.2f} s; all {2 * FLOWS} transfers went on after {took:.2f} s"
        )
    total = transfers.finish(PATIENCE_S)
    seen, lost = watch.stop()
    print(f"{total >> 20} MiB, {sum(len(flow.records) for flow in seen.values())} records")
    # Where one end alone restarts, the other's counters go on without a leap.
    check(seen, lost, FLOWS, 2 if who == "ab" else 0)
