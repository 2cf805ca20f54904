"""Programs started by `sectool run`: one cgroup each, known again after the daemon restarts."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from sectool.errors import SectoolError, UsageError
from sectool.labels import LabelError, LabelSet

log = logging.getLogger("sectool.agent")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class Program:
    """A registered cgroup. `cgroup` is its path below the cgroup v2 mount, `cgroup_id` the inode the kernel attests."""

    name: str
    labels: dict[str, str]
    cgroup: str
    cgroup_id: int
    uid: int  # who registered it


def write_atomically(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace `path` by `text` so that a crash leaves the old or the new file, never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


class Programs:
    """The registry. `root` is the folder of this daemon's own cgroups, `mount` the cgroup v2 mount it is on."""

    def __init__(self, root: Path, mount: Path, record: Path, ended: Callable[[Program], None]) -> None:
        self.root = root
        self.mount = mount
        self.by_id: dict[int, Program] = {}
        self._record = record
        self._ended = ended

    def load(self) -> None:
        """Take up what an earlier daemon registered and is still there."""
        try:
            rows = json.loads(self._record.read_text(encoding="utf-8"))
            known = [Program(**row) for row in rows]
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError) as error:
            log.error("%s is unreadable (%s); programs started before lose their labels", self._record, error)
            return
        for program in known:
            folder = self._folder(program)
            with contextlib.suppress(OSError):
                if folder.stat().st_ino == program.cgroup_id:
                    self.by_id[program.cgroup_id] = program

    def register(self, name: str | None, labels: dict[str, str], uid: int, pid: int) -> Program:
        """Make a cgroup for `labels` and move process `pid` into it.

        Raises UsageError for a bad name or label, SectoolError when the cgroup cannot be made.
        """
        try:
            checked = LabelSet(labels)
        except LabelError as error:
            raise UsageError(str(error)) from None
        if name is not None and not _NAME.fullmatch(name):
            raise UsageError(f"{name!r} is no name: letters, digits and . _ - inside, at most 63 characters")
        name = name or checked.get("app") or "program"
        leaf = f"{re.sub(r'[^A-Za-z0-9._-]', '-', name)}-{secrets.token_hex(4)}"
        folder = self.root / leaf
        try:
            folder.mkdir(parents=True)
            identity = folder.stat().st_ino
            (folder / "cgroup.procs").write_text(str(pid), encoding="ascii")
        except OSError as error:
            with contextlib.suppress(OSError):
                folder.rmdir()
            raise SectoolError(
                f"cannot make cgroup {folder}: {error.strerror}",
                "sectool needs a writable cgroup v2 hierarchy (mounted at /sys/fs/cgroup or /sys/fs/cgroup/unified)",
            ) from None
        program = Program(name, dict(checked), "/" + str(folder.relative_to(self.mount)), identity, uid)
        self.by_id[identity] = program
        self._save()
        return program

    def sweep(self) -> None:
        """Forget programs whose last process has gone, and remove their cgroups."""
        gone = [p for p in self.by_id.values() if not self._populated(p)]
        for program in gone:
            with contextlib.suppress(OSError):
                self._folder(program).rmdir()
            del self.by_id[program.cgroup_id]
            self._ended(program)
        if gone:
            self._save()

    def remove_empty(self) -> None:
        """At `down`: remove every cgroup of ours that no process is in. Programs still running keep theirs."""
        self.sweep()
        remove_empty_cgroups(self.root)

    def _folder(self, program: Program) -> Path:
        return self.mount / program.cgroup.lstrip("/")

    def _populated(self, program: Program) -> bool:
        try:
            events = (self._folder(program) / "cgroup.events").read_text(encoding="ascii")
        except OSError:
            return False
        return "populated 1" in events

    def _save(self) -> None:
        rows = json.dumps([asdict(p) for p in self.by_id.values()], indent=1)
        try:
            write_atomically(self._record, rows)
        except OSError as error:
            log.error(
                "cannot write %s: %s; a restarted daemon will not know these programs", self._record, error
            )


def remove_empty_cgroups(root: Path) -> None:
    """Remove `root` and the cgroups directly in it, as far as no process is in them."""
    with contextlib.suppress(OSError):
        for folder in [f for f in root.iterdir() if f.is_dir()]:
            with contextlib.suppress(OSError):
                folder.rmdir()
        root.rmdir()
