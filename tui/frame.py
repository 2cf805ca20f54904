"""The frame around the views: which one is in sight, the moment they share, whether the daemon answers, and the clock.

a question finds nobody ──► status is asked at once ──fails──► lost: a banner, and status again every RETRY_S
                                                  └─answers──► not lost: the view asks anew if it was
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from rich.text import Text
from textual.app import App, ComposeResult
from textual.filter import LineFilter, NoColor
from textual.message import Message
from textual.widgets import ContentSwitcher, Static

from sectool.cli.status import suspended
from sectool.errors import NoDaemonError, SectoolError
from sectool.events import now_us
from sectool.filters import Filter
from tui import dialogs, lines
from tui.actions import available
from tui.asking import Asking, CalledOffError
from tui.cursor import Cursor
from tui.prompt import Prompt
from tui.rights import Rights
from tui.settings import Settings
from tui.source import Source
from tui.view import PATIENCE_S, View
from tui.views import VIEW_TYPES

TICK_S = 0.25
STATUS_S = 2.0
RETRY_S = 2.0
TRAIL = 20  # views that `back` remembers
_PARTS = frozenset({"head", "nav", "banner", "note"})
THEMES = ("textual-dark", "textual-light", "ansi-dark")


class Frame(App[None]):
    """Everything of the console but what its actions do."""

    TITLE = "sectool"
    CSS = (
        """
    Screen { layout: vertical; }
    #head { height: 1; background: $panel; color: $text; }
    #nav { height: 1; color: $text-muted; }
    #banner { height: auto; max-height: 2; background: $error; color: $text; text-style: bold; display: none; }
    #banner.-shown { display: block; }
    #views { height: 1fr; }
    #note { height: 1; color: $text-muted; }
    .title { height: 1; text-style: bold; }
    .title:ansi { text-style: bold; }
    .pane { height: 1fr; }
    """
        + dialogs.CSS
    )

    class Status(Message):
        """The daemon's status, or why there is none."""

        bubble = False

        def __init__(self, facts: dict[str, Any], error: SectoolError | None) -> None:
            super().__init__()
            self.facts = facts
            self.error = error

    def __init__(self, source: Source, *, settings: Settings | None = None, theme: str | None = None) -> None:
        colours = os.environ.get("NO_COLOR")
        many = os.environ.get("COLORTERM") or os.environ.get("TEXTUAL_COLOR_SYSTEM") == "truecolor"
        plain = bool(colours) or ("256" not in os.environ.get("TERM", "") and not many)
        super().__init__()
        self.source = source
        self.settings = settings if settings is not None else Settings()
        self.cursor = Cursor()
        self.filter = Filter()
        self.paused = False
        self.facts: dict[str, Any] = {}
        self.lost: SectoolError | None = None
        self.asking_status: Asking | None = None
        self._asked = 0.0
        self._told_until = 0.0
        self.trail: list[str] = []
        self._painted: dict[str, Text] = {}
        self._last_tick = time.monotonic()
        self.theme = theme or ("ansi-dark" if plain else self.settings.theme or THEMES[0])

    def get_line_filters(self) -> Sequence[LineFilter]:
        """NO_COLOR means none at all, not greys."""
        return [NoColor()] if self.no_color else super().get_line_filters()

    def compose(self) -> ComposeResult:
        """Head, views, foot."""
        yield Static(id="head", markup=False)
        yield Static(id="nav", markup=False)
        yield Static(id="banner", markup=False)
        yield ContentSwitcher(id="views")
        yield Prompt()
        yield Static(id="note", markup=False)

    def on_mount(self) -> None:
        """Open the first view and start the clock."""
        self.open_view("pulse")
        self.set_interval(TICK_S, self.beat)
        self._ask_status()

    def exit(self, *args: Any, **kwargs: Any) -> None:
        """Leave without waiting for answers that nobody will see; changes under way are let finish."""
        if self.asking_status is not None:
            self.asking_status.call_off()
        for view in self.screen_stack[0].query(View) if self.screen_stack else ():
            view.forget()
        super().exit(*args, **kwargs)

    @property
    def rights(self) -> Rights:
        """What may be changed from here."""
        return Rights.of(self.facts, self.source.why_read_only)

    # --- views -----------------------------------------------------------------------------------------------

    @property
    def sight(self) -> View | None:
        """The view in sight; None on the way in or out."""
        # Asked several times a key: a search by selector would look at every widget of every view.
        parts = {part.id: part for part in self.screen_stack[0].children} if self.screen_stack else {}
        switcher = parts.get("views")
        if not isinstance(switcher, ContentSwitcher) or not parts.keys() >= _PARTS:
            return None
        return next((v for v in switcher.children if v.id == switcher.current and isinstance(v, View)), None)

    @property
    def view(self) -> View:
        """The view in sight."""
        current = self.sight
        assert current is not None
        return current

    @property
    def view_name(self) -> str:
        """Its name; before there is one, the first's."""
        current = self.screen_stack[0].query_one("#views", ContentSwitcher).current or "view-pulse"
        return current.removeprefix("view-")

    def open_view(self, name: str, *, back: bool = False) -> View:
        """Show a view, made at its first time. What the one before still asks is called off."""
        switcher = self.query_one("#views", ContentSwitcher)
        wanted = f"view-{name}"
        before = switcher.current
        if before and before != wanted:
            self.view.forget()
            if not back:
                self.trail = [*self.trail[-TRAIL:], before.removeprefix("view-")]
        found = next((w for w in switcher.children if w.id == wanted), None)
        if found is None:
            found = VIEW_TYPES[name]()
            switcher.mount(found)
            found.call_after_refresh(self._opened, found)
        else:
            self.call_after_refresh(self._opened, found)
        switcher.current = wanted
        self._told_until = 0.0
        self.paint()
        assert isinstance(found, View)
        return found

    def _opened(self, view: View) -> None:
        if self.sight is not view:
            return  # others were faster
        view.reload()
        target = view.first()
        if target is not None and not self.query_one(Prompt).shown:
            target.focus()
        self.paint()

    def move_to(self, cursor: Cursor) -> None:
        """Change the shared moment."""
        self.cursor = cursor
        self.view.forget()
        self.view.reload()
        self.paint()

    # --- clock -----------------------------------------------------------------------------------------------

    def beat(self) -> None:
        """A quarter of a second has passed."""
        if self.sight is None:
            return  # on the way in or out
        now = time.monotonic()
        passed, self._last_tick = now - self._last_tick, now
        if self.cursor.speed:
            self.cursor = self.cursor.elapse(int(passed * 1e6), now_us())
            if not self.view.asking:  # a slow answer makes a replay choppy, not late
                self.view.reload()
        if not self.paused and len(self.screen_stack) == 1:
            self.view.tick()
        if now - self._asked > (RETRY_S if self.lost else STATUS_S):
            self._ask_status()
        self.paint()

    # --- daemon ----------------------------------------------------------------------------------------------

    def _ask_status(self) -> None:
        if self.asking_status is not None or (self.source.offline and self.facts):
            return
        self.asking_status = Asking()
        self._asked = time.monotonic()
        self.run_worker(self._fetch_status, thread=True, exit_on_error=False, group="status")

    def _fetch_status(self) -> None:
        asking = self.asking_status
        assert asking is not None
        facts, error = {}, None
        try:
            with asking.in_this_thread():
                facts = self.source.status()
        except CalledOffError:
            return
        except SectoolError as failed:
            error = failed
        except Exception as failed:  # a defect in one answer must not end the questions
            error = SectoolError(f"status failed: {type(failed).__name__}: {failed}", "please report this")
        self.post_message(self.Status(facts, error))

    def on_frame_status(self, message: Status) -> None:
        """The daemon has answered, or has not."""
        self.asking_status = None
        back, self.lost = self.lost is not None, message.error
        if message.error is not None:
            self.paint()
            return
        self.facts = message.facts
        if back:
            self.tell("the daemon answers again")
            if self.sight is not None:
                self.sight.reload()
        self.paint()

    def trouble(self, error: SectoolError) -> None:
        """A question failed. Where nobody answers, status tells whether the daemon is gone; anything else is a note."""
        if isinstance(error, NoDaemonError) and not self.source.offline:
            self._ask_status()
        else:
            self.tell(f"{error.message}{' — ' + error.hint if error.hint else ''}", 8.0)
        self.paint()

    # --- lines -----------------------------------------------------------------------------------------------

    def tell(self, text: str, seconds: float = 4.0) -> None:
        """Say something at the foot for a while."""
        self._told_until = time.monotonic() + seconds
        self._put("note", lines.one_line(text))

    def paint(self) -> None:
        """Bring the frame up to date."""
        view = self.sight
        if view is None:
            return  # on the way in or out
        room = self.size.width
        self._put(
            "head",
            lines.head(
                self.facts,
                self.cursor,
                lost=self.lost is not None,
                read_only=self.rights.nothing,
                paused=self.paused,
                now_us=now_us(),
                room=room,
            ),
        )
        self._put("nav", lines.views(self.view_name, room))
        loud = suspended(self.facts) or lines.store_trouble(self.facts)
        self.screen_stack[0].query_one("#banner", Static).set_class(
            self.lost is not None or bool(loud), "-shown"
        )
        if self.lost is not None:
            self._put("banner", lines.no_daemon(self.lost, RETRY_S), layout=True)
        elif loud:
            self._put("banner", lines.one_line(loud), layout=True)
        if time.monotonic() >= self._told_until:
            if (took := view.asking_for) >= PATIENCE_S:
                self._put("note", lines.one_line(f"asking for {took:.0f} s; esc calls it off"))
            else:
                rights = self.rights
                refused = {
                    key
                    for action in available(self.view_name)
                    if rights.why_not(action.needs)
                    for key in action.shown_keys.split()
                }
                self._put("note", lines.hint(view.hint(), refused, room))

    def _put(self, name: str, text: Text, *, layout: bool = False) -> None:
        """Change one of the frame's lines if it differs: a quiet console draws nothing."""
        if self._painted.get(name) != text:
            self._painted[name] = text
            self.screen_stack[0].query_one(f"#{name}", Static).update(text, layout=layout)
