"""What may be changed, by flag, by what is looked at and by the asker's roles; and that the console says so."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from sectool.api.paths import Paths
from sectool.api.server import Operation, Reply, Request, Server
from tests.tui.conftest import FIRST, screen, until
from tui.actions import ACTIONS
from tui.app import Console
from tui.lines import hint
from tui.rights import Need, Rights
from tui.source import Source


@pytest.mark.parametrize(
    ("roles", "role", "root"),
    [
        (None, True, True),  # not known yet: the daemon is the judge
        (["root"], True, True),
        (["payments"], True, False),
        ([], False, False),
    ],
)
def test_roles_decide(roles: list[str] | None, role: bool, root: bool) -> None:
    facts = {} if roles is None else {"caller": {"user": "eve", "roles": roles}}
    rights = Rights.of(facts, "")
    assert not rights.why_not(Need.NOTHING)
    assert (not rights.why_not(Need.ROLE), not rights.why_not(Need.ROOT)) == (role, root)
    assert rights.nothing is not role
    assert ("eve" in rights.why_not(Need.ROOT)) is not root
    assert Rights.of(facts, "stored files").why_not(Need.ROLE) == "stored files"


def test_what_is_refused_is_in_brackets_and_struck_out() -> None:
    line = hint("a apply  y as command  P promote", {"a", "P"}, 80)
    assert line.plain == " (a apply)  y as command  (P promote)"
    struck = {line.plain[span.start : span.end] for span in line.spans if "strike" in str(span.style)}
    assert struck == {"(a apply)", "(P promote)"}
    assert hint("a apply  y as command", {"a"}, 6).cell_len <= 6


def test_who_may_read_only_is_told_so(tmp_path: Path) -> None:
    async def status(request: Request) -> Reply:
        return Reply({"host": "web-7", "state": "enforcing", "caller": {"user": "eve", "roles": []}})

    facts = {"revision": 1, "applied": 1, "author": "root", "reason": "", "active": True}

    async def history(request: Request) -> Reply:
        return Reply({"items": [facts]})

    async def show(request: Request) -> Reply:
        return Reply(facts, FIRST.encode())

    operations = {"status": status, "policy.history": history, "policy.show": show}

    async def play() -> None:
        paths = Paths(tmp_path / "state", tmp_path)
        handlers = {name: Operation(handle, writes=False) for name, handle in operations.items()}
        server = Server(paths.control_socket, handlers)
        await server.start()
        app = Console(Source(paths))
        async with app.run_test(size=(110, 60)) as pilot:
            await until(lambda: app.facts, "the status")
            app.open_view("policies")
            await until(lambda: "Revision 1" in screen(app), "the policy")
            app._told_until = 0.0
            app.paint()
            await pilot.pause()
            text = screen(app)
            assert "read-only" in text
            assert "(B roll back)" in text
            for action in ACTIONS:
                if action.needs and "policies" in action.views:
                    app.carry_out(action)
                    assert len(app.screen_stack) == 1, action.name  # no question even
                    await pilot.pause()
                    assert f"{action.name} is not possible: eve holds no role" in screen(app)
            await pilot.press("question_mark")
            await pilot.pause()
            assert "not possible: eve holds no role" in screen(app)
        await server.close()

    asyncio.run(play())
