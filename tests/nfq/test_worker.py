"""The worker's clocks; the rest of it is tested on a real kernel."""

from __future__ import annotations

import time

import pytest

from nfq import worker


@pytest.mark.parametrize(("due", "now", "next_due"), [(5, 3, 5), (5, 9, 5), (9 * 10**15, 7, 1_000_007)])
def test_a_calendar_set_back_holds_up_nothing(due: int, now: int, next_due: int) -> None:
    assert worker._soon(due, now) == next_due


def test_the_time_that_a_host_sleeps_counts() -> None:
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    assert before <= worker._since_boot() <= time.clock_gettime(time.CLOCK_BOOTTIME)
