"""A file that a command writes its result to: whole or not there, for its owner alone, never over another unasked."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sectool.errors import PrivilegeError, SectoolError, UsageError


def check_target(path: Path, *, force: bool) -> None:
    """Raise UsageError when `path` may not be written: something is there, or (with `force`) no regular file."""
    try:
        there = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        there = None
    except OSError as error:
        raise _explained(error, path) from None
    if there is not None and not stat.S_ISREG(there.st_mode):
        raise UsageError(f"{path} is not a regular file", "name a file that may be made anew")
    if there is not None and not force:
        raise UsageError(f"{path} exists", "--force writes over it")
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent}", "make it first, or name another file")


@contextlib.contextmanager
def new_file(path: Path, *, force: bool) -> Iterator[IO[bytes]]:
    """Write to what becomes `path` (mode 0600) at the end, if nothing failed until then.

    Raises UsageError as `check_target` does, PrivilegeError, SectoolError for a full disk and the like.
    """
    check_target(path, force=force)
    try:
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:200]}.")
    except OSError as error:
        raise _explained(error, path) from None
    draft = Path(name)
    try:
        with os.fdopen(fd, "wb") as out:
            yield out
            out.flush()
            os.fsync(fd)
        check_target(path, force=force)
        if force:
            draft.replace(path)
        else:
            _place(draft, path)
    except OSError as error:
        raise _explained(error, path) from None
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def _place(draft: Path, path: Path) -> None:
    """Give `draft` its name, which nothing may bear yet."""
    try:
        path.hardlink_to(draft)
    except FileExistsError:
        raise UsageError(f"{path} exists", "--force writes over it") from None
    except OSError:  # a file system without hard links
        draft.replace(path)


def _explained(error: OSError, path: Path) -> SectoolError:
    if isinstance(error, PermissionError):
        return PrivilegeError(f"no permission to write {path}", "name a file in a folder of your own")
    return SectoolError(f"cannot write {path}: {error.strerror or error}", "is there room on the disk?")
