"""What a lab may not leave behind, and whether it did.

A snapshot is taken before the lab is made and one after it is gone. Of things that others on the machine may
change meanwhile (mounts of other namespaces, other labs) only those with the lab's own name count; the host's
own rules, interfaces and routes must be exactly what they were.
"""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from labs import netns, place

DEFAULT_FOLDERS = ("/var/lib/sectool", "/run/sectool", "/etc/sectool")
SHARED_FOLDERS = ("/run", "/tmp", "/var/tmp", "/dev/shm", "/var/lib", "/etc")
_VOLATILE = re.compile(r"^#.*$|\[\d+:\d+\]|counter packets \d+ bytes \d+|expires \d+sec", re.MULTILINE)


def _say(*command: str) -> str:
    """What a command says about the host; '' when it does not exist here or refuses."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return _VOLATILE.sub("", done.stdout)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The machine, as far as a lab called `lab` could change it. Every entry is one thing, in words."""

    lab: str
    things: frozenset[str]


def cgroups_in_use(lab: str) -> frozenset[Path]:
    """The cgroup v2 folders the lab's processes are in now, wherever: all of them have to go with it."""
    found = set()
    for pid in place.processes(lab):
        try:
            text = Path(f"/proc/{pid}/cgroup").read_text()
        except OSError:
            continue
        for line in text.splitlines():
            if line.startswith("0::/") and len(line) > len("0::/"):
                found.add(place.cgroup_mount() / line[len("0::/") :])
    return frozenset(found)


def take(lab: str) -> Snapshot:
    """Look at rules, interfaces, routes, mounts, namespaces, cgroups, processes and files."""
    things: set[str] = set()
    for name, command in (
        ("iptables rule", ("iptables-save",)),
        ("ip6tables rule", ("ip6tables-save",)),
        ("nftables line", ("nft", "list", "ruleset")),
        ("interface", ("ip", "-br", "link")),
        ("address", ("ip", "-br", "address")),
        ("routing rule", ("ip", "rule")),
        ("route", ("ip", "route", "show", "table", "all")),
    ):
        things.update(f"{name}: {line.strip()}" for line in _say(*command).splitlines() if line.strip())
    prefix = f"{netns.PREFIX}-{lab}-"
    for line in Path("/proc/self/mounts").read_text().splitlines():
        where = line.split()[1]
        # Others come and go in these folders all the time; a lab's own mounts have its name in them.
        passing = where.startswith((f"{netns.NETNS}/", "/tmp/", "/var/tmp/"))
        if not passing or prefix in where or f"/{lab}/" in f"{where}/":
            things.add(f"mount: {where}")
    things.update(f"namespace: {name.name}" for name in netns.existing(lab))
    mount = place.cgroup_mount()
    # os.walk, for others' groups vanish while this looks: it passes over them, where rglob raises.
    folders = (Path(folder) for folder, _, _ in os.walk(mount))
    things.update(f"cgroup: {folder}" for folder in folders if lab in folder.relative_to(mount).parts)
    things.update(f"process: {pid} {_command(pid)}" for pid in place.processes(lab))
    things.update(f"folder: {folder}" for folder in DEFAULT_FOLDERS if Path(folder).exists())
    for shared in map(Path, SHARED_FOLDERS):
        if shared.is_dir():
            ours = [entry for entry in shared.iterdir() if lab in re.split(r"[-._]", entry.name)]
            things.update(f"file: {entry}" for entry in ours)
    if (folder := place.in_memory() / "sectool-lab" / lab).exists():
        things.add(f"folder: {folder}")
    return Snapshot(lab, frozenset(things))


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:80]
    except OSError:
        return ""


def left_behind(before: Snapshot, after: Snapshot, cgroups: frozenset[Path] = frozenset()) -> list[str]:
    """What is there now and was not, or was and is not. `cgroups` are folders that must have gone."""
    return [
        *(f"left behind: {thing}" for thing in sorted(after.things - before.things)),
        *(f"gone: {thing}" for thing in sorted(before.things - after.things)),
        *(f"left behind: cgroup: {folder}" for folder in sorted(cgroups) if folder.exists()),
    ]
