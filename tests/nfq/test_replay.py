"""The replay window against a model that remembers everything."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nfq.replay import WINDOW, Window

# Steps relative to the highest accepted so far: in order, a few apart, around the window's far end, far ahead.
STEPS = st.one_of(
    st.just(1),
    st.integers(-6, 6),
    st.integers(-WINDOW - 3, -WINDOW + 3),
    st.integers(WINDOW - 3, WINDOW + 3),
    st.integers(-3 * WINDOW, 3 * WINDOW),
    st.integers(1 << 16, 1 << 33),
)


@given(st.lists(STEPS, max_size=60), st.sampled_from([0, 1, 5000, 2**32 - 3]))
def test_a_counter_is_accepted_once_and_only_inside_the_window(steps: list[int], begin: int) -> None:
    window = Window(begin)
    seen: set[int] = set()
    highest = begin
    for step in steps:
        counter = highest + step
        expected = counter > begin and counter not in seen and counter > highest - WINDOW
        assert window.fresh(counter) is expected
        if expected:
            window.accept(counter)
            seen.add(counter)
            highest = max(highest, counter)
            assert window.highest == highest
            assert not window.fresh(counter)
        assert window._missing.bit_length() <= 2 * WINDOW + 1


def test_everything_inside_the_window_can_still_come() -> None:
    window = Window()
    window.accept(2 * WINDOW)
    late = range(WINDOW + 1, 2 * WINDOW)
    assert all(window.fresh(c) for c in late)
    for counter in late:
        window.accept(counter)
    assert not any(window.fresh(c) for c in range(2 * WINDOW + 1))


def test_a_long_flow_with_losses_stays_small() -> None:
    window = Window()
    for counter in range(1, 100_000):
        if counter % 7:
            window.accept(counter)
    assert window._missing.bit_length() <= 2 * WINDOW + 1
