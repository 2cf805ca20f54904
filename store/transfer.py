"""Sealed segments on other machines: copied as they are, with their chain, into a case bundle; taken from one, apart.

BUNDLE/events/flows-….duckdb    the sealed segments of a window, native or compact, byte by byte
BUNDLE/events/chain.jsonl       the whole chain: each copy's hash stands in it, and that nothing between is missing
BUNDLE/…                        the rest as in any case bundle (store.case), signed by the host

state/imported/NAME/            an imported one: opened with `sectool --store`, never part of the host's own history
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sectool.errors import StoreError, UsageError
from sectool.identity.trust import TrustBundle
from store import migration, segment
from store.case import Checked, check_case, manifest_of
from store.schema import SEGMENT_VERSION
from store.segment import Damage

IMPORTED = "imported"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True, slots=True)
class Import:
    """What came in: where it lies, and what checking it came to."""

    folder: Path
    checked: Checked
    segments: tuple[str, ...]


def exported(state: Path) -> frozenset[str] | None:
    """The segments that a bundle says it was given; None for a host's own history, and for bundles of rows."""
    if not (state / "manifest.json").exists():
        return None
    segments = manifest_of(state).get("segments")
    return frozenset(segments) if isinstance(segments, list) else None


def check_segments(folder: Path, given: Collection[str]) -> list[Damage]:
    """What does not hold of a bundle's segments, against its chain and this release."""
    events = folder / "events"
    problems = segment.verify_chain(events, given)
    known = segment.sealed(events)
    problems += [Damage(name, "is not in the chain") for name in sorted(given) if name not in known]
    broken = {problem.where for problem in problems}
    for path in segment.segment_files(events):
        if path.name in broken:
            continue
        version = migration.version_of(path)
        if version is None:
            problems.append(Damage(path.name, "cannot be read"))
        elif version != SEGMENT_VERSION:
            problems.append(
                Damage(path.name, f"is of version {version}; this release reads {SEGMENT_VERSION}")
            )
    return problems


def import_bundle(folder: Path, state: Path, name: str, trusted: TrustBundle | None) -> Import:
    """Check a bundle of sealed segments and take a copy of it to `state`/imported/`name`.

    Raises UsageError for what is no such bundle, or a name that is taken; StoreError naming every place that does not
    hold, with nothing taken. What is checked is the copy, so that nobody changes it in between.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name[:80]!r} is no name for an import", "letters, digits, '.', '_' and '-'")
    if exported(folder) is None:
        raise UsageError(
            f"{folder} holds no sealed segments",
            f"`sectool store export` makes such a bundle; any other is opened in place: sectool --store {folder}",
        )
    target = state / IMPORTED / name
    draft = target.with_name(f".{name}.{os.getpid()}.new")
    if target.exists():
        raise UsageError(f"{name} is there already", "choose another --name; nothing is ever merged")
    try:
        draft.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
        shutil.copytree(folder, draft, symlinks=True)
        checked = check_case(draft, trusted)
        given = exported(draft) or frozenset()
        problems = [*checked.problems]
        if not problems:
            problems += [f"{problem.where}: {problem.what}" for problem in check_segments(draft, given)]
        if problems:
            raise StoreError(
                f"{folder} does not hold: {'; '.join(problems[:20])}",
                "nothing was taken; get it again from where it was made",
            )
        draft.rename(target)
    except (OSError, shutil.Error) as error:
        why = getattr(error, "strerror", None) or str(error)[:300]
        raise StoreError(f"cannot import {folder}: {why}", "is there room?") from None
    finally:
        _remove(draft)
    return Import(target, checked, tuple(sorted(given)))


def suggested_name(manifest: dict[str, Any]) -> str:
    """A name for what a bundle holds: its host and when it begins."""
    text = f"{manifest['host']}-{manifest['since']}".replace(":", "")
    return re.sub(r"[^A-Za-z0-9._-]", "-", text).lstrip("._-")[:100] or "import"


def _remove(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)
