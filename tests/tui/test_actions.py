"""One registry feeds everything: no key twice, every action can be done, and the key reference is up to date."""

from __future__ import annotations

import asyncio
import re
import shlex
from pathlib import Path

from typer.main import get_command

from sectool.cli.main import app
from tests.tui.conftest import Open, press, screen
from tui.actions import ACTIONS, BY_NAME, VIEWS, available, reference
from tui.app import Console
from tui.equivalents import FILE, command
from tui.views import VIEW_TYPES

KEYS = Path(__file__).parents[2] / "docs" / "keys.md"


def test_the_reference_is_up_to_date() -> None:
    assert KEYS.read_text() == reference(), "run: python -m tui.keys > docs/keys.md"
    assert all(f"`:{action.name}" in reference() for action in ACTIONS)


def test_names_and_views_agree() -> None:
    assert len(BY_NAME) == len(ACTIONS)
    assert {name for name, *_ in VIEWS} == set(VIEW_TYPES)


def test_no_key_means_two_things_in_a_view() -> None:
    for view in VIEW_TYPES:
        own = [key for action in available(view) if action.views for key in action.keys]
        everywhere = [key for action in available(view) if not action.views for key in action.keys]
        assert len(own) == len(set(own)), view
        assert len(everywhere) == len(set(everywhere)), view


def test_every_action_is_carried_out_by_somebody() -> None:
    for action in ACTIONS:
        if action.name in VIEW_TYPES or action.name.startswith("window-"):
            continue
        method = f"do_{action.name.replace('-', '_')}"
        for view in action.views or [""]:
            assert hasattr(VIEW_TYPES[view] if view else Console, method), (action.name, view)


def parsed(line: str, stand_in: Path) -> str:
    """The command that a line is taken for, by the CLI itself; fails as the CLI would for a user."""
    command, context = get_command(app), None
    words = [str(stand_in) if word == FILE else word for word in shlex.split(line)]
    assert words.pop(0) == "sectool"
    path = ["sectool"]
    while True:
        command = getattr(command, "real", lambda now=command: now)()
        context = command.make_context(path[-1], words, parent=context)
        if not hasattr(command, "commands"):
            return " ".join(path)
        name, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
        path.append(str(name))


def test_every_action_has_a_command_line_that_the_cli_takes(console: Open, tmp_path: Path) -> None:
    stand_in = tmp_path / "policy.yaml"
    stand_in.write_text("")

    async def look() -> None:
        async with console((100, 30)) as (app_, pilot):
            for name, key, *_ in VIEWS:
                await press(pilot, *({"why": ("u", "w")}.get(name, (key,))))
                for action in available(name):
                    if not action.views and name != "pulse":
                        continue  # its command is the same everywhere
                    for line in command(app_, action).split("; "):
                        if not line.startswith(("sectool --help", "sectool --version", "sectool --color")):
                            assert parsed(line, stand_in).count(" ") >= 1, (action.name, line)
                        assert "{" not in line, action.name
            app_.command("cli flows")
            await pilot.pause()
            assert app_.clipboard == "sectool flows --since 15m"
            app_.pop_screen()
            app_.command("cli nothing")
            await pilot.pause()
            assert "there is no action" in screen(app_)

    asyncio.run(look())


def test_every_action_names_a_command_that_exists() -> None:
    commands = get_command(app)
    for action in ACTIONS:
        words = action.cli.split()
        if words[0].startswith(("{", "--")):
            continue
        command = commands.commands.get(words[0])  # type: ignore[attr-defined]
        assert command is not None, action.name
        if len(words) > 1 and re.fullmatch("[a-z-]+", words[1]) and words[0] in ("policy", "identity"):
            assert words[1] in command.real().commands, action.name
