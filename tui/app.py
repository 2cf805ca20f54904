"""The console: what its actions do. One registry names them (tui.actions); the views carry out some."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from textual.app import SystemCommand
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import Input

from sectool.errors import SectoolError
from sectool.events import now_us
from sectool.filters import FilterError, parse_text
from tui.actions import ACTIONS, BY_NAME, VIEWS, Action, available
from tui.cursor import WINDOWS
from tui.dialogs import Confirm, Help, Shown
from tui.frame import THEMES, Frame
from tui.inquest import rule_for
from tui.prompt import Prompt
from tui.settings import Saved
from tui.views import VIEW_TYPES

PressKeys = tuple(sorted({key for action in ACTIONS for key in action.keys}))


class Console(Frame):
    """`sectool top`."""

    ENABLE_COMMAND_PALETTE = True
    COMMAND_PALETTE_BINDING = "ctrl+p"
    BINDINGS: ClassVar[list[BindingType]] = [
        *(Binding(key, f"press('{key}')", show=False) for key in PressKeys),
        Binding("ctrl+c", "quit", show=False, priority=True),
    ]

    def explain(self, flow: str) -> None:
        """Open Why on a connection."""
        from tui.views.why import Why

        view = self.open_view("why")
        assert isinstance(view, Why)
        view.explain(flow)

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
        if refused := self.rights.why_not(action.needs):
            self.tell(f"{action.name} is not possible: {refused}")
            return
        if action.name == "why" and argument:
            self.explain(argument)
            return
        if action.name == "why" and self._with_flow(self.explain):
            return
        if action.name == "back" and self.view.give_up():
            self.tell("called off; r asks again")
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

    def do_back(self, _: str) -> None:
        """To the view before."""
        if self.trail:
            self.open_view(self.trail.pop(), back=True)

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
        self.push_screen(Help(self.view_name, self.rights))

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
        if not self._with_flow(self._copy_rule_of):
            self.tell("choose a connection first")

    def _copy_rule_of(self, flow: str) -> None:
        source = self.source
        self.view.ask("rule", lambda: rule_for(source, flow), then=self._rule_found)

    def _with_flow(self, do: Callable[[str], None]) -> bool:
        """Do it with the chosen connection, found first if need be; False when none is meant."""
        flow = self.view.selected_flow()
        find = None if flow else self.view.flow_to_find()
        if find is not None:
            self.view.ask("flow", find, then=lambda found: do(found) if found else self.tell("it is gone"))
        elif flow:
            do(flow)
        return bool(flow) or find is not None

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
                f"{action.help}{key}{self._refused(action)}".replace("[", "(").replace("]", ")"),
                lambda a=action: self.carry_out(a),
            )

    def _refused(self, action: Action) -> str:
        why = self.rights.why_not(action.needs)
        return f" — not possible: {why}" if why else ""

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
