"""The cgroup v2 hierarchy: where it is mounted, ids and paths.

A cgroup's id, as sockets carry it (INET_DIAG_CGROUP_ID), is the inode number of its directory
(kernfs; kernel/cgroup/cgroup.c, cgroup_id). Hybrid layouts mount v2 at /sys/fs/cgroup/unified.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from sectool.errors import SectoolError

_CACHE_LIMIT = 16_384


@cache
def mount() -> Path:
    """Mount point of the cgroup v2 hierarchy in this mount namespace; SectoolError when there is none."""
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        left, _, right = line.partition(" - ")
        if right.startswith("cgroup2 "):
            words = left.split()
            # mountinfo escapes blanks and backslashes as octal (proc(5))
            return Path(words[4].encode().decode("unicode_escape"))
    raise SectoolError(
        "no cgroup v2 hierarchy is mounted",
        "mount one: mount -t cgroup2 none /sys/fs/cgroup (systemd does this on current distributions)",
    )


class Paths:
    """Finds the path of a cgroup by its id, through a bounded memory and a walk through the tree on a miss."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or mount()
        self._known: dict[int, str] = {}

    def path(self, number: int) -> str | None:
        """Path below the mount, starting with '/', or None when no such cgroup exists now."""
        known = self._known.get(number)
        if known is not None and self._is(known, number):
            return known
        if self._is("/", number):
            return "/"
        if len(self._known) > _CACHE_LIMIT:
            self._known.clear()
        self._walk(self.root, "")
        found = self._known.get(number)
        return found if found is not None and self._is(found, number) else None

    def directory(self, path: str) -> Path:
        """The directory of a path that `path` gave."""
        return self.root / path.lstrip("/")

    def _is(self, path: str, number: int) -> bool:
        try:
            return os.stat(f"{self.root}{path}").st_ino == number  # noqa: PTH116 (on the connection path)
        except OSError:
            return False

    def _walk(self, folder: Path, path: str) -> None:
        try:
            with os.scandir(folder) as entries:
                below = [(e.name, e.inode()) for e in entries if e.is_dir(follow_symlinks=False)]
        except OSError:
            return
        for name, inode in below:
            self._known[inode] = f"{path}/{name}"
        for name, _ in below:
            self._walk(folder / name, f"{path}/{name}")
