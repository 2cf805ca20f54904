"""What a packet worker of another namespace knows when it joins the others."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nfq import netns
from sectool.agent import namespaces
from sectool.agent.namespaces import Namespaces, Space


def test_what_changes_while_a_worker_starts_reaches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is configured with what was trusted when its process began, and told of changes from when it is listed."""
    trusted = ["before"]
    told: list[tuple[str, bytes]] = []

    class Starting:
        """Between its configuration and being ready the bundle changes."""

        enforcing, revision, child = True, 7, None

        def __init__(self, number: int, setup: Any, **_: Any) -> None:
            told.append(("config", setup.bundle()))

        async def begin(self, *_: Any) -> None:
            trusted[0] = "after"

        def resettle(self) -> None:
            told.append(("settings", b""))

        def send(self, header: Mapping[str, Any], payload: bytes = b"") -> None:
            told.append((str(header["t"]), payload))

        async def stop(self, *_: Any) -> None:
            told.append(("stop", b""))

    def tell_trust(worker: Starting) -> None:
        worker.send({"t": "bundle"}, trusted[0].encode())

    daemon: Any = SimpleNamespace(
        bundle=lambda: trusted[0].encode(),
        policy_text=lambda: SimpleNamespace(revision=7),
        revoked=SimpleNamespace(to_wire=bytes),
        modes=SimpleNamespace(told=dict),
        workers=[],
        health=SimpleNamespace(clear=lambda what: None),
        discovery=SimpleNamespace(inside=lambda inode, path: None, outside=lambda inode: None),
        identify=None,
        nursery=None,
        tell_trust=tell_trust,
        keys=tmp_path,
        paths=SimpleNamespace(run=tmp_path),
        remove_rules=False,
    )
    monkeypatch.setattr(namespaces, "Worker", Starting)
    monkeypatch.setattr(
        namespaces, "_inside", lambda space, work: False
    )  # nothing is touched in the namespace
    fd = os.open("/proc/self/ns/net", os.O_RDONLY)
    space = Space(1, "netns x", fd, tmp_path / "ns-1", 1000, netns.NamespaceLock(tmp_path), 0.0)

    async def start() -> None:
        daemon.activation = asyncio.Lock()
        spaces = Namespaces(daemon, {1: space})
        await spaces._start(space)
        assert [worker.__class__ for worker in daemon.workers] == [Starting]
        assert told == [("config", b"before"), ("mode", b""), ("settings", b""), ("bundle", b"after")]
        await spaces.close()

    asyncio.run(start())
