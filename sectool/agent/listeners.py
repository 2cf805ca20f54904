"""Which workload listens on which port: sock_diag tells the sockets, /proc/PID/fd whose they are."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from nfq import netns
from nfq.sockdiag import SockDiag, Socket, TcpState
from nfq.udpdiag import DatagramDiag
from sectool.agent.inventory import Inventory, with_ports
from sectool.errors import SectoolError

log = logging.getLogger("sectool.agent")

LOOKS: Final = 20_000  # at descriptors, in one search for the owners of listeners
AGAIN_S: Final = 6.0  # for a listener that nobody was found to hold
_UDP_OPEN: Final = 7  # a UDP socket that is not connected (TCP_CLOSE)


class Listeners:
    """Remembers which process holds a listening socket, as long as both are there."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._owners: dict[int, int] = {}  # process id by inode of the socket
        self._nobodys: dict[int, float] = {}  # those nobody was found to hold: looked for again then

    def look(self, inventory: Inventory, namespaces: Iterable[str]) -> dict[int, tuple[str, ...]]:
        """Listening ports by workload id, in network namespaces given by paths ('' is our own).

        One that cannot be looked into has none.
        """
        found: list[tuple[str, Socket]] = []
        for path in list(namespaces):
            try:
                found += _listening(path)
            except SectoolError as error:
                log.warning("%s", error.message)
        inodes = {sock.inode for _, sock in found}
        self._owners = {inode: pid for inode, pid in self._owners.items() if inode in inodes}
        now = time.monotonic()
        self._nobodys = {
            inode: until for inode, until in self._nobodys.items() if inode in inodes and until > now
        }
        searched = [s for _, s in found if s.inode not in self._nobodys and not self._owned(inventory, s)]
        self._search(inventory, searched)
        self._nobodys |= {s.inode: now + AGAIN_S for s in searched if s.inode not in self._owners}
        ports = []
        for protocol, sock in found:
            home = inventory.home(self._owners.get(sock.inode, 0))
            if home is not None:
                ports.append((home.number, f"{protocol}/{sock.local_port}"))
        return with_ports(ports)

    def _owned(self, inventory: Inventory, sock: Socket) -> bool:
        pid = self._owners.get(sock.inode)
        return pid is not None and inventory.process(pid) is not None

    def _search(self, inventory: Inventory, socks: list[Socket]) -> None:
        """Which process holds these sockets, among those of the same cgroup; those of other users are possible, too."""
        wanted = {f"socket:[{sock.inode}]": sock for sock in socks}
        cgroups = {sock.cgroup_id for sock in socks}
        looks = LOOKS
        for process, _ in list(inventory.processes()):
            if process.cgroup_id not in cgroups or not wanted:
                continue
            folder = f"{self._proc}/{process.pid}/fd"
            try:
                names = os.listdir(folder)  # noqa: PTH208
            except OSError:
                continue
            for name in names:
                looks -= 1
                if looks < 0:
                    return
                try:
                    sock = wanted.pop(os.readlink(f"{folder}/{name}"), None)  # noqa: PTH115
                except OSError:
                    continue
                if sock is not None:
                    self._owners[sock.inode] = process.pid


def _listening(namespace: str) -> list[tuple[str, Socket]]:
    """Listening TCP and unconnected UDP sockets of a network namespace, '' for our own. Raises SectoolError."""
    with netns.enter(namespace) if namespace else contextlib.nullcontext():
        diags = ("tcp", SockDiag(), 1 << TcpState.LISTEN), ("udp", DatagramDiag(), 1 << _UDP_OPEN)
        passing = {"tcp": range(1), "udp": _ephemeral()}
    found = []
    for protocol, diag, states in diags:
        with contextlib.closing(diag):
            for v6 in (False, True):
                found += [
                    (protocol, s) for s in diag.dump(v6, states) if s.local_port not in passing[protocol]
                ]
    return found


def _ephemeral() -> range:
    """Ports that the kernel gives to sockets that ask for none: a UDP socket there is most likely a client."""
    try:
        low, high = map(
            int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()
        )
    except (OSError, ValueError):
        low, high = 32768, 60999
    return range(low, high + 1)
