"""Enforce, observe, and a broken glass: what is on disk, which clock counts, and a daemon that is asked."""

from __future__ import annotations

import contextlib
import json
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectool.agent.daemon import Daemon
from sectool.agent.health import Health
from sectool.agent.mode import Chosen, Mode, Modes, Now, Suspension, load, parse, save
from sectool.errors import SectoolError
from sectool.events import Type
from tests.sectool.agent.conftest import Host, until

SECOND = 1_000_000
START = Now(1_790_000_000 * SECOND, 500 * SECOND, "boot-1")
BROKEN = Suspension.begin("alice", "INC-1", 600, START)


def later(seconds: int, *, calendar: int | None = None, boot: str = "boot-1") -> Now:
    """So long after START; `calendar`: what the clock on the wall says instead."""
    wall = seconds if calendar is None else calendar
    return Now(START.utc_us + wall * SECOND, START.boot_us + seconds * SECOND, boot)


@pytest.mark.parametrize(
    ("now", "left"),
    [
        (START, 600),
        (later(599), 1),
        (later(600), 0),
        (later(9_999), 0),
        (later(300, calendar=-86_400), 300),  # the calendar was set back: nothing is won
        (later(601, calendar=0), 0),
        (later(10, calendar=700), 0),  # set forward: over early
        (replace(later(300), boot_us=7, boot="boot-2"), 300),  # another boot: the calendar counts
        (later(0, calendar=-86_400, boot="boot-2"), 600),  # and never gives more than was asked for
    ],
)
def test_the_earlier_of_both_clocks_ends_it(now: Now, left: int) -> None:
    assert BROKEN.left_us(now) == left * SECOND


def test_after_a_boot_setting_the_calendar_back_wins_nothing_either() -> None:
    begun = replace(later(100, boot="boot-2"), boot_us=7 * SECOND)
    going_on = BROKEN.carried_over(begun)
    assert going_on.left_us(begun) == 500 * SECOND
    assert going_on.left_us(replace(begun, boot_us=507 * SECOND, utc_us=START.utc_us)) == 0
    assert BROKEN.carried_over(START) is BROKEN


def test_a_daemon_that_starts_after_a_boot_keeps_the_end_by_its_clock(tmp_path: Path) -> None:
    now = Now.read()
    save(tmp_path, Chosen(suspension=Suspension.begin("alice", "INC-1", 600, replace(now, boot="before"))))
    modes = Parts(tmp_path).modes()
    for kept in (modes.chosen.suspension, load(tmp_path).suspension):
        assert kept is not None
        assert kept.boot == now.boot
        assert kept.until_boot_us <= Now.read().boot_us + 600 * SECOND


def test_what_was_chosen_is_found_again_and_is_root_s_alone(tmp_path: Path) -> None:
    chosen = Chosen(Mode.OBSERVE, 7, "alice", "first week", BROKEN)
    save(tmp_path, chosen)
    assert load(tmp_path) == chosen
    assert stat.S_IMODE((tmp_path / "mode.json").stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["mode.json"]


def test_nothing_chosen_is_enforce(tmp_path: Path) -> None:
    assert load(tmp_path) == Chosen()
    assert load(tmp_path).mode is Mode.ENFORCE


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"mode": "off"}', '{"mode": "observe"}', "[" * 100_000, '{"mode": ["observe"]}'],
)
def test_a_file_that_cannot_be_read_is_an_error_with_a_remedy(tmp_path: Path, text: str) -> None:
    (tmp_path / "mode.json").write_text(text)
    with pytest.raises(SectoolError, match=r"mode\.json") as caught:
        load(tmp_path)
    assert "sectool mode enforce" in caught.value.hint


@given(
    st.binary(max_size=200)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps).map(str.encode)
)
def test_any_bytes_are_a_choice_or_a_value_error(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        assert parse(data).mode in Mode


# -- without a daemon's other parts ----------------------------------------------------------------------------------


class Parts:
    """What a daemon's modes speak to: its workers, its ring, its health and its alerts, as lists."""

    def __init__(self, state: Path, *, ring_full: bool = False) -> None:
        self.paths = SimpleNamespace(state=state)
        self.host = SimpleNamespace(name="h")
        self.told: list[Mapping[str, object]] = []
        self.emitted: list[tuple[Type, dict[str, object]]] = []
        self.alarmed: list[str] = []
        self.workers = [SimpleNamespace(send=self.told.append)]
        self.health = Health(lambda *_: None)
        self.alerts = SimpleNamespace(hold=lambda name, *_: self.alarmed.append(name), let_go=lambda _: None)
        self.events = SimpleNamespace(emit=self._emit)
        self._ring_full = ring_full

    def _emit(self, kind: Type, **facts: object) -> bool:
        self.emitted.append((kind, facts))
        return not self._ring_full

    def modes(self, chosen: Mode | None = None) -> Modes:
        return Modes(cast(Daemon, self), chosen)


def unwritable(state: Path) -> None:
    """Nobody can write there what is to be written, root neither."""
    (state / "mode.new").mkdir()


def test_neither_a_full_disk_nor_a_full_ring_keeps_denial_away(tmp_path: Path) -> None:
    save(tmp_path, Chosen(Mode.OBSERVE, 7, "alice", "first week"))
    parts = Parts(tmp_path, ring_full=True)
    modes = parts.modes()
    unwritable(tmp_path)
    modes.choose(Mode.ENFORCE, "bob", "enough")
    assert modes.mode is Mode.ENFORCE
    assert not modes.observing
    assert parts.told[-1] == {"t": "mode", "observing": False, "for_us": None}
    assert [kind for kind, _ in parts.emitted] == [Type.MODE_CHANGED]
    assert "until the next start" in parts.health.problems["mode"]


@pytest.mark.parametrize("ring_full", [False, True])
def test_observing_begins_only_where_it_can_be_recorded_and_kept(tmp_path: Path, ring_full: bool) -> None:
    parts = Parts(tmp_path, ring_full=ring_full)
    modes = parts.modes()
    if not ring_full:
        unwritable(tmp_path)
    with pytest.raises(SectoolError):
        modes.choose(Mode.OBSERVE, "bob", "")
    assert modes.mode is Mode.ENFORCE
    assert not parts.told


def test_a_start_that_changes_the_mode_is_on_record(tmp_path: Path) -> None:
    first, second = Parts(tmp_path), Parts(tmp_path)
    first.modes(Mode.OBSERVE).start()
    second.modes(Mode.OBSERVE).start()
    ((kind, facts),) = first.emitted
    assert kind is Type.MODE_CHANGED
    assert (facts["before"], facts["mode"]) == ("enforce", "observe")
    assert not second.emitted, "it changes nothing"


# -- with a daemon ---------------------------------------------------------------------------------------------------


def events(host: Host, kind: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = host.json("events", "--type", kind)["items"]
    return found


def chains(host: Host) -> list[str]:
    """The kernel rules without times and counters."""
    return [line for line in host.rules().splitlines() if line.startswith("-A")]


def test_the_glass(shared: Host) -> None:
    refused = shared.sectool("break-glass", "--for", "10m")
    assert refused.code == 2
    assert "reason" in refused.err
    assert shared.sectool("break-glass", "--for", "2d", "--reason", "x").code == 2
    assert shared.sectool("break-glass", "--end").code == 2

    shared.ok("break-glass", "--for", "10m", "--reason", "INC-4711")
    status = shared.status()
    assert status["observing"]
    assert 0 < status["break_glass"]["left_s"] <= 600
    assert "GLASS BROKEN: NOTHING IS DENIED" in shared.sectool("status").out
    assert shared.sectool("status").code == 1
    again = shared.sectool("break-glass", "--for", "20m", "--reason", "longer")
    assert again.code == 2
    assert "already" in again.err
    raised = shared.json("alerts")["items"]
    assert [a for a in raised if "INC-4711" in a["text"]], raised

    shared.ok("break-glass", "--end", "--reason", "was DNS")
    assert not shared.status()["observing"]
    assert shared.json("alerts")["items"] == []
    (begun,) = until(lambda: events(shared, "break_glass.begun"), "the event")
    (over,) = until(lambda: events(shared, "break_glass.ended"), "the event")
    assert "INC-4711" in str(begun)
    assert "was DNS" in str(over)
    assert "root" in str(begun)


def test_a_broken_glass_mends_itself(shared: Host) -> None:
    shared.ok("break-glass", "--for", "1s", "--reason", "a moment")
    until(lambda: not shared.status()["observing"], "denial to be in force again")
    until(
        lambda: not any(w["stats"].get("observing") for w in shared.status()["workers"]),
        "the workers to deny",
    )


def test_the_mode_goes_with_restarts_and_back(shared: Host) -> None:
    before = chains(shared)
    assert shared.ok("mode").out.startswith("enforce")
    shared.ok("mode", "observe", "--reason", "first week")
    assert "--queue-bypass" in shared.rules()
    assert "OBSERVE: NOTHING IS DENIED" in shared.sectool("status").out
    assert shared.sectool("mode").code == 1
    assert shared.sectool("break-glass", "--for", "1m", "--reason", "x").code == 2, "there is no glass"
    shared.ok("restart")
    assert shared.status()["mode"] == "observe"
    shared.ok("mode", "enforce", "--reason", "back-test clean")
    assert shared.ok("status").code == 0
    assert chains(shared) == before
    until(lambda: len(events(shared, "mode.changed")) == 2, "two events")


def test_members_of_the_socket_group_may_not(shared: Host) -> None:
    done = shared.shell(
        "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sectool", "mode", "observe"
    )
    assert done.code != 0
    assert not shared.status()["observing"]


def test_a_file_that_cannot_be_read_enforces_and_says_so(host: Host) -> None:
    host.state.mkdir(exist_ok=True)
    (host.state / "mode.json").write_text("{}")
    host.ok("up", "--background")
    status = host.status()
    assert not status["observing"]
    assert any(problem["what"] == "mode" for problem in status["problems"])
    host.ok("mode", "enforce")
    assert host.status()["problems"] == []


def test_without_a_daemon_it_is_the_mode_of_the_next_start(host: Host) -> None:
    host.state.mkdir(exist_ok=True)
    (host.state / "mode.json").write_text("{}")  # as its hint says
    host.ok("mode", "observe")
    assert load(host.state).mode is Mode.OBSERVE
    host.ok("mode", "enforce")
    assert load(host.state).mode is Mode.ENFORCE
