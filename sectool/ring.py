"""Single-producer single-consumer ring of event slots in a tmpfs file.

      header page (4096 bytes)                       slots of events.SLOT_SIZE bytes
    ┌──────────────────────────────────────┐      ┌──────┬──────┬──────┬─── … ───┬──────┐
    │ magic version slot_size capacity     │      │ FLOW │ BLOB │ more │         │      │
    │ ring id, producer pid and start time │      └──────┴──────┴──────┴─── … ───┴──────┘
    │ head (producer) tail (reader) lost   │         position p lives in slot p mod capacity
    └──────────────────────────────────────┘

`head` and `tail` count slots since the ring was made and never wrap; `head - tail` slots are unread. The producer
writes a slot and then publishes it by writing `head`; the reader writes `tail` only when what it read is durable.
Both are aligned 8-byte cells written by one store each (memoryview.cast("Q")). On x86-64 stores become visible in
program order, so a published slot is complete. Weaker machines (aarch64) promise no such order between the
interpreter's two plain stores; there the reader takes only slots that were published before its previous look,
at least one polling interval ago, which in practice is thousands of times longer than a store buffer drains.

No lock and no system call per event. A full ring drops the event and counts it in `lost`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sectool.errors import SectoolError, StoreError
from sectool.events import FLOW_DTYPE, FLOW_STRUCT, SLOT_SIZE, Kind, now_us

MAGIC = int.from_bytes(b"SECTRING", "little")
VERSION = 1
HEADER_SIZE = 4096
DEFAULT_CAPACITY = 262_144
MAX_CAPACITY = 1 << 24
MAX_BLOB = 1 << 20  # bytes of JSON; also bounded by half the ring

# Cells of the header page, as indexes of u64. Producer's and reader's cells are on cache lines of their own.
_MAGIC, _VERSION, _SLOT_SIZE, _CAPACITY, _RING_ID, _PID, _STARTED = range(7)
_HEAD, _TAIL, _LOST = 8, 16, 24
_CELLS = 32

_BLOB_HEAD = 8  # kind u8, 3 pad, length u32
_STRONG_ORDER = platform.machine() in {"x86_64", "AMD64", "i686"}


class RingDamagedError(StoreError):
    """A ring file whose header cannot be right."""


def slots_of(blob_length: int) -> int:
    """Slots a JSON blob of that many bytes takes."""
    return -(-(_BLOB_HEAD + blob_length) // SLOT_SIZE)


def _check(cells: memoryview, size: int, path: Path) -> int:
    """The capacity of a sound ring; RingDamagedError says what is wrong with any other."""
    hint = "the next start of its producer moves it aside and makes a new one; unread events in it are lost"
    if cells[_MAGIC] != MAGIC or cells[_VERSION] != VERSION or cells[_SLOT_SIZE] != SLOT_SIZE:
        raise RingDamagedError(f"{path} is not an event ring of this version", hint)
    capacity = int(cells[_CAPACITY])
    if capacity & (capacity - 1) or not 2 <= capacity <= MAX_CAPACITY:
        raise RingDamagedError(f"{path} claims a capacity of {capacity} slots", hint)
    if size != HEADER_SIZE + capacity * SLOT_SIZE:
        raise RingDamagedError(f"{path} has {size} bytes, which is not what {capacity} slots take", hint)
    if not 0 <= int(cells[_HEAD]) - int(cells[_TAIL]) <= capacity:
        raise RingDamagedError(f"{path} claims {cells[_HEAD]} slots written and {cells[_TAIL]} read", hint)
    return capacity


class RingWriter:
    """The producing end. One per ring file at a time; the file lock is taken once, at opening."""

    def __init__(self, path: Path, capacity: int = DEFAULT_CAPACITY) -> None:
        """Continue the ring at `path`, or make one of `capacity` slots (rounded up to a power of two).

        A ring that exists keeps its capacity and its unread events. One that is damaged is kept under another
        name (`.damaged-<time>`). Raises SectoolError when another process writes to it or no file can be made.
        """
        self.path = path
        try:
            self._fd = _open_locked(path, capacity)
            self._map = mmap.mmap(self._fd, 0)
        except OSError as error:
            raise SectoolError(
                f"cannot make the event ring {path}: {error.strerror or error}",
                "the run folder has to be on a tmpfs with room left, and writable for root",
            ) from None
        view = memoryview(self._map)
        self._slots = view[HEADER_SIZE:]
        self._cells = view[: _CELLS * 8].cast("Q")
        self._capacity = int(self._cells[_CAPACITY])
        self._mask = self._capacity - 1
        self._head = int(self._cells[_HEAD])
        self._limit = (
            int(self._cells[_TAIL]) + self._capacity
        )  # head may not reach beyond; refreshed when met
        self._pack_into = FLOW_STRUCT.pack_into
        self._cells[_PID] = os.getpid()
        self._cells[_STARTED] = now_us()

    @classmethod
    def open_or_create(cls, path: Path, capacity: int = DEFAULT_CAPACITY) -> RingWriter:
        """See the constructor."""
        return cls(path, capacity)

    def put(self, record: bytes) -> bool:
        """Append one packed flow record of SLOT_SIZE bytes; False (and counted) when the ring is full."""
        head = self._head
        if head >= self._limit and not self._room(head, 1):
            return False
        at = (head & self._mask) * SLOT_SIZE
        self._slots[at : at + SLOT_SIZE] = record
        self._head = head = head + 1
        self._cells[_HEAD] = head
        return True

    def pack_into_next(self, *values: Any) -> bool:
        """Append one flow record given as the values of events.FIELDS, packed straight into its slot."""
        head = self._head
        if head >= self._limit and not self._room(head, 1):
            return False
        self._pack_into(self._map, HEADER_SIZE + (head & self._mask) * SLOT_SIZE, *values)
        self._head = head = head + 1
        self._cells[_HEAD] = head
        return True

    def put_blob(self, blob: dict[str, Any]) -> bool:
        """Append one JSON event, whole or not at all; False (and counted) when it does not fit."""
        text = json.dumps(blob, separators=(",", ":")).encode("ascii")
        slots = slots_of(len(text))
        head = self._head
        if len(text) > MAX_BLOB or slots > self._capacity // 2:
            self._cells[_LOST] += 1
            return False
        if head + slots > self._limit and not self._room(head, slots):
            return False
        data = bytes((Kind.BLOB, 0, 0, 0)) + len(text).to_bytes(4, "little") + text
        at = (head & self._mask) * SLOT_SIZE
        first = min(len(data), len(self._slots) - at)
        self._slots[at : at + first] = data[:first]
        self._slots[: len(data) - first] = data[first:]
        self._head = head = head + slots
        self._cells[_HEAD] = head
        return True

    def _room(self, head: int, slots: int) -> bool:
        """Look where the reader is now; count the event as lost when `slots` more do not fit."""
        self._limit = min(int(self._cells[_TAIL]), head) + self._capacity
        if head + slots <= self._limit:
            return True
        self._cells[_LOST] += 1
        return False

    @property
    def lost(self) -> int:
        """Events dropped since the ring was made."""
        return int(self._cells[_LOST])

    @property
    def capacity(self) -> int:
        """Slots in the ring."""
        return self._capacity

    @property
    def pending(self) -> int:
        """Slots the reader has not confirmed yet."""
        return self._head - int(self._cells[_TAIL])

    def close(self) -> None:
        """Let go of the file. What is in it stays for the reader."""
        if self._fd >= 0:
            self._cells.release()
            self._slots.release()
            with contextlib.suppress(BufferError):  # a view still held elsewhere: unmapped when that goes
                self._map.close()
            os.close(self._fd)
            self._fd = -1


def _open_locked(path: Path, capacity: int) -> int:
    """A file descriptor of a sound ring at `path`, locked against other producers."""
    for _ in range(8):  # the file may be replaced between opening and locking
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            _create(path, capacity)
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stat, named = os.fstat(fd), path.lstat()
            if (stat.st_dev, stat.st_ino) != (named.st_dev, named.st_ino):
                os.close(fd)
                continue
            raw = os.pread(fd, _CELLS * 8, 0)
            _check(memoryview(raw.ljust(_CELLS * 8, b"\0")).cast("Q"), stat.st_size, path)
        except BlockingIOError:
            os.close(fd)
            raise SectoolError(
                f"another process writes events to {path}",
                "stop the other daemon, or give this one its own --run folder",
            ) from None
        except FileNotFoundError:
            os.close(fd)
            continue
        except RingDamagedError:
            path.rename(path.with_name(f".{path.name}.damaged-{now_us()}"))
            os.close(fd)
            continue
        return fd
    raise SectoolError(
        f"{path} is replaced again and again by somebody else", "look who else uses the run folder"
    )


def _create(path: Path, capacity: int) -> None:
    """Put an empty ring at `path`, complete from the first moment it has that name."""
    slots = 1 << max(1, (min(capacity, MAX_CAPACITY) - 1).bit_length())
    cells = [0] * _CELLS
    cells[_MAGIC], cells[_VERSION], cells[_SLOT_SIZE], cells[_CAPACITY] = MAGIC, VERSION, SLOT_SIZE, slots
    cells[_RING_ID] = int.from_bytes(os.urandom(8), "little") & 0x7FFF_FFFF_FFFF_FFFF
    draft = path.with_name(f".{path.name}.{os.getpid()}.new")
    fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        os.fchmod(fd, 0o600)
        # A page the tmpfs cannot give would kill the producer with SIGBUS in the middle of a packet.
        os.posix_fallocate(fd, 0, HEADER_SIZE + slots * SLOT_SIZE)
        os.pwrite(fd, b"".join(c.to_bytes(8, "little") for c in cells), 0)
        try:
            os.link(draft, path)
        except FileExistsError:
            return  # somebody was faster; theirs is used
    finally:
        os.close(fd)
        draft.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one read took: flow records and JSON events, each in the order they were written.

    `first` is the ring position of the first slot, `end` the one after the last. `damaged` counts slots that held
    neither (they are skipped).
    """

    records: NDArray[np.void]
    blobs: list[dict[str, Any]]
    first: int
    end: int
    damaged: int


class RingReader:
    """The consuming end: read, make durable, commit."""

    def __init__(self, path: Path) -> None:
        """Open the ring at `path`. Raises RingDamagedError, or OSError when there is no such file."""
        self.path = path
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            stat = os.fstat(fd)
            if stat.st_size < HEADER_SIZE:
                raise RingDamagedError(
                    f"{path} is too short for an event ring", "remove it and restart its producer"
                )
            self._map = mmap.mmap(fd, 0)
        finally:
            os.close(fd)
        self.file = (stat.st_dev, stat.st_ino)
        view = memoryview(self._map)
        self._cells = view[: _CELLS * 8].cast("Q")
        try:
            self.capacity = _check(self._cells, stat.st_size, path)
        except RingDamagedError:
            self._cells.release()
            view.release()
            self._map.close()
            raise
        self._mask = self.capacity - 1
        self._slots = np.frombuffer(view, dtype=np.uint8, offset=HEADER_SIZE).reshape(
            self.capacity, SLOT_SIZE
        )
        self._tail = int(self._cells[_TAIL])  # confirmed
        self._next = self._tail  # read
        self._seen = int(self._cells[_HEAD]) if _STRONG_ORDER else self._tail

    @classmethod
    def open(cls, path: Path) -> RingReader:
        """See the constructor."""
        return cls(path)

    @property
    def ring_id(self) -> int:
        """Random 63-bit id given when the ring was made: positions are unique within it."""
        return int(self._cells[_RING_ID])

    @property
    def position(self) -> int:
        """Position of the next slot to read."""
        return self._next

    @property
    def pending(self) -> int:
        """Slots written and not yet confirmed."""
        return max(0, int(self._cells[_HEAD]) - self._tail)

    @property
    def lost(self) -> int:
        """Events the producer dropped since the ring was made."""
        return int(self._cells[_LOST])

    @property
    def producer(self) -> tuple[int, int]:
        """Pid of the latest producer and when it opened the ring (UTC microseconds)."""
        return int(self._cells[_PID]), int(self._cells[_STARTED])

    def skip_to(self, position: int) -> None:
        """Everything before `position` is durable already (a reader died between durable and commit)."""
        if self._next < position <= int(self._cells[_HEAD]):
            self._next = position
            self.commit()

    def read(self, max_slots: int) -> Batch:
        """Up to about `max_slots` slots from where the last read ended (a blob is never cut), copied.

        Raises RingDamagedError when the counters became impossible.
        """
        head = int(self._cells[_HEAD])
        if not self._next <= head <= self._next + self.capacity:
            raise RingDamagedError(
                f"{self.path}: {head} slots written, {self._next} read", "restart its producer"
            )
        if not _STRONG_ORDER:
            head, self._seen = max(self._seen, self._next), head
        first = self._next
        count = min(head - first, max_slots)
        slots = self._take(first, count)
        batch = self._parse(slots, first, head)
        self._next = batch.end
        return batch

    def _take(self, position: int, count: int) -> NDArray[np.uint8]:
        at = position & self._mask
        straight = self._slots[at : at + count]
        if len(straight) == count:
            return straight.copy()
        return np.concatenate((straight, self._slots[: count - len(straight)]))

    def _parse(self, slots: NDArray[np.uint8], first: int, head: int) -> Batch:
        kinds = slots[:, 0]
        others = np.flatnonzero(kinds != Kind.FLOW)
        if not len(others):
            return Batch(slots.view(FLOW_DTYPE)[:, 0], [], first, first + len(slots), 0)
        flows = np.ones(len(slots), dtype=np.bool_)
        blobs: list[dict[str, Any]] = []
        damaged = 0
        after = 0  # index behind the last blob
        for index in others.tolist():
            if index < after:
                continue  # inside a blob
            size = 1
            if kinds[index] == Kind.BLOB:
                length = int.from_bytes(slots[index, 4:8].tobytes(), "little")
                want = slots_of(length)
                if 0 < length <= MAX_BLOB and want <= head - first - index:
                    size = want
                    beyond = index + size - len(slots)
                    body = slots[index : index + size].tobytes()
                    if beyond > 0:
                        body += self._take(first + len(slots), beyond).tobytes()
                    blob = _load(body[_BLOB_HEAD : _BLOB_HEAD + length])
                else:
                    blob = None
            else:
                blob = None
            if blob is None:
                damaged += size
            else:
                blobs.append(blob)
            after = index + size
            flows[index:after] = False
        records = slots[flows].view(FLOW_DTYPE)[:, 0]
        return Batch(records, blobs, first, first + max(after, len(slots)), damaged)

    def commit(self) -> None:
        """What was read so far is durable: give its slots back to the producer."""
        self._tail = self._next
        self._cells[_TAIL] = self._next

    def rewind(self) -> None:
        """Forget the reads since the last commit: they come again."""
        self._next = self._tail

    def close(self) -> None:
        """Let go of the file."""
        self._cells.release()
        del self._slots
        with contextlib.suppress(BufferError):  # a copy-less view still held: unmapped when that goes
            self._map.close()


def _load(text: bytes) -> dict[str, Any] | None:
    """A blob's JSON object, or None. NaN and the infinities, which JSON does not have, become text."""
    try:
        blob = json.loads(text, parse_constant=str)
    except (ValueError, RecursionError):
        return None
    return blob if isinstance(blob, dict) else None
