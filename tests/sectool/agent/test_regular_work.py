"""What the daemon does every second: no part keeps another from its turn."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest

from sectool.agent.daemon import Daemon
from sectool.errors import SectoolError


@pytest.mark.parametrize("failing", ["mode", "renew", "revoked", "partners", "packages", "workers", "after"])
def test_a_part_that_fails_keeps_no_other_from_its_turn(failing: str) -> None:
    done: list[str] = []

    def part(name: str) -> None:
        done.append(name)
        if name == failing:
            raise SectoolError("no space left on device")

    async def look_after() -> None:
        part("after")

    made = SimpleNamespace(
        modes=SimpleNamespace(watch=lambda: part("mode")),
        revoked=SimpleNamespace(watch=lambda *_: part("revoked")),
        relations=SimpleNamespace(refresh_due=lambda *_: part("partners")),
        programs=SimpleNamespace(sweep=lambda: part("programs")),
        namespaces=SimpleNamespace(sweep=lambda: part("namespaces")),
        _renew=lambda: part("renew"),
        _look_at_packages=lambda: part("packages"),
        _check_workers=lambda: part("workers"),
        _look_after=look_after,
    )
    asyncio.run(Daemon._every_second(cast(Daemon, made)))
    assert done == [
        "mode",
        "renew",
        "revoked",
        "partners",
        "packages",
        "workers",
        "programs",
        "namespaces",
        "after",
    ]
