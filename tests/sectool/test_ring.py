"""The ring against a model, and against everything that can be wrong with its file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sectool.errors import SectoolError
from sectool.events import FIELDS, FLOW_DTYPE, FLOW_STRUCT, INDEX, SLOT_SIZE, Kind
from sectool.ring import HEADER_SIZE, MAX_BLOB, RingDamagedError, RingReader, RingWriter, slots_of


def values(pid: int) -> list[Any]:
    """The values of a flow record that can be told from others by its pid."""
    out: list[Any] = [b"" if code.endswith("s") else 0 for _, code in FIELDS]
    out[INDEX["kind"]], out[INDEX["pid"]] = Kind.FLOW, pid
    return out


def record(pid: int) -> bytes:
    return FLOW_STRUCT.pack(*values(pid))


def cells(path: Path) -> np.memmap[Any, Any]:
    return np.memmap(path, dtype="<u8", mode="r+", shape=(32,))


def test_flow_records_come_out_as_they_went_in(tmp_path: Path) -> None:
    ring = RingWriter.open_or_create(tmp_path / "ring-x", 8)
    reader = RingReader.open(tmp_path / "ring-x")
    assert ring.put(record(1))
    assert ring.pack_into_next(*values(2))
    batch = reader.read(100)
    assert batch.records.dtype == FLOW_DTYPE
    assert batch.records["pid"].tolist() == [1, 2]
    assert [r.tobytes() for r in batch.records] == [record(1), record(2)]
    assert (batch.first, batch.end, batch.damaged, batch.blobs) == (0, 2, 0, [])
    assert (tmp_path / "ring-x").stat().st_mode & 0o777 == 0o600


def test_what_was_read_but_not_committed_comes_again(tmp_path: Path) -> None:
    path = tmp_path / "ring-x"
    ring = RingWriter(path, 8)
    for pid in range(3):
        ring.put(record(pid))
    first = RingReader(path)
    assert first.read(2).records["pid"].tolist() == [0, 1]
    first.commit()
    assert first.read(2).records["pid"].tolist() == [2]
    second = RingReader(path)  # as after kill -9 of the first
    assert second.read(9).records["pid"].tolist() == [2]
    second.rewind()
    assert second.read(9).records["pid"].tolist() == [2]
    third = RingReader(path)
    third.skip_to(3)  # durable, as the store's own note says
    assert third.read(9).records["pid"].tolist() == []
    assert ring.pending == 0


def test_a_full_ring_drops_and_counts(tmp_path: Path) -> None:
    ring = RingWriter(tmp_path / "ring-x", 4)
    reader = RingReader(tmp_path / "ring-x")
    assert [ring.put(record(n)) for n in range(6)] == [True] * 4 + [False] * 2
    assert not ring.put_blob({"type": "x"})
    assert ring.lost == reader.lost == 3
    reader.read(2)
    assert not ring.put(record(9)), "read is not committed"
    reader.commit()
    assert ring.put(record(9))


def test_a_restarted_producer_continues(tmp_path: Path) -> None:
    path = tmp_path / "ring-x"
    first = RingWriter(path, 8)
    first.put(record(1))
    first.put_blob({"big": "x" * 900})
    first.close()
    second = RingWriter(path, 64)
    assert second.capacity == 8, "what is unread stays, so does the size"
    second.put(record(2))
    batch = RingReader(path).read(64)
    assert batch.records["pid"].tolist() == [1, 2]
    assert batch.blobs == [{"big": "x" * 900}]


def test_a_killed_producer_leaves_only_whole_events(tmp_path: Path) -> None:
    path = tmp_path / "ring-x"
    code = (
        "import sys; from pathlib import Path; from sectool.ring import RingWriter; import os\n"
        "ring = RingWriter(Path(sys.argv[1]), 1 << 16)\n"
        "n = 0\n"
        "while True:\n"
        "    n += 1\n"
        "    ring.put_blob({'n': n, 'text': 'x' * (n % 700)})\n"
        "    if n == 1000: print(flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    child.kill()
    child.wait()
    batch = RingReader(path).read(1 << 16)
    assert batch.damaged == 0
    assert [blob["n"] for blob in batch.blobs] == list(range(1, len(batch.blobs) + 1))
    assert len(batch.blobs) >= 1000
    RingWriter(path).close()  # its lock died with it


def test_one_producer_at_a_time(tmp_path: Path) -> None:
    ring = RingWriter(tmp_path / "ring-x", 8)
    with pytest.raises(SectoolError, match="another process"):
        RingWriter(tmp_path / "ring-x", 8)
    ring.close()
    ring.close()
    RingWriter(tmp_path / "ring-x", 8).close()


def test_no_ring_where_none_can_be(tmp_path: Path) -> None:
    with pytest.raises(SectoolError, match="cannot make the event ring"):
        RingWriter(tmp_path / "missing" / "ring-x")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(SectoolError):
        RingWriter(tmp_path / "link")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("cell", "value"),
    [(0, 1), (1, 99), (2, 8), (3, 6), (3, 0), (3, 1 << 40), (8, 1 << 20), (16, 5), (8, (1 << 64) - 1)],
    ids=["magic", "version", "slot size", "odd capacity", "no capacity", "huge", "head", "tail", "head -1"],
)
def test_a_damaged_header_is_refused_and_set_aside(tmp_path: Path, cell: int, value: int) -> None:
    path = tmp_path / "ring-x"
    RingWriter(path, 8).close()
    cells(path)[cell] = value
    with pytest.raises(RingDamagedError) as refused:
        RingReader(path)
    assert refused.value.hint
    ring = RingWriter(path, 8)
    ring.put(record(1))
    assert RingReader(path).read(9).records["pid"].tolist() == [1]
    kept = list(tmp_path.glob(".ring-x.damaged-*"))
    assert len(kept) == 1
    assert cells(kept[0])[cell] == value, "kept as it was"


@pytest.mark.parametrize("size", [0, 100, HEADER_SIZE, HEADER_SIZE + 8 * SLOT_SIZE - 1])
def test_a_file_cut_short_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "ring-x"
    RingWriter(path, 8).close()
    os.truncate(path, size)
    with pytest.raises(RingDamagedError):
        RingReader(path)
    RingWriter(path, 8).close()
    RingReader(path).close()


def test_counters_that_become_impossible_under_a_reader(tmp_path: Path) -> None:
    path = tmp_path / "ring-x"
    ring = RingWriter(path, 8)
    reader = RingReader(path)
    cells(path)[8] = 1000
    with pytest.raises(RingDamagedError):
        reader.read(10)
    ring.put(record(1))  # the producer has its own count and writes it again
    assert reader.read(10).records["pid"].tolist() == [1]


def test_garbage_slots_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "ring-x"
    ring = RingWriter(path, 16)
    ring.put(record(1))
    ring.put_blob({"a": "x" * 600})  # three slots
    ring.put(record(2))
    ring.put_blob({"b": 1})
    ring.put(record(3))
    raw = np.memmap(path, dtype=np.uint8, mode="r+", offset=HEADER_SIZE).reshape(16, SLOT_SIZE)
    raw[1, 4:8] = 0xFF  # a length beyond everything
    raw[5, 8:10] = 0  # no JSON
    batch = RingReader(path).read(16)
    assert batch.records["pid"].tolist() == [1, 2, 3]
    assert batch.blobs == []
    assert batch.damaged == 4
    assert batch.end == 7


def test_blobs_too_large_are_lost_not_cut(tmp_path: Path) -> None:
    ring = RingWriter(tmp_path / "ring-x", 8)
    assert not ring.put_blob({"x": "y" * (5 * SLOT_SIZE)}), "more than half the ring"
    assert ring.lost == 1
    large = RingWriter(tmp_path / "ring-y", 1 << 14)
    assert not large.put_blob({"x": "y" * MAX_BLOB})
    assert large.put_blob({"x": "y" * (MAX_BLOB - 10)})


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(garbage=st.binary(max_size=16 * SLOT_SIZE), head=st.integers(0, 16), most=st.integers(0, 20))
def test_any_bytes_in_slots_are_parsed_or_counted(
    tmp_path: Path, garbage: bytes, head: int, most: int
) -> None:
    """Invariant: whatever is in the slots, a read takes at least one slot when there is one, and ends."""
    path = tmp_path / "ring-g"
    path.unlink(missing_ok=True)
    RingWriter(path, 16).close()
    raw = np.memmap(path, dtype=np.uint8, mode="r+", offset=HEADER_SIZE)
    raw[: len(garbage)] = np.frombuffer(garbage, np.uint8)
    cells(path)[8] = head
    reader = RingReader(path)
    taken = 0
    while taken < head:
        batch = reader.read(most + 1)
        assert batch.end > batch.first == taken
        taken = batch.end
        assert len(batch.records) + len(batch.blobs) + batch.damaged <= batch.end - batch.first
    assert taken == head
    reader.close()


class RingModel(RuleBasedStateMachine):
    """The ring beside a queue: same order within each kind, nothing lost uncounted, nothing twice once committed."""

    capacity = 16

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "ring-m"
        self.writer = RingWriter(self.path, self.capacity)
        self.reader = RingReader(self.path)
        self.unread: deque[tuple[Any, int]] = deque()  # event and its slots
        self.uncommitted: list[tuple[Any, int]] = []
        self.serial = self.lost = 0

    @property
    def used(self) -> int:
        return sum(slots for _, slots in self.unread) + sum(slots for _, slots in self.uncommitted)

    @rule()
    def put(self) -> None:
        self.serial += 1
        fits = self.used + 1 <= self.capacity
        assert self.writer.put(record(self.serial)) is fits
        self._account(fits, self.serial, 1)

    @rule(length=st.integers(0, 9 * SLOT_SIZE))
    def put_blob(self, length: int) -> None:
        self.serial += 1
        blob = {"n": self.serial, "t": "é" * (length // 6)}
        slots = slots_of(len(json.dumps(blob, separators=(",", ":"))))
        fits = slots <= self.capacity // 2 and self.used + slots <= self.capacity
        assert self.writer.put_blob(blob) is fits
        self._account(fits, blob, slots)

    def _account(self, fits: bool, event: Any, slots: int) -> None:
        if fits:
            self.unread.append((event, slots))
        else:
            self.lost += 1

    @rule(most=st.integers(1, 20))
    def read(self, most: int) -> None:
        batch = self.reader.read(most)
        slots = 0
        flows: list[int] = []
        blobs: list[dict[str, Any]] = []
        while slots < batch.end - batch.first:
            event, size = self.unread.popleft()
            self.uncommitted.append((event, size))
            slots += size
            (blobs if isinstance(event, dict) else flows).append(event)
        assert slots == batch.end - batch.first
        assert batch.records["pid"].tolist() == flows
        assert batch.blobs == blobs
        assert batch.damaged == 0

    @rule()
    def commit(self) -> None:
        self.reader.commit()
        self.uncommitted.clear()

    @rule()
    def reader_dies(self) -> None:
        self.reader.close()
        self.reader = RingReader(self.path)
        self.unread.extendleft(reversed(self.uncommitted))
        self.uncommitted.clear()

    @precondition(lambda self: self.serial % 3 == 0)
    @rule()
    def writer_dies(self) -> None:
        self.writer.close()
        self.writer = RingWriter(self.path, self.capacity)

    @invariant()
    def agree(self) -> None:
        assert self.writer.lost == self.reader.lost == self.lost
        assert self.reader.pending == self.writer.pending == self.used

    def teardown(self) -> None:
        self.writer.close()
        self.reader.close()
        self.folder.cleanup()


RingModel.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestRingModel = RingModel.TestCase
