"""The moment in time that all views share. Pure: the clock is a parameter.

live ──[──► as of T ──]──► … ──0──► live        T never lies in the future: stepping past now is live again
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sectool.clock import HOUR, MINUTE, SECOND, iso

WINDOWS: tuple[tuple[str, int], ...] = (
    ("1 m", MINUTE),
    ("5 m", 5 * MINUTE),
    ("15 m", 15 * MINUTE),
    ("1 h", HOUR),
    ("6 h", 6 * HOUR),
    ("24 h", 24 * HOUR),
)
SPEEDS: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100)
STEPS_A_WINDOW = 5


@dataclass(frozen=True, slots=True)
class Cursor:
    """A window of `window_us` that ends `at` a moment (UTC microseconds), or now when that is None.

    `speed` is how many times faster than the clock a replay goes; 0 when nothing is replayed.
    """

    window_us: int = 15 * MINUTE
    at: int | None = None
    speed: int = 0

    @property
    def live(self) -> bool:
        """Whether the window ends now."""
        return self.at is None

    def until(self, now_us: int) -> int:
        """Where the window ends, exclusive. A little ahead when live: clocks of events and ours are the same one."""
        return now_us + SECOND if self.at is None else self.at

    def since(self, now_us: int) -> int:
        """Where the window begins."""
        return max(0, self.until(now_us) - self.window_us)

    def step(self, steps: int, now_us: int) -> Cursor:
        """Move by fifths of the window; past now is live."""
        here = now_us if self.at is None else self.at
        return self.to(here + steps * self.window_us // STEPS_A_WINDOW, now_us)

    def to(self, moment_us: int, now_us: int) -> Cursor:
        """Go to a moment; from now on it is live."""
        if moment_us >= now_us:
            return replace(self, at=None, speed=0)
        return replace(self, at=max(0, moment_us))

    def now(self) -> Cursor:
        """Go live."""
        return replace(self, at=None, speed=0)

    def window(self, number: int) -> Cursor:
        """Choose the window by its key, 1 to 6."""
        return replace(self, window_us=WINDOWS[number - 1][1])

    def zoom(self, by: int, about_us: int, now_us: int) -> Cursor:
        """The next longer (`by` 1) or shorter (-1) window, with the moment `about_us` where it was in it."""
        spans = [us for _, us in WINDOWS]
        here = spans.index(self.window_us) if self.window_us in spans else 0
        wide = spans[min(max(here + by, 0), len(spans) - 1)]
        if wide == self.window_us:
            return self
        end = self.until(now_us)
        ahead = min(max(end - about_us, 0), self.window_us) * wide // self.window_us
        return replace(self, window_us=wide, speed=0).to(
            end if about_us >= end else about_us + max(1, ahead), now_us
        )

    def play(self, now_us: int) -> Cursor:
        """Start a replay of the window (it begins where the window did), or end it."""
        if self.speed:
            return replace(self, speed=0)
        start = self.since(now_us) if self.at is None else self.at
        return replace(self, at=start, speed=10)

    def faster(self, by: int) -> Cursor:
        """The next speed up or down."""
        if not self.speed:
            return self
        index = SPEEDS.index(self.speed) + by
        return replace(self, speed=SPEEDS[min(max(index, 0), len(SPEEDS) - 1)])

    def elapse(self, us: int, now_us: int) -> Cursor:
        """A replay after `us` microseconds of the clock."""
        if not self.speed or self.at is None:
            return self
        return self.to(self.at + us * self.speed, now_us)

    @property
    def span(self) -> str:
        """The window for people: `15 m`."""
        return next((name for name, us in WINDOWS if us == self.window_us), f"{self.window_us // MINUTE} m")

    @property
    def badge(self) -> str:
        """`LIVE`, or `AS OF` and the moment."""
        if self.at is None:
            return "LIVE"
        if self.speed:
            return f"REPLAY x{self.speed} {iso(self.at)}"
        return f"AS OF {iso(self.at)}"

    def at_flag(self) -> str:
        """The moment as a flag of the CLI; empty when live."""
        return "" if self.at is None else f"--at {iso(self.at)}"

    def flags(self) -> str:
        """The same window as flags of the CLI."""
        if self.at is None:
            return f"--since {self.span.replace(' ', '')}"
        return f"--since {iso(self.at - self.window_us)} --until {iso(self.at)}"
