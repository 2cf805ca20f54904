"""Live flows and the keys of encrypted ones in a root-only tmpfs file, so that a restarted worker goes on with them.

Fixed slots in a shared mapping (nfq.journalslot; stores to memory, no system calls), and beside it a file with the
identities that slots refer to (nfq.journalnames). One worker writes a journal; who takes over waits for its lock.

Keys are in memory only: the file must lie on tmpfs or ramfs, is kept from being swapped out while a worker has it, and
a slot's keys are overwritten when its flow ends. A worker takes flows over from journals of other numbers so:

    state copied into a slot of its own, not valid yet ─► the old slot cleared ─► the new one made valid

so that no two workers, in whatever order they die, ever go on with the same counters.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from nfq.flow import Flow
from nfq.journalnames import JournalNames, read
from nfq.journalslot import (
    FREE,
    SIZE,
    SIZE_1,
    STATE_AT,
    Memory,
    convert,
    flow_of,
    key_of,
    note_state,
    references,
    used_as,
    write,
)
from nfq.recordstate import STATE_SIZE
from nfq.tmpfs import in_memory, keep_from_swap
from sectool.errors import SectoolError

SLOTS: Final = 65_536

_HEADER: Final = 64
_MAGIC: Final = b"sectool flows 2\n"
_MAGIC_1: Final = b"sectool flows 1\n"
_LAYOUT = struct.Struct("<16sII")  # magic, slots, bytes of a slot

Mine = Callable[[bytes], bool]  # flow key -> whether this worker is to have the flow


def _everything(_key: bytes) -> bool:
    return True


class Journal:
    """Slots by number; a flow keeps its slot while it lives. When all are taken, flows go without (`skipped`)."""

    def __init__(self, path: Path, slots: int = SLOTS) -> None:
        """Open or make the file. Raises SectoolError: no room, not in memory, or another worker has it."""
        self.path = path
        self.skipped = 0
        self.forgotten = 0  # used slots that could not be understood
        self.foreign = False  # the file was of a format that this version does not know, and is made anew
        self._fd = _open(path)
        try:
            self.slots = self._prepare(slots)
            self._map = mmap.mmap(self._fd, _HEADER + self.slots * SIZE)
        except BaseException:
            os.close(self._fd)
            raise
        self.locked = keep_from_swap(self._map)
        self._view = memoryview(self._map)
        self._used = np.frombuffer(self._map, np.uint8, self.slots * SIZE, _HEADER).reshape(-1, SIZE)[:, 0]
        self._clear_torn()
        self._free = [int(i) for i in np.flatnonzero(self._used == FREE)[::-1]]
        self._names = JournalNames(_beside(path), self._needed)

    def _prepare(self, slots: int) -> int:
        """Give the file today's layout, keeping what it holds; how many slots it has."""
        head = os.pread(self._fd, _LAYOUT.size, 0)
        magic, had, size = _LAYOUT.unpack(head) if len(head) == _LAYOUT.size else (b"", 0, 0)
        there = os.fstat(self._fd).st_size
        if magic == _MAGIC and size == SIZE and had > 0 and there == _HEADER + had * SIZE:
            return int(had)
        before = [] if magic != _MAGIC_1 else _slots_of_1(self._fd)
        self.foreign = magic not in (_MAGIC_1, b"", bytes(16))
        slots = max(slots, len(before))
        os.ftruncate(self._fd, 0)
        try:
            # A full tmpfs must be an error now, not a signal later.
            os.posix_fallocate(self._fd, 0, _HEADER + slots * SIZE)
        except OSError as e:
            raise SectoolError(
                f"cannot make the flow journal {self.path}: {e.strerror}",
                f"make room for {(_HEADER + slots * SIZE) >> 20} MiB on the tmpfs it is on",
            ) from e
        for number, slot in enumerate(before):
            os.pwrite(self._fd, slot, _HEADER + number * SIZE)
        os.pwrite(self._fd, _LAYOUT.pack(_MAGIC, slots, SIZE), 0)
        return slots

    def _clear_torn(self) -> None:
        """Overwrite keys in slots that are not used: a crash came between clearing a slot and its keys."""
        all_of = np.frombuffer(self._map, np.uint8, self.slots * SIZE, _HEADER).reshape(-1, SIZE)
        states = all_of[:, STATE_AT:]
        torn = (self._used == FREE) & states.any(axis=1)
        states[torn] = 0

    def _slot(self, number: int) -> memoryview:
        at = _HEADER + number * SIZE
        return self._view[at : at + SIZE]

    # -- while the worker lives ------------------------------------------------------------------------------------

    def add(self, flow: Flow) -> None:
        """Write the flow into a free slot; if it has one already, note how far it is."""
        if flow.journal_slot >= 0:
            note_state(flow, self._slot(flow.journal_slot))
            return
        if not self._free:
            self.skipped += 1
            return
        try:
            peer = self._refer(flow)
        except OSError:  # no room for the identity: without it the slot would mean nothing
            self.skipped += 1
            return
        number = self._free.pop()
        slot = self._slot(number)
        write(flow, peer, slot)
        slot[0] = used_as(flow)  # last: a slot torn by a crash stays unused
        flow.journal_slot = number

    def _refer(self, flow: Flow) -> int:
        """Have everybody written down whom the flow's slot will refer to; the number of its peer."""
        self._names.identity(flow.local.identity if flow.local else None)
        peer = flow.peer_local.identity if flow.peer_local is not None else flow.peer
        if peer is not None or flow.request is None:
            return self._names.identity(peer)
        return self._names.names(flow.request.source.names or flow.request.destination.names)

    def state(self, flow: Flow) -> memoryview | None:
        """Where the state of the flow's records is kept (STATE_SIZE bytes); None: it has no slot."""
        if flow.journal_slot < 0:
            return None
        return self._slot(flow.journal_slot)[STATE_AT : STATE_AT + STATE_SIZE]

    def remove(self, flow: Flow) -> None:
        """Free the flow's slot, if it has one, and overwrite its keys."""
        if flow.journal_slot >= 0:
            _clear(self._slot(flow.journal_slot))
            self._free.append(flow.journal_slot)
            flow.journal_slot = -1

    def _needed(self) -> set[int]:
        used = np.flatnonzero(self._used != FREE)
        return {number for i in used for number in references(self._slot(int(i)))}

    # -- after the worker before -----------------------------------------------------------------------------------

    def restore(self, mine: Mine = _everything, others: Sequence[Path] = ()) -> Iterator[Flow]:
        """Flows left by the worker before, as far as they are `mine`; and mine out of the journals `others`.

        A slot that cannot be understood is freed and counted. One that is not mine stays for the worker whose it is.
        """
        memory = self._names.load()
        for number in np.flatnonzero(self._used != FREE):
            slot = self._slot(int(number))
            if not mine(key_of(slot)):
                continue
            flow = self._flow(slot, memory)
            if flow is None:
                self._free.append(int(number))
                continue
            flow.journal_slot = int(number)
            yield flow
        for path in others:
            if path != self.path:
                yield from self._take_from(path, mine)
        with contextlib.suppress(OSError):
            self._names.compact()

    def _flow(self, slot: memoryview, memory: Memory) -> Flow | None:
        try:
            return flow_of(slot, memory)
        except (KeyError, ValueError):
            _clear(slot)
            self.forgotten += 1
            return None

    def _take_from(self, path: Path, mine: Mine) -> Iterator[Flow]:
        """Move my flows out of another worker's journal; that worker may be alive, and leaves them alone."""
        with contextlib.ExitStack() as stack:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
                stack.callback(os.close, fd)
                magic, slots, size = _LAYOUT.unpack(os.pread(fd, _LAYOUT.size, 0))
                if magic != _MAGIC or size != SIZE or os.fstat(fd).st_size != _HEADER + slots * SIZE:
                    return
                theirs = stack.enter_context(mmap.mmap(fd, _HEADER + slots * SIZE))
            except (OSError, struct.error, ValueError):
                return  # it has just been made, or has gone
            used = np.frombuffer(theirs, np.uint8, slots * SIZE, _HEADER).reshape(-1, SIZE)[:, 0]
            numbers = [int(number) for number in np.flatnonzero(used != FREE)]
            del used
            memory: Memory | None = None
            with memoryview(theirs) as view:
                for number in numbers:
                    at = _HEADER + number * SIZE
                    with view[at : at + SIZE] as slot:
                        if slot[0] == FREE or not mine(key_of(slot)):
                            continue
                        memory = memory or read(_beside(path))
                        flow = self._move(slot, memory)
                    if flow is not None:
                        yield flow

    def _move(self, theirs: memoryview, memory: Memory) -> Flow | None:
        if not self._free:
            self.skipped += 1
            return None
        number = self._free.pop()
        slot, used = self._slot(number), theirs[0]
        slot[1:] = theirs[1:]
        try:
            for reference in references(slot):
                self._names.identity(memory.identities.get(reference))
                self._names.names(memory.names.get(reference, frozenset()))
        except OSError:
            self._free.append(number)
            self.skipped += 1
            return None
        _clear(theirs)
        slot[0] = used
        flow = self._flow(slot, memory)
        if flow is None:
            self._free.append(number)
        else:
            flow.journal_slot = number
        return flow

    def close(self) -> None:
        """Let go of the file, which stays. (Records that still keep their state in it hold the mapping.)"""
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        os.close(self._fd)
        self._names.close()
        del self._used
        with contextlib.suppress(BufferError):
            self._view.release()
            self._map.close()


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".identities")


def _open(path: Path) -> int:
    """The journal's file, ours alone and in memory."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as e:
        raise SectoolError(f"cannot open the flow journal {path}: {e.strerror}", "run as root") from e
    try:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid():
            raise SectoolError(f"the flow journal {path} belongs to somebody else", "remove it")
        os.fchmod(fd, 0o600)
        if not in_memory(path):
            raise SectoolError(
                f"{path} would put keys on a disk: it does not lie on tmpfs",
                "put the run folder on a tmpfs (--run), or mount one there",
            )
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SectoolError(
                f"the flow journal {path} is in use by another packet worker", "stop that one first"
            ) from None
    except BaseException:
        os.close(fd)
        raise
    return fd


def _clear(slot: memoryview) -> None:
    """Free a slot; its keys go."""
    slot[0] = FREE
    slot[1:] = bytes(SIZE - 1)


def _slots_of_1(fd: int) -> list[bytes]:
    """The used slots of a journal of the first format, as today's."""
    data = memoryview(os.pread(fd, os.fstat(fd).st_size, 0))
    out = []
    for at in range(_HEADER, len(data) - SIZE_1 + 1, SIZE_1):
        if data[at]:
            slot = bytearray(SIZE)
            convert(data[at : at + SIZE_1], memoryview(slot))
            out.append(bytes(slot))
    return out
