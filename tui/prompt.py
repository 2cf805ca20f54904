"""The line at the foot where filters, action names and moments are typed, checked at every key."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.suggester import Suggester
from textual.widgets import Input, Static

from sectool.cli.text import escape, fit
from sectool.events import Action as Verdict
from sectool.events import DropReason
from sectool.filters import FLAGS, Field, FilterError, parse_text
from tui.actions import ACTIONS
from tui.view import View

VALUES = {
    Field.VERDICT: tuple(v.name.lower() for v in Verdict if v),
    Field.REASON: tuple(r.name.lower() for r in DropReason if r),
    Field.PROTOCOL: ("tcp", "udp", "icmp", "icmpv6"),
    Field.ENCRYPTED: ("yes", "no"),
    Field.LABEL: ("app=", "env=", "zone="),
}


def complete(text: str) -> str:
    """A filter with its last word completed, or as it is."""
    head, _, word = text.rpartition(" ")
    sign = "!" if word.startswith("!") else ""
    word = word.removeprefix("!")
    name, equals, value = word.partition("=")
    if not word:
        return text
    if not equals:
        found = next((n for n in sorted(FLAGS) if n.startswith(name)), None)
        whole = None if found is None else found + ("" if FLAGS[found].implied else "=")
    else:
        flag = FLAGS.get(name)
        options: Iterable[str] = VALUES.get(flag.field, ()) if flag else ()
        value = value.replace("-", "_") if flag and flag.field is Field.REASON else value
        match = next((o for o in options if o.startswith(value)), None)
        whole = None if match is None else f"{name}={match}"
    return text if whole is None else f"{head} {sign}{whole}".lstrip() if head else f"{sign}{whole}"


class _Filters(Suggester):
    def __init__(self) -> None:
        super().__init__(use_cache=False, case_sensitive=True)

    async def get_suggestion(self, value: str) -> str | None:
        """The completed filter."""
        whole = complete(value)
        return whole if whole != value and whole.startswith(value) else None


class _Commands(Suggester):
    def __init__(self) -> None:
        super().__init__(use_cache=False, case_sensitive=True)

    async def get_suggestion(self, value: str) -> str | None:
        """The first action of that beginning."""
        return next((a.name for a in ACTIONS if value and a.name.startswith(value)), None)


class Prompt(Vertical):
    """Hidden until something is to be typed."""

    DEFAULT_CSS = """
    Prompt { height: auto; display: none; }
    Prompt.-shown { display: block; }
    Prompt Input { height: 1; border: none; padding: 0 1; background: $panel; }
    Prompt Input:focus { border: none; }
    Prompt .say { height: 1; padding: 0 1; color: $text-muted; }
    Prompt .say.-bad { color: $text-error; text-style: bold; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", show=False, priority=True),
        Binding("tab", "complete", show=False, priority=True),
    ]

    def __init__(self) -> None:
        super().__init__(id="prompt")
        self._done: Callable[[str], object] | None = None
        self._live = False

    def compose(self) -> ComposeResult:
        """A line of what is thought of the input, and the input."""
        yield Static(classes="say", markup=False)
        yield Input(compact=True)

    @property
    def shown(self) -> bool:
        """Whether something is being typed."""
        return self.has_class("-shown")

    def open(self, label: str, say: str, done: Callable[[str], object]) -> None:
        """Ask for one line."""
        self._open("", label.strip(), say, done, None, live=False)

    def open_commands(self, done: Callable[[str], object]) -> None:
        """Ask for an action."""
        self._open(
            "",
            "name of an action",
            ": and the name of an action; tab completes, ? lists them",
            done,
            _Commands(),
        )

    def open_filter(self, text: str, done: Callable[[str], object], view: View) -> None:
        """Ask for a filter; a sound one counts while it is being typed."""
        say = "filter, e.g. verdict=deny from-label=app=web not to-port=443; tab completes"
        self._open(f"{text} " if text else "", "filter", say, done, _Filters(), live=True)

    def _open(
        self,
        value: str,
        placeholder: str,
        say: str,
        done: Callable[[str], object],
        suggester: Suggester | None,
        *,
        live: bool = False,
    ) -> None:
        self._done, self._live = done, live
        line = self.query_one(Input)
        line.suggester = suggester
        line.placeholder = placeholder
        with self.prevent(Input.Changed):
            line.value = value
        line.cursor_position = len(value)
        self._say(say)
        self.add_class("-shown")
        line.focus()

    def _say(self, text: str, *, bad: bool = False) -> None:
        label = self.query_one(".say", Static)
        label.set_class(bad, "-bad")
        label.update(Text(fit(escape(text), max(10, self.app.size.width - 2)), no_wrap=True))

    def on_input_changed(self, event: Input.Changed) -> None:
        """Look at a filter while it is typed."""
        event.stop()
        if not self._live:
            return
        try:
            parse_text(event.value)
        except FilterError as error:
            self._say(f"{error.message}{' — ' + error.hint if error.hint else ''}", bad=True)
            return
        self._say(
            f"{len(event.value.split()) or 'no'} condition{'' if len(event.value.split()) == 1 else 's'}"
        )

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Enter: carry it out; a filter that is none stays to be mended."""
        event.stop()
        done, text = self._done, event.value
        if self._live:
            try:
                parse_text(text)
            except FilterError:
                return
        self.action_leave()
        if done is not None:
            done(text)

    def action_complete(self) -> None:
        """Take the suggestion."""
        line = self.query_one(Input)
        if self._live:
            line.value = complete(line.value)
        else:
            found = next(
                (a.name for a in ACTIONS if line.value and a.name.startswith(line.value)), line.value
            )
            line.value = found
        line.cursor_position = len(line.value)

    def action_leave(self) -> None:
        """Close it."""
        from tui.app import Console

        self.remove_class("-shown")
        app = self.app
        assert isinstance(app, Console)
        target = app.view.first()
        if target is not None:
            target.focus()
