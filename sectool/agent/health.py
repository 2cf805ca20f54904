"""What is wrong right now: named problems, each told when it appears and when it is gone."""

from __future__ import annotations

from collections.abc import Callable


class Health:
    """`changed(degraded, what, why)` hears of every problem that appears (True) and goes (False)."""

    def __init__(self, changed: Callable[[bool, str, str], None]) -> None:
        self.problems: dict[str, str] = {}
        self._changed = changed

    def raise_(self, what: str, why: str) -> None:
        """`what` (a part of the daemon) is not well because of `why`."""
        known = what in self.problems
        self.problems[what] = why
        if not known:
            self._changed(True, what, why)

    def clear(self, what: str) -> None:
        """`what` is well again, or was all the time."""
        why = self.problems.pop(what, None)
        if why is not None:
            self._changed(False, what, why)
