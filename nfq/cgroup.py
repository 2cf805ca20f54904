"""cgroup v2: where it is mounted, and ids to paths.

A cgroup's id is its directory's inode number and also the 8 bytes of its file handle, so the kernel itself turns an id
into a directory (open_by_handle_at(2), handle type FILEID_KERNFS; fs/kernfs/mount.c).
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Final

from sectool.errors import SectoolError

_FILEID_KERNFS: Final = 0xFE
_CACHE_LIMIT: Final = 4096
_libc = ctypes.CDLL(None, use_errno=True)


def mount(mountinfo: Path = Path("/proc/self/mountinfo")) -> Path:
    """Where cgroup v2 is mounted: /sys/fs/cgroup, /sys/fs/cgroup/unified (hybrid) or elsewhere; or SectoolError."""
    try:
        lines = mountinfo.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as e:
        raise SectoolError(f"cannot read {mountinfo}: {e.strerror}") from None
    found = []
    for line in lines:
        # id parent major:minor root point options [optional...] - type source options (proc_pid_mountinfo(5))
        before, _, after = line.partition(" - ")
        fields = before.split(" ")
        if after.startswith("cgroup2 ") and len(fields) >= 5:
            found.append((fields[3], Path(_unescape(fields[4]))))
    # A mount of the whole hierarchy is worth more than one of a part of it.
    for _, point in sorted(found, key=lambda item: item[0] != "/"):
        if (point / "cgroup.procs").exists():
            return point
    raise SectoolError(
        "cgroup v2 is not mounted",
        "current distributions mount it at /sys/fs/cgroup; otherwise: mount -t cgroup2 none /sys/fs/cgroup/unified",
    )


def _unescape(text: str) -> str:
    for code, char in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, char)
    return text


class Cgroups:
    """Paths of cgroups by id, cached; `path` of one that is gone is None."""

    def __init__(self, point: Path | None = None) -> None:
        self.mount = mount() if point is None else point
        self._fd = os.open(self.mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._by_handle = True
        self._paths: OrderedDict[int, str] = OrderedDict()

    def close(self) -> None:
        """Let go of the mount."""
        os.close(self._fd)

    def id_of(self, path: str) -> int:
        """Id of the cgroup at a path below the mount (`/` is the root). Raises SectoolError when it does not exist."""
        try:
            return (self.mount / path.lstrip("/")).stat().st_ino
        except OSError as e:
            raise SectoolError(f"no cgroup {path}: {e.strerror}") from None

    def folder(self, cgroup_id: int) -> Path | None:
        """Directory of a cgroup; None when it is gone."""
        path = self.path(cgroup_id)
        return None if path is None else self.mount / path.lstrip("/")

    def path(self, cgroup_id: int) -> str | None:
        """Path below the mount, beginning with `/`; None when there is no such cgroup (any more)."""
        known = self._paths.get(cgroup_id)
        if known is not None and self._is(known, cgroup_id):
            return known
        found = self._find(cgroup_id)
        if found is None:
            self._paths.pop(cgroup_id, None)
            return None
        self._paths[cgroup_id] = found
        self._paths.move_to_end(cgroup_id)
        if len(self._paths) > _CACHE_LIMIT:
            self._paths.popitem(last=False)
        return found

    def _is(self, path: str, cgroup_id: int) -> bool:
        try:
            return os.stat(path.lstrip("/") or ".", dir_fd=self._fd).st_ino == cgroup_id
        except OSError:
            return False

    def _find(self, cgroup_id: int) -> str | None:
        if self._by_handle:
            handle = ctypes.create_string_buffer(struct.pack("=IiQ", 8, _FILEID_KERNFS, cgroup_id), 16)
            fd = _libc.open_by_handle_at(self._fd, handle, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            if fd >= 0:
                try:
                    whole = os.readlink(f"/proc/self/fd/{fd}")  # noqa: PTH115 (bytes of a path that may be gone)
                finally:
                    os.close(fd)
                base = str(self.mount).rstrip("/")
                if whole != base and not whole.startswith(base + "/"):
                    return None  # gone (` (deleted)`), or outside what is mounted here
                path = whole[len(base) :] or "/"
                return path if self._is(path, cgroup_id) else None
            if ctypes.get_errno() not in (1, 13, 38, 95):  # not permitted, no such call: then search
                return None
            self._by_handle = False
        for folder, _, _ in os.walk(self.mount):
            relative = "/" + os.path.relpath(folder, self.mount) if folder != str(self.mount) else "/"
            if self._is(relative, cgroup_id):
                return relative
        return None


def of_process(pid: int | str = "self") -> str | None:
    """cgroup v2 path of a process; None when it has gone or there is no such hierarchy."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    return next((line[3:] for line in lines if line.startswith("0::")), None)


def create(path: str, point: Path | None = None) -> Path:
    """Make the cgroup (and those above it) at a path below the mount; fine when it exists. Raises SectoolError."""
    folder = (mount() if point is None else point) / path.strip("/")
    if ".." in folder.parts:
        raise SectoolError(f"{path!r} is no cgroup path")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise SectoolError(
            f"cannot make cgroup {folder}: {e.strerror}", "run as root, with cgroup v2 writable"
        ) from None
    return folder


def remove(folder: Path) -> bool:
    """Remove an empty cgroup. False when processes or cgroups are still in it; True when it is gone."""
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def join(folder: Path, pid: int) -> None:
    """Move a process (all its threads) into a cgroup. Raises SectoolError."""
    try:
        (folder / "cgroup.procs").write_text(str(pid), encoding="ascii")
    except OSError as e:
        raise SectoolError(f"cannot move process {pid} into {folder}: {e.strerror}") from None
