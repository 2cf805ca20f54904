"""What the console remembers: theme, columns, saved queries. A file that cannot be read or written is no failure."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path


def default_path() -> Path:
    """`$XDG_CONFIG_HOME/sectool/top.json`."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "sectool" / "top.json"


@dataclass(slots=True)
class Settings:
    """Kept at `path`; nowhere when that is None."""

    path: Path | None = None
    theme: str = ""
    columns: list[str] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)

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
        return out

    def save(self) -> None:
        """Write it down, replacing the file at once."""
        if self.path is None:
            return
        text = json.dumps({"theme": self.theme, "columns": self.columns, "queries": self.queries}, indent=1)
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new = self.path.with_suffix(".new")
            new.write_text(text)
            new.replace(self.path)
