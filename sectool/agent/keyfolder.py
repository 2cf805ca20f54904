"""Where the packet workers' journals lie. They hold keys, so it is memory and never a disk, and root's alone.

The run folder, if it is on a tmpfs, as /run is on most systems. Elsewhere (some containers) a folder of our own below
/dev/shm, named after the run folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from nfq.tmpfs import in_memory
from sectool.errors import SectoolError

SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108  (see _ours)
PREFIX: Final = "sectool-"
JOURNALS: Final = "flows-worker-*"
_OWNER: Final = "run-folder"  # a file that says whose folder it is


def _substitute(run: Path) -> Path:
    return SHARED_MEMORY / (PREFIX + hashlib.sha256(os.fsencode(run)).hexdigest()[:16])


def key_folder(run: Path) -> Path:
    """The folder, made if need be. Raises SectoolError when there is no memory to put it in."""
    if in_memory(run):
        return run
    sweep()
    if not SHARED_MEMORY.is_dir() or not in_memory(SHARED_MEMORY):
        raise SectoolError(
            f"{run} is on a disk, and keys of connections must not get there",
            f"mount a tmpfs there (mount -t tmpfs -o mode=0755 tmpfs {run}), or choose a run folder on one with --run",
        )
    folder = _substitute(run)
    if not _ours(folder):
        with contextlib.suppress(
            FileNotFoundError
        ):  # anybody may make files here: not to be trusted, nor in the way
            folder.rename(folder.with_name(f"{folder.name}.not-ours-{os.getpid()}"))
        folder.mkdir(mode=0o700)
        (folder / _OWNER).write_bytes(os.fsencode(run))
    for journal in run.glob(JOURNALS):  # of a version that kept them there: without keys
        shutil.move(journal, folder / journal.name)
    return folder


def _ours(folder: Path) -> bool:
    try:
        about = folder.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid() and not about.st_mode & 0o077


def journals(run: Path) -> list[Path]:
    """All journals there are, of whatever worker."""
    folders = [run, _substitute(run)]
    return sorted(
        path
        for folder in folders
        if folder == run or _ours(folder)
        for path in folder.glob(JOURNALS)
        if not path.name.endswith((".identities", ".new"))
    )


def remove(run: Path) -> list[str]:
    """Remove the journals of a run folder; their names."""
    folder = _substitute(run)
    removed = []
    for path in (p for place in (run, folder) if place == run or _ours(place) for p in place.glob(JOURNALS)):
        with contextlib.suppress(OSError):
            path.unlink()
            removed.append(path.name)
    if _ours(folder):
        shutil.rmtree(folder, ignore_errors=True)
    return removed


def sweep() -> None:
    """Remove what daemons left whose run folder is gone."""
    for folder in _left():
        shutil.rmtree(folder, ignore_errors=True)


def _left() -> Iterator[Path]:
    for folder in SHARED_MEMORY.glob(PREFIX + "*"):
        if _ours(folder):
            with contextlib.suppress(OSError):
                if not Path(os.fsdecode((folder / _OWNER).read_bytes())).is_dir():
                    yield folder
