"""What a learner has reached, by scenario: goals, hints taken, a score. One JSON file; a damaged one counts as none.

Building hosts takes root, learning does not: under sudo the file is that of the user who called it, and is read and
written with that user's rights.
"""

from __future__ import annotations

import json
import os
import pwd
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

SOLVED_COSTS = 100  # who has the solution shown has learnt, and scores nothing


@dataclass(frozen=True, slots=True)
class Progress:
    """One scenario's. `best`: the highest score with all goals reached; None: not yet."""

    hints: int = 0
    lost: int = 0  # points that the hints taken cost
    solution_seen: bool = False
    reached: int = 0
    goals: int = 0
    best: int | None = None

    @property
    def score(self) -> int:
        """Points that reaching all goals now would give, of 100."""
        return max(0, 100 - self.lost - (SOLVED_COSTS if self.solution_seen else 0))

    def checked(self, reached: int, goals: int) -> Progress:
        """After a look at the goals."""
        best = self.best
        if reached == goals:
            best = max(self.score, best or 0)
        return replace(self, reached=reached, goals=goals, best=best)

    def hinted(self, costs: int) -> Progress:
        """After one more hint."""
        return replace(self, hints=self.hints + 1, lost=self.lost + costs)

    def again(self) -> Progress:
        """At the start of another try: what was best stays."""
        return Progress(best=self.best)


def _learner() -> pwd.struct_passwd | None:
    """The user behind sudo; None without one."""
    try:
        return pwd.getpwuid(int(os.environ["SUDO_UID"])) if os.geteuid() == 0 else None
    except (KeyError, ValueError):
        return None


@contextmanager
def _as_learner() -> Iterator[None]:
    user = _learner()
    if user is None or user.pw_uid == 0:
        yield
        return
    os.setegid(user.pw_gid)
    os.seteuid(user.pw_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def file() -> Path:
    """Where it is kept: `$XDG_STATE_HOME/sectool/scenarios.json`."""
    user = _learner()
    home = Path(user.pw_dir) if user is not None else Path.home()
    base = os.environ.get("XDG_STATE_HOME") or str(home / ".local" / "state")
    return Path(base) / "sectool" / "scenarios.json"


def load() -> dict[str, Progress]:
    """By scenario."""
    try:
        with _as_learner():
            found = json.loads(file().read_text(encoding="utf-8"))
        return {name: Progress(**one) for name, one in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def save(name: str, progress: Progress) -> None:
    """Keep one scenario's."""
    _keep({**load(), name: progress})


def forget(names: Iterable[str]) -> None:
    """As if these had never been tried."""
    gone = set(names)
    _keep({name: one for name, one in load().items() if name not in gone})


def _keep(everything: dict[str, Progress]) -> None:
    path = file()
    text = json.dumps({key: asdict(value) for key, value in everything.items()})
    with _as_learner():
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(text, encoding="utf-8")
        new.replace(path)
