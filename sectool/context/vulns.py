"""Known vulnerabilities of this host's images, packages and programs, through reports that come one after the other.

A report says what is there now: a finding that a later report on the same subject does not repeat is fixed. How old a
finding is counts from the first report that had it, not from its publication: from then on somebody could have acted.

    subject     an image, by its digests; or this host
    workload    by its container's image digest, else by its executable's path or the package that owns it

A finding in a package of this host counts while that version of it is installed: an upgrade ends it at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from sectool.clock import iso
from sectool.context.vulnreport import SEVERITIES, Finding, Report
from sectool.errors import SectoolError
from sectool.identity.files import write_atomic

MAX_SUBJECTS: Final = 1024
MAX_FIXED: Final = 2000  # kept of a subject, the latest
MAX_FILE: Final = 256 << 20
NONE: Final = "none"


@dataclass(frozen=True, slots=True)
class Known:
    """A finding with its time: UTC microseconds; `fixed_us` 0 while it is open."""

    finding: Finding
    first_us: int
    fixed_us: int = 0


@dataclass(frozen=True, slots=True)
class Subject:
    """What reports were on. No digests: this host."""

    name: str
    digests: tuple[str, ...]
    tool: str
    reported_us: int
    known: tuple[Known, ...] = field(repr=False)

    @property
    def open(self) -> Iterator[Known]:
        """Findings that are not fixed."""
        return (known for known in self.known if not known.fixed_us)


@dataclass(frozen=True, slots=True)
class Change:
    """What a report has changed: numbers of findings."""

    new: int
    fixed: int
    open: int


class Vulnerabilities:
    """All that is known, in one file. SectoolError for a damaged one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._index = _Index([])
        self.subjects: list[Subject] = []
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return
        if size > MAX_FILE:
            raise SectoolError(
                f"{path} is larger than {MAX_FILE} bytes", "move it away and import the reports again"
            )
        try:
            document = json.loads(path.read_bytes())
            self.subjects = [_subject(each) for each in document["subjects"]]
            self._index = _Index(self.subjects)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise SectoolError(
                f"{path} cannot be read ({type(error).__name__})", "move it away and import the reports again"
            ) from None

    def take(self, report: Report, now_us: int) -> Change:
        """A report is in: its subject is as it says from now on. Kept on disk before it counts."""
        before = next((s for s in self.subjects if _same(s, report)), None)
        if before is None and len(self.subjects) >= MAX_SUBJECTS:
            raise SectoolError(
                f"there are reports on {MAX_SUBJECTS} subjects already", "sectool vuln forget NAME"
            )
        first = min(report.made_us or now_us, now_us)
        old = {known.finding.key: known for known in before.open} if before is not None else {}
        current = {finding.key: finding for finding in report.findings}
        known = [Known(f, old[key].first_us if key in old else first) for key, f in current.items()]
        gone = [replace(k, fixed_us=now_us) for key, k in old.items() if key not in current]
        fixed = [k for k in before.known if k.fixed_us] if before is not None else []
        fixed = sorted([*fixed, *gone], key=lambda k: k.fixed_us)[-MAX_FIXED:]
        digests = tuple(sorted({*report.digests, *(before.digests if before is not None else ())}))
        after = Subject(report.name, digests, report.tool, now_us, (*known, *fixed))
        self._put([*(s for s in self.subjects if s is not before), after])
        return Change(len(current.keys() - old.keys()), len(gone), len(known))

    def forget(self, name: str) -> None:
        """No report on that subject counts any more. SectoolError when there is none."""
        left = [subject for subject in self.subjects if subject.name != name and name not in subject.digests]
        if len(left) == len(self.subjects):
            raise SectoolError(f"there is no report on {name[:200]!r}", "sectool vuln list shows them")
        self._put(left)

    def _put(self, subjects: list[Subject]) -> None:
        document = {"version": 1, "subjects": [_plain(subject) for subject in subjects]}
        self._path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        write_atomic(self._path, json.dumps(document, separators=(",", ":")).encode(), 0o600)
        self.subjects, self._index = subjects, _Index(subjects)

    def of(self, facts: Mapping[str, str], owner: Callable[[str], str]) -> list[Known] | None:
        """Open findings of the workload with these facts; None when no report is on what it is of.

        `owner` tells the package of a path of this host as `name version`, '' if none.
        """
        index = self._index
        if "container.id" in facts:
            return index.images.get(facts.get("container.digest", ""))
        if not index.host:
            return None
        path = facts.get("executable", "")
        found = list(index.paths.get(path, ()))
        if index.packages:
            package, _, version = owner(path).partition(" ")
            found += [k for k in index.packages.get(package, ()) if _is_installed(k.finding, version)]
        return found

    def labels(self, facts: Mapping[str, str], owner: Callable[[str], str]) -> dict[str, str]:
        """`vuln` (the gravest severity, or none) and `vuln-age` (since when, of the oldest of it)."""
        found = self.of(facts, owner)
        if found is None:
            return {}
        if not found:
            return {"vuln": NONE}
        worst = max(found, key=lambda known: SEVERITIES.index(known.finding.severity)).finding.severity
        since = min(known.first_us for known in found if known.finding.severity == worst)
        return {"vuln": worst, "vuln-age": iso(since)}


class _Index:
    """What is open, by what a workload is known by: asked for every new workload, made anew by every report."""

    def __init__(self, subjects: list[Subject]) -> None:
        self.images: dict[str, list[Known]] = {}  # by digest
        self.paths: dict[str, list[Known]] = {}  # of this host
        self.packages: dict[str, list[Known]] = {}
        self.host = any(not subject.digests for subject in subjects)
        for subject in subjects:
            for digest in subject.digests:
                self.images.setdefault(digest, []).extend(subject.open)
            for known in () if subject.digests else subject.open:
                by, key = (
                    (self.paths, known.finding.path)
                    if known.finding.path
                    else (self.packages, known.finding.package)
                )
                by.setdefault(key, []).append(known)


def _same(subject: Subject, report: Report) -> bool:
    if not report.digests:
        return not subject.digests and subject.name == report.name
    return not set(subject.digests).isdisjoint(report.digests)


def _is_installed(finding: Finding, version: str) -> bool:
    """Whether the version found is the one that is there now."""
    return not finding.version or _plain_version(finding.version) == _plain_version(version)


def _plain_version(version: str) -> str:
    """Without the epoch, which scanners leave out or not."""
    head, colon, rest = version.partition(":")
    return rest if colon and head.isdigit() else version


def _plain(subject: Subject) -> dict[str, Any]:
    return {
        "name": subject.name,
        "digests": list(subject.digests),
        "tool": subject.tool,
        "reported_us": subject.reported_us,
        "known": [
            [k.finding.id, k.finding.severity, k.finding.package, k.finding.version, k.finding.fixed_in,
             k.finding.path, k.first_us, k.fixed_us]
            for k in subject.known
        ],
    }  # fmt: skip


def _subject(fields: Mapping[str, Any]) -> Subject:
    known = []
    for row in fields["known"]:
        *texts, first, fixed = row
        if texts[1] not in SEVERITIES:
            raise ValueError("severity")
        known.append(Known(Finding(*map(str, texts)), int(first), int(fixed)))
    digests = tuple(map(str, fields["digests"]))
    return Subject(
        str(fields["name"]), digests, str(fields["tool"]), int(fields["reported_us"]), tuple(known)
    )
