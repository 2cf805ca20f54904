"""What keeps keys quick in a process that also reads answers: short turns for threads, few collections of garbage."""

from __future__ import annotations

import gc
import sys

SWITCH_S = 0.001  # a thread that turns answers into Python gives way to a key after that long, not after 5 ms
YOUNG = 20_000  # objects between two collections: an answer of a thousand rows brings as many


def quicken() -> None:
    """To be called once by a process that is the console, when all its code is read."""
    sys.setswitchinterval(SWITCH_S)
    gc.collect()
    gc.freeze()  # the toolkit's objects stay for ever: no collection need look at them
    gc.set_threshold(YOUNG, 20, 50)
