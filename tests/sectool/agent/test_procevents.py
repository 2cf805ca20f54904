"""The kernel's news of processes: real ones, and bytes that are none."""

from __future__ import annotations

import select
import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectool.agent.procevents import EXEC, EXIT, FORK, UID, News, ProcEvents, note

from .conftest import until


def message(what: int, *words: int) -> bytes:
    return bytes(36) + struct.pack("=IIQ", what, 0, 0) + struct.pack(f"={len(words)}I", *words)


def test_what_is_told() -> None:
    news = News()
    for data in (
        message(FORK, 1, 1, 20, 20), message(FORK, 1, 1, 22, 21), message(EXEC, 30, 30), message(UID, 41, 40, 0, 0),
        message(EXIT, 51, 50, 0, 0), message(EXIT, 60, 60, 0, 0), message(0, 7, 7), message(64, 8, 8),
    ):  # fmt: skip
        note(data, news)
    assert news.changed == {20, 30, 40}
    assert news.ended == {60}


@given(st.binary(max_size=100))
def test_any_bytes_are_news_or_nothing(data: bytes) -> None:
    news = News()
    note(data, news)
    assert len(news.changed) + len(news.ended) <= 1


@pytest.mark.kernel
def test_a_real_process_begins_and_ends_and_threads_are_not_told() -> None:
    events = ProcEvents()
    try:
        code = "import threading\nfor i in range(9):\n t = threading.Thread(target=int); t.start(); t.join()\ninput()"
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
        changed: set[int] = set()
        ended: set[int] = set()

        def heard(pids: set[int]) -> bool:
            select.select([events.fd], [], [], 1)
            news = events.read()
            changed.update(news.changed)
            ended.update(news.ended)
            return child.pid in pids

        until(lambda: heard(changed), "the kernel tells of the child")
        assert events.heard
        child.communicate(b"\n")
        until(lambda: heard(ended), "the kernel tells of its end")
    finally:
        events.close()
