"""The daemon dies and comes back while somebody looks: a banner, keys that work, and a tail without gap or double."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
from pathlib import Path

import pytest
from textual.pilot import Pilot

from labs.lab import Lab, Node
from labs.topology import SHOP, Topology
from sectool.api.paths import Paths
from sectool.api.server import Operation, Reply, Request, Server
from sectool.events import Action, DropReason, now_us
from sectool.ring import RingWriter
from tests.store.conftest import StoreLab
from tests.tui.conftest import screen, until
from tui.app import Console
from tui.grid import Grid
from tui.source import Source


def test_without_a_daemon_keys_work_and_it_is_found_when_it_comes(tmp_path: Path) -> None:
    async def status(request: Request) -> Reply:
        return Reply(
            {"host": "web-7", "state": "enforcing", "caller": {"user": request.peer.name, "roles": []}}
        )

    async def play() -> None:
        paths = Paths(tmp_path / "state", tmp_path)
        app = Console(Source(paths))
        async with app.run_test(size=(110, 30)) as pilot:
            await until(lambda: app.lost, "the loss")
            await pilot.pause()
            assert "NO DAEMON" in screen(app)
            await pilot.press("question_mark")
            assert len(app.screen_stack) == 2
            await pilot.press("escape", "f", "3")
            assert app.view_name == "flows"
            server = Server(paths.control_socket, {"status": Operation(status, writes=False)})
            await server.start()
            await until(lambda: app.lost is None and app.facts, "the daemon")
            app.paint()
            await pilot.pause()
            text = screen(app)
            assert "NO DAEMON" not in text
            assert "STORE DOES NOT ANSWER" in text  # there is none here
            assert "web-7" in text
            await server.close()
            await until(lambda: app.lost, "the loss of it")

    asyncio.run(play())


class Traffic:
    """Flows in the ring of a worker of our own, whether a daemon reads it or not."""

    def __init__(self, node: Node) -> None:
        self._ring = RingWriter(node.run_folder / "ring-test", 1 << 10)
        self._next = 0

    def flows(self, number: int) -> None:
        """So many more, each its own."""
        for _ in range(number):
            self._next += 1
            record = StoreLab.record(
                flow=self._next,
                start=now_us(),
                action=Action.DENY,
                drop_reason=DropReason.DEFAULT_DENY,
                destination_port=self._next,
            )
            assert self._ring.put(record)

    @property
    def all(self) -> list[str]:
        """Their services, in the order they came."""
        return [f"tcp/{port}" for port in range(1, self._next + 1)]


@pytest.mark.kernel
def test_a_killed_daemon_is_told_of_and_the_tail_goes_on() -> None:
    topology = Topology(tuple(host for host in SHOP.hosts if host.name == "rogue"), SHOP.policies)
    lab = Lab(f"loss{secrets.token_hex(3)}", topology)
    lab.up(temporary=True)
    try:
        node = lab["rogue"]
        asyncio.run(_lose(node, Traffic(node)))
    finally:
        lab.down()


async def _lose(node: Node, traffic: Traffic) -> None:
    app = Console(Source(Paths.resolve(str(node.state), str(node.run_folder))))
    async with app.run_test(size=(120, 36)) as pilot:
        grid = await _open_flows(app, pilot)

        def shown() -> list[str]:
            return [row.cells[4] for row in grid.rows if row.cells[4] in traffic.all]

        traffic.flows(5)
        await until(lambda: shown() == traffic.all, "the first flows")
        os.kill(app.facts["pid"], signal.SIGKILL)
        await until(lambda: app.lost is not None, "the loss")
        app.paint()
        await pilot.pause()
        assert "NO DAEMON" in screen(app)
        before = grid.cursor
        await pilot.press("k", "enter")
        assert grid.cursor == before - 1
        await pilot.pause()
        assert "seen by the" in screen(app)  # details of what is there
        await pilot.press("escape", "m", "f", "G")
        assert shown() == traffic.all
        traffic.flows(5)  # nobody reads the ring now

        await asyncio.to_thread(node.sectool, "up", "--background", timeout=90.0)
        await until(lambda: app.lost is None, "the daemon")
        await until(lambda: shown() == traffic.all, "what came meanwhile")
        app.paint()
        await pilot.pause()
        assert "NO DAEMON" not in screen(app)

        old = app.facts["store"]["pid"]
        os.kill(old, signal.SIGKILL)
        traffic.flows(5)
        await until(lambda: shown() == traffic.all, "the flows after the store's restart")
        await until(
            lambda: app.facts["store"].get("pid") != old and "error" not in app.facts["store"],
            "the new store",
        )
        assert app.lost is None
        traffic.flows(1)
        await until(lambda: shown() == traffic.all, "one more")
        assert len(shown()) == len(set(shown())) == 16


async def _open_flows(app: Console, pilot: Pilot[None]) -> Grid:
    await until(lambda: app.facts and app.sight is not None, "the daemon's status")
    await pilot.press("f")
    await until(lambda: app.query("#flows"), "the flows")
    return app.query_one("#flows", Grid)
