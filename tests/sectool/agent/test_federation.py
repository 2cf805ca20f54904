"""Refreshing bundles: what changes is taken, what fails leaves the last good one in force and is told."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from sectool.agent import federation
from sectool.agent.daemon import Daemon
from sectool.agent.federation import STALE, Relations, export, relationship_of
from sectool.agent.health import Health
from sectool.errors import SectoolError, UsageError
from sectool.events import now_us
from sectool.identity.bundle import SpiffeBundle, parse_bundle
from sectool.identity.enrolment import HostIdentity, enroll_host, init_ca
from sectool.identity.federation import Relationship

URL = "https://partner.example/bundle"
DOMAIN = "partner.example"


class Agent:
    """What of the daemon a refresh touches."""

    def __init__(self) -> None:
        self.changes: list[str] = []
        self.health = Health(lambda *_: None)

    def trust_changed(self, _: Any, reason: str) -> None:
        self.changes.append(reason)


def enrolled(state: Path) -> HostIdentity:
    init_ca(state, DOMAIN)
    return enroll_host(state, "gate", state / "ca")


@pytest.fixture
def bundles(tmp_path: Path) -> tuple[SpiffeBundle, SpiffeBundle]:
    """A domain's bundle, and one with another root, each with its number."""
    made = []
    for number in (1, 2):
        state = tmp_path / str(number)
        text = export(state, enrolled(state))
        made.append(replace(parse_bundle(text.encode(), DOMAIN), sequence=number))
    return made[0], made[1]


def relations(folder: Path, bundle: SpiffeBundle) -> Relations:
    made = Relations(folder, "ours.example")
    fields = {"domain": DOMAIN, "profile": "https_web", "url": URL, "accept": ["app"]}
    made.federation.put(relationship_of(fields, bundle.to_json().encode(), 1, made.federation))
    return made


def refresh(
    made: Relations, agent: Agent, answer: SpiffeBundle | SectoolError, monkeypatch: pytest.MonkeyPatch
) -> bool:
    def fetch(*_: Any, **__: Any) -> SpiffeBundle:
        if isinstance(answer, SectoolError):
            raise answer
        return answer

    monkeypatch.setattr(federation, "fetch_bundle", fetch)
    return asyncio.run(made.refresh(cast(Daemon, agent), DOMAIN, None))


def known(made: Relations) -> Relationship:
    return made.federation.get(DOMAIN)


def test_a_new_root_is_told_and_the_same_is_not(
    tmp_path: Path, bundles: tuple[SpiffeBundle, SpiffeBundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = bundles
    made, agent = relations(tmp_path, first), Agent()
    assert refresh(made, agent, first, monkeypatch) is False
    assert agent.changes == []
    assert known(made).due_us > now_us()
    assert refresh(made, agent, second, monkeypatch) is True
    assert agent.changes == [f"bundle of {DOMAIN} refreshed"]
    assert known(Relations(tmp_path, "ours.example")).bundle == second


def test_what_fails_leaves_the_last_good_bundle_and_becomes_a_problem(
    tmp_path: Path, bundles: tuple[SpiffeBundle, SpiffeBundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = bundles
    made, agent = relations(tmp_path, second), Agent()
    for number in range(1, STALE + 1):
        with pytest.raises(SectoolError):
            refresh(made, agent, SectoolError("down"), monkeypatch)
        assert (known(made).bundle, known(made).error) == (second, "down")
        assert (f"bundle of {DOMAIN}" in agent.health.problems) == (number == STALE)
    with pytest.raises(SectoolError, match="old copy"):
        refresh(made, agent, first, monkeypatch)
    assert known(made).bundle == second
    refresh(made, agent, second, monkeypatch)
    assert agent.health.problems == {}
    assert known(made).error == ""


def test_a_refresh_that_comes_too_late_brings_nobody_back(
    tmp_path: Path, bundles: tuple[SpiffeBundle, SpiffeBundle], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = bundles
    made, agent = relations(tmp_path, first), Agent()

    def removed_meanwhile(*_: Any, **__: Any) -> SpiffeBundle:
        made.federation.remove(DOMAIN)
        return second

    monkeypatch.setattr(federation, "fetch_bundle", removed_meanwhile)
    with pytest.raises(SectoolError, match="changed meanwhile"):
        asyncio.run(made.refresh(cast(Daemon, agent), DOMAIN, None))
    assert made.federation.known == {}
    assert agent.changes == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"profile": "file"}, "no bundle"),
        ({"profile": "ftp"}, "no endpoint profile"),
        ({"profile": "https_web", "url": "http://x/"}, "not the URL"),
        ({"profile": "https_spiffe", "url": URL}, "spiffe://"),
        ({"accept": ["domain"]}, "cannot be accepted"),
        ({"accept": "app"}, "list of texts"),
        ({"domain": 7}, "have to be text"),
        ({"domain": "unknown.example"}, "no relationship"),
    ],
)
def test_what_cannot_be_added(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    made = Relations(tmp_path, "ours.example")
    with pytest.raises(SectoolError, match=words):
        relationship_of({"domain": DOMAIN, **fields}, b"", 1, made.federation)


def test_labels_alone_can_be_changed(tmp_path: Path, bundles: tuple[SpiffeBundle, SpiffeBundle]) -> None:
    made = relations(tmp_path, bundles[0])
    changed = relationship_of({"domain": DOMAIN, "accept": ["tier=web"]}, b"", 9, made.federation)
    assert changed == replace(known(made), accept=changed.accept)
    assert dict(changed.accept.allow) == {"tier": ("web",)}
    with pytest.raises(UsageError, match="file"):
        asyncio.run(_of_file(made).refresh(cast(Daemon, Agent()), DOMAIN, None))


def _of_file(made: Relations) -> Relations:
    document = known(made).bundle.to_json().encode()
    made.federation.put(relationship_of({"domain": DOMAIN, "profile": "file"}, document, 9, made.federation))
    return made


def test_our_own_number_grows_with_our_roots_alone(tmp_path: Path) -> None:
    host = enrolled(tmp_path)
    first = parse_bundle(export(tmp_path, host).encode(), DOMAIN)
    assert parse_bundle(export(tmp_path, host).encode(), DOMAIN) == first
    other = enrolled(tmp_path / "other")
    changed = replace(host, bundle=other.bundle)
    second = parse_bundle(export(tmp_path, changed).encode(), DOMAIN)
    assert first.sequence is not None
    assert second.sequence is not None
    assert second.sequence > first.sequence
    assert second.fingerprints != first.fingerprints
