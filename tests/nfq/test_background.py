"""Work beside the loop: results come, the small overtake the large, nothing is kept without bound."""

from __future__ import annotations

import select
import threading
from collections.abc import Iterator

import pytest

from nfq.background import Background, Steps


@pytest.fixture
def background() -> Iterator[Background[str]]:
    """One thread, room for four."""
    made: Background[str] = Background(threads=1, limit=4)
    yield made
    made.close()


def serve(background: Background[str], results: list[str | None], count: int) -> None:
    """Be the loop until so many results are there."""
    with select.epoll() as poll:
        poll.register(background.fd, select.EPOLLIN)
        while len(results) < count:
            assert poll.poll(10), f"only {results} of {count} results came"
            background.completed()


def quick(result: str) -> Steps[str]:
    """Done in one step."""
    yield from ()
    return result


def blocked(gate: threading.Event, result: str) -> Steps[str]:
    """A step that waits, then one more."""
    assert gate.wait(10)
    yield 1
    return result


def failing() -> Steps[str]:
    """Fails."""
    yield 1
    raise OSError("no such luck")


def test_results_are_handed_on_by_the_loop_only(background: Background[str]) -> None:
    results: list[str | None] = []
    where: list[threading.Thread] = []

    def done(result: str | None) -> None:
        where.append(threading.current_thread())
        results.append(result)

    assert background.completed() == 0
    assert background.start(1, quick("a"), done)
    assert background.start(1, failing(), done)
    serve(background, results, 2)
    assert results == ["a", None]
    assert where == [threading.current_thread()] * 2
    assert (background.failed, background.completed()) == (1, 0)


def test_the_smallest_is_next(background: Background[str]) -> None:
    gate, results = threading.Event(), list[str | None]()
    background.start(0, blocked(gate, "first"), results.append)
    for size, name in ((30, "large"), (2, "small"), (10, "medium")):
        background.start(size, quick(name), results.append)
    gate.set()
    serve(background, results, 4)
    assert results[-3:] == ["small", "medium", "large"]


def test_when_full_the_largest_that_waits_gives_way(background: Background[str]) -> None:
    gate, results, gave_way = threading.Event(), list[str | None](), list[str | None]()
    running = threading.Event()

    def first() -> Steps[str]:
        running.set()
        return (yield from blocked(gate, "first"))

    background.start(0, first(), results.append)
    assert running.wait(10)
    background.start(20, quick("b"), results.append)
    background.start(90, quick("giant"), gave_way.append)
    background.start(20, quick("c"), results.append)
    assert not background.start(90, quick("another giant"), results.append)
    assert background.start(5, quick("d"), results.append)
    gate.set()
    serve(background, results, 4)
    assert sorted(str(r) for r in results) == ["b", "c", "d", "first"]
    assert gave_way == [None]
    assert background.refused == 2


def test_after_closing_nothing_is_called() -> None:
    made: Background[str] = Background(threads=2)
    gate, results = threading.Event(), list[str | None]()
    for _ in range(10):
        made.start(1, blocked(gate, "x"), results.append)
    gate.set()
    made.close()
    assert results == []
    assert not any(thread.is_alive() for thread in made._threads)
