"""Keys and certificates on disk: written atomically; secrets readable by their owner only, or refused."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from sectool.errors import PrivilegeError, SectoolError, UsageError

MAX_FILE = 1 << 20  # bytes of any file this package reads


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _explain(error: OSError, path: Path, doing: str) -> SectoolError:
    if isinstance(error, PermissionError):
        return PrivilegeError(
            f"no permission to {doing} {path}", "run the command as root, or as the owner of the file"
        )
    return SectoolError(f"cannot {doing} {path}: {error.strerror or error}", "check the path and the disk")


def write_atomic(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace `path` by `data`: readers see the old or the new file; the new one survives a power cut."""
    try:
        fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(fd, "wb") as out:
                os.fchmod(fd, mode)
                out.write(data)
                out.flush()
                os.fsync(fd)
            os.replace(name, path)  # noqa: PTH105 - the name comes from mkstemp
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)  # noqa: PTH108
            raise
        _sync_directory(path.parent)
    except OSError as error:
        raise _explain(error, path, "write") from None


def read_file(path: Path, missing: str, hint: str, *, secret: bool = False) -> bytes:
    """The content of a regular file of at most MAX_FILE bytes.

    A missing file raises UsageError with the message and hint given. A `secret` that its group or others can
    read or write, or that belongs to somebody else than us or root, is refused: it must be taken for stolen.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not hang us
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(f"{missing}: {path} does not exist", hint) from None
    except OSError as error:
        raise _explain(error, path, "read") from None
    info = os.fstat(fd)
    if not stat.S_ISREG(info.st_mode):
        os.close(fd)
        raise SectoolError(f"{path} is not a regular file", "check the path")
    with os.fdopen(fd, "rb") as file:
        if secret and info.st_mode & 0o077:
            raise SectoolError(
                f"{path} holds a private key but its mode is {stat.S_IMODE(info.st_mode):04o}",
                f"others may have read it: make a new key; if that is impossible, run: chmod 600 {path}",
            )
        if secret and info.st_uid not in (0, os.geteuid()):
            raise SectoolError(
                f"{path} holds a private key but belongs to user {info.st_uid}", f"run: chown root {path}"
            )
        data = file.read(MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise SectoolError(f"{path} is larger than {MAX_FILE} bytes", "check the path")
    return data


@contextlib.contextmanager
def new_directory(path: Path, exists: str, hint: str, *, force: bool = False) -> Iterator[Path]:
    """Fill a directory all or nothing: yields a private temporary one that becomes `path` (0700) at the end.

    An existing `path` raises UsageError with the message and hint given, unless `force`: then the old
    directory is removed once the new one stands.
    """
    try:
        if path.exists() and not force:
            raise UsageError(f"{exists}: {path} exists", hint)
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise _explain(error, path, "create") from None
    try:
        yield fresh
        try:
            _sync_directory(fresh)
            old: Path | None = None
            if force and path.exists():
                old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
                path.rename(old / path.name)
            fresh.rename(path)
            _sync_directory(path.parent)
            if old is not None:
                shutil.rmtree(old)
        except OSError as error:
            raise _explain(error, path, "create") from None
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
