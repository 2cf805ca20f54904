"""The worker's own memory in large pages: fewer translations to look up on the way of every packet.

What a packet touches lies scattered over the interpreter's heap, and the kernel's own work in between pushes it out of
the translation caches; under a hypervisor each lookup walks two tables. After the start, when all code and tables are
there, the heap is asked to be collapsed into 2 MiB pages (madvise(2), MADV_COLLAPSE, Linux 6.1). Measured with
connections one by one: a tenth of the packet path's time. Where the kernel cannot, nothing changes.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Final

_HUGEPAGE, _COLLAPSE = 14, 25  # MADV_*
_SIZE: Final = 2 << 20
_MOST: Final = 16 << 20  # a larger mapping may be mostly unused, and would be filled
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) rw-p [0-9a-f]+ 00:00 0\s*(\[heap\])?\n")
_libc = ctypes.CDLL(None)


def collapse(maps: Path = Path("/proc/self/maps")) -> int:
    """Ask for it; how many bytes lie in large pages for it. Takes some milliseconds. Never raises."""
    done = 0
    try:
        text = maps.read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    for found in _MAPPING.finditer(text):
        begin, end = -(-int(found[1], 16) // _SIZE) * _SIZE, int(found[2], 16) // _SIZE * _SIZE
        if begin >= end or (end - begin > _MOST and not found[3]):
            continue
        where, size = ctypes.c_void_p(begin), ctypes.c_size_t(end - begin)
        if not _libc.madvise(where, size, _HUGEPAGE) and not _libc.madvise(where, size, _COLLAPSE):
            done += end - begin
    return done
