"""Identities: whose word each label rests on, who talks with them, and revoking one, in a real lab."""

from __future__ import annotations

import asyncio
import secrets

import pytest

from labs.lab import SECTOOL, Lab, Node
from labs.topology import SHOP, Topology
from sectool.api.paths import Paths
from tests.tui.conftest import Open, press, screen, until
from tui.app import Console
from tui.grid import Grid
from tui.source import Source
from tui.views.identities import Identities, peers_statement, with_origins


def test_labels_have_the_origins_of_their_workload() -> None:
    issued = [
        {"spiffe_id": "spiffe://a.example/host/h/wl/web", "labels": {"app": "web", "domain": "a.example"}},
        {"spiffe_id": "spiffe://a.example/host/h/wl/old", "labels": {"app": "old"}},
    ]
    workloads = [{"path": "/host/h/wl/web", "origins": {"app": "operator", "zone": "host"}}]
    found = with_origins(issued, workloads)
    assert found[0]["origins"] == {"app": "operator", "zone": "host", "domain": "verifier"}
    assert found[1]["origins"] == {}


def test_the_chosen_one_is_shown_with_its_peers_and_leads_to_its_flows(console: Open) -> None:
    async def play() -> None:
        async with console((160, 48)) as (app, pilot):
            await press(pilot, "i", "G")
            text = screen(app)
            assert "app=web" in text
            assert "operator" in text
            assert "to   db·prod" in text
            assert "10 denied, 19 allowed" in text
            await press(pilot, "x")
            assert "revoke is not possible: these are stored files" in screen(app)
            assert app.view.cli() == "sectool identity list"
            await press(pilot, "left_square_bracket")
            assert app.view.cli().startswith("sectool identity list --at 2026-")
            await press(pilot, "0", "enter")
            assert app.view_name == "flows"
            assert str(app.filter) == "identity=spiffe://lab.example/web"
            assert len(app.query_one("#flows", Grid).rows) == 29
            hostile = "spiffe://x/'; DROP TABLE flows; --"
            assert app.source.query(peers_statement(hostile, 0, 1)).items == []

    asyncio.run(play())


@pytest.mark.kernel
def test_an_identity_is_revoked_with_a_reason_after_a_question() -> None:
    topology = Topology(tuple(host for host in SHOP.hosts if host.name == "rogue"), SHOP.policies)
    lab = Lab(f"revoke{secrets.token_hex(3)}", topology)
    lab.up(temporary=True)
    try:
        node = lab["rogue"]
        node.popen([SECTOOL, "run", "--label", "app=till", "--", "sleep", "600"])
        asyncio.run(_revoke(node))
        lists = node.json("revocation", "list")["items"]
        assert any("till" in workload for each in lists for workload in each["workloads"])
        assert "key leaked" in node.sectool("timeline", "--kind", "identity")
    finally:
        lab.down()


async def _revoke(node: Node) -> None:
    app = Console(Source(Paths.resolve(str(node.state), str(node.run_folder))))
    async with app.run_test(size=(120, 36)) as pilot:
        await until(lambda: app.facts and app.sight is not None, "the daemon's status")
        assert app.facts["caller"]["roles"] == ["root"]
        await pilot.press("i")
        view = app.view
        assert isinstance(view, Identities)
        await until(
            lambda: any(i["labels"].get("app") == "till" for i in view.items.values()), "the identity"
        )
        while (view.chosen or {}).get("labels", {}).get("app") != "till":
            await pilot.press("j")
        chosen = view.chosen
        assert chosen is not None
        assert chosen["origins"]["app"] == "operator"
        await pilot.press("x", "enter")
        await pilot.pause()
        assert "a revocation takes a reason" in screen(app)
        await pilot.press("x", *"key", "space", *"leaked", "enter")
        await until(lambda: len(app.screen_stack) == 2, "the question")
        await pilot.pause()
        assert "--reason 'key leaked'" in screen(app)
        await pilot.press("y")
        gone = lambda: all(  # noqa: E731
            i["refused"] for i in view.items.values() if i["labels"].get("app") == "till"
        )
        await until(gone, "the revocation")
        await pilot.pause()
        assert "revoked: list" in screen(app)
        view.cli()
        await pilot.press("h")
        await until(lambda: "Certificates" in screen(app) and "revocations" in screen(app), "the health")
        await until(lambda: "examining" not in screen(app), "the doctor")
