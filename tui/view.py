"""What all views have in common: questions are asked in a thread, one at a time, and answers come as messages."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from textual.containers import Vertical
from textual.message import Message
from textual.widget import Widget

from sectool.errors import SectoolError
from sectool.events import now_us
from tui.cursor import Cursor
from tui.source import Source

if TYPE_CHECKING:
    from tui.app import Console

FASTEST_S = 0.25  # between two refreshes of a view
REST = 10  # a view rests this many times as long as its question took: a tenth of a core at most


class View(Vertical):
    """One of the screens. `NAME` is what `:` calls it."""

    NAME: ClassVar[str] = ""
    TITLE: ClassVar[str] = ""

    class Loaded(Message):
        """An answer for the view. `error` is set when there is none."""

        bubble = False

        def __init__(
            self, ticket: int, what: str, answer: Any, error: SectoolError | None, took: float
        ) -> None:
            super().__init__()
            self.ticket = ticket
            self.what = what
            self.answer = answer
            self.error = error
            self.took = took

    def __init__(self) -> None:
        super().__init__(id=f"view-{self.NAME}")
        self._ticket = 0
        self._asking: set[str] = set()
        self._pending: dict[str, Callable[[], Any]] = {}
        self._rest_until = 0.0

    @property
    def console(self) -> Console:
        """The app."""
        from tui.app import Console

        app = self.app
        assert isinstance(app, Console)
        return app

    @property
    def source(self) -> Source:
        """Where answers come from."""
        return self.console.source

    @property
    def cursor(self) -> Cursor:
        """The shared moment."""
        return self.console.cursor

    def bounds(self) -> tuple[int, int]:
        """The window in UTC microseconds."""
        now = now_us()
        return self.cursor.since(now), self.cursor.until(now)

    @property
    def asking(self) -> bool:
        """Whether an answer is under way."""
        return bool(self._asking)

    # --- asking ----------------------------------------------------------------------------------------------

    def ask(self, what: str, question: Callable[[], Any]) -> None:
        """Ask in a thread. While one `what` is being asked, only the newest further one is kept."""
        if what in self._asking:
            self._pending[what] = question
            return
        self._asking.add(what)
        self.run_worker(
            partial(self._answer, self._ticket, what, question),
            name=f"{self.NAME} {what}",
            group=self.NAME,
            thread=True,
            exit_on_error=False,
        )

    def _answer(self, ticket: int, what: str, question: Callable[[], Any]) -> None:
        begun = time.monotonic()
        answer, error = None, None
        try:
            answer = question()
        except SectoolError as failed:
            error = failed
        except OSError as failed:
            error = SectoolError(f"{what} failed: {failed.strerror or failed}")
        except Exception as failed:  # a defect in one answer must not end the console
            error = SectoolError(f"{what} failed: {type(failed).__name__}: {failed}", "please report this")
        self.post_message(self.Loaded(ticket, what, answer, error, time.monotonic() - begun))

    def forget(self) -> None:
        """Answers still under way are not wanted any more."""
        self._ticket += 1
        self._pending.clear()

    def on_view_loaded(self, message: Loaded) -> None:
        """Hand an answer to `got`, or its error to `failed`."""
        message.stop()
        self._asking.discard(message.what)
        self._rest_until = time.monotonic() + max(FASTEST_S, message.took * REST)
        if message.ticket == self._ticket:
            if message.error is not None:
                self.failed(message.what, message.error)
            else:
                self.console.reached()
                self.got(message.what, message.answer)
            self.console.paint()
        further = self._pending.pop(message.what, None)
        if further is not None:
            self.ask(message.what, further)

    def tick(self) -> None:
        """Four times a second while in sight: look again when live, and not sooner than the last answer allows."""
        if self.source.offline and not self.cursor.speed:
            return  # stored files do not change
        if (
            (self.cursor.live or self.cursor.speed)
            and not self._asking
            and time.monotonic() >= self._rest_until
        ):
            self.reload()

    # --- for the views ---------------------------------------------------------------------------------------

    def reload(self) -> None:
        """Ask for everything shown."""

    def got(self, what: str, answer: Any) -> None:
        """An answer has come."""

    def failed(self, what: str, error: SectoolError) -> None:
        """None has come."""
        self.console.trouble(error)

    def first(self) -> Widget | None:
        """What gets the focus when the view opens."""
        return next((w for w in self.query("*") if w.can_focus and w.display), None)

    def selected_flow(self) -> str:
        """Id of the flow under the cursor, or empty."""
        return ""

    def selected(self) -> Any:
        """What `Y` copies as JSON."""
        return None

    def cli(self) -> str:
        """The command that shows the same."""
        return "sectool status"

    def hint(self) -> str:
        """One line on what can be done here, for the foot of the screen."""
        return ""
