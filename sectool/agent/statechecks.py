"""Whether a daemon's own files are in order: enrolment, certificates, keys, settings' meaning, memory, disk.

Each check gives (name, level, message, hint); level as in sectool.agent.doctor.Level. Nothing is changed.
"""

from __future__ import annotations

import grp
import os
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from nfq.tmpfs import in_memory
from sectool.agent.hostchecks import Checked
from sectool.agent.keyfolder import SHARED_MEMORY
from sectool.agent.settings import Settings
from sectool.api.paths import Paths
from sectool.errors import SectoolError
from sectool.identity.enrolment import load_host

SOON_DAYS: Final = 30
LEAST_FREE: Final = 64 << 20  # below this the store stops writing
LITTLE_FREE: Final = 1 << 30
_DAY: Final = 86_400.0


def checks(paths: Paths, settings: Settings) -> Iterator[Checked]:
    """All of them."""
    if not paths.state.is_dir():
        yield (
            "state folder",
            "note",
            f"{paths.state} does not exist: this host is not enrolled",
            "sectool ca init on one host, then sectool host enroll on each",
        )
        return
    yield from _folder(paths.state)
    yield from _keys(paths.state)
    yield from _enrolment(paths)
    yield from _group(settings)
    yield from _memory(paths.run)
    yield from _disk(paths.state)


def _folder(folder: Path) -> Iterator[Checked]:
    try:
        about = folder.stat()
    except OSError as error:
        yield "state folder", "warning", f"{folder} cannot be read: {error.strerror}", "run it with sudo"
        return
    if about.st_mode & 0o022:
        mode = f"{stat.S_IMODE(about.st_mode):04o}"
        yield (
            "state folder",
            "bad",
            f"others may write in {folder} (mode {mode}): they can replace keys and history",
            f"chmod go-w {folder}, then sectool store verify",
        )
    elif about.st_uid not in (0, os.geteuid()):
        yield "state folder", "bad", f"{folder} belongs to user {about.st_uid}", f"chown root {folder}"
    else:
        yield "state folder", "good", str(folder), ""


def _keys(state: Path) -> Iterator[Checked]:
    wrong = []
    for key in (*state.rglob("*.key"), *state.rglob("*.key.*")):
        try:
            about = key.lstat()
        except OSError:
            continue
        if about.st_mode & 0o077 or about.st_uid not in (0, os.geteuid()):
            wrong.append(f"{key} (mode {stat.S_IMODE(about.st_mode):04o}, user {about.st_uid})")
    if wrong:
        yield (
            "private keys",
            "bad",
            f"readable by others: {', '.join(wrong[:3])}",
            "take them for stolen: enrol again with --force; if that is impossible: chmod 600, chown root",
        )
    else:
        yield "private keys", "good", "root's alone", ""


def _enrolment(paths: Paths) -> Iterator[Checked]:
    if not paths.host.is_dir():
        yield (
            "enrolment",
            "note",
            "this host is not enrolled in a trust domain",
            "sectool host enroll --name NAME --ca DIRECTORY",
        )
        return
    try:
        host = load_host(paths.state)
    except SectoolError as error:
        yield "enrolment", "bad", error.message, error.hint
        return
    who = f"{host.name} in {host.trust_domain}"
    certificate = host.authority.certificate
    now = time.time()
    begins = certificate.not_valid_before_utc.timestamp()
    ends = certificate.not_valid_after_utc.timestamp()
    if now < begins:
        yield (
            "enrolment",
            "bad",
            f"{who}: the host's certificate begins in {(begins - now) / _DAY:.1f} days",
            "set the clock: timedatectl, chronyc makestep",
        )
    elif now >= ends:
        yield (
            "enrolment",
            "bad",
            f"{who}: the host's certificate ended {(now - ends) / _DAY:.1f} days ago: nobody believes it any more",
            "enrol again: sectool host enroll --force",
        )
    elif ends - now < SOON_DAYS * _DAY:
        yield (
            "enrolment",
            "warning",
            f"{who}: the host's certificate ends in {(ends - now) / _DAY:.1f} days",
            "enrol again before: sectool host enroll --force; connections go on",
        )
    else:
        yield "enrolment", "good", f"{who}, for {(ends - now) / _DAY:.0f} days", ""


def _group(settings: Settings) -> Iterator[Checked]:
    if settings.socket_group is None:
        return
    try:
        grp.getgrnam(settings.socket_group)
    except KeyError:
        yield (
            "socket group",
            "bad",
            f"there is no group {settings.socket_group!r} (socket_group in sectool.yaml)",
            f"groupadd --system {settings.socket_group}",
        )


def _memory(run: Path) -> Iterator[Checked]:
    nearest = next(folder for folder in (run, *run.parents) if folder.is_dir())
    try:
        good = in_memory(nearest) or (SHARED_MEMORY.is_dir() and in_memory(SHARED_MEMORY))
    except OSError:
        good = False
    if good:
        yield "memory for keys", "good", "there is a tmpfs for keys of live connections", ""
    else:
        yield (
            "memory for keys",
            "bad",
            f"neither {run} nor {SHARED_MEMORY} is on a tmpfs: the daemon does not write keys to a disk",
            f"mount -t tmpfs -o mode=0755 tmpfs {run}",
        )


def _disk(state: Path) -> Iterator[Checked]:
    try:
        free = shutil.disk_usage(state).free
    except OSError as error:
        yield "disk", "warning", f"cannot ask how full {state} is: {error.strerror}", ""
        return
    said = f"{free / (1 << 30):.1f} GiB free"
    if free < LEAST_FREE:
        yield "disk", "bad", f"{said} for {state}: events are being lost", "make room, or sectool store prune"
    elif free < LITTLE_FREE:
        yield "disk", "warning", f"{said} for {state}: events need room", "make room, or sectool store prune"
    else:
        yield "disk", "good", said, ""
