"""Which record counters have been accepted: everything above the highest, and what is missing in a window below it."""

from __future__ import annotations

from typing import Final

WINDOW: Final = 4096


class Window:
    """Counters accepted so far. `highest` starts at 0, which no record has.

    What is remembered is what is *missing* below the highest, so records in order cost nothing: bit i of a number
    stands for counter `_base` + i. It never has more than 2 x WINDOW + 1 bits.
    """

    __slots__ = ("_base", "_missing", "highest")

    def __init__(self, highest: int = 0) -> None:
        """`highest`: that and everything below it counts as accepted."""
        self.highest = highest
        self._base = highest + 1
        self._missing = 0

    def fresh(self, counter: int) -> bool:
        """Whether this counter may still be accepted: it is above the highest, or inside the window and missing."""
        if counter > self.highest:
            return True
        if counter <= self.highest - WINDOW or counter < self._base:
            return False
        return self._missing >> counter - self._base & 1 == 1

    def accept(self, counter: int) -> None:
        """Take a counter that is `fresh`, after its record has been verified."""
        highest = self.highest
        if counter < highest:
            self._missing ^= 1 << counter - self._base
            return
        self.highest = counter
        if counter == highest + 1:
            return
        lowest = max(highest + 1, counter - WINDOW + 1)
        if not self._missing:
            self._base = lowest
        elif counter - self._base >= 2 * WINDOW:
            shift = counter - WINDOW + 1 - self._base
            self._missing >>= shift
            self._base += shift
        if lowest < counter:
            self._missing |= (1 << counter - lowest) - 1 << lowest - self._base
