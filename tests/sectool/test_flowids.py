"""Event ids: version 7, in order of time, never the same twice, not in children either."""

from __future__ import annotations

import os
import uuid

from sectool.flowids import new_event_id

T0 = 1_772_323_200_000_000


def test_the_time_can_be_read_from_an_id() -> None:
    made = uuid.UUID(bytes=new_event_id(T0 + 1999))
    assert made.version == 7 and made.variant == uuid.RFC_4122
    assert made.int >> 80 == (T0 + 1999) // 1000


def test_ids_are_in_order_of_microseconds() -> None:
    ids = [new_event_id(T0 + us) for us in range(3000)]
    assert sorted(ids) == ids


def test_no_id_comes_twice_for_the_same_moment() -> None:
    assert len({new_event_id(T0) for _ in range(10_000)}) == 10_000


def test_a_child_process_draws_its_own_numbers() -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, new_event_id(T0))
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(read, 16)
    os.close(read)
    os.close(write)
    ours = new_event_id(T0)
    assert theirs[8:12] != ours[8:12]
