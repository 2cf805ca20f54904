"""What files of this host say about names: /etc/hosts, and whom it asks (resolv.conf). Read again when they change.

A local caching resolver (systemd-resolved) is in one file with its own address, in the other with those that it asks:
answers of all of them count. A host that names none asks itself (resolv.conf(5)).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from nfq.namefile import NameFile
from nfq.names import Follower, NameTable
from sectool.policy.selector import host_name

HOSTS: Final = Path("/etc/hosts")
RESOLV: Final = (Path("/etc/resolv.conf"), Path("/run/systemd/resolve/resolv.conf"))
_LIMIT: Final = 4 << 20  # bytes of a file that are read
_MAPPED: Final = bytes(10) + b"\xff\xff"

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Stamp = tuple[int, int, int]


def hosts(text: str) -> Iterator[tuple[bytes, str]]:
    """Address and name, for each name in a file as hosts(5) says; lines that cannot be read are passed over."""
    for line in text.splitlines():
        words = line.partition("#")[0].split()
        try:
            address = ipaddress.ip_address(words[0].partition("%")[0]).packed
        except (ValueError, IndexError):
            continue
        if address.startswith(_MAPPED) and len(address) == 16:
            address = address[12:]
        for word in words[1:]:
            try:
                yield address, host_name(word)
            except ValueError:
                continue


def nameservers(text: str) -> Iterator[Network]:
    """The resolvers that a file as resolv.conf(5) names."""
    for line in text.splitlines():
        words = line.split()
        if len(words) > 1 and words[0] == "nameserver":
            try:
                yield ipaddress.ip_network(ipaddress.ip_address(words[1].partition("%")[0]))
            except ValueError:
                continue


class NameSources:
    """Keeps a NameTable up to date with files: those of the host, and those of the other workers."""

    def __init__(
        self,
        table: NameTable,
        resolvers: Sequence[Network] | None,
        others: Sequence[Path] = (),
        *,
        hosts_file: Path = HOSTS,
        resolv_files: Sequence[Path] = RESOLV,
    ) -> None:
        """`resolvers`: whose answers count; None: those that `resolv_files` name. `others`: files of other workers."""
        self._table = table
        self._others = others
        self._hosts_file = hosts_file
        self._resolv_files = resolv_files
        self._stamps: dict[Path, _Stamp | None] = {}
        self._watched = -1
        self._fixed = resolvers is not None
        table.trust(resolvers)
        self.refresh()

    def refresh(self) -> None:
        """Read what has changed since the last time. Cheap when nothing has."""
        if self._watched != self._table.watched or self._changed(self._hosts_file):
            self._watched = self._table.watched
            self._table.known_by_file(hosts(_read(self._hosts_file)))
        changed = [self._changed(path) for path in self._resolv_files]
        if not self._fixed and any(changed):
            found = [network for path in self._resolv_files for network in nameservers(_read(path))]
            own = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))
            self._table.trust(found or own)
        if self._others:
            self._follow()

    def _changed(self, path: Path) -> bool:
        stamp = _stamp(path)
        if path in self._stamps and self._stamps[path] == stamp:
            return False
        self._stamps[path] = stamp
        return True

    def _follow(self) -> None:
        """Open the files of workers that have come, and of those that made theirs anew."""
        known = {follower.file.path: follower for follower in self._table.others}
        for path in self._others:
            follower = known.get(path)
            stamp = _stamp(path)
            if stamp is None or (follower is not None and follower.file.inode == stamp[0]):
                continue
            file = NameFile.open(path)
            if file is not None:
                if follower is not None:
                    self._table.others.remove(follower)
                    follower.file.close()
                self._table.others.append(Follower(file))


def _stamp(path: Path) -> _Stamp | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(_LIMIT).decode("utf-8", "replace")
    except OSError:
        return ""
