"""Commands that are imported when they are used, so that `sectool --help` and every other command start fast."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import typer
from typer.core import TyperGroup


@dataclass(frozen=True, slots=True)
class Place:
    """Where a command lives: `module` has a Typer `app`; `command` names one in it, or None for all as a group."""

    module: str
    help: str
    command: str | None = None

    def load(self, name: str) -> Any:
        """Import the command."""
        group = typer.main.get_group(importlib.import_module(self.module).app)
        if self.command is None:
            group.name = name
            return group
        return group.commands[self.command]


class Unloaded(TyperGroup):
    """Stands for a command in help listings and turns into the real one when it is invoked or completed."""

    def __init__(self, name: str, place: Place) -> None:
        super().__init__(name=name, help=place.help, rich_markup_mode=None)
        self._place = place
        self._real: Any = None

    def real(self) -> Any:
        """The command itself."""
        if self._real is None:
            self._real = self._place.load(self.name or "")
        return self._real

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Hand over to the real command."""
        return self.real().make_context(info_name, args, parent=parent, **extra)
