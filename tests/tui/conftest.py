"""A stored host to look at: flows, policies and events as a daemon left them, and a console on it."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from sectool.events import Action, DropReason
from sectool.policy import parse
from sectool.policy.engine import Engine
from store.control import Actor, ControlHistory
from tests.store.conftest import T0, StoreLab
from tui.app import Console
from tui.settings import Settings
from tui.source import Source

NOW = T0 + 900_000_000  # when the tests look: a quarter of an hour after the first flow
HOSTILE = "evil\x1b[31m\nred[bold]x[/bold]\u202egnp"

FIRST = """\
kind: Policy
name: shop
owner: team-shop
rules:
  - allow app=web to call app=db on tcp/5432
---
kind: Guardrail
name: baseline
owner: security
rules:
  - deny env=test to call env=prod because "PCI 1.2.1"
"""
SECOND = FIRST + '  - deny app=web to call app=db because "freeze, SEC-7"\n'

Open = Callable[..., AbstractAsyncContextManager[tuple[Console, Pilot[None]]]]


@pytest.fixture(scope="session")
def folder() -> Iterator[Path]:
    """State folder of a host where revision 2 has cut web off from db."""
    base = Path(tempfile.mkdtemp(prefix="st-tui-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    lab = StoreLab(base)
    try:
        _fill(lab)
        yield lab.state
    finally:
        lab.close()
        shutil.rmtree(base, ignore_errors=True)


def _fill(lab: StoreLab) -> None:
    web, db = lab.labels("app=web,env=prod"), lab.labels("app=db,env=prod")
    batch = lab.labels("app=batch,env=prod")
    web_id, db_id = (lab.identity(f"spiffe://lab.example/{n}", n_) for n, n_ in (("web", web), ("db", db)))
    batch_id = lab.identity("spiffe://lab.example/batch", batch)
    allow = lab.rule("allow app=web to call app=db on tcp/5432")
    deny = lab.rule('deny app=web to call app=db because "freeze, SEC-7"')
    lab.ring().put_blob(
        {"type": "dict.workload", "id": 5, "name": HOSTILE, "labels_id": web, "uid": 1, "user": "x"}
    )
    lab.start()
    ends = {
        "source_labels": web,
        "source_identity": web_id,
        "destination_labels": db,
        "destination_identity": db_id,
    }
    for n in range(30):
        good = n < 20
        lab.ring().put(
            lab.record(
                flow=n + 1,
                start=T0 + n * 30_000_000,
                destination_port=5432,
                action=Action.ALLOW if good else Action.DENY,
                drop_reason=0 if good else DropReason.GUARDRAIL_DENY,
                rule=allow if good else deny,
                policy_revision=1 if good else 2,
                source_workload=5,
                **ends,
            )
        )
    for n in range(3):
        ends = {"source_labels": batch, "source_identity": batch_id, "destination_labels": db}
        lab.ring().put(
            lab.record(
                flow=n + 100,
                start=T0 + 850_000_000 + n,
                destination_port=5432,
                action=Action.DENY,
                drop_reason=DropReason.DEFAULT_DENY,
                flags=1,
                policy_revision=2,
                destination_identity=db_id,
                **ends,
            )
        )
    change = {"revision": 2, "hash": "00", "author": "eve", "previous": 1}
    lab.ring().put_blob({"type": "policy.applied", "ts": T0 + 595_000_000, "reason": HOSTILE, **change})
    lab.ring().put_blob(
        {"type": "policy.activated", "ts": T0 + 596_000_000, "cut": 1, "problems": [], **change}
    )
    lab.stored(33, 2)
    lab.stop()
    history = ControlHistory(lab.state / "control.sqlite")
    for number, (text, author, reason, at) in enumerate(
        ((FIRST, "root", "first", T0 - 3_600_000_000), (SECOND, "eve", HOSTILE, T0 + 595_000_000)), 1
    ):
        Engine(parse(text, "test"))
        body = {
            "revision": number,
            "hash": "00",
            "text": text,
            "author": author,
            "reason": reason,
            "roles": [],
        }
        history.append("policy", str(number), body, Actor(0, author), reason, at)
        history.append("activation", "host1", {"revision": number}, Actor(0, "agent"), "switched", at)
    for name, labels in (
        ("web", "app=web,env=prod"),
        ("db", "app=db,env=prod"),
        ("batch", "app=batch,env=prod"),
    ):
        spiffe_id, own = f"spiffe://lab.example/{name}", dict(part.split("=") for part in labels.split(","))
        issued: dict[str, Any] = {"spiffe_id": spiffe_id, "labels": own, "serial": f"{len(name):x}0ff"}
        issued |= {"fingerprint": "ab" * 32, "not_before": T0 - 1, "not_after": T0 + 86_400_000_000}
        history.append("identity", spiffe_id, issued, Actor(0, "agent"), "issued", T0 - 1)
        origins = {"app": "operator", "env": "host"}
        body = {"name": name, "path": f"/{name}", "labels": own, "origins": origins}
        history.append("workload", name, body, Actor(0, "agent"), "started", T0 - 1)
    history.close_file()


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of the console stands at NOW."""

    for name, module in sys.modules.copy().items():
        if name.startswith("tui.") and hasattr(module, "now_us"):
            monkeypatch.setattr(module, "now_us", lambda: NOW)


async def settle(pilot: Pilot[None]) -> None:
    """Wait until nothing is being asked and everything is drawn."""
    app = pilot.app
    assert isinstance(app, Console)
    deadline = time.monotonic() + 90
    quiet = 0
    while quiet < 2:
        await pilot.pause()
        busy = app.view.asking or app.asking_status is not None or not app.facts
        quiet = 0 if busy else quiet + 1
        if time.monotonic() > deadline:
            pytest.fail(f"{app.view_name} still asks for {app.view._asking}")
        if busy:
            await asyncio.sleep(0.01)


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait for something to become true while the console goes on."""
    deadline = time.monotonic() + 90
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited in vain: {what}")
        await asyncio.sleep(0.01)


@pytest.fixture
def console(folder: Path, still: None) -> Open:
    """Opens a console on the stored host, settled on Pulse."""

    @asynccontextmanager
    async def opened(
        size: tuple[int, int] = (80, 24), theme: str = "textual-dark", settings: Settings | None = None
    ) -> AsyncIterator[tuple[Console, Pilot[None]]]:
        source = Source.of_store(folder)
        app = Console(source, theme=theme, settings=settings)
        with contextlib.closing(source):
            async with app.run_test(size=size) as pilot:
                await settle(pilot)
                yield app, pilot

    return opened


async def press(pilot: Pilot[None], *keys: str) -> None:
    """Press keys and wait for what they ask."""
    for key in keys:
        await pilot.press(key)
    await settle(pilot)


def screen(app: Console) -> str:
    """What stands on the terminal."""
    return "\n".join("".join(segment.text for segment in strip).rstrip() for strip in strips(app))


def strips(app: Console) -> list[Any]:
    """The terminal's lines with their styles, after all filters."""
    return app.screen._compositor.render_strips()
