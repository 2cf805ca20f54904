"""What a store has to outlive: kill -9 at any moment, damaged files, readers in the way, a clock that goes back.

Few rounds by default. Many: SECTOOL_STORE_KILLS=200 SECTOOL_STORE_DAMAGES=200 pytest tests/store/test_hard.py
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sectool.errors import SectoolError
from sectool.filters import Filter
from store import index, retention, segment
from store.control import Actor, ControlHistory
from store.flows import list_flows
from store.past import CONTROL
from store.process import Limits
from store.query import run
from store.reader import LocalReader
from store.retention import Retention
from store.verify import verify

KILLS = int(os.environ.get("SECTOOL_STORE_KILLS", "5"))
DAMAGES = int(os.environ.get("SECTOOL_STORE_DAMAGES", "1"))
SEED = int(os.environ.get("SECTOOL_STORE_SEED", "1"))
HOUR = 3_600_000_000
BUSY = ("--segment-bytes", "600000", "--checkpoint-seconds", "0.3")  # seals, checkpoints all the time


class Producer:
    """Puts numbered records and events into a ring, without a pause, never more than it takes."""

    def __init__(self, lab: Any) -> None:
        self.lab, self.ring = lab, lab.ring(capacity=1 << 12)
        self.written = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._produce)

    def _produce(self) -> None:
        while not self._done.is_set():
            if self.ring.pending > 3000:
                self._done.wait(0.001)
            elif self.written % 50 == 49:
                blob = {"type": "workload.start", "ts": self.lab.T0, "n": self.written}
                self.written += self.ring.put_blob(blob)
            else:
                self.written += self.ring.put(self.lab.record(pid=self.written, flow=self.written))

    def __enter__(self) -> Producer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()


def numbers(reader: Any) -> list[int]:
    """The numbers of all records and events."""
    flows = (
        reader.query("SELECT pid FROM flow_records ORDER BY seq", limit=1_000_000).table["pid"].to_pylist()
    )
    assert flows == sorted(flows), "in the order of arrival"
    events = reader.query(
        "SELECT (body->>'n')::INT n FROM events WHERE type = 'workload.start' ORDER BY seq", limit=1_000_000
    ).table["n"]
    return [*flows, *events.to_pylist()]


@pytest.mark.long
def test_killed_at_random_points(lab: Any) -> None:
    """While it starts, inserts, checkpoints, seals, compacts and indexes: all is there, once, and verifiable."""
    dice = random.Random(SEED)
    retention.save(lab.state, Retention(compact_us=1, since_us=1))
    pause = threading.Event()
    with Producer(lab) as producer:
        for life in range(KILLS):
            before = producer.written
            # Three deaths in a row while one segment is opened would have that set aside: it might be the cause.
            early = life % 2 == 1
            lab.start(*BUSY, wait_for_it=not early)
            if not early:
                lab.wait("it goes on", lambda before=before: producer.written > before + 500)
            pause.wait(dice.random() * (0.4 if early else 1.5))
            lab.kill()
        lab.start(*BUSY)
        producer.stop()
    ring = producer.ring
    lab.wait("the ring is drained", lambda: ring.pending == 0, 120)
    assert lab.stop() == 0, lab.log
    assert ring.lost == 0
    reader = lab.reader()
    assert not reader.live
    assert reader.warnings == []
    assert sorted(numbers(reader)) == list(range(producer.written))
    seqs = reader.query(
        "SELECT count(*) n, count(DISTINCT seq) d FROM (SELECT seq FROM flow_records UNION ALL SELECT seq FROM events)"
    ).table.to_pylist()[0]
    assert seqs["n"] == seqs["d"]
    reader.close()
    assert verify(lab.state).problems == ()
    assert not list(lab.events.glob("*.damaged-*"))


@pytest.fixture(scope="module")
def left(make_lab: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a killed store left: a compact segment, a native one, one that is not sealed with its log, an index."""
    lab = make_lab(tmp_path_factory.mktemp("left"))
    for life in range(2):
        store = lab.inside()
        for number in range(400):
            lab.ring().put(lab.record(pid=400 * life + number, flow=400 * life + number))
        store.step()
        store.close()
        if not life:
            store = lab.inside()
            assert store.compact_next(0)[0]
            store.tidy()  # which indexes it
            store.close()
    with ControlHistory(lab.state / CONTROL) as control:
        for number in range(20):
            control.append("policy", str(number), {"text": f"rule {number}"}, Actor(0, "root"), "why", lab.T0)
    lab.start()
    for number in range(800, 1200):
        lab.ring().put(lab.record(pid=number, flow=number))
    lab.stored(1200)
    lab.kill()
    return lab


PARTS = ("compact", "native", "unsealed", "log", "chain", "index", "control")


def part(events: Path, which: str, dice: random.Random) -> tuple[Path, set[int]]:
    """A file, and the numbers of the records that are gone when it cannot be read."""
    one, two, three = segment.segment_files(events)
    match which:
        case "compact":
            return dice.choice(sorted(one.iterdir())), set(range(400))
        case "native":
            return two, set(range(400, 800))
        case "unsealed":
            return three, set(range(800, 1200))
        case "log":
            return segment.wal_of(three), set(range(800, 1200))
        case "chain":
            return events / segment.CHAIN, set()
        case "control":
            return events.parent / CONTROL, set()
    return index.index_file(events), set()


def harm(path: Path, how: str, dice: random.Random) -> None:
    data = bytearray(path.read_bytes())
    assert data
    if how == "torn":
        data = data[: dice.randrange(len(data))]
    else:
        for _ in range(dice.randint(1, 3)):
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.parent.chmod(0o750)
    path.chmod(0o640)
    path.write_bytes(data)


@pytest.mark.parametrize("which", PARTS)
def test_damaged_files(left: Any, lab: Any, which: str) -> None:
    """The store comes up and goes on, all that other files hold is there, and the damage is told or found."""
    for round_ in range(DAMAGES):
        dice = random.Random(f"{SEED} {which} {round_}")
        how = dice.choice(("torn", "flipped"))
        shutil.rmtree(lab.state)
        shutil.copytree(left.state, lab.state)
        whole = verify(lab.state, index=False).heads[-1:]
        path, gone = part(lab.events, which, dice)
        harm(path, how, dice)
        sealed_before = verify(lab.state).problems
        lab.start()
        reader = lab.live()
        number = 5000 + round_
        lab.ring().put(lab.record(pid=number, flow=number))
        lab.wait("it goes on", lambda reader=reader, number=number: number in there(reader, number))
        try:
            found = {n for n in there(reader) if n < 1200}
        except SectoolError as error:  # damaged rows fail the questions that read them, and no others
            assert "Corrupt" in error.message or "enough bytes" in error.message
            assert lab.stop() == 0, lab.log
            names = [path.name, path.parent.name, "index.duckdb"]
            assert {problem.where for problem in sealed_before} & set(names) or which == "unsealed"
            continue
        assert set(range(1200)) - gone <= found, f"round {round_}: more is gone than what was in {path.name}"
        told = [str(body) for body in reader.events(["store.damaged"]).table["body"].to_pylist()]
        assert lab.stop() == 0, lab.log
        lost = set(range(1200)) - found
        if which == "control":
            # A bit of a page that holds nothing changes nothing that is on record.
            same = verify(lab.state).heads[-1:] == whole and how == "flipped"
            assert sealed_before or same, f"round {round_}: nobody saw that {path.name} was changed"
        elif which == "index":
            # Noticed at the start, or where a question reads it; `verify` reads all of it.
            assert not verify(lab.state).problems or sealed_before
        elif which == "log":
            assert found == set(range(1200 - len(lost))), "a log ends where it was torn"
            assert how == "torn" or not lost or told
        else:
            assert not lost or told, f"round {round_}: {len(lost)} records went without a word"
            if which in ("compact", "native", "chain"):
                assert sealed_before or told, f"round {round_}: nobody saw that {path.name} was changed"


def there(reader: Any, least: int = 0) -> list[int]:
    """The numbers of the records from `least` on."""
    sql = f"SELECT pid FROM flow_records WHERE pid >= {least} ORDER BY seq"
    return list(reader.query(sql, limit=1_000_000).table["pid"].to_pylist())


def test_readers_of_files_while_segments_are_sealed(lab: Any) -> None:
    """Two readers that ask no daemon: they see whole segments, nothing twice, and are in nobody's way."""
    retention.save(lab.state, Retention(compact_us=1, since_us=1))
    failures: list[str] = []
    seen = [0, 0]
    done = threading.Event()

    def read(which: int) -> None:
        while not done.is_set():
            try:
                with contextlib.closing(LocalReader(lab.events)) as reader:
                    got = there(reader)
                    if len(set(got)) != len(got) or got != sorted(got):
                        failures.append(f"{len(got)} rows, {len(set(got))} of them different")
                    seen[which] = max(seen[which], len(got))
            except Exception as error:  # whatever it is, it fails the test
                failures.append(repr(error))

    with Producer(lab) as producer:
        lab.start(*BUSY)
        readers = [threading.Thread(target=read, args=(which,)) for which in range(2)]
        for reader in readers:
            reader.start()
        try:
            lab.wait("some segments are sealed", lambda: len(segment.sealed(lab.events)) >= 4, 60)
            lab.wait("both have read", lambda: all(seen), 60)
        finally:
            done.set()
            for reader in readers:
                reader.join()
    lab.wait("the ring is drained", lambda: producer.ring.pending == 0, 60)
    assert lab.stop() == 0
    assert failures == []
    assert sorted(numbers(lab.reader())) == list(range(producer.written))
    assert verify(lab.state).problems == ()


def test_the_clock_is_set_back_an_hour_while_it_runs(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, chain and numbers rise all the same; flows are in the order of their begin by the clock of then."""
    clock = [lab.T0 + 10 * HOUR]
    for module in ("process", "segment", "upkeep"):
        monkeypatch.setattr(f"store.{module}.now_us", lambda: clock[0])
    store = lab.inside(Limits(segment_bytes=1))
    store.upkeep.choose({"keep_us": 365 * 24 * HOUR}, "root")
    for number, change in enumerate((0, 60, -HOUR, 60, 2 * HOUR, -HOUR)):
        clock[0] += change
        lab.ring().put(lab.record(pid=number, flow=number, start=clock[0]))
        store.step()
        store._roll_if_due()
        store.tidy()
    names = [path.name for path in segment.segment_files(lab.events)]
    chained = [entry["segment"] for entry in segment.entries(lab.events)]
    assert chained == names[: len(chained)]
    assert len(chained) == 6
    firsts = [int(segment.sealed(lab.events)[name]["first_seq"]) for name in chained]
    assert firsts == sorted(firsts)
    assert list_flows(store.catalog, Filter(), last=3).table["pid"].to_pylist() == [1, 5, 4]
    assert run(store.catalog, "SELECT pid FROM flow_records ORDER BY seq").table["pid"].to_pylist() == list(
        range(6)
    )
    store.limits = replace(store.limits, segment_us=HOUR)
    store.close()
    assert verify(lab.state).problems == ()
    again = lab.inside()
    lab.ring().put(lab.record(pid=6, flow=6, start=clock[0]))
    again.step()
    assert list_flows(again.catalog, Filter(), last=2).table["pid"].to_pylist() == [6, 4]
