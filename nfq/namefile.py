"""Names of addresses in a tmpfs file: written by one worker, followed by the others, found again by its successor.

An answer reaches one worker, and the connection it leads to may be another's within a microsecond. So the entry is in
shared memory before the answer's verdict is given: no message has to arrive first. The file holds fixed slots and a
ring of the numbers of those changed last; a follower reads what changed since it last looked, everything if it missed
some. Each slot has a checksum: one torn by a crash, or by being read while it is written, counts as not there.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final, NamedTuple

from sectool.errors import SectoolError

_MAGIC: Final = b"sectool names 1\n"
_HEAD: Final = struct.Struct("<Q")  # changes so far
_HEAD_AT: Final = 16
_RING_AT: Final = 64
_RING: Final = 4096  # changes remembered
_NUMBER: Final = struct.Struct("<I")
_SLOTS_AT: Final = _RING_AT + _RING * 4
# checksum of the rest; expiry, address length, resolver length, name length; address, resolver, name
_SLOT: Final = struct.Struct("<IqBBBx16s16s253s")
_SIZE: Final = 304
LIMIT_NAME: Final = 253  # characters

assert _SLOT.size <= _SIZE


class Entry(NamedTuple):
    """`name` has `address` (4 or 16 bytes) until `expires_us`, says `resolver` (b'' for a file of this host)."""

    name: str
    address: bytes
    expires_us: int
    resolver: bytes


def path_of(run: Path, worker: int) -> Path:
    """Where a worker's file is."""
    return run / f"names-worker-{worker}"


class NameFile:
    """The slots of one worker's file. One writer, any number of readers."""

    def __init__(self, path: Path, mapped: mmap.mmap, slots: int, inode: int) -> None:
        """See `create` and `open`."""
        self.path = path
        self._map = mapped
        self.slots = slots
        self.inode = inode  # another one under the same path: the file was made anew

    @classmethod
    def create(cls, path: Path, slots: int) -> NameFile:
        """For its writer: the file that is there, or a new one in its place. Raises SectoolError."""
        size = _SLOTS_AT + slots * _SIZE
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(fd).st_size not in (0, size) or os.pread(fd, len(_MAGIC), 0) not in (b"", _MAGIC):
                # Of another version: whoever reads it goes on with what it was.
                path.unlink()
                os.close(fd)
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            os.posix_fallocate(fd, 0, size)  # a full tmpfs must be an error now, not a signal later
            mapped = mmap.mmap(fd, size)
            inode = os.fstat(fd).st_ino
        except OSError as e:
            raise SectoolError(f"cannot make {path}: {e.strerror}", "make room in the run folder") from e
        finally:
            os.close(fd)
        mapped[: len(_MAGIC)] = _MAGIC
        return cls(path, mapped, slots, inode)

    @classmethod
    def open(cls, path: Path) -> NameFile | None:
        """For a reader; None while there is no such file."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            status = os.fstat(fd)
            slots, odd = divmod(status.st_size - _SLOTS_AT, _SIZE)
            if slots < 1 or odd or os.pread(fd, len(_MAGIC), 0) != _MAGIC:
                return None
            return cls(path, mmap.mmap(fd, status.st_size, prot=mmap.PROT_READ), slots, status.st_ino)
        except OSError:
            return None
        finally:
            os.close(fd)

    @property
    def changes(self) -> int:
        """How many changes there were so far."""
        return int(_HEAD.unpack_from(self._map, _HEAD_AT)[0])

    def changed(self, since: int) -> tuple[int, Iterable[int]]:
        """The number of changes now, and the slots that those after `since` were made to."""
        now = self.changes
        if not 0 <= now - since < _RING:  # some are overwritten; or the count began anew
            return now, range(self.slots)
        slots = {_NUMBER.unpack_from(self._map, _RING_AT + (n % _RING) * 4)[0] for n in range(since, now)}
        return now, [slot for slot in slots if slot < self.slots]

    def write(self, slot: int, entry: Entry | None) -> None:
        """Set or clear a slot."""
        at = _SLOTS_AT + slot * _SIZE
        if entry is None:
            self._map[at : at + 16] = bytes(16)
        else:
            name = entry.name.encode("ascii")
            if len(name) > LIMIT_NAME:
                return
            _SLOT.pack_into(
                self._map,
                at,
                0,
                entry.expires_us,
                len(entry.address),
                len(entry.resolver),
                len(name),
                entry.address,
                entry.resolver,
                name,
            )
            _NUMBER.pack_into(self._map, at, self._checksum(at))
        changes = self.changes
        _NUMBER.pack_into(self._map, _RING_AT + (changes % _RING) * 4, slot)
        _HEAD.pack_into(self._map, _HEAD_AT, changes + 1)  # last: what it counts is there

    def read(self, slot: int) -> Entry | None:
        """What a slot holds; None when it is empty or torn."""
        at = _SLOTS_AT + slot * _SIZE
        total, expires, here, there, n, address, resolver, name = _SLOT.unpack_from(self._map, at)
        if not here or total != self._checksum(at) or here not in (4, 16) or there not in (0, 4, 16):
            return None
        try:
            return Entry(name[:n].decode("ascii"), address[:here], expires, resolver[:there])
        except UnicodeDecodeError:
            return None

    def _checksum(self, at: int) -> int:
        return zlib.crc32(self._map[at + 4 : at + _SLOT.size])

    def close(self) -> None:
        """Unmap; the file stays."""
        self._map.close()
