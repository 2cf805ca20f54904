"""What the workers know of host names, read from their files: for `sectool names`."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nfq.namefile import Entry, NameFile, path_of
from nfq.names import NameTable, Purse
from nfq.namesources import HOSTS, hosts
from sectool.policy import Engine

ROWS = 2000
ADDRESSES = 64  # of one row


def known(run: Path, workers: int, engine: Engine | None, now_us: int) -> dict[str, Any]:
    """Names with their addresses, those that rules speak of first; `more`: how many rows are left out."""
    table = NameTable()
    if engine is not None:
        table.watch(engine)
    entries = [
        entry
        for number in range(workers)
        for entry in _entries(path_of(run, number))
        if entry.expires_us > now_us
    ]
    rows = [*_of_file(table), *_told(table, entries)]
    rows.sort(key=lambda row: (not row["in_policy"], row["name"], row["resolver"]))
    return {"items": rows[:ROWS], "more": max(0, len(rows) - ROWS)}


def _entries(path: Path) -> list[Entry]:
    file = NameFile.open(path)
    if file is None:
        return []
    try:
        return [entry for slot in range(file.slots) if (entry := file.read(slot)) is not None]
    finally:
        file.close()


def _told(table: NameTable, entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """Rows of what resolvers said."""
    found: dict[tuple[str, bytes], dict[bytes, int]] = {}
    for entry in entries:
        addresses = found.setdefault((entry.name, entry.resolver), {})
        addresses[entry.address] = max(entry.expires_us, addresses.get(entry.address, 0))
    return [
        {
            "name": name,
            "addresses": [str(ipaddress.ip_address(a)) for a in sorted(addresses)[:ADDRESSES]],
            "resolver": str(ipaddress.ip_address(resolver)),
            "expires": max(addresses.values()),
            "in_policy": table.purse(name) is not Purse.OTHER,
        }
        for (name, resolver), addresses in found.items()
    ]


def _of_file(table: NameTable) -> list[dict[str, Any]]:
    """Rows of what this host's own file says, as far as rules speak of it."""
    try:
        text = HOSTS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found: dict[str, list[str]] = {}
    for address, name in hosts(text):
        if table.purse(name) is not Purse.OTHER:
            found.setdefault(name, []).append(str(ipaddress.ip_address(address)))
    return [
        {
            "name": name,
            "addresses": sorted(set(a))[:ADDRESSES],
            "resolver": str(HOSTS),
            "expires": None,
            "in_policy": True,
        }
        for name, a in found.items()
    ]
