"""What the console remembers: theme, columns, queries, views. A file that cannot be read or written is no failure."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tui.cursor import WINDOWS


def default_path() -> Path:
    """`$XDG_CONFIG_HOME/sectool/top.json`."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "sectool" / "top.json"


@dataclass(frozen=True, slots=True)
class Saved:
    """A view with its filter (as it is typed) and the number of its window, 1 to 6."""

    view: str
    filter: str
    window: int

    @classmethod
    def parse(cls, data: object) -> Saved | None:
        """From the file; None when it is none."""
        if not isinstance(data, dict):
            return None
        view, text, window = data.get("view"), data.get("filter"), data.get("window")
        if not isinstance(view, str) or not isinstance(text, str) or not isinstance(window, int):
            return None
        return cls(view, text, window) if 1 <= window <= len(WINDOWS) else None


@dataclass(slots=True)
class Settings:
    """Kept at `path`; nowhere when that is None."""

    path: Path | None = None
    theme: str = ""
    columns: list[str] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)
    views: dict[str, Saved] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Settings:
        """What was remembered, as far as it makes sense."""
        out = cls(path)
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError):
            return out
        if not isinstance(data, dict):
            return out
        if isinstance(data.get("theme"), str):
            out.theme = data["theme"]
        for name in ("columns", "queries"):
            if isinstance(data.get(name), list):
                setattr(out, name, [v for v in data[name] if isinstance(v, str)])
        if isinstance(data.get("views"), dict):
            found = {name: Saved.parse(value) for name, value in data["views"].items()}
            out.views = {name: saved for name, saved in found.items() if saved is not None}
        return out

    def save(self) -> None:
        """Write it down, replacing the file at once."""
        if self.path is None:
            return
        text = json.dumps(
            {
                "theme": self.theme,
                "columns": self.columns,
                "queries": self.queries,
                "views": {name: asdict(saved) for name, saved in self.views.items()},
            },
            indent=1,
        )
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = self.path.with_suffix(".new")
            new.write_text(text)
            new.replace(self.path)
