"""Who puts kernel rules in place, and takes them away, in which order. The rules themselves: tests/kernel."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from nfq import rules
from sectool.agent.daemon import Daemon

LONGEST_S = 30


class Placing:
    """What a daemon needs to place its rules; `installing` lasts until `go`."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.mode = "observe"
        self.installing, self.go = threading.Event(), threading.Event()
        monkeypatch.setattr(rules, "install", self._install)
        monkeypatch.setattr(rules, "remove", lambda _: self.done.append("removed"))
        made = SimpleNamespace(_placing=threading.Lock(), remove_rules=False, rules_installed=True)
        made.paths = SimpleNamespace(run=tmp_path)
        self.daemon = cast(Daemon, made)
        self.threads: list[threading.Thread] = []

    def _install(self, config: str, _: Path) -> None:
        self.installing.set()
        assert self.go.wait(LONGEST_S)
        self.done.append(config)

    def put(self) -> None:
        self.daemon.mode_rules = self.mode  # type: ignore[misc, assignment]
        self._begin(Daemon._put_rules)

    def remove(self) -> None:
        self.daemon.remove_rules = True
        self._begin(Daemon._maybe_remove_rules)

    def _begin(self, what: object) -> None:
        self.threads.append(threading.Thread(target=what, args=(self.daemon,)))  # type: ignore[arg-type]
        self.threads[-1].start()

    def end(self) -> list[str]:
        self.go.set()
        for thread in self.threads:
            thread.join(LONGEST_S)
        return self.done


@pytest.fixture
def placing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Placing]:
    made = Placing(tmp_path, monkeypatch)
    yield made
    made.end()


def test_rules_that_are_being_put_back_do_not_outlive_their_removal(placing: Placing) -> None:
    placing.put()
    assert placing.installing.wait(LONGEST_S)
    placing.remove()
    placing.put()  # a look that began before
    assert placing.end() == ["observe", "removed"]


def test_rules_put_back_for_the_mode_before_do_not_end_last(placing: Placing) -> None:
    placing.put()
    assert placing.installing.wait(LONGEST_S)
    placing.mode = "enforce"
    placing.put()
    placing.put()
    assert placing.end() == ["observe", "enforce", "enforce"]
