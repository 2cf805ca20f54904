"""Which Debian package owns a program file: from dpkg's file lists, read once for all files that are asked together.

    /var/lib/dpkg/info/<package>[:<arch>].list    one path a line
    /var/lib/dpkg/status                          stanzas, for the version

A path tells what was installed there, not what is there now: whether the file is still the packaged one is told by its
SHA-256. On systems with merged /usr a list may have the path without /usr.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

DPKG: Final = Path("/var/lib/dpkg")
_MERGED: Final = ("/usr/bin/", "/usr/sbin/", "/usr/lib/", "/usr/lib64/", "/usr/libexec/")
_STANZA: Final = re.compile(rb"^Package: (\S+)\n(?:.+\n)*?(?:Version: (\S+)\n)", re.MULTILINE)


class Packages:
    """Owners of files, remembered until dpkg's database changes. For one thread at a time."""

    def __init__(self, dpkg: Path = DPKG) -> None:
        self._dpkg = dpkg
        self._known: dict[str, str] = {}
        self._stamp = 0

    def known(self, path: str) -> str | None:
        """The answer found before; None when it was not asked yet, or dpkg has worked since."""
        if self._changed():
            self._known.clear()
        return self._known.get(path)

    def owners(self, paths: Iterable[str]) -> dict[str, str]:
        """`package version` of each path, '' for one that no package owns. Takes tens of milliseconds; never raises."""
        self._changed()
        wanted = dict.fromkeys(paths, "")
        found = self._search(wanted)
        versions = self._versions(set(found.values()))
        for path, package in found.items():
            version = versions.get(package, "")
            wanted[path] = f"{package} {version}" if version else package
        self._known.update(wanted)
        return wanted

    def _changed(self) -> bool:
        try:
            stamp = (self._dpkg / "status").stat().st_mtime_ns
        except OSError:
            stamp = 0
        before, self._stamp = self._stamp, stamp
        return before != stamp

    def _search(self, paths: Iterable[str]) -> dict[str, str]:
        needles = {
            b"\n" + form.encode("utf-8", "surrogateescape") + b"\n": path
            for path in paths
            for form in _forms(path)
        }
        found: dict[str, str] = {}
        for file in self._lists():
            try:
                content = b"\n" + file.read_bytes()
            except OSError:
                continue
            for needle, path in needles.items():
                if path not in found and needle in content:
                    found[path] = file.name.removesuffix(".list").partition(":")[0]
        return found

    def _lists(self) -> Iterator[Path]:
        try:
            yield from sorted((self._dpkg / "info").glob("*.list"))
        except OSError:
            return

    def _versions(self, packages: set[str]) -> dict[str, str]:
        if not packages:
            return {}
        try:
            status = (self._dpkg / "status").read_bytes()
        except OSError:
            return {}
        pairs = (
            (m[1].decode(errors="replace"), m[2].decode(errors="replace")) for m in _STANZA.finditer(status)
        )
        return {name: version for name, version in pairs if name in packages}


def _forms(path: str) -> Iterator[str]:
    yield path
    if path.startswith(_MERGED):
        yield path.removeprefix("/usr")
