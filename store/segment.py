"""Segment files: their names, their chain of hashes, and what becomes of damaged ones.

    flows-20260301T140000Z-1.duckdb      a segment: live (written by the store process) or sealed (mode 0440)
    chain.jsonl                          one entry per sealed segment, each hashed over the one before
    flows-20260301T140000Z-1.parquet/    a sealed segment made compact (store.compaction): a file a table
    *.damaged-<microseconds>             what could not be opened: kept, never touched again

A segment begins at every start of the store and whenever the live one is too old or too large.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import os
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb

from sectool.clock import to_datetime
from sectool.errors import StoreError
from sectool.events import now_us

CHAIN = "chain.jsonl"
GENESIS = "0" * 64
NOT_NOW = "cannot be opened now"  # what of a Damage that is none: the file may be sound
OTHER_VERSION = "written by another release: segment of version"
NATIVE, COMPACT = ".duckdb", ".parquet"
_NAME = re.compile(r"flows-[0-9]{8}T[0-9]{6}Z-[0-9]+\.(duckdb|parquet)")
# An open that fails for one of these says nothing about the file's content.
_NOT_ITS_FAULT = (
    "set lock on",  # not "lock" alone: checksums that do not fit speak of blocks
    "conflicting lock",
    "no space",
    "permission denied",
    "too many open files",
    "cannot allocate",
    "read-only file",
    OTHER_VERSION.lower(),
)


@dataclass(frozen=True, slots=True)
class Damage:
    """Something of the store's files that had to be set aside, or does not hold. `kept` is its name now."""

    where: str
    what: str
    kept: str = ""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a segment holds. Sequence numbers are 0 when it is empty; times are UTC microseconds."""

    records: int
    events: int
    first_seq: int
    last_seq: int
    first_us: int
    last_us: int

    @property
    def empty(self) -> bool:
        return not self.records and not self.events


def segment_name(start_us: int, number: int) -> str:
    """File name of a segment begun at `start_us`."""
    return f"flows-{to_datetime(start_us):%Y%m%dT%H%M%SZ}-{number}.duckdb"


def segment_files(events: Path) -> list[Path]:
    """All segments in `events`, oldest first. Of one that is there twice (compaction was killed) the native one."""
    try:
        found = [path for path in events.iterdir() if _NAME.fullmatch(path.name)]
    except FileNotFoundError:
        return []
    native = {path.stem for path in found if not compact(path)}
    found = [path for path in found if not compact(path) or path.stem not in native]
    return sorted(found, key=lambda path: _place(path.name))


def next_name(events: Path, now: int, number: int) -> str:
    """A name behind all that are there, whatever the clock did meanwhile: names in order are rows in order."""
    name = segment_name(now, number)
    files = segment_files(events)
    if files and _place(files[-1].name) >= _place(name):
        stamp, last = _place(files[-1].name)
        name = f"flows-{stamp}-{last + 1}{NATIVE}"
    return name


def _place(name: str) -> tuple[str, int]:
    _, stamp, number = name.partition(".")[0].split("-")
    return stamp, int(number)


def compact(path: Path) -> bool:
    """Whether a segment is a folder of Parquet files, not a native file."""
    return path.suffix == COMPACT


def one(cursor: duckdb.DuckDBPyConnection, sql: str, values: Sequence[Any] = ()) -> tuple[Any, ...]:
    """The single row of a query, read to its end: a result left half read would bar the cursor for what follows."""
    (row,) = cursor.execute(sql, list(values)).fetchall()
    return tuple(row)


def summarise(connection: duckdb.DuckDBPyConnection, alias: str) -> Summary:
    """Count what the segment attached as `alias` holds."""
    row = one(
        connection,
        f"SELECT r.n, e.n, coalesce(least(r.a, e.a), 0), coalesce(greatest(r.z, e.z), 0),"  # noqa: S608
        " coalesce(epoch_us(least(r.t, e.t)), 0), coalesce(epoch_us(greatest(r.u, e.u)), 0) FROM"
        f" (SELECT count(*) n, min(seq) a, max(seq) z, min(ts) t, max(ts) u FROM {alias}.flow_records) r,"
        f" (SELECT count(*) n, min(seq) a, max(seq) z, min(ts) t, max(ts) u FROM {alias}.events) e",
    )
    return Summary(*(int(value) for value in row))


def damaged_by(error: Exception) -> bool:
    """Whether an error of opening a segment speaks of its content, not of circumstances."""
    text = str(error).lower()
    if isinstance(error, duckdb.OutOfMemoryException | OSError | MemoryError):
        return False
    return not any(word in text for word in _NOT_ITS_FAULT)


def set_aside(path: Path) -> Path:
    """Rename a damaged file out of the way; never over another."""
    kept = path.with_name(f"{path.name}.damaged-{now_us()}")
    path.rename(kept)
    return kept


def wal_of(path: Path) -> Path:
    """The write-ahead log beside a segment."""
    return path.with_name(path.name + ".wal")


def recover(path: Path) -> tuple[Summary | None, list[Damage]]:
    """Make a segment left behind by a dead store whole: replay its log, write it out, close it.

    Returns what it holds (None: set aside, or not to be opened now) and what was damaged.
    """
    damage: list[Damage] = []
    for _ in range(2):
        try:
            with duckdb.connect(":memory:") as connection:
                connection.execute(f"ATTACH '{_quoted(path)}' AS s")
                connection.execute("CHECKPOINT s")
                summary = summarise(connection, "s")
                connection.execute("DETACH s")
        except (duckdb.Error, OSError) as error:
            if not damaged_by(error):
                damage.append(Damage(path.name, f"{NOT_NOW}: {_first_line(error)}"))
                return None, damage
            wal = wal_of(path)
            broken = wal if wal.exists() else path
            damage.append(Damage(broken.name, _first_line(error), set_aside(broken).name))
            if broken is path:
                return None, damage
        else:
            return summary, damage
    return None, damage


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


def _quoted(path: Path) -> str:
    return str(path).replace("'", "''")


def file_hash(path: Path) -> str:
    """SHA-256 of a segment, in hex. Of a folder it is that of its files' names and hashes."""
    if path.is_dir():
        lines = [f"{file_hash(file)}  {file.name}\n" for file in sorted(path.iterdir())]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_of(path: Path) -> int:
    """Bytes of a segment; 0 when it is not there."""
    try:
        if path.is_dir():
            return sum(file.stat().st_size for file in path.iterdir())
        return path.stat().st_size
    except OSError:
        return 0


def seal(events: Path, path: Path, summary: Summary) -> None:
    """Make a closed (or no longer written) segment read-only and append it to the chain. Durable on return."""
    if not compact(path):  # its files are
        path.chmod(0o440)
    append_entry(events, sealed_fields(path.name, path, summary))


def sealed_fields(name: str, file: Path, summary: Summary) -> dict[str, Any]:
    """What the chain says of the segment `name`, whose content is in `file`."""
    return {
        "segment": name,
        "sha256": file_hash(file),
        "bytes": size_of(file),
        "records": summary.records,
        "events": summary.events,
        "first_seq": summary.first_seq,
        "last_seq": summary.last_seq,
        "first_us": summary.first_us,
        "last_us": summary.last_us,
        "sealed_us": now_us(),
    }


def append_entry(events: Path, fields: dict[str, Any]) -> None:
    """Append one entry to the chain, hashed over the entry before it. Raises OSError with the chain as it was."""
    number, previous = chain_head(events)
    entry: dict[str, Any] = {"n": number + 1, **fields, "prev": previous}
    entry["hash"] = _entry_hash(entry)
    fd = os.open(events / CHAIN, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        line = json.dumps(entry).encode() + b"\n"
        before = os.fstat(fd).st_size
        try:
            if os.write(fd, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(fd, before)  # half an entry would end the chain for good
            raise
        os.fsync(fd)
    finally:
        os.close(fd)


def _entry_hash(entry: dict[str, Any]) -> str:
    plain = {key: value for key, value in entry.items() if key != "hash"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def entries(events: Path) -> Iterator[dict[str, Any]]:
    """The chain's entries up to the first line that is none."""
    try:
        lines = (events / CHAIN).read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for line in lines:
        entry = _parse(line)
        if entry is None:
            return
        yield entry


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    sound = isinstance(entry, dict) and isinstance(entry.get("n"), int) and isinstance(entry.get("hash"), str)
    return entry if sound else None


def sealed(events: Path) -> dict[str, dict[str, Any]]:
    """Chain entries by segment name."""
    return {entry["segment"]: entry for entry in entries(events) if isinstance(entry.get("segment"), str)}


def mend_chain(events: Path) -> list[Damage]:
    """Set aside what a crash left half-written at the end of the chain, so that it can go on."""
    chain = events / CHAIN
    try:
        data = chain.read_bytes()
    except FileNotFoundError:
        return []
    good = 0
    for line in data.splitlines(keepends=True):
        if not line.endswith(b"\n") or _parse(line) is None:
            break
        good += len(line)
    if good == len(data):
        return []
    kept = chain.with_name(f"{CHAIN}.damaged-{now_us()}")
    kept.write_bytes(data)
    kept.chmod(0o440)
    os.truncate(chain, good)
    return [Damage(CHAIN, f"its last {len(data) - good} bytes are no entry", kept.name)]


def verify_chain(events: Path, given: Collection[str] | None = None) -> list[Damage]:
    """Everything that was edited, removed or reordered among the sealed segments; empty when all holds.

    `given`: the segments that a bundle was given, of which alone the files have to be there; None: all of the chain.
    What this cannot see: the newest entries removed together with their files, unless `chain_head` was noted elsewhere.
    """
    problems: list[Damage] = []
    try:
        lines = (events / CHAIN).read_bytes().splitlines()
    except FileNotFoundError:
        lines = []
    except OSError as error:
        raise StoreError(f"cannot read {events / CHAIN}: {error.strerror}", "run it with sudo") from None
    previous = GENESIS
    retired: set[str] = set()
    listed: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        entry = _parse(line)
        if entry is None:
            problems.append(Damage(CHAIN, f"line {number} is no entry"))
            break
        if entry["n"] != number:
            problems.append(Damage(CHAIN, f"entry {number} is missing; {entry['n']} stands in its place"))
            break
        if entry.get("prev") != previous:
            problems.append(Damage(CHAIN, f"entry {number} does not follow the one before it"))
            break
        if not hmac.compare_digest(_entry_hash(entry), entry["hash"]):
            problems.append(Damage(CHAIN, f"entry {number} was edited"))
            break
        previous = entry["hash"]
        for word in ("retired", "replaces"):
            if isinstance(entry.get(word), str):
                retired.add(entry[word])
        if isinstance(entry.get("segment"), str):
            listed[entry["segment"]] = str(entry.get("sha256"))
    for name, digest in listed.items():
        path = events / name
        if not path.exists():
            if name in given if given is not None else name not in retired and name not in gone(events):
                problems.append(Damage(name, "is missing"))
        elif not hmac.compare_digest(file_hash(path), digest):
            problems.append(Damage(name, "was changed after it was sealed"))
    problems += [
        Damage(path.name, "is read-only as sealed segments are, but the chain does not list it")
        for path in segment_files(events)
        if path.name not in listed and not path.stat().st_mode & 0o200
    ]
    return problems


def beyond(events: Path, keep_bytes: int | None, keep_us: int | None, now: int) -> list[Path]:
    """The oldest sealed segments that retention lets go: those whose newest row is older than `keep_us`, and those
    that make the sealed ones together larger than `keep_bytes`. Never one behind a segment that stays."""
    known = sealed(events)
    paths = [path for path in segment_files(events) if path.name in known]
    total = sum(int(known[path.name].get("bytes", 0)) for path in paths)
    out = []
    for path in paths:
        entry = known[path.name]
        old = keep_us is not None and int(entry.get("last_us", 0)) < now - keep_us
        if not old and (keep_bytes is None or total <= keep_bytes):
            break
        out.append(path)
        total -= int(entry.get("bytes", 0))
    return out


def gone(events: Path) -> set[str]:
    """Names of segments that the chain says were removed: retired, or replaced by a compact one."""
    return {
        str(entry[word]) for entry in entries(events) for word in ("retired", "replaces") if entry.get(word)
    }


def chain_head(events: Path) -> tuple[int, str]:
    """Number and hash of the newest entry: noted elsewhere, they betray a chain cut short."""
    number, digest = 0, GENESIS
    for entry in entries(events):
        number, digest = entry["n"], entry["hash"]
    return number, digest
