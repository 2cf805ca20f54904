"""Whose socket sent an ICMP question: ping sockets by their identifier, raw sockets where all belong to one workload.

The kernel lists them with user and inode (/proc/net/icmp, /proc/net/raw; and their IPv6 kin), but without a cgroup:
that is the one of a process that holds the inode among its open files. The rest is as for any socket (nfq.attribution).
What no such socket sent is the host's own: also what a program with CAP_NET_RAW made up by itself (IPPROTO_RAW), who
could as well send frames past all rules.
"""
# A Path costs as much as the system call.
# ruff: noqa: PTH115

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, NamedTuple

from nfq import cgroup
from nfq.attestation import Attributed
from nfq.attribution import Attributor
from nfq.cgroup import Cgroups
from nfq.sockdiag import Socket
from sectool.errors import SectoolError

_LOOKS: Final = 8192  # at processes and descriptors, for one question
_SOCKETS: Final = 8  # raw sockets looked at; more than that are nobody's in particular
_LINES: Final = 4096


class _Listed(NamedTuple):
    """A socket as /proc/net lists it; `number`: identifier of a ping socket, protocol of a raw one."""

    number: int
    uid: int
    inode: int


class IcmpOwners:
    """Owners of ICMP sockets of this network namespace. For one thread."""

    def __init__(self, attributor: Attributor, cgroups: Cgroups, proc: Path = Path("/proc")) -> None:
        self._attributor = attributor
        self._cgroups = cgroups
        self._proc = os.fspath(proc)

    def sender(self, v6: bool, identifier: int) -> Attributed:
        """Who sent an outgoing question; the host itself when no socket can be named. Never raises."""
        six = "6" if v6 else ""
        found = [one for one in self._listed(f"icmp{six}") if one.number == identifier]
        if not found:
            found = [one for one in self._listed(f"raw{six}") if one.number == (58 if v6 else 1)]
        if not found or len(found) > _SOCKETS:
            return self._attributor.host()
        owners = self._owners(found)
        if not owners or any(owner.key != owners[0].key for owner in owners):
            return self._attributor.host()
        return owners[0]

    def _listed(self, name: str) -> list[_Listed]:
        try:
            with open(f"{self._proc}/thread-self/net/{name}", encoding="ascii") as listing:  # noqa: PTH123
                lines = listing.readlines(_LINES * 160)[1:]
        except OSError:
            return []
        out = []
        for line in lines:
            # sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode ... (net/ipv4/ping.c, raw.c)
            fields = line.split()
            if len(fields) > 9:
                out.append(_Listed(int(fields[1].rpartition(":")[2], 16), int(fields[7]), int(fields[9])))
        return out

    def _owners(self, sockets: list[_Listed]) -> list[Attributed]:
        """Each socket's owner; none at all when one of them has none that can be found."""
        holders = self._holders({one.inode: one.uid for one in sockets})
        out = []
        for one in sockets:
            path = holders.get(one.inode)
            if path is None:
                return []
            try:
                number = self._cgroups.id_of(path)
            except SectoolError:
                return []
            sock = Socket(one.uid, one.inode, number, 0, 0, b"", 0, b"", 0)
            out.append(self._attributor.of(sock))
        return out

    def _holders(self, wanted: dict[int, int]) -> dict[int, str]:
        """cgroup path of a process that holds each inode; of all processes, those of the sockets' users first."""
        names = {f"socket:[{inode}]": inode for inode in wanted}
        found: dict[int, str] = {}
        looks = _LOOKS
        for pid in self._processes(set(wanted.values())):
            folder = f"{self._proc}/{pid}/fd"
            try:
                with os.scandir(folder) as entries:
                    for entry in entries:
                        looks -= 1
                        if looks < 0:
                            return found
                        inode = names.get(os.readlink(f"{folder}/{entry.name}"))
                        path = cgroup.of_process(pid) if inode is not None and inode not in found else None
                        if inode is not None and path is not None:
                            found[inode] = path
            except OSError:
                continue  # gone meanwhile
            if len(found) == len(names):
                break
        return found

    def _processes(self, uids: set[int]) -> list[int]:
        mine: list[int] = []
        others: list[int] = []
        with os.scandir(self._proc) as entries:
            for entry in entries:
                if entry.name.isdigit():
                    try:
                        (mine if entry.stat().st_uid in uids else others).append(int(entry.name))
                    except OSError:
                        continue
        return mine[::-1] + others[::-1]  # the youngest first: most likely it has just been started
