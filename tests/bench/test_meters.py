"""What measurements read: numbers of iperf3, connbench and /proc/stat."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectool.errors import SectoolError
from tests.bench.meters import Busy, Stopwatch, busy_ticks, connections, iperf_gbit

STAT = "cpu  100 20 30 4000 500 6 7 8 9 10\ncpu0 1 1 1 1 1 1 1 0 0 0\nintr 5\n"


def test_idle_waiting_and_stolen_time_is_not_busy() -> None:
    assert busy_ticks(STAT) == 100 + 20 + 30 + 6 + 7


def test_a_stat_without_the_sum_of_cpus_is_an_error() -> None:
    with pytest.raises(SectoolError, match="no line of all CPUs"):
        busy_ticks("cpu0 1 2 3 4 5 6 7\n")


def test_the_machine_s_own_stat_is_read_and_work_shows() -> None:
    watch = Stopwatch()
    end = time.process_time() + 0.2
    while time.process_time() < end:
        busy_ticks(Path("/proc/stat").read_text())
    busy = watch.stop()
    assert busy.cpu_seconds >= 0.1
    assert busy.seconds >= 0.2


def test_cores_are_cpu_time_by_time() -> None:
    assert Busy(3.0, 2.0).cores == 1.5


def test_the_receiver_s_rate_counts() -> None:
    ends = {"sum_sent": {"bits_per_second": 9e9}, "sum_received": {"bits_per_second": 8.5e9}}
    assert iperf_gbit(json.dumps({"end": ends})) == 8.5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "nothing"),
        ("iperf3: killed", "killed"),
        ('{"error": "unable to connect"}', "unable to connect"),
        ('{"end": {}}', "without a sum"),
        ('{"end": null}', "without a sum"),
        ("[]", "no JSON object"),
    ],
)
def test_a_failed_transfer_says_why(text: str, words: str) -> None:
    with pytest.raises(SectoolError, match=words):
        iperf_gbit(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("connbench: connect: refused", "refused"),
        ('{"connections": 0, "errors": 3}', "no connection"),
        ("{}", "no con"),
    ],
)
def test_a_round_without_connections_is_an_error(text: str, words: str) -> None:
    with pytest.raises(SectoolError, match=words):
        connections(text)


@given(st.text(max_size=200))
def test_strange_words_of_programs_are_errors_and_nothing_else(text: str) -> None:
    for read in (iperf_gbit, connections):
        with pytest.raises(SectoolError):
            read(text)
