"""What all views have in common: questions asked in threads, answers that come as messages, and calling them off."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from textual.containers import Vertical
from textual.message import Message
from textual.widget import Widget

from sectool.errors import SectoolError
from sectool.events import now_us
from tui.asking import Asking, CalledOffError
from tui.cursor import Cursor
from tui.source import Source

if TYPE_CHECKING:
    from tui.app import Console

FASTEST_S = 0.25  # between two refreshes of a view
PATIENCE_S = 1.0  # what takes longer can be called off with esc, and is told of
REST = 10  # a view rests this many times as long as its question took: a tenth of a core at most


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, and who gets the answer (None: the view's `got`)."""

    what: str
    ask: Callable[[], Any]
    then: Callable[[Any], None] | None
    asking: Asking


class View(Vertical):
    """One of the screens. `NAME` is what `:` calls it."""

    NAME: ClassVar[str] = ""
    TITLE: ClassVar[str] = ""
    BESIDE: ClassVar[frozenset[str]] = (
        frozenset()
    )  # questions that take their time, and that nobody waits for

    class Loaded(Message):
        """An answer for the view. `error` is set when there is none."""

        bubble = False

        def __init__(self, question: Question, answer: Any, error: SectoolError | None) -> None:
            super().__init__()
            self.question = question
            self.answer = answer
            self.error = error

    def __init__(self) -> None:
        super().__init__(id=f"view-{self.NAME}")
        self._asking: dict[str, Question] = {}
        self._pending: dict[str, Question] = {}
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

    @property
    def asking_for(self) -> float:
        """Seconds since the oldest question was asked that somebody waits for and that can be called off; 0: none."""
        return max(
            (q.asking.took for q in self._asking.values() if not (q.asking.lasting or q.what in self.BESIDE)),
            default=0.0,
        )

    # --- asking ----------------------------------------------------------------------------------------------

    def ask(
        self,
        what: str,
        question: Callable[[], Any],
        *,
        then: Callable[[Any], None] | None = None,
        lasting: bool = False,
    ) -> None:
        """Ask in a thread; the answer goes to `then`, or to `got`. `lasting`: it changes something.

        While one `what` is being asked, only the newest further one is kept.
        """
        wanted = Question(what, question, then, Asking(lasting=lasting))
        if what in self._asking:
            self._pending[what] = wanted
        else:
            self._begin(wanted)

    def _begin(self, question: Question) -> None:
        question.asking.begun = time.monotonic()
        self._asking[question.what] = question
        self.run_worker(
            partial(self._answer, question),
            name=f"{self.NAME} {question.what}",
            group=self.NAME,
            thread=True,
            exit_on_error=False,
        )

    def _answer(self, question: Question) -> None:
        answer, error = None, None
        what = question.what
        try:
            with question.asking.in_this_thread():
                answer = question.ask()
        except CalledOffError:
            return
        except SectoolError as failed:
            error = failed
        except OSError as failed:
            error = SectoolError(f"{what} failed: {failed.strerror or failed}")
        except Exception as failed:  # a defect in one answer must not end the console
            error = SectoolError(f"{what} failed: {type(failed).__name__}: {failed}", "please report this")
        self.post_message(self.Loaded(question, answer, error))

    def forget(self) -> None:
        """Call off what is being asked, but for changes: nobody wants these answers any more."""
        for known in (self._asking, self._pending):
            for what, question in list(known.items()):
                if not question.asking.lasting:
                    del known[what]
                    question.asking.call_off()

    def give_up(self) -> bool:
        """Call off what takes long; whether there was anything. The view rests as if it had been answered."""
        took = self.asking_for
        if took < PATIENCE_S:
            return False
        self.forget()
        self._rest_until = time.monotonic() + max(FASTEST_S, took * REST)
        return True

    def on_view_loaded(self, message: Loaded) -> None:
        """Hand an answer on, or its error to `failed`."""
        message.stop()
        question = message.question
        if self._asking.get(question.what) is not question:
            return  # it was called off
        del self._asking[question.what]
        self._rest_until = time.monotonic() + max(FASTEST_S, question.asking.took * REST)
        if message.error is not None:
            self.failed(question.what, message.error)
        else:
            (question.then or partial(self.got, question.what))(message.answer)
        self.console.paint()
        further = self._pending.pop(question.what, None)
        if further is not None:
            self._begin(further)

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

    def flow_to_find(self) -> Callable[[], str] | None:
        """Finds the connection meant where none is under the cursor; it may block. None: none is meant."""
        return None

    def selected(self) -> Any:
        """What `Y` copies as JSON."""
        return None

    def cli(self) -> str:
        """The command that shows the same."""
        return "sectool status"

    def hint(self) -> str:
        """One line on what can be done here, for the foot of the screen."""
        return ""
