"""How the agent watches its lists: warned once and well before, its own renewed, carried over to a new key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sectool.agent import revocation
from sectool.agent.health import Health
from sectool.agent.revocation import Revoked
from sectool.clock import DAY, SECOND
from sectool.events import now_us
from sectool.identity.authority import RootAuthority
from sectool.identity.enrolment import default_constraints, enroll_host, init_ca, load_host
from sectool.identity.joining import accept, grant, prepare, read_request
from sectool.identity.lists import revoke_here
from sectool.identity.register import revoke
from sectool.identity.revocation import Entries
from sectool.identity.rollover import bundle
from sectool.labels import LabelSet

NAME = "spiffe://shop.example/host/web/wl/x"


class Agent:
    """As much of a daemon as lists have to do with."""

    def __init__(self, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host = load_host(state)
        self.told: list[tuple[bool, str]] = []
        self.reasons: list[str] = []
        self.frames: list[bytes] = []
        self.health = Health(lambda degraded, what, why: self.told.append((degraded, what)))
        self.revoked = Revoked(state, self.host.bundle, True, 60)
        monkeypatch.setattr(revocation, "took", self._took)

    def _took(self, daemon: Any, taken: Any, actor: Any, reason: str) -> None:
        self.reasons.append(reason)
        self.revoked.settle()

    def tell_workers(self, header: Any, payload: bytes) -> None:
        self.frames.append(payload)

    def watch(self, now: int) -> None:
        self.revoked.watch(self, now)  # type: ignore[arg-type]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    init_ca(tmp_path, "shop.example")
    enroll_host(tmp_path, "web", tmp_path / "ca")
    return tmp_path


def test_a_list_that_ends_is_told_once_before_and_once_after(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, now = Agent(state, monkeypatch), now_us()
    ca = state / "ca"
    listed = revoke(ca, RootAuthority.load(ca), Entries(frozenset({"aa"})), now, days=8)
    agent.revoked.lists.take(listed.pem, now)
    for day in (0, 1, 5):
        agent.watch(now + day * DAY)
    assert agent.told == []
    for _ in range(3):
        agent.watch(now + 7 * DAY)
    assert [degraded for degraded, _ in agent.told] == [True]
    for _ in range(3):
        agent.watch(now + 9 * DAY)
    assert [degraded for degraded, _ in agent.told] == [True, False, True]
    assert next(iter(agent.health.problems.values())).startswith("it expired")
    newer = revoke(ca, RootAuthority.load(ca), Entries(), now + 9 * DAY)
    agent.revoked.lists.take(newer.pem, now + 9 * DAY)
    agent.watch(now + 9 * DAY)
    assert agent.health.problems == {}


def test_a_list_that_is_required_and_not_there_is_told_until_it_is(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent, now = Agent(state, monkeypatch), now_us()
    agent.revoked.reread(agent.host.bundle, True, 60, ("other.example",))  # not even trusted
    agent.watch(now)
    assert agent.health.problems == {}
    agent.revoked.reread(agent.host.bundle, True, 60, ("*",))
    agent.watch(now)
    assert list(agent.health.problems) == ["no revocation list of shop.example"]
    assert "required" in agent.health.problems["no revocation list of shop.example"]
    assert "no revocation list" in agent.revoked.current.stale("shop.example", "", now)
    first = revoke(state / "ca", RootAuthority.load(state / "ca"), Entries(), now)
    agent.revoked.lists.take(first.pem, now)
    agent.revoked.settle()
    agent.watch(now)
    assert agent.health.problems == {}
    assert agent.revoked.current.stale("shop.example", "", now) == ""


def test_its_own_list_is_renewed_and_outlives_a_new_key(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent, now = Agent(state, monkeypatch), now_us()
    first = revoke_here(state, agent.host, agent.revoked.lists, Entries(workloads={NAME: 0}), now)
    agent.watch(now)
    assert agent.reasons == []
    agent.watch(now + 25 * DAY)
    assert agent.reasons == ["renewed"] and agent.health.problems == {}
    second = agent.revoked.lists.known[first.issuer]
    assert second.entries == first.entries and second.next_update_us > first.next_update_us
    wanted = read_request(prepare(state, "web", None))
    root = RootAuthority.load(state / "ca")
    later = now + 26 * DAY
    answer = grant(root, wanted, default_constraints("web", LabelSet({})), bundle(state / "ca"), later)
    agent.host = accept(state, answer, later)
    agent.watch(later)
    assert agent.reasons[1:] == ["carried over to the host's new CA"]
    mine = agent.revoked.lists.known[agent.host.authority.key_id]
    assert mine.entries.workloads == {NAME: 0}
    agent.watch(later + 60 * DAY)  # the old key's list has expired: it goes, without a word
    agent.watch(later + 60 * DAY + SECOND)
    assert first.issuer not in agent.revoked.lists.known
    assert agent.health.problems == {}


def test_a_damaged_file_is_told(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (state / "revocation").mkdir()
    (state / "revocation" / "x.pem").write_text("rubbish")
    agent = Agent(state, monkeypatch)
    agent.watch(now_us())
    assert [what for _, what in agent.told] == ["revocation list x.pem"]
