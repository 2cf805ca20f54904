"""When a workload begins, changes and ends, told with a clock of our own."""

from __future__ import annotations

import pytest

from sectool.agent.inventory import (
    CHANGES_US,
    LINGER_US,
    MAX_ENDED,
    SETTLE_US,
    Inventory,
    Running,
    with_ports,
)
from sectool.agent.processes import Process
from sectool.identity.workload import Facts, Workload
from sectool.labels import LabelSet

NOW = 4_000_000_000_000_000  # later than any process of these tests begins


def process(pid: int, *, started: int = 5, cgroup: str = "/a", inode: int = 1) -> Process:
    return Process(pid, started, 1, 33, 7, cgroup, 9, (1, inode, 1))


def workload(name: str = "web", *, automatic: bool = False) -> Workload:
    return Workload(name, f"/host/h/wl/{name}", LabelSet({"app": name}), automatic)


def facts(executable: str = "/bin/web", cgroup: str = "/a") -> Facts:
    return Facts(33, "www", executable, "ab", cgroup, "", 1)


def names(found: list[Running]) -> list[str]:
    return [running.workload.name for running in found]


@pytest.fixture
def inventory() -> Inventory:
    return Inventory()


def test_a_named_workload_begins_at_once_and_ends_some_time_after_its_last_process(
    inventory: Inventory,
) -> None:
    inventory.place(process(10), 1, workload(), facts(), NOW)
    inventory.place(process(11), 1, workload(), facts(), NOW)
    turn = inventory.due(NOW)
    assert names(turn.began) == ["web"]
    assert abs(turn.began[0].since_us - process(10).started_us) < 10_000  # a clock tick
    inventory.remove(10, NOW + 5)
    assert inventory.due(NOW + 10 * LINGER_US).ended == []
    inventory.remove(11, NOW + 6)
    assert inventory.due(NOW + 6 + LINGER_US - 1).ended == []
    ended = inventory.due(NOW + 6 + LINGER_US).ended
    assert names(ended) == ["web"]
    assert ended[0].ended_us == NOW + 6
    assert not inventory.wanted(1)


def test_what_runs_for_a_moment_and_has_no_name_leaves_no_trail(inventory: Inventory) -> None:
    inventory.place(process(10), 1, workload("ls", automatic=True), facts(), NOW)
    inventory.by_id[1].since_us = NOW
    assert inventory.due(NOW + SETTLE_US - 1).began == []
    inventory.remove(10, NOW + 10)
    turn = inventory.due(NOW + SETTLE_US + LINGER_US)
    assert (turn.began, turn.ended, inventory.by_id) == ([], [], {})


def test_one_without_a_name_begins_when_it_stays_or_connects_or_listens(inventory: Inventory) -> None:
    for number in (1, 2, 3):
        inventory.place(process(number), number, workload(f"w{number}", automatic=True), facts(), NOW)
        inventory.by_id[number].since_us = NOW
    inventory.connected(2, workload("w2", automatic=True), facts(), NOW)
    inventory.listening({3: ("tcp/80",)})
    assert names(inventory.due(NOW).began) == ["w2", "w3"]
    assert names(inventory.due(NOW + SETTLE_US).began) == ["w1"]


def test_a_restart_at_once_goes_on(inventory: Inventory) -> None:
    inventory.place(process(10), 1, workload(), facts(), NOW)
    inventory.due(NOW)
    inventory.remove(10, NOW)
    inventory.place(process(12), 1, workload(), facts(), NOW + LINGER_US - 1)
    turn = inventory.due(NOW + 10 * LINGER_US)
    assert (turn.began, turn.ended) == ([], [])


def test_a_reused_process_id_is_another_process(inventory: Inventory) -> None:
    inventory.place(process(10), 1, workload(), facts(), NOW)
    inventory.due(NOW)
    inventory.place(process(10, started=6), 2, workload("other"), facts("/bin/other"), NOW)
    turn = inventory.due(NOW + LINGER_US)
    assert names(turn.began) == ["other"]
    assert turn.began[0].before is None
    assert names(turn.ended) == ["web"]


def test_the_same_process_under_other_rules_is_a_change_and_no_start(inventory: Inventory) -> None:
    inventory.place(process(10), 1, workload(), facts(), NOW)
    inventory.due(NOW)
    inventory.place(process(10), 2, workload("shop"), facts(), NOW + 7)
    turn = inventory.due(NOW + 7 + LINGER_US)
    assert [(r.before, r.since_us) for r in turn.began] == [(1, NOW + 7)]
    assert [r.became for r in turn.ended] == [2]


def test_a_service_that_a_shell_becomes_goes_on(inventory: Inventory) -> None:
    """exec in the same process, under the same name: neither an end nor another start."""
    inventory.place(process(10, inode=1), 1, workload(), facts("/bin/sh"), NOW)
    assert names(inventory.due(NOW).began) == ["web"]
    inventory.place(process(10, inode=2), 2, workload(), facts("/bin/web"), NOW + 1)
    began = inventory.due(NOW + 1).began
    assert [(running.before, running.told["executable"]) for running in began] == [(1, "/bin/sh")]
    ended = inventory.due(NOW + 2 * LINGER_US).ended
    assert [(running.number, running.became) for running in ended] == [(1, 2)]
    inventory.remove(10, NOW + 3 * LINGER_US)
    assert [running.became for running in inventory.due(NOW + 5 * LINGER_US).ended] == [None]


def test_a_shell_that_becomes_what_it_has_started_before_has_not_ended_the_service(
    inventory: Inventory,
) -> None:
    """sh -c 'web --check; exec web': the program of that name is known already."""
    inventory.place(process(10, inode=1), 1, workload(), facts("/bin/sh"), NOW)
    inventory.place(process(11, inode=2), 2, workload(), facts("/bin/web"), NOW)
    inventory.due(NOW)
    inventory.remove(11, NOW + 1)
    inventory.place(process(10, inode=2), 2, workload(), facts("/bin/web"), NOW + 2)
    assert [(r.number, r.became) for r in inventory.due(NOW + 2 * LINGER_US).ended] == [(1, 2)]
    assert inventory.wanted(2)


def test_another_program_beside_it_or_by_another_name_is_a_workload_of_its_own(inventory: Inventory) -> None:
    inventory.place(process(10, inode=1), 1, workload(), facts("/bin/sh"), NOW)
    inventory.place(process(11, inode=1), 1, workload(), facts("/bin/sh"), NOW)
    inventory.due(NOW)
    inventory.place(process(10, inode=2), 2, workload(), facts("/bin/web"), NOW + 1)
    inventory.place(process(11, inode=3), 3, workload("db"), facts("/bin/db"), NOW + 1)
    assert [running.before for running in inventory.due(NOW + 1).began] == [None, None]
    assert [running.became for running in inventory.due(NOW + 2 * LINGER_US).ended] == [None]


def test_one_that_gets_a_process_back_has_become_nothing(inventory: Inventory) -> None:
    inventory.place(process(10, inode=1), 1, workload(), facts("/bin/sh"), NOW)
    inventory.due(NOW)
    inventory.place(process(10, inode=2), 2, workload(), facts("/bin/web"), NOW + 1)
    inventory.place(process(12, inode=1), 1, workload(), facts("/bin/sh"), NOW + 2)
    inventory.due(NOW + 2)
    inventory.remove(12, NOW + 3)
    assert [running.became for running in inventory.due(NOW + 3 + LINGER_US).ended] == [None]


def test_ports_and_package_are_changes(inventory: Inventory) -> None:
    inventory.place(process(10), 1, workload(), facts(), NOW)
    inventory.due(NOW)
    assert inventory.missing_packages() == {"/bin/web"}
    inventory.owned({"/bin/web": "web 1.0"})
    inventory.listening(with_ports([(1, "tcp/443"), (1, "udp/53"), (1, "tcp/80"), (1, "tcp/80")]))
    changed = inventory.due(NOW).changed
    assert changed[0].noted["ports"] == ["tcp/80", "tcp/443", "udp/53"]
    assert changed[0].noted["package"] == "web 1.0"
    assert inventory.due(NOW).changed == []
    assert inventory.missing_packages() == set()


def test_a_workload_that_changes_all_the_time_is_told_now_and_then(inventory: Inventory) -> None:
    inventory.place(process(10), 1, workload(), facts(), NOW)
    inventory.due(NOW)
    told = 0
    for step in range(100):
        inventory.listening({1: (f"tcp/{step + 1}",)})
        told += len(inventory.due(NOW + step * CHANGES_US // 20).changed)
    assert told == 5
    last = inventory.due(NOW + 10 * CHANGES_US).changed
    assert last[0].noted["ports"] == ["tcp/100"]


def test_whoever_cannot_be_told_apart_lives_as_long_as_somebody_is_in_its_cgroup(
    inventory: Inventory,
) -> None:
    inventory.place(process(10, cgroup="/mixed"), 1, workload("a"), facts(cgroup="/mixed"), NOW)
    inventory.connected(2, workload("shared"), facts("", "/mixed"), NOW)
    assert names(inventory.due(NOW).began) == ["a", "shared"]
    assert inventory.due(NOW + 10 * LINGER_US).ended == []
    inventory.remove(10, NOW + 10 * LINGER_US)
    inventory.due(NOW + 10 * LINGER_US)
    assert sorted(names(inventory.due(NOW + 20 * LINGER_US).ended)) == ["a", "shared"]


def test_those_that_ended_are_remembered_within_bounds(inventory: Inventory) -> None:
    for number in range(1, MAX_ENDED + 10):
        inventory.place(process(number), number, workload(f"w{number}"), facts(), NOW)
        inventory.due(NOW)
        inventory.remove(number, NOW)
    inventory.due(NOW + LINGER_US)
    assert len(inventory.ended) == MAX_ENDED
    assert 1 not in inventory.ended
