"""Back-test of a recorded past: how long until ten million flows are judged by another policy.

The past is that of `tests.bench.history`. BACKTEST_FLOWS sets another number of flows.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from sectool.policy import parse
from store.backtest import backtest
from store.situations import History
from tests.bench.history import fleet, write_history
from tests.bench.rows import Row, row

FLOWS = int(os.environ.get("BACKTEST_FLOWS", "10000000"))
SEGMENTS = 10


def rows(rounds: int) -> list[Row]:
    """Seconds for all flows, opening the segments included; and how many situations they come down to."""
    talks = fleet()
    rules = sorted({talk.rule for talk in talks if talk.rule})
    kept = [rule for number, rule in enumerate(rules) if number % 50]  # two in a hundred are taken away
    text = "kind: Policy\nname: candidate\nowner: bench\nrules:\n" + "".join(f"- '{rule}'\n" for rule in kept)
    candidate = parse(text)
    spent: list[float] = []
    situations: list[float] = []
    with tempfile.TemporaryDirectory(prefix="sectool-backtest-", dir="/var/tmp") as folder:
        for number in range(SEGMENTS):
            write_history(Path(folder), talks, FLOWS // SEGMENTS, number, number=number + 1)
        for _ in range(rounds):
            begin = time.perf_counter()
            history = History(Path(folder))
            try:
                outcome = backtest(history, candidate)
            finally:
                history.close()
            spent.append(time.perf_counter() - begin)
            situations.append(outcome.situations)
            assert outcome.flows == FLOWS // SEGMENTS * SEGMENTS
            assert outcome.regressions
    case = f"{FLOWS:,} flows"
    return [
        row("backtest", case, "judge all", "s", spent),
        row("backtest", case, "distinct situations", "", situations),
    ]
