"""The shared moment: steps, windows, replay, and never the future."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sectool.clock import MINUTE, SECOND
from tui.cursor import SPEEDS, WINDOWS, Cursor

NOW = 1_772_330_584_000_000


def test_steps_go_back_and_return_to_live() -> None:
    earlier = Cursor().step(-1, NOW)
    assert earlier.at == NOW - 3 * MINUTE
    assert not earlier.live
    assert earlier.badge.startswith("AS OF 2026-03-01T02:")
    assert earlier.step(1, NOW).live
    assert earlier.until(NOW) - earlier.since(NOW) == 15 * MINUTE


def test_windows_are_chosen_by_number() -> None:
    assert [Cursor().window(n).span for n in range(1, 7)] == [name for name, _ in WINDOWS]


def test_replay_goes_faster_than_the_clock_and_ends_live() -> None:
    replay = Cursor().play(NOW)
    assert replay.at == NOW + SECOND - 15 * MINUTE
    assert replay.faster(1).speed == 20
    assert replay.faster(99).speed == SPEEDS[-1]
    later = replay.elapse(SECOND, NOW)
    assert later.at == replay.at + 10 * SECOND
    assert replay.elapse(100 * MINUTE, NOW).live
    assert replay.play(NOW).speed == 0


def test_flags_name_the_same_window() -> None:
    assert Cursor().flags() == "--since 15m"
    assert Cursor(at=NOW).flags() == "--since 2026-03-01T01:48:04Z --until 2026-03-01T02:03:04Z"


@given(st.lists(st.tuples(st.sampled_from("[]prf0"), st.integers(1, 6)), max_size=30))
def test_it_never_lies_in_the_future(moves: list[tuple[str, int]]) -> None:
    cursor, now = Cursor(), NOW
    for move, number in moves:
        now += number * SECOND
        match move:
            case "[":
                cursor = cursor.step(-number, now)
            case "]":
                cursor = cursor.step(number, now)
            case "p":
                cursor = cursor.play(now)
            case "r":
                cursor = cursor.elapse(number * SECOND, now)
            case "f":
                cursor = cursor.faster(number - 3)
            case _:
                cursor = cursor.now()
        assert cursor.at is None or 0 <= cursor.at < now
        assert cursor.since(now) < cursor.until(now)


@given(st.integers(1, 6), st.sampled_from([-1, 1]), st.integers(0, 900), st.integers(0, 900))
def test_zooming_keeps_the_moment_in_sight(window: int, by: int, past: int, inside: int) -> None:
    now = 10**15
    before = Cursor().window(window).to(now - past * SECOND, now)
    about = before.until(now) - min(inside * SECOND, before.window_us - 1) - 1
    after = before.zoom(by, about, now)
    assert after.window_us != before.window_us or window in (1, 6)
    assert after.until(now) <= now + SECOND
    assert after.since(now) <= about < after.until(now)
