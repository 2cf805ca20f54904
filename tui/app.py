"""The console: one frame around the views, the shared moment, and the one place where actions are carried out."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, ClassVar

from rich.text import Text
from textual.app import App, ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.filter import LineFilter, NoColor
from textual.screen import Screen
from textual.widgets import ContentSwitcher, Input, Static

from sectool.cli.status import suspended
from sectool.cli.text import escape, fit
from sectool.errors import NoDaemonError, SectoolError
from sectool.events import now_us
from sectool.filters import Filter, FilterError, parse_text
from tui.actions import ACTIONS, BY_NAME, VIEWS, Action, available
from tui.cursor import WINDOWS, Cursor
from tui.dialogs import Confirm, Help, Shown
from tui.prompt import Prompt
from tui.settings import Saved, Settings
from tui.source import Source
from tui.view import View
from tui.views import VIEW_TYPES
from tui.words import ago

TICK_S = 0.25
STATUS_S = 2.0
RETRY_S = 2.0
THEMES = ("textual-dark", "textual-light", "ansi-dark")

PressKeys = tuple(sorted({key for action in ACTIONS for key in action.keys}))


class Console(App[None]):
    """`sectool top`."""

    TITLE = "sectool"
    ENABLE_COMMAND_PALETTE = True
    COMMAND_PALETTE_BINDING = "ctrl+p"
    BINDINGS: ClassVar[list[BindingType]] = [
        *(Binding(key, f"press('{key}')", show=False) for key in PressKeys),
        Binding("ctrl+c", "quit", show=False, priority=True),
    ]
    CSS = """
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

    def __init__(self, source: Source, *, settings: Settings | None = None, theme: str | None = None) -> None:
        colours = os.environ.get("NO_COLOR")
        plain = bool(colours) or ("256" not in os.environ.get("TERM", "") and not os.environ.get("COLORTERM"))
        super().__init__()
        self.source = source
        self.settings = settings if settings is not None else Settings()
        self.cursor = Cursor()
        self.filter = Filter()
        self.paused = False
        self.facts: dict[str, Any] = {}
        self.lost: SectoolError | None = None
        self._asked = 0.0
        self._asking_status = False
        self._told_until = 0.0
        self._trail: list[str] = []
        self._painted: dict[str, Text] = {}
        self._last_tick = time.monotonic()
        self.theme = theme or ("ansi-dark" if plain else self.settings.theme or THEMES[0])

    def get_line_filters(self) -> Sequence[LineFilter]:
        """NO_COLOR means none at all, not greys."""
        return [NoColor()] if self.no_color else super().get_line_filters()

    # --- frame -----------------------------------------------------------------------------------------------

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

    @property
    def sight(self) -> View | None:
        """The view in sight; None on the way in or out."""
        frame = self.screen_stack[0] if self.screen_stack else None
        if frame is None or len(frame.query("#head, #nav, #banner, #note")) < 4:
            return None
        for switcher in frame.query(ContentSwitcher):
            return next(
                (v for v in switcher.children if v.id == switcher.current and isinstance(v, View)), None
            )
        return None

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
        """Show a view, made at its first time."""
        switcher = self.query_one("#views", ContentSwitcher)
        wanted = f"view-{name}"
        before = switcher.current
        if before and before != wanted and not back:
            self._trail = [*self._trail[-20:], before.removeprefix("view-")]
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
        view.reload()
        target = view.first()
        if target is not None and self.view is view and not self.query_one(Prompt).shown:
            target.focus()
        self.paint()

    def beat(self) -> None:
        """A quarter of a second has passed."""
        if self.sight is None:
            return  # on the way in or out
        now = time.monotonic()
        passed, self._last_tick = now - self._last_tick, now
        if self.cursor.speed:
            self.cursor = self.cursor.elapse(int(passed * 1e6), now_us())
            self.view.reload()
        if not self.paused and len(self.screen_stack) == 1:
            self.view.tick()
        if now - self._asked > (RETRY_S if self.lost else STATUS_S):
            self._ask_status()
        self.paint()

    def _ask_status(self) -> None:
        if self._asking_status or (self.source.offline and self.facts):
            return
        self._asking_status = True
        self._asked = time.monotonic()
        self.run_worker(self._fetch_status, thread=True, exit_on_error=False, group="status")

    def _fetch_status(self) -> None:
        try:
            facts = self.source.status()
        except (SectoolError, OSError) as error:
            failed = error if isinstance(error, SectoolError) else SectoolError(str(error))
            self.call_from_thread(self._status_failed, failed)
        else:
            self.call_from_thread(self._status_came, facts)

    def _status_failed(self, error: SectoolError) -> None:
        self._asking_status = False
        self.trouble(error)

    def _status_came(self, facts: dict[str, Any]) -> None:
        self._asking_status = False
        back = self.lost is not None
        self.facts = facts
        self.reached()
        if back:
            self.tell("the daemon answers again")
            self.view.reload()
        self.paint()

    def trouble(self, error: SectoolError) -> None:
        """A question failed. A missing daemon is a banner until it is back; anything else a note."""
        if isinstance(error, NoDaemonError) and not self.source.offline:
            self.lost = error
        else:
            self.tell(f"{error.message}{' — ' + error.hint if error.hint else ''}", 8.0)
        self.paint()

    def reached(self) -> None:
        """The daemon has answered."""
        if self.lost is not None:
            self.lost = None
            self.paint()

    def tell(self, text: str, seconds: float = 4.0) -> None:
        """Say something at the foot for a while."""
        self._told_until = time.monotonic() + seconds
        self._put("note", Text(escape(f" {text}"), no_wrap=True, overflow="ellipsis"))

    def paint(self) -> None:
        """Bring the frame up to date."""
        if self.sight is None:
            return  # on the way in or out
        frame = self.screen_stack[0]
        room = self.size.width
        self._put("head", self._head(room))
        self._put("nav", self._nav(room))
        loud = suspended(self.facts)
        frame.query_one("#banner", Static).set_class(self.lost is not None or bool(loud), "-shown")
        if self.lost is None and loud:
            self._put("banner", Text(escape(f" {loud}"), no_wrap=True, overflow="ellipsis"), layout=True)
        if self.lost is not None:
            since = f" What is shown is from before; trying again every {RETRY_S:g} s."
            self._put("banner", Text(f" NO DAEMON  {escape(self.lost.message)}.{since}"), layout=True)
        if time.monotonic() >= self._told_until:
            text = self.view.hint() if frame.query_one("#views", ContentSwitcher).current else ""
            self._put("note", Text(fit(escape(f" {text}"), room), no_wrap=True))

    def _put(self, name: str, text: Text, *, layout: bool = False) -> None:
        """Change one of the frame's lines if it differs: a quiet console draws nothing."""
        if self._painted.get(name) != text:
            self._painted[name] = text
            self.screen_stack[0].query_one(f"#{name}", Static).update(text, layout=layout)

    def _head(self, room: int) -> Text:
        facts = self.facts
        where = escape(str(facts.get("host", "…")))
        state = str(facts.get("state", "starting" if not self.lost else "unreachable"))
        sign, style = {"enforcing": ("●", "bold green"), "files": ("■", "bold")}.get(state, ("▲", "bold red"))
        if self.lost:
            sign, state, style = "▲", "no daemon", "bold red"
        left = Text(" sectool ", style="bold")
        left.append(where)
        left.append("  ")
        left.append(f"{sign} {'stored files' if state == 'files' else state}", style=style)
        if self.source.read_only:
            left.append("  read-only")
        policy = facts.get("policy")
        if policy and room >= 100:
            left.append(f"  policy r{policy['revision']}, {ago(policy['applied'], now_us())} old")
        if self.paused:
            left.append("  PAUSED", style="bold yellow")
        badge = self.cursor.badge
        right = Text(f"{self.cursor.span} ")
        right.append(f" {badge} ", style="bold reverse green" if self.cursor.live else "bold black on yellow")
        left.truncate(max(0, room - right.cell_len), overflow="ellipsis")
        left.append(" " * max(0, room - left.cell_len - right.cell_len))
        return left + right

    def _nav(self, room: int) -> Text:
        out = Text("", no_wrap=True)
        roomy = room >= 100  # then every name has a blank on both sides
        for name, key, title, *_ in VIEWS:
            chosen = name == self.view_name
            name_ = f" {key} {title}"
            if roomy or chosen:
                out.append(f"{name_} ", style="bold reverse" if chosen else "")
            else:
                out.append(name_)
        return out

    def explain(self, flow: str) -> None:
        """Open Why on a connection."""
        from tui.views.why import Why

        view = self.open_view("why")
        assert isinstance(view, Why)
        view.explain(flow)

    # --- actions ---------------------------------------------------------------------------------------------

    def action_press(self, key: str) -> None:
        """A key of the registry."""
        for action in available(self.view_name):
            if key in action.keys and (action.views or not self._shadowed(action, key)):
                self.carry_out(action)
                return

    def _shadowed(self, action: Action, key: str) -> bool:
        return any(a is not action and a.views and key in a.keys for a in available(self.view_name))

    def carry_out(self, action: Action, argument: str = "") -> None:
        """Do it, or say why not."""
        if action.writes and self.source.read_only:
            self.tell(f"{action.name} is not possible: {self.source.why_read_only}")
            return
        if action.name == "why" and (argument or self.view.selected_flow()):
            self.explain(argument or self.view.selected_flow())
            return
        if any(name == action.name for name, *_ in VIEWS):
            self.open_view(action.name)
            return
        if action.name.startswith("window-"):
            self.move_to(self.cursor.window(int(action.name[-1])))
            return
        method = f"do_{action.name.replace('-', '_')}"
        do: Callable[[str], None] | None = getattr(self.view, method, None) or getattr(self, method, None)
        if do is None:
            self.tell(f"{action.name} means nothing here; it is for {', '.join(action.views)}")
            return
        do(argument)

    def move_to(self, cursor: Cursor) -> None:
        """Change the shared moment."""
        self.cursor = cursor
        self.view.forget()
        self.view.reload()
        self.paint()

    def do_back(self, _: str) -> None:
        """To the view before."""
        if self._trail:
            self.open_view(self._trail.pop(), back=True)

    def do_earlier(self, _: str) -> None:
        """A step into the past."""
        self.move_to(self.cursor.step(-1, now_us()))

    def do_later(self, _: str) -> None:
        """A step towards now."""
        self.move_to(self.cursor.step(1, now_us()))

    def do_live(self, _: str) -> None:
        """Now."""
        self.paused = False
        self.move_to(self.cursor.now())

    def do_time(self, text: str) -> None:
        """To a moment."""
        if not text:
            self.query_one(Prompt).open(
                "time ", "go to: 10m (ago), 14:30, or 2026-03-01T02:00:00Z", self.go_to
            )
            return
        self.go_to(text)

    def go_to(self, text: str) -> None:
        """To the moment that `text` names."""
        from sectool.moment import parse_time

        try:
            moment = parse_time(text.strip(), now_us())
        except SectoolError as error:
            self.trouble(error)
            return
        self.move_to(self.cursor.to(moment, now_us()))

    def do_replay(self, _: str) -> None:
        """Play the window, or stop."""
        self.move_to(self.cursor.play(now_us()))

    def do_faster(self, _: str) -> None:
        """Replay faster."""
        self.cursor = self.cursor.faster(1)

    def do_slower(self, _: str) -> None:
        """Replay slower."""
        self.cursor = self.cursor.faster(-1)

    def do_filter(self, text: str) -> None:
        """Filter flows."""
        if text:
            self.set_filter(text)
            return
        view = self.open_view("flows")
        self.query_one(Prompt).open_filter(str(self.filter), self.set_filter, view)

    def set_filter(self, text: str) -> bool:
        """Take a filter over if it is one; the results stay otherwise."""
        try:
            chosen = parse_text(text)
        except FilterError as error:
            self.tell(error.message)
            return False
        if chosen != self.filter:
            self.filter = chosen
            self.open_view("flows")
        return True

    def do_pause(self, _: str) -> None:
        """Hold still, or go on."""
        self.paused = not self.paused
        if not self.paused:
            self.view.reload()
        self.paint()

    def do_refresh(self, _: str) -> None:
        """Ask again."""
        self.view.forget()
        self.view.reload()

    def do_prompt(self, _: str) -> None:
        """The `:` prompt."""
        self.query_one(Prompt).open_commands(self.command)

    def command(self, text: str) -> None:
        """What was typed at the prompt."""
        name, _, argument = text.strip().partition(" ")
        if not name:
            return
        action = BY_NAME.get(name)
        if action is None:
            near = [a.name for a in available(self.view_name) if a.name.startswith(name)]
            if len(near) != 1:
                self.tell(f"there is no action {name!r}; ? lists them all")
                return
            action = BY_NAME[near[0]]
        if action.views and self.view_name not in action.views:
            self.tell(f"{action.name} is for {', '.join(action.views)}")
            return
        self.carry_out(action, argument.strip())

    def do_help(self, _: str) -> None:
        """All keys that mean something here."""
        self.push_screen(Help(self.view_name))

    def do_theme(self, _: str) -> None:
        """The next theme, remembered."""
        self.theme = (
            THEMES[(THEMES.index(self.theme) + 1) % len(THEMES)] if self.theme in THEMES else THEMES[0]
        )
        self.settings.theme = self.theme
        self.settings.save()

    def do_quit(self, _: str) -> None:
        """Leave."""
        self.exit()

    def do_copy_cli(self, _: str) -> None:
        """The command that shows the same as the view."""
        command = self.view.cli()
        self.copy_to_clipboard(command)
        self.tell(f"copied: {command}", 8.0)

    def do_copy_rule(self, _: str) -> None:
        """The rule that allows the chosen connection, or would."""
        flow = self.view.selected_flow()
        if not flow:
            self.tell("choose a connection first")
            return
        self.run_worker(partial(self._find_rule, flow), thread=True, exit_on_error=False, group="rule")

    def _find_rule(self, flow: str) -> None:
        try:
            answer, _ = self.source.explain(flow)
        except SectoolError as error:
            self.call_from_thread(self.trouble, error)
            return
        main = answer.inquiry.main
        rule = main.decision.rule.text if answer.inquiry.allowed and main.decision.rule else main.sentence
        self.call_from_thread(self._rule_found, rule)

    def _rule_found(self, rule: str) -> None:
        if not rule:
            self.tell("no rule would let it through: w says what denies it")
            return
        self.copy_to_clipboard(rule)
        self.tell(f"copied: {rule}", 8.0)

    def do_save(self, name: str) -> None:
        """Remember where we are."""
        if not name:
            self.query_one(Prompt).open("name", "a name for this view, filter and window", self.do_save)
            return
        window = next(i for i, (_, us) in enumerate(WINDOWS, 1) if us == self.cursor.window_us)
        self.settings.views[name] = Saved(self.view_name, str(self.filter), window)
        self.settings.save()
        self.tell(f"remembered as {name!r}; v goes there")

    def do_open(self, name: str) -> None:
        """Go where we were."""
        known = ", ".join(sorted(self.settings.views))
        if not known:
            self.tell("nothing is remembered yet; :save NAME does it")
        elif not name:
            self.query_one(Prompt).open("name", f"go to: {known}", self.do_open)
        elif name not in self.settings.views:
            self.tell(f"nothing is remembered as {name!r}; there is {known}")
        else:
            saved = self.settings.views[name]
            self.cursor = self.cursor.window(saved.window)
            if self.set_filter(saved.filter):
                self.open_view(saved.view if saved.view in VIEW_TYPES else "flows")

    def do_cli(self, name: str) -> None:
        """The command that does the same as an action, shown and copied."""
        from tui.equivalents import command

        action = BY_NAME.get(name or "copy-cli")
        if action is None:
            self.tell(f"there is no action {name!r}; ? lists them all")
            return
        line = command(self, action)
        self.copy_to_clipboard(line)
        self.push_screen(Shown(f"{action.name} in the CLI (copied)", line))

    def do_copy_json(self, _: str) -> None:
        """The chosen row as JSON."""
        chosen = self.view.selected()
        if chosen is None:
            self.tell("there is no row to copy")
            return
        text = json.dumps(chosen, indent=2, default=str)
        self.copy_to_clipboard(text)
        self.push_screen(Shown("copied as JSON", text))

    def confirm(self, question: str, lines: Iterable[str], do: Callable[[], None]) -> None:
        """Ask before something is changed."""

        def answered(yes: bool | None) -> None:
            if yes:
                do()

        self.push_screen(Confirm(question, tuple(lines)), answered)

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """The palette: every action of the registry."""
        for action in available(self.view_name):
            key = f"  [{action.shown_keys}]" if action.keys else ""
            yield SystemCommand(
                action.name,
                f"{action.help}{key}".replace("[", "(").replace("]", ")"),
                lambda a=action: self.carry_out(a),
            )

    def window_flags(self) -> str:
        """The window as flags of the CLI."""
        return self.cursor.flags()

    def filter_flags(self) -> str:
        """The filter as flags of the CLI."""
        out: list[str] = []
        for clause in self.filter.clauses:
            for value in clause.values:
                if clause.negated:
                    out.append("--not")
                name = str(clause.field) if clause.side == "any" else f"{clause.side}-{clause.field}"
                if name == "encrypted":
                    out.append("--encrypted" if str(value) == "yes" else "--unencrypted")
                else:
                    out += [f"--{name}", shlex.quote(str(value))]
        return " ".join(out)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """The prompt's own affair."""
        event.stop()
