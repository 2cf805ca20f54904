"""Files that are memory: where keys may be written without reaching a disk, and kept from being swapped out."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path
from typing import Final

_MAGICS: Final = (0x01021994, 0x858458F6)  # tmpfs, ramfs (include/uapi/linux/magic.h)
_STATFS_BYTES: Final = 512  # struct statfs has 120 or so; its first long is f_type

_libc = ctypes.CDLL(None, use_errno=True)


def in_memory(path: Path) -> bool:
    """Whether a file or folder lies on tmpfs or ramfs. Raises OSError."""
    said = ctypes.create_string_buffer(_STATFS_BYTES)
    if _libc.statfs(os.fsencode(path), said):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(path))
    return ctypes.c_ulong.from_buffer(said).value & 0xFFFFFFFF in _MAGICS


def keep_from_swap(mapped: mmap.mmap) -> bool:
    """mlock(2) a mapping: as long as this process has it, its pages are not swapped out. False when not permitted."""
    first = ctypes.c_char.from_buffer(mapped)
    return not _libc.mlock(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(len(mapped)))
