"""Calling a question off ends what it waits for: connections are hung up, queries stop, nobody hears an answer."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
from duckdb import DuckDBPyConnection
from textual.pilot import Pilot
from textual.widgets import TextArea

from sectool.api.client import Client
from sectool.errors import NoDaemonError, SectoolError
from store.catalog import Catalog
from tests.tui.conftest import Open, press, screen, until
from tui.asking import Asking, CalledOffError, ended_by
from tui.view import PATIENCE_S
from tui.views.query import Query

ENDLESS = "WITH RECURSIVE r(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM r) SELECT max(n) FROM r"
DEADLINE_S = 60.0


@contextmanager
def silent_server(path: Path) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Takes one connection and says nothing to any question; tells when one came, and when the asker hung up."""
    asked, gone = threading.Event(), threading.Event()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with listener.accept()[0] as client:
                while client.recv(4096):
                    asked.set()
                gone.set()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield asked, gone
        thread.join(DEADLINE_S)


def test_a_connection_is_hung_up(tmp_path: Path) -> None:
    asking, outcome = Asking(), []

    def ask() -> None:
        with asking.in_this_thread(), Client(tmp_path / "sock", timeout=DEADLINE_S) as client:
            try:
                with ended_by(client.abort):
                    client.call("query")
            except SectoolError as error:
                outcome.append(type(error))

    with silent_server(tmp_path / "sock") as (asked, gone):
        thread = threading.Thread(target=ask)
        thread.start()
        assert asked.wait(DEADLINE_S)
        asking.call_off()
        assert gone.wait(DEADLINE_S)
        thread.join(DEADLINE_S)
    assert outcome == [CalledOffError]


def test_what_was_aborted_does_not_connect(tmp_path: Path) -> None:
    with silent_server(tmp_path / "sock") as (_, gone):
        client = Client(tmp_path / "sock")
        client.abort()
        with pytest.raises(NoDaemonError):
            client.call("ping")
        assert gone.wait(DEADLINE_S)


def test_nothing_begins_after_it_was_called_off() -> None:
    asking, begun = Asking(), []
    asking.call_off()
    asking.call_off()
    with asking.in_this_thread(), pytest.raises(CalledOffError), ended_by(lambda: None):
        begun.append(1)
    assert not begun
    with ended_by(lambda: begun.append(1)):  # outside of any question
        pass
    assert not begun


def test_an_end_that_goes_unheard_is_repeated_until_it_is_left() -> None:
    asking, heard, tries = Asking(), threading.Event(), []

    def end() -> None:
        tries.append(1)
        if len(tries) == 3:
            heard.set()

    with pytest.raises(CalledOffError), asking.waits(end):
        asking.call_off()
        assert heard.wait(DEADLINE_S)
        raise SectoolError("stopped")
    assert asking.called_off


def test_other_errors_stay_what_they_are() -> None:
    asking = Asking()
    with pytest.raises(NoDaemonError), asking.waits(lambda: None):
        raise NoDaemonError("gone")


def _left(catalog: Catalog, cursor: DuckDBPyConnection) -> bool:
    return cursor not in catalog._readers


async def _ask(pilot: Pilot[None], query: Query) -> None:
    query.query_one(TextArea).text = ENDLESS
    await pilot.press("f5")
    files = query.source._opened().catalog
    await until(lambda: files._readers, "the query runs")


def test_a_query_stops_when_nobody_waits_for_it(console: Open) -> None:
    """By esc, by another query, by going elsewhere; and leaving does not wait for it either."""

    async def play() -> None:
        async with console() as (app, pilot):
            await press(pilot, "s")
            view = app.view
            assert isinstance(view, Query)
            catalog = app.source._opened().catalog
            for way in ("escape", "another", "elsewhere", "leaving"):
                await _ask(pilot, view)
                (running,) = catalog._readers
                if way == "elsewhere":
                    app.command("why")
                elif way == "another":
                    view.query_one(TextArea).text = "SELECT 42 AS answer"
                    await pilot.press("f5")
                else:
                    await pilot.press("ctrl+c" if way == "leaving" else way)
                await until(partial(_left, catalog, running), "the query has ended")
                if way == "another":
                    await until(lambda: view.items == [{"answer": 42}], "the other answer")
                elif way == "elsewhere":
                    assert app.view_name == "why"
                    app.open_view("query")
                    await pilot.pause()
                elif way != "leaving":
                    assert app.view_name == "query"
                    assert "called off" in screen(app)

    asyncio.run(asyncio.wait_for(play(), 2 * DEADLINE_S))


def test_what_takes_long_is_told_of_and_called_off_by_esc(console: Open) -> None:
    async def play() -> None:
        async with console() as (app, pilot):
            source, view = app.source, app.view
            done: list[bool] = []
            never: list[object] = []
            view.ask("endless", lambda: source.query(ENDLESS), then=never.append)
            question = view._asking["endless"].asking
            question.begun -= PATIENCE_S + 2
            app.paint()
            await pilot.pause()
            assert "esc calls it off" in screen(app)
            change = threading.Event()
            view.ask("change", lambda: change.wait(DEADLINE_S), then=done.append, lasting=True)
            await pilot.press("escape")
            assert question.called_off
            assert "endless" not in view._asking
            assert view._asking["change"].asking.called_off is False
            assert "called off" in screen(app)
            change.set()
            await until(lambda: done, "the change is done")
            assert (done, never) == ([True], [])
            await press(pilot, "h")  # what nobody waits for is not told of, and esc goes back
            examined = threading.Event()
            app.view.ask("doctor", lambda: examined.wait(DEADLINE_S), then=done.append)
            app.view._asking["doctor"].asking.begun -= PATIENCE_S + 2
            assert app.view.asking_for == 0
            await pilot.press("escape")
            assert app.view_name == "pulse"
            examined.set()

    asyncio.run(play())
