from __future__ import annotations

from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from sectool import clock


def test_known_moments() -> None:
    assert clock.to_datetime(0) == datetime(1970, 1, 1, tzinfo=UTC)
    assert (
        clock.from_datetime(datetime(2026, 3, 1, 2, 0, 0, 5, tzinfo=UTC)) == 1_772_330_400 * clock.SECOND + 5
    )
    assert clock.iso(1_772_330_400_999_999) == "2026-03-01T02:00:00Z"


@given(st.integers(-(10**15), 10**16))
def test_conversions_are_exact(us: int) -> None:
    assert clock.from_datetime(clock.to_datetime(us)) == us
