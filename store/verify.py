"""Whether history was tampered with: the sealed segments and the control history, checked offline.

    events/chain.jsonl     one entry a sealed segment, each hashed over the one before, with the file's SHA-256
    control.sqlite         one entry a change, each hashed over the one before and over the rows it added and closed
    events/index.duckdb    derived, so there is nothing to hash: it is made a second time and compared

Both chains show edits, removals and reorderings of anything but their end. That the newest entries were cut off
together with what they speak of shows only against a head noted elsewhere: `anchors`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sectool.errors import StoreError, UsageError
from store import segment
from store.control import GENESIS as CONTROL_GENESIS
from store.control import ControlHistory
from store.indexcheck import check_index
from store.segment import Damage
from store.transfer import exported

CONTROL = "control.sqlite"
_ANCHOR = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Head:
    """The newest entry of a chain: noted elsewhere, it betrays a chain cut short. `entries` is its number."""

    chain: str
    entries: int
    hash: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `verify` found. `problems` in the order of history, the first bad place of each chain first."""

    problems: tuple[Damage, ...]
    heads: tuple[Head, ...]
    segments: int  # sealed ones that were read through
    bytes: int
    unsealed: tuple[str, ...]  # files that no seal covers yet: the one being written, and what a crash left
    stretches: int | None  # of the index that were made again and compared; None: left out
    unchecked: int  # stretches over rows that no seal covers yet


def anchor(text: str) -> str:
    """A noted head as people give it. Raises UsageError."""
    text = text.strip().lower()
    if not _ANCHOR.fullmatch(text):
        raise UsageError(
            f"{text[:80]!r} is no anchor",
            "an anchor is a head that `sectool store verify` printed: 64 hex digits",
        )
    return text


def verify(state: Path, anchors: Sequence[str] = (), *, index: bool = True) -> Verdict:
    """Check everything in `state`; also that each of `anchors` is still part of one of the chains.

    Without `index` that of the segments is left out: it is derived, and checking it takes as long as making it.

    Reads every byte of every sealed segment. Raises StoreError or PrivilegeError when it may not read.
    """
    events = state / "events"
    problems = list(segment.verify_chain(events, exported(state)))
    entries = list(segment.entries(events))
    seen = {segment.GENESIS, *(str(entry["hash"]) for entry in entries)}
    heads = [Head("events", *segment.chain_head(events))]
    control = state / CONTROL
    if control.exists():
        try:
            with ControlHistory(control, read_only=True) as history:
                problem = history.verify()
                transactions = history.transactions()
        except StoreError as error:
            if not os.access(control, os.R_OK):
                raise
            problem, transactions = f"cannot be read: {error.message}", []
        if problem is not None:
            problems.append(Damage(CONTROL, problem))
        seen.update(entry.hash for entry in transactions)
        newest = transactions[-1] if transactions else None
        heads.append(Head("control", newest.id if newest else 0, newest.hash if newest else CONTROL_GENESIS))
    problems += _cut_off(anchors, seen)
    known = segment.sealed(events)
    files = segment.segment_files(events)
    covered = [path for path in files if path.name in known]
    broken = {problem.where for problem in problems}
    indexed = None
    if index:
        indexed = check_index(events, {path.name for path in covered} - broken)
        problems += indexed.problems
    return Verdict(
        tuple(problems),
        tuple(heads),
        len(covered),
        sum(segment.size_of(path) for path in covered),
        tuple(path.name for path in files if path.name not in known),
        indexed.stretches if indexed is not None else None,
        indexed.unchecked if indexed is not None else 0,
    )


def _cut_off(anchors: Iterable[str], seen: set[str]) -> list[Damage]:
    return [
        Damage(
            f"anchor {given[:16]}…",
            "stands in neither chain: the newest part of the history was cut off or rewritten after it was noted",
        )
        for given in anchors
        if given not in seen
    ]
