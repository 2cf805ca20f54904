"""Programs started by `sectool run`: one cgroup each, known again after the daemon restarts.

The cgroup is made inside the one the caller is in: whoever limits, lists or ends the caller's cgroup (a systemd
unit, a login session, the lab) still reaches the program. Its inode number is what the kernel attests of sockets.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from sectool.errors import SectoolError, UsageError
from sectool.identity.files import write_atomic
from sectool.identity.workload import path_segment
from sectool.labels import LabelError, LabelSet

log = logging.getLogger("sectool.agent")

MAX_SAME_NAME = 1000
ROOT_GROUP = "sectool"  # home of programs whose caller sits in the root cgroup
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True, slots=True)
class Program:
    """A registered cgroup: its path below the cgroup v2 mount and its id, the inode number."""

    name: str
    labels: dict[str, str]
    cgroup: str
    cgroup_id: int
    uid: int  # who registered it


class Programs:
    """The registry. `mount` is where cgroup v2 is mounted, `record` the file that outlives us."""

    def __init__(self, mount: Path, record: Path, ended: Callable[[Program], None]) -> None:
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
        folder = self.mount / parent_cgroup(pid) / path_segment(name)
        try:
            folder = _make_free(folder)
            identity = folder.stat().st_ino
            (folder / "cgroup.procs").write_text(str(pid), encoding="ascii")
        except OSError as error:
            with contextlib.suppress(OSError):
                folder.rmdir()
            raise SectoolError(
                f"cannot make cgroup {folder}: {error.strerror}",
                f"sectool needs to write to the cgroup v2 hierarchy at {self.mount}",
            ) from None
        program = Program(
            folder.name, dict(checked), "/" + str(folder.relative_to(self.mount)), identity, uid
        )
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
            write_atomic(self._record, rows.encode(), 0o600)
        except SectoolError as error:
            log.error(
                "cannot write %s: %s; a restarted daemon will not know these programs", self._record, error
            )


def _make_free(folder: Path) -> Path:
    """Make `folder`, or with -2, -3, … behind its name where programs of that name run already."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, MAX_SAME_NAME + 1):
        candidate = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        with contextlib.suppress(FileExistsError):
            candidate.mkdir()
            return candidate
    raise SectoolError(f"{MAX_SAME_NAME} programs named {folder.name} run already", "choose another --name")


def parent_cgroup(pid: int) -> str:
    """The cgroup v2 path of `pid` without its leading slash; `sectool` for a process in the root cgroup."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise SectoolError(f"cannot read the cgroup of process {pid}: {error.strerror}") from None
    path = next((line[3:] for line in lines if line.startswith("0::")), "")
    inside = path.strip("/")
    return inside if inside and ".." not in inside.split("/") else ROOT_GROUP


def forget_programs(mount: Path, record: Path) -> None:
    """At `down`: remove the cgroups that no process is in any more. Programs that still run stay on record."""
    programs = Programs(mount, record, lambda _: None)
    programs.load()
    programs.sweep()
    with contextlib.suppress(OSError):
        (mount / ROOT_GROUP).rmdir()
    if not programs.by_id:
        with contextlib.suppress(FileNotFoundError):
            record.unlink()
