"""What a learner has reached, by scenario: goals, hints taken, a score. One JSON file; a damaged one counts as none."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

HINT_COSTS = 10  # points of 100, each
SOLVED_COSTS = 100  # who has the solution shown has learnt, and scores nothing


@dataclass(frozen=True, slots=True)
class Progress:
    """One scenario's. `best`: the highest score with all goals reached; None: not yet."""

    hints: int = 0
    solution_seen: bool = False
    reached: int = 0
    goals: int = 0
    best: int | None = None

    @property
    def score(self) -> int:
        """Points that reaching all goals now would give."""
        lost = HINT_COSTS * self.hints + (SOLVED_COSTS if self.solution_seen else 0)
        return max(0, 100 - lost)

    def checked(self, reached: int, goals: int) -> Progress:
        """After a look at the goals."""
        best = self.best
        if reached == goals:
            best = max(self.score, best or 0)
        return replace(self, reached=reached, goals=goals, best=best)

    def again(self) -> Progress:
        """At the start of another try: what was best stays."""
        return Progress(best=self.best)


def file() -> Path:
    """Where it is kept: `$XDG_STATE_HOME/sectool/scenarios.json`."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "sectool" / "scenarios.json"


def load() -> dict[str, Progress]:
    """By scenario."""
    try:
        found = json.loads(file().read_text(encoding="utf-8"))
        return {name: Progress(**one) for name, one in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def save(name: str, progress: Progress) -> None:
    """Keep one scenario's."""
    everything = {**load(), name: progress}
    path = file()
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps({key: asdict(value) for key, value in everything.items()}), encoding="utf-8")
    new.replace(path)
