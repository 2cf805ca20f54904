"""What this host keeps of its history: chosen once, on record with who and why, minded by the store from then on.

    state/retention.json     the setting; without the file everything is kept, and nothing is rewritten

A file that cannot be understood deletes nothing: the store says so, and keeps all until it is written anew.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from sectool.clock import DAY, HOUR, SECOND
from sectool.errors import StoreError, UsageError

FILE = "retention.json"
MAX_REASON = 1000
MAX_FILE = 1 << 16
_MOST = 1 << 62
_TEXT = re.compile(r"[^\x00-\x1f\x7f]*")


class WhenFull(StrEnum):
    """What is done when the reserve of the disk is reached."""

    STOP = "stop"  # history stays; no more is taken in until there is room
    DROP_OLDEST = "drop-oldest"  # the oldest sealed segments make room


@dataclass(frozen=True, slots=True)
class Retention:
    """What is kept. Microseconds and bytes; None: no bound, or never."""

    keep_us: int | None = None  # how old the newest row of a segment may get
    keep_bytes: int | None = None  # of all sealed segments together
    compact_us: int | None = None  # sealed segments so old are made compact
    when_full: WhenFull = WhenFull.STOP
    spare_us: int = DAY  # younger segments are never given up for room
    since_us: int = 0  # when it was chosen; 0: never
    by: str = ""
    reason: str = ""

    @property
    def plain(self) -> bool:
        """Whether nothing is ever deleted or rewritten by it."""
        return (self.keep_us, self.keep_bytes, self.compact_us) == (None,) * 3 and (
            self.when_full is WhenFull.STOP
        )

    @property
    def for_room(self) -> str:
        """What becomes of history on a full disk, for whoever is told that it is full."""
        if self.when_full is WhenFull.DROP_OLDEST:
            return f"the oldest segments make room, but none younger than {span(self.spare_us)}"
        return "no history is deleted for it (see `sectool store retention --when-full`)"

    def document(self) -> dict[str, Any]:
        """As it is written, sent and shown."""
        return asdict(self)


BOUNDS = ("keep_us", "keep_bytes", "compact_us")


def parse(data: bytes) -> Retention:
    """The file's bytes. Raises ValueError."""
    try:
        found = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(found, dict):
        raise ValueError("not a mapping")
    return from_document(found)


def from_document(found: Mapping[str, Any]) -> Retention:
    """A setting from its document. Raises ValueError for what is missing, of a wrong kind, or out of bounds."""
    unknown = found.keys() - set(Retention.__dataclass_fields__)
    if unknown:
        raise ValueError(f"{min(map(str, unknown))[:40]!r} is not known here")
    for name in BOUNDS:
        value = found.get(name)
        if value is not None and (type(value) is not int or not 0 < value <= _MOST):
            raise ValueError(f"{name} is no number above 0")
    for name in ("spare_us", "since_us"):
        value = found.get(name)
        if type(value) is not int or not 0 <= value <= _MOST:
            raise ValueError(f"{name} is no number")
    for name in ("by", "reason"):
        value = found.get(name)
        if not isinstance(value, str) or len(value) > MAX_REASON or not _TEXT.fullmatch(value):
            raise ValueError(f"{name} is no line of text")
    when_full = found.get("when_full")
    if when_full not in [*WhenFull]:
        raise ValueError(f"when full: {' or '.join(WhenFull)}, nothing else")
    return Retention(
        found.get("keep_us"),
        found.get("keep_bytes"),
        found.get("compact_us"),
        WhenFull(str(when_full)),
        found["spare_us"],
        found["since_us"],
        found["by"],
        found["reason"],
    )


def load(state: Path) -> Retention:
    """What was chosen last. Raises StoreError for a file that cannot be read or understood."""
    path = state / FILE
    try:
        with path.open("rb") as file:
            return parse(file.read(MAX_FILE))
    except FileNotFoundError:
        return Retention()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise StoreError(
            f"cannot read {path}: {why}", "`sudo sectool store retention --off` writes it anew: all is kept"
        ) from None


def save(state: Path, chosen: Retention) -> None:
    """Write it, whole or not at all, so that it outlives a crash of the host. Raises StoreError."""
    path = state / FILE
    new = path.with_suffix(".new")
    try:
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
        with os.fdopen(fd, "wb") as file:
            os.fchmod(file.fileno(), 0o640)
            file.write(json.dumps(chosen.document(), indent=1).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
        folder = os.open(state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "; `sudo sectool store prune` makes room" if full else ""
        raise StoreError(f"cannot write {path}: {error.strerror}", f"nothing has changed{hint}") from None


def changed(before: Retention, wanted: Mapping[str, Any], by: str, now_us: int) -> Retention:
    """`before` with what a request asks for: fields of Retention, 0 for no bound, and `off` for nothing of it.

    Raises UsageError.
    """
    known = {*BOUNDS, "when_full", "spare_us"}
    asked = {name: wanted[name] for name in known if wanted.get(name) is not None}
    off = wanted.get("off", False)
    reason = wanted.get("reason") or ""
    if not isinstance(off, bool) or (off and asked):
        raise UsageError("--off goes alone", "it takes back all that was set")
    if not off and not asked:
        raise UsageError("say what to keep", "e.g. --keep-days 90, --keep 20G, or --off")
    given = {name: None if name in BOUNDS and value == 0 else value for name, value in asked.items()}
    try:
        return from_document(
            {
                **(Retention() if off else before).document(),
                **given,
                "since_us": now_us,
                "by": by[:MAX_REASON],
                "reason": reason,
            }
        )
    except (ValueError, TypeError) as error:
        raise UsageError(f"retention: {error}", "see `sectool store retention --help`") from None


def bounded(chosen: Retention, keep_bytes: int | None, keep_us: int | None) -> Retention:
    """The setting, or while nobody chose one, the bounds that the store was started with."""
    if chosen.since_us:
        return chosen
    return replace(chosen, keep_bytes=keep_bytes, keep_us=keep_us)


def words(chosen: Retention) -> str:
    """The setting as a line of text."""
    parts = []
    if chosen.keep_us is not None:
        parts.append(f"segments older than {span(chosen.keep_us)} are deleted")
    if chosen.keep_bytes is not None:
        parts.append(f"of the sealed ones {room(chosen.keep_bytes)} are kept")
    if chosen.compact_us is not None:
        parts.append(f"those older than {span(chosen.compact_us)} are made compact")
    if chosen.when_full is WhenFull.DROP_OLDEST:
        parts.append(f"on a full disk the oldest make room, but none younger than {span(chosen.spare_us)}")
    return "; ".join(parts) or "everything; on a full disk nothing more is taken in"


def span(us: int) -> str:
    """A length of time as people give it: in the largest unit that it is a whole number of."""
    for unit, letter in ((DAY, "d"), (HOUR, "h"), (60 * SECOND, "m"), (SECOND, "s")):
        if us % unit == 0 and us:
            return f"{us // unit}{letter}"
    return f"{us / SECOND:g}s"


def room(count: int) -> str:
    """Bytes as people give them."""
    for power, letter in ((4, "T"), (3, "G"), (2, "M"), (1, "K")):
        if count >= 1 << 10 * power:
            return f"{count / (1 << 10 * power):.4g}{letter}"
    return f"{count} bytes"
