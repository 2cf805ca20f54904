"""Copies of sealed segments for bundles: byte by byte, with the chain that says what they were when sealed."""

from __future__ import annotations

import shutil
from pathlib import Path

from sectool.clock import iso
from sectool.errors import StoreError
from store import segment

TRIES = 3


def copy_sealed(events: Path, target: Path, since: int, until: int) -> dict[str, int]:
    """Copy the sealed segments with rows of [since, until), and the chain; counts of rows by table.

    Raises StoreError when there is none, or a copy is not what the chain says of it. The segment being written is
    not among them: nothing vouches for it yet.
    """
    for _ in range(TRIES):  # one may be made compact, or go, while it is copied
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(mode=0o700, parents=True)
        try:
            return _copy(events, target, since, until)
        except FileNotFoundError:
            continue
    raise StoreError("the segments change all the time", "try again in a moment")


def _copy(events: Path, target: Path, since: int, until: int) -> dict[str, int]:
    known = segment.sealed(events)
    chosen = [
        path
        for path in segment.segment_files(events)
        if path.name in known
        and int(known[path.name]["first_us"]) < until
        and int(known[path.name]["last_us"]) >= since
    ]
    if not chosen:
        raise StoreError(
            f"no sealed segment has anything of {iso(since)} to {iso(until)}",
            "`sectool store stats` lists them; `sectool case export` takes rows that are not sealed yet",
        )
    for path in chosen:
        copied = target / path.name
        if path.is_dir():
            shutil.copytree(path, copied, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(path, copied)
        for file in copied.iterdir() if copied.is_dir() else (copied,):
            file.chmod(0o440)
        if segment.file_hash(copied) != known[path.name]["sha256"]:
            raise StoreError(
                f"{path.name} was changed after it was sealed", "`sectool store verify` tells what else was"
            )
    shutil.copyfile(events / segment.CHAIN, target / segment.CHAIN)
    (target / segment.CHAIN).chmod(0o440)
    entries = [known[path.name] for path in chosen]
    return {
        "flow_records": sum(int(entry["records"]) for entry in entries),
        "events": sum(int(entry["events"]) for entry in entries),
    }
