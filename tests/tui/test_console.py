"""The console driven by keys, on a stored host."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from sectool.api.paths import Paths
from sectool.errors import NoDaemonError, SectoolError, StoreError
from tests.tui.conftest import HOSTILE, Open, press, screen, settle, strips
from tui.actions import ACTIONS
from tui.app import Console
from tui.grid import Grid
from tui.settings import Settings
from tui.source import Source
from tui.views.why import Why

VARIANTS = {
    "dark": ("textual-dark", (80, 24)),
    "light": ("textual-light", (80, 24)),
    "nocolor": ("ansi-dark", (80, 24)),
    "wide": ("textual-dark", (160, 48)),
}
SNAPSHOTS = Path(__file__).parent / "snapshots"
KEYS = {"pulse": "u", "flows": "f", "why": "w", "map": "m", "policies": "o", "identities": "i", "timeline": "l",
        "hosts": "h", "query": "s"}  # fmt: skip


def picture(app: Console) -> str:
    """The terminal as text, and below it the styles: one letter a cell, and what the letters mean."""
    legend: dict[str, str] = {}
    styles = []
    for strip in strips(app):
        line = ""
        for segment in strip:
            name = str(segment.style or "none")
            line += legend.setdefault(name, chr(ord("a") + len(legend) % 26)) * segment.cell_length
        styles.append(line)
    meaning = [f"{letter} {name}" for name, letter in legend.items()]
    return "\n".join([screen(app), "", *styles, "", *meaning, ""])


def live(app: Console) -> bool:
    """Whether the window ends now."""
    return app.cursor.live


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """To its end."""
    asyncio.run(coroutine)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_view_looks_as_it_did(console: Open, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if variant == "nocolor":
        monkeypatch.setenv("NO_COLOR", "1")
    theme, size = VARIANTS[variant]
    wrong = []

    async def look() -> None:
        async with console(size, theme) as (app, pilot):
            for name, key in KEYS.items():
                await press(pilot, key)
                assert app.view_name == name
                shown = picture(app) if size == (80, 24) else screen(app) + "\n"
                if variant == "nocolor":
                    assert not any(
                        s.style and ((s.style.color and not s.style.color.is_default)
                                     or (s.style.bgcolor and not s.style.bgcolor.is_default))
                        for strip in strips(app) for s in strip
                    ), name  # fmt: skip
                file = SNAPSHOTS / f"{name}-{variant}.txt"
                if os.environ.get("SECTOOL_SNAPSHOTS") == "write":
                    file.write_text(shown)
                elif file.read_text() != shown:
                    wrong.append(f"{file.name}:\n{shown[:4000]}")

    run(look())
    assert not wrong, "SECTOOL_SNAPSHOTS=write makes them anew; look at the difference\n" + "\n".join(wrong)


def test_nothing_of_a_peer_reaches_the_terminal(console: Open) -> None:
    async def look() -> None:
        async with console((160, 48)) as (app, pilot):
            for key in KEYS.values():
                await press(pilot, key)
                text = screen(app)
                assert "\x1b" not in text
                assert "\u202e" not in text
            assert app.view_name == "query"
            await press(pilot, "escape", "l")
            assert "[bold]x[/bold]" in screen(app)  # as it is, not as markup
            assert HOSTILE not in screen(app)

    run(look())


def test_from_a_denial_to_a_draft_in_few_keys(console: Open) -> None:
    async def play() -> None:
        async with console() as (app, pilot):
            assert "guardrail deny" in screen(app)
            await press(pilot, "enter")
            assert isinstance(app.view, Why)
            text = screen(app)
            assert "DENIED" in text
            await press(pilot, "d")
            assert app.view.draft is not None
            assert app.view.draft.document == ""
            assert "freeze" not in app.view.draft.text
            assert "PCI 1.2.1" in app.view.draft.text
            assert "newly allowed" in screen(app)
            assert "sectool policy backtest" in app.view.cli()
            await press(pilot, "a")  # stored files: told, not done
            assert "not possible" in screen(app)
            assert len(app.screen_stack) == 1
            await press(pilot, "u", "j", "enter", "d")
            assert app.view.draft.document.startswith("fix-")
            assert "mode: stage" in app.view.draft.text
            await press(pilot, "escape")
            assert app.view_name == "pulse"

    run(play())


def test_scrubbing_shows_the_past(console: Open) -> None:
    async def play() -> None:
        async with console() as (app, pilot):
            await press(pilot, "o")
            assert "freeze" in screen(app)
            for _ in range(3):
                await press(pilot, "left_square_bracket")
            assert "AS OF 2026-03-01T02:0" in screen(app)
            assert "freeze" not in screen(app)
            await press(pilot, "u")
            assert "guardrail deny" not in screen(app)
            await press(pilot, "0")
            assert "LIVE" in screen(app)
            assert "guardrail deny" in screen(app)
            await press(pilot, "t", *"nonsense", "enter")
            assert "LIVE" in screen(app)
            await press(pilot, "t", *"20h", "enter")
            assert not live(app)
            await press(pilot, "R")
            assert app.cursor.speed == 10
            await press(pilot, "plus")
            assert app.cursor.speed == 20
            await press(pilot, "R", "0", "1")
            assert live(app)
            assert app.cursor.span == "1 m"

    run(play())


def test_a_bad_filter_never_clears_the_results(console: Open) -> None:
    async def play() -> None:
        async with console() as (app, pilot):
            await press(pilot, "f")
            assert len(app.query_one("#flows", Grid).rows) == 32
            await press(pilot, "slash", *"verdct=deny")
            assert "there is no filter" in screen(app)
            await press(pilot, "enter")
            assert len(app.query_one("#flows", Grid).rows) == 32
            assert "verdct" in screen(app)
            await press(pilot, "escape", "slash", *"verd", "tab", *"den", "tab", "enter")
            assert str(app.filter) == "verdict=deny"
            assert len(app.query_one("#flows", Grid).rows) == 13
            assert app.view.cli().startswith("sectool flows --verdict deny")
            await press(pilot, "escape")
            assert len(app.query_one("#flows", Grid).rows) == 32

    run(play())


def test_rows_details_marks_and_columns(console: Open, tmp_path: Path) -> None:
    async def play() -> None:
        settings = Settings(tmp_path / "top.json")
        async with console(settings=settings) as (app, pilot):
            await press(pilot, "f", "g")
            grid = app.query_one("#flows", Grid)
            assert grid.cursor == 0
            await press(pilot, "j", "j", "k", "enter")
            assert grid.cursor == 1
            assert "spiffe://lab.example/web" in screen(app)
            await press(pilot, "escape", "space", "space", "Y")
            assert "copied as JSON" in screen(app)
            assert len(json.loads(app.clipboard)) == 2
            await press(pilot, "escape", "y")
            assert app.clipboard == "sectool flows --since 15m"
            await press(pilot, "c", "space", "enter")
            assert "time" not in settings.columns
            assert Settings.load(tmp_path / "top.json").columns == settings.columns
            await press(pilot, "G", "ctrl+u", "ctrl+d", "p")
            assert app.paused
            assert "PAUSED" in screen(app)
            await press(pilot, "p", "r")
            assert not app.paused

    run(play())


def test_prompt_palette_help_and_theme(console: Open) -> None:
    async def play() -> None:
        async with console((100, 40)) as (app, pilot):
            await press(pilot, "colon", *"time", "tab", "enter", "escape")
            await press(pilot, "colon", *"flo", "enter")
            assert app.view_name == "flows"
            await press(pilot, "colon", *"nothing", "enter")
            assert "there is no action" in screen(app)
            await press(pilot, "question_mark")
            assert "choose the columns" in screen(app)
            await press(pilot, "j", "escape")
            await press(pilot, "T")
            assert app.theme == "textual-light"
            await press(pilot, "ctrl+p")
            assert len(app.screen_stack) == 2
            await press(pilot, "escape", "q")
            assert not app.is_running or app._exit

    run(play())


def test_policies_query_map_and_timeline(console: Open) -> None:
    async def play() -> None:
        async with console() as (app, pilot):
            await press(pilot, "o", "d")
            assert "what it changed" in screen(app)
            await press(pilot, "comma")
            assert "Revision 1," in screen(app)
            await press(pilot, "full_stop", "B")
            assert "not possible" in screen(app)
            await press(pilot, "s", "f5")
            assert "2 rows" in screen(app) or "rows" in screen(app)
            await press(pilot, "f8", "escape", "enter", "escape", "escape")
            await press(pilot, "m", "b", "b")
            assert "by env" in screen(app)
            await press(pilot, "b", "b", "b", "b", "b")
            await press(pilot, "enter")
            assert app.view_name == "flows"
            assert "label=app=" in str(app.filter)
            await press(pilot, "l")
            await press(pilot, "enter")
            assert app.view_name == "why"  # the newest entry is a connection
            await press(pilot, "escape")
            await press(pilot, "t")
            assert not live(app)
            await press(pilot, "minus", "right_square_bracket", "i", "enter", "escape", "h", "Y", "escape")

    run(play())


@pytest.mark.long
def test_every_action_survives_in_every_view(console: Open) -> None:
    """None of them may end the console, whatever is selected; those that write are refused on stored files."""

    async def play() -> None:
        async with console() as (app, pilot):
            for view in KEYS:
                for action in ACTIONS:
                    if action.name in ("quit", *KEYS) or (action.views and view not in action.views):
                        continue
                    if not action.views and view not in ("pulse", "query"):
                        continue
                    if app.view_name != view:  # most actions leave it open
                        app.open_view(view)
                        await pilot.pause()
                    app.carry_out(action)
                    while len(app.screen_stack) > 1:
                        app.pop_screen()
                    await pilot.pause()
                    app.query_one("#prompt").remove_class("-shown")
            assert app.is_running

    run(play())


def test_sources_say_what_is_missing(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(StoreError):
        Source.of_store(tmp_path)
    offline = Source.of_store(folder / "events")
    assert offline.paths.state == folder
    with pytest.raises(SectoolError, match="nothing is changed"):
        offline.apply("x", "")
    with pytest.raises(NoDaemonError):
        Source(Paths(tmp_path, tmp_path)).status()


def test_an_unreadable_memory_is_no_failure(tmp_path: Path) -> None:
    file = tmp_path / "top.json"
    for text in ("{", "[]", '{"columns": [1, "x"], "theme": 5}'):
        file.write_text(text)
        assert Settings.load(file).theme == ""


def test_views_are_remembered_by_name_and_rules_copied(console: Open, tmp_path: Path) -> None:
    async def play() -> None:
        file = tmp_path / "top.json"
        async with console(settings=Settings(file)) as (app, pilot):
            await press(pilot, "v")
            assert "nothing is remembered" in screen(app)
            await press(pilot, "slash", *"verdict=deny", "enter", "4", "colon", *"save night", "enter")
            app.set_filter("")
            await press(pilot, "u", "2")
            assert (app.view_name, str(app.filter), app.cursor.span) == ("pulse", "", "5 m")
            await press(pilot, "v", *"day", "enter")
            assert "there is night" in screen(app)
            await press(pilot, "v", *"night", "enter")
            assert (app.view_name, str(app.filter), app.cursor.span) == ("flows", "verdict=deny", "1 h")
            await press(pilot, "u", "j", "ctrl+y")
            await app.workers.wait_for_complete()
            await settle(pilot)
            assert app.clipboard.startswith("allow app=batch to call app=db"), screen(app)
            await press(pilot, "k", "ctrl+y")
            await app.workers.wait_for_complete()
            await settle(pilot)
            assert "no rule would let it through" in screen(app)
        assert list(Settings.load(file).views) == ["night"]
        file.write_text(
            '{"views": {"a": 1, "b": {"view": "flows", "filter": "", "window": 9}, "c": {"view": 1}}}'
        )
        assert Settings.load(file).views == {}

    run(play())
