"""Beside a journal: who its slots refer to, as JSON lines. Identities by number, sets of host names by a negative one.

Written once each, before the first slot that refers to them. When many have come and gone the file is made anew with
those that some slot still needs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, Final

from nfq.journalslot import Memory
from sectool.identity.verify import PeerIdentity
from sectool.labels import LabelError, LabelSet

LIMIT: Final = 65_536  # lines, before those that nobody needs any more are left out


class JournalNames:
    """The writer's end of one such file."""

    def __init__(self, path: Path, needed: Callable[[], set[int]], limit: int = LIMIT) -> None:
        """`needed` tells which numbers some slot refers to."""
        self.path = path
        self._needed = needed
        self._limit = self._lines_limit = limit
        self._written: set[int] = set()
        self._out: IO[str]
        self._open()

    def _open(self) -> None:
        self._out = os.fdopen(_private(self.path, os.O_APPEND), "w", encoding="ascii")
        self._out.write("\n")  # ends a line that a crash has torn

    def identity(self, identity: PeerIdentity | None) -> int:
        """The number of an identity, which is in the file from now on; 0: none. Raises OSError: no room for it."""
        if identity is None:
            return 0
        if identity.id not in self._written:
            self._put(identity.id, _to_json(identity))
        return identity.id

    def names(self, names: frozenset[str]) -> int:
        """The (negative) number of a set of host names, likewise; 0: no names."""
        if not names:
            return 0
        number = number_of(names)
        if number not in self._written:
            self._put(number, {"id": number, "names": sorted(names)})
        return number

    def _put(self, number: int, line: dict[str, object]) -> None:
        if len(self._written) >= self._lines_limit:
            self.compact()
        self._out.write(json.dumps(line) + "\n")
        self._out.flush()
        self._written.add(number)

    def load(self) -> Memory:
        """What the file holds, which counts as written."""
        memory = read(self.path)
        self._written = {*memory.identities, *memory.names}
        return memory

    def compact(self) -> None:
        """Make the file anew, with what is needed. Raises OSError."""
        memory, needed = read(self.path), self._needed()
        fresh = self.path.with_name(self.path.name + ".new")
        with os.fdopen(_private(fresh, os.O_TRUNC), "w", encoding="ascii") as out:
            for number in needed & memory.identities.keys():
                out.write(json.dumps(_to_json(memory.identities[number])) + "\n")
            for number in needed & memory.names.keys():
                out.write(json.dumps({"id": number, "names": sorted(memory.names[number])}) + "\n")
        fresh.replace(self.path)
        self._out.close()
        self._open()
        self._written = needed & {*memory.identities, *memory.names}
        self._lines_limit = max(self._limit, 2 * len(self._written))

    def close(self) -> None:
        """The file stays."""
        self._out.close()


def read(path: Path) -> Memory:
    """What a file holds, as far as it can be understood. Raises OSError."""
    identities: dict[int, PeerIdentity] = {}
    names: dict[int, frozenset[str]] = {}
    for text in _lines(path):
        try:
            line = json.loads(text)
            if "names" in line:
                names[int(line["id"])] = frozenset(str(name) for name in line["names"])
            else:
                identity = _from_json(line)
                identities[identity.id] = identity
        except (ValueError, KeyError, TypeError, AttributeError, LabelError):
            continue  # a line torn by a crash
    return Memory(identities, names)


def _lines(path: Path) -> Iterable[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except FileNotFoundError:
        return ()


def _private(path: Path, how: int) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | how, 0o600)


def number_of(names: frozenset[str]) -> int:
    """The number of a set of host names, the same in every journal: below zero, of its content."""
    digest = hashlib.sha256("\n".join(sorted(names)).encode()).digest()
    return -1 - (int.from_bytes(digest[:8], "big") >> 1)


def _to_json(i: PeerIdentity) -> dict[str, object]:
    return {
        "id": i.id,
        "spiffe_id": i.spiffe_id,
        "trust_domain": i.trust_domain,
        "labels": dict(i.labels),
        "x25519": i.x25519.hex(),
        "not_before_us": i.not_before_us,
        "not_after_us": i.not_after_us,
        "fingerprint": i.fingerprint.hex(),
        "serial": i.serial,
        "host": i.host,
        "issuer": i.issuer,
        "issuer_serial": i.issuer_serial,
        "root": i.root,
    }


def _from_json(d: dict[str, Any]) -> PeerIdentity:
    labels = d.pop("labels")
    x25519, fingerprint = bytes.fromhex(str(d.pop("x25519"))), bytes.fromhex(str(d.pop("fingerprint")))
    if not isinstance(labels, dict):
        raise ValueError("labels")
    return PeerIdentity(labels=LabelSet(labels), x25519=x25519, fingerprint=fingerprint, **d)
