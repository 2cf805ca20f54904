"""The event store under sustained load: a producer at 100,000 and 200,000 events a second, followed and queried
meanwhile; then questions about a long past (tests.bench.store_questions).

Producer, store and questioner are three processes (this one asks), as on a host. Nothing may be lost.
SECTOOL_BENCH_STORE=load or =questions measures that half alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sectool.errors import SectoolError
from sectool.events import FLOW_DTYPE, Action, Kind, Phase, now_us
from sectool.filters import parse_text
from sectool.ring import RingWriter
from store.reader import LiveReader, open_reader
from tests.bench import store_questions
from tests.bench.rows import Row, row
from tests.bench.store_questions import NOTE as NOTE

RATE, SECONDS = 100_000, 30.0  # events a second, in every round
PEAK, PEAK_SECONDS = 200_000, 60.0  # once
CHUNK = 1000
QUERY = (
    "SELECT destination_port, action, count(*) AS records, sum(source_bytes) AS bytes FROM flow_records"
    " WHERE event_start > make_timestamp({since}) GROUP BY ALL ORDER BY records DESC"
)


def chunk(rng: np.random.Generator, count: int) -> NDArray[np.void]:
    """`count` records of flows that begin and end now: a VERDICT and an END each, with few peers and many ports."""
    now = now_us()
    records = np.zeros(count, FLOW_DTYPE)
    flows = np.arange(count) // 2
    records["kind"] = Kind.FLOW
    records["phase"] = np.where(np.arange(count) % 2 == 0, Phase.VERDICT, Phase.END)
    for name, value in (
        ("point", 1),
        ("direction", 1),
        ("transport", 6),
        ("ip_version", 4),
        ("auth_method", 1),
    ):
        records[name] = value
    records["action"] = np.where(flows % 20 == 0, Action.DENY, Action.ALLOW)
    records["drop_reason"] = np.where(flows % 20 == 0, 1, 0)
    records["source_port"] = rng.integers(10_000, 65_000, count // 2)[flows]
    records["destination_port"] = rng.choice([80, 443, 5432, 6379], count // 2)[flows]
    records["ts"], records["start"] = now, now - flows
    records["end"] = np.where(records["phase"] == Phase.END, now, 0)
    ids = np.zeros((count // 2, 16), np.uint8)
    ids[:, :6] = np.frombuffer((now // 1000).to_bytes(6, "big"), np.uint8)
    ids[:, 6:] = rng.integers(0, 256, (count // 2, 10), np.uint8)
    records["event_id"] = ids[flows].view("V16")[:, 0]
    for name in ("source_ip", "destination_ip"):
        address = np.zeros((count // 2, 16), np.uint8)
        address[:, 10:12] = 255
        address[:, 12] = 10
        address[:, 15] = rng.integers(1, 250, count // 2)
        records[name] = address[flows].view("V16")[:, 0]
    records["community"] = rng.integers(0, 256, (count // 2, 20), np.uint8)[flows].view("V20")[:, 0]
    records["history"] = np.frombuffer(b"ShADadFf".ljust(12, b"\0"), "V12")[0]
    for name in ("source_bytes", "destination_bytes"):
        records[name] = rng.integers(100, 1_000_000, count)
    for name in ("source_identity", "destination_identity", "source_labels", "destination_labels", "rule"):
        records[name] = rng.integers(1, 50, count // 2)[flows]
    return records


def produce(path: Path, rate: int, seconds: float) -> None:
    """Put records into the ring at `path`, evenly; print what it cost as JSON."""
    rng = np.random.default_rng(7)
    ring = RingWriter(path)
    total, spent, refused, late = int(rate * seconds), 0.0, 0, 0.0
    begin = time.perf_counter()
    for first in range(0, total, CHUNK):
        wait = begin + first / rate - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        late = max(late, -wait)
        records = [record.tobytes() for record in chunk(rng, CHUNK)]
        put = ring.put
        start = time.perf_counter()
        for record in records:
            refused += not put(record)
        spent += time.perf_counter() - start
    elapsed = time.perf_counter() - begin
    print(
        json.dumps(
            {
                "put_us": spent / total * 1e6,
                "refused": refused,
                "rate": total / elapsed,
                "late_ms": late * 1e3,
            }
        )
    )
    ring.close()


def wait_for(what: str, condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Until `condition` holds; SectoolError past the deadline."""
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        if time.monotonic() > deadline:
            raise SectoolError(f"{what}: not within {seconds:g} s")
        pause.wait(0.02)


class Follower(threading.Thread):
    """Follows denied flows; keeps how old each batch was on arrival, and what it missed."""

    def __init__(self, reader: LiveReader) -> None:
        super().__init__(daemon=True)
        self._reader = reader
        self.lag_ms: list[float] = []
        self.rows = self.gaps = 0

    def run(self) -> None:
        with contextlib.suppress(SectoolError):
            for frame in self._reader.tail(parse_text("verdict=deny")):
                self.gaps += frame.gap
                if frame.table is not None:
                    newest = frame.table.column("event_start")[-1].value
                    self.lag_ms.append((now_us() - newest) / 1000)
                    self.rows += frame.table.num_rows


def one_round(base: Path, rate: int, seconds: float) -> dict[tuple[str, str, str], float]:
    """One run of `seconds` at `rate` events a second; (case, metric, unit) to value."""
    state, run = base / "state", Path(tempfile.mkdtemp(prefix="sectool-bench-", dir="/dev/shm"))
    state.mkdir()
    store = subprocess.Popen(
        [sys.executable, "-m", "store", "--state", str(state), "--run", str(run)], stderr=subprocess.DEVNULL
    )
    producer = None
    try:
        wait_for("the store answers", lambda: (run / "events.sock").exists())
        reader = open_reader(state, run)
        assert isinstance(reader, LiveReader)
        follower = Follower(reader)
        follower.start()
        code = (
            "import pathlib, sys; from tests.bench.store import produce;"
            " produce(pathlib.Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))"
        )
        arguments = [str(run / "ring-bench"), str(rate), str(seconds)]
        before = os.times()
        producer = subprocess.Popen(
            [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True
        )
        latencies = []
        pause = threading.Event()
        while producer.poll() is None:
            start = time.perf_counter()
            reader.query(QUERY.format(since=now_us() - 10_000_000))
            latencies.append((time.perf_counter() - start) * 1000)
            pause.wait(1.0)
        assert producer.stdout is not None
        made = json.loads(producer.stdout.read())
        total = int(rate * seconds)
        wait_for("all events are stored", lambda: reader.stats()["flow_records"] + made["refused"] >= total)
        stats = reader.stats()
        store.send_signal(signal.SIGTERM)
        store.wait(60)
        used = os.times()
        size = sum(path.stat().st_size for path in (state / "events").glob("flows-*.duckdb"))
        cpu = used.children_user + used.children_system - before.children_user - before.children_system
    finally:
        for process in (producer, store):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
        shutil.rmtree(run, ignore_errors=True)
    load = f"{rate:,}/s for {seconds:g} s"
    return {
        (load, "rate", "events/s"): made["rate"],
        (load, "lost", "events"): stats["lost"] + made["refused"],
        (load, "put", "µs"): made["put_us"],
        (load, "insert_p50", "ms"): stats["insert_p50_ms"],
        (load, "insert_p99", "ms"): stats["insert_p99_ms"],
        (load, "query_median", "ms"): float(np.median(latencies)),
        (load, "query_max", "ms"): max(latencies),
        (load, "tail_lag_median", "ms"): float(np.median(follower.lag_ms))
        if follower.lag_ms
        else float("nan"),
        (load, "tail_lag_p99", "ms"): float(np.quantile(follower.lag_ms, 0.99))
        if follower.lag_ms
        else float("nan"),
        (load, "tail_missed", "flows"): follower.gaps,
        (load, "cpu_all_processes", "cores"): cpu / seconds,
        (load, "on_disk", "bytes/event"): size / max(1, stats["flow_records"]),
    }


def rows(rounds: int) -> list[Row]:
    """Loss, latency and size under load, and what questions cost."""
    part = os.environ.get("SECTOOL_BENCH_STORE", "")
    out: list[Row] = []
    if part != "questions":
        for rate, seconds, times in ((RATE, SECONDS, rounds), (PEAK, PEAK_SECONDS, 1)):
            measured = []
            for _ in range(times):
                with tempfile.TemporaryDirectory(prefix="sectool-bench-") as folder:
                    measured.append(one_round(Path(folder), rate, seconds))
            out += [row("store", *key, [one[key] for one in measured]) for key in measured[0]]
    if part != "load":
        out += store_questions.rows(rounds)
    return out
