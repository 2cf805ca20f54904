"""Facts in, credentials out, with a real host CA: cached, renewed at half life, bounded, refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sectool.agent import identities as module
from sectool.agent.identities import Identities, Issued
from sectool.errors import SectoolError
from sectool.events import now_us
from sectool.identity.credential import Credential
from sectool.identity.enrolment import HostIdentity, enroll_host, init_ca
from sectool.identity.workload import Facts, Workload, resolve

FACTS: dict[str, Any] = {
    "uid": 33,
    "user": "www-data",
    "executable": "/usr/sbin/nginx",
    "sha256": "ab" * 32,
    "cgroup": "/system.slice/nginx.service",
    "unit": "nginx.service",
    "pid": 7,
}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> HostIdentity:
    state = tmp_path_factory.mktemp("state")
    init_ca(state, "shop.example")
    return enroll_host(state, "web-1", state / "ca", {"env": "dev"})


class Book:
    """Identities with a host's CA, and what was told of them."""

    def __init__(self, host: HostIdentity, ttl_s: int = 3600) -> None:
        self.told: list[tuple[int, bool]] = []
        self.registered: dict[str, dict[str, str]] = {}
        self.ttl_s = ttl_s
        self.host = host
        self.book = Identities(self.resolve, self.issue, self.issued)

    def resolve(self, facts: Facts) -> Workload:
        return resolve(facts, (), self.registered, host=self.host.name, host_labels=self.host.labels)

    def issue(self, workload: Workload) -> Credential:
        return self.host.authority.issue(workload.path, workload.labels, now_us(), self.ttl_s)

    def issued(self, entry: Issued, before: Credential | None) -> None:
        self.told.append((entry.workload_id, before is not None))


def test_the_same_facts_share_one_credential(host: HostIdentity) -> None:
    made = Book(host)
    first = made.book.identify((1, "a"), FACTS)
    second = made.book.identify((2, "b"), {**FACTS, "pid": 8})
    assert first is second
    assert list(first.keys) == [(1, "a"), (2, "b")]
    assert made.told == [(first.workload_id, False)]
    assert first.credential.peer.labels["env"] == "dev"
    assert first.credential.peer.labels["unit"] == "nginx.service"
    assert first.credential.peer.spiffe_id.startswith("spiffe://shop.example/host/web-1/wl/")


@pytest.mark.parametrize(
    "change", [{"uid": 34}, {"sha256": "cd" * 32}, {"executable": "/opt/nginx"}, {"unit": "x.service"}]
)
def test_other_facts_are_another_workload(host: HostIdentity, change: dict[str, Any]) -> None:
    made = Book(host)
    assert made.book.identify(1, FACTS) is not made.book.identify(1, {**FACTS, **change})


def test_renewal_at_half_life_keeps_the_identity_and_tells_of_it(host: HostIdentity) -> None:
    made = Book(host)
    entry = made.book.identify("k", FACTS)
    before = entry.credential
    assert made.book.renew_due(now_us()) == []
    assert made.book.renew_due(before.renew_at_us) == [entry]
    assert entry.credential.peer.serial != before.peer.serial
    assert entry.credential.peer.spiffe_id == before.peer.spiffe_id
    assert entry.rotations == 1
    assert made.told == [(entry.workload_id, False), (entry.workload_id, True)]


def test_a_due_credential_is_renewed_when_asked_for(host: HostIdentity) -> None:
    made = Book(host, ttl_s=1)
    entry = made.book.identify("k", FACTS)
    entry.credential = host.authority.issue(
        entry.workload.path, entry.workload.labels, now_us() - 3_000_000, 4
    )
    assert entry.credential.renew_at_us < now_us()
    made.book.identify("k2", FACTS)
    assert entry.rotations == 1


def test_a_renewal_that_fails_leaves_the_old_credential_until_it_expires(host: HostIdentity) -> None:
    made = Book(host)
    entry = made.book.identify("k", FACTS)

    def fail(_: Workload) -> Credential:
        raise SectoolError("the CA is gone")

    book = Identities(made.resolve, fail, made.issued)
    book.by_workload[entry.workload_id] = entry
    assert book.renew_due(entry.credential.renew_at_us) == []
    assert entry.workload_id in book.by_workload
    assert book.renew_due(entry.credential.not_after_us) == []
    assert entry.workload_id not in book.by_workload


@pytest.mark.parametrize("raw", [{}, {"uid": 1}, {**FACTS, "stray": 1}])
def test_facts_that_do_not_fit_are_refused_and_counted(host: HostIdentity, raw: dict[str, Any]) -> None:
    made = Book(host)
    with pytest.raises(SectoolError, match="do not fit"):
        made.book.identify("k", raw)
    assert made.book.refused == 1


def test_labels_the_host_may_not_vouch_for_are_refused(host: HostIdentity) -> None:
    made = Book(host)
    made.registered["/x"] = {"env": "prod"}
    with pytest.raises(SectoolError, match="may not vouch for env=prod"):
        made.book.identify("k", {**FACTS, "cgroup": "/x"})
    assert made.book.by_workload == {}


def test_a_program_that_ended_is_forgotten_with_what_is_below_it(host: HostIdentity) -> None:
    made = Book(host)
    inside = made.book.identify(1, {**FACTS, "cgroup": "/run/web/sub", "uid": 1})
    beside = made.book.identify(2, {**FACTS, "cgroup": "/run/web-2", "uid": 2})
    assert made.book.forget_cgroup("/run/web") == [inside]
    assert list(made.book.by_workload) == [beside.workload_id]


def test_both_tables_are_bounded(host: HostIdentity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WORKLOADS", 2)
    monkeypatch.setattr(module, "MAX_KEYS", 3)
    made = Book(host)
    first = made.book.identify(1, {**FACTS, "uid": 1})
    second = made.book.identify(1, {**FACTS, "uid": 2})
    for key in range(5):
        made.book.identify(key, {**FACTS, "uid": 1})
    assert list(first.keys) == [2, 3, 4]
    made.book.identify(1, {**FACTS, "uid": 3})
    assert second.workload_id not in made.book.by_workload  # silent longest
    assert first.workload_id in made.book.by_workload


def test_nothing_secret_in_what_is_told(host: HostIdentity, tmp_path: Path) -> None:
    entry = Book(host).book.identify("k", FACTS)
    assert "private" not in repr(entry).lower()
    assert "X25519PrivateKey" not in repr(entry)
    assert set(entry.describe()) == {
        "name",
        "labels_id",
        "uid",
        "user",
        "executable",
        "sha256",
        "unit",
        "cgroup",
    }


def test_a_socket_that_is_another_workloads_now_gets_its_credential(host: HostIdentity) -> None:
    made = Book(host)
    old = made.book.identify("k", FACTS)
    new = made.book.identify("other", {**FACTS, "uid": 34})
    assert made.book.move("k", old.workload_id, new.workload_id) is new
    assert ("k" in old.keys, "k" in new.keys) == (False, True)
    assert made.book.move("k", old.workload_id, new.workload_id) is None
    assert made.book.move("unknown", new.workload_id, old.workload_id) is None
