"""Labels: what a certificate vouches for and policy selects on.

Keys and values follow a deliberately small alphabet (that of Kubernetes labels, plus `/` and `.` inside
keys for prefixes) so that a label can be printed anywhere, put into a sentence and compared bytewise.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType

_KEY = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._/-]{0,61}[A-Za-z0-9])?")
_VALUE = re.compile(r"(?:[A-Za-z0-9_/](?:[A-Za-z0-9._/@:+-]{0,126}[A-Za-z0-9_])?)?")

MAX_LABELS = 64

# Set by whoever verifies a credential, never taken from one: the trust domain, and whether it is another than ours.
DOMAIN_LABEL = "domain"
FEDERATED_LABEL = "federated"


class LabelError(ValueError):
    """A label key, value or set outside the allowed alphabet or size."""


@lru_cache(maxsize=16_384)  # a large policy says the same few thousand labels over and over
def check_label(key: str, value: str) -> None:
    """Raise LabelError unless `key=value` is a well-formed label."""
    if not _KEY.fullmatch(key):
        raise LabelError(
            f"label key {key!r} is not valid: letters, digits and . _ - / inside, at most 63 characters"
        )
    if not _VALUE.fullmatch(value):
        raise LabelError(
            f"value {value!r} of label {key!r} is not valid: letters, digits and . _ - / @ : + inside, "
            "at most 128 characters"
        )


class LabelSet(Mapping[str, str]):
    """An immutable, hashable set of labels with a stable 64-bit id.

    `id` is the first 8 bytes (big endian, top bit cleared so that it fits a signed BIGINT) of the SHA-256
    of the canonical text `k=v,k=v` in key order: equal sets have equal ids on every host, without coordination.
    """

    __slots__ = ("_hash", "_map", "id")

    def __init__(self, labels: Mapping[str, str] | None = None) -> None:
        items = dict(sorted((labels or {}).items()))
        if len(items) > MAX_LABELS:
            raise LabelError(f"{len(items)} labels; at most {MAX_LABELS} are allowed")
        for key, value in items.items():
            check_label(key, value)
        self._map: Mapping[str, str] = MappingProxyType(items)
        self.id: int = stable_id(str(self).encode())
        self._hash = hash(self.id)

    def __getitem__(self, key: str) -> str:
        return self._map[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._map)

    def __len__(self) -> int:
        return len(self._map)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if isinstance(other, LabelSet):
            return self._map == other._map
        return NotImplemented

    def __str__(self) -> str:
        return ",".join(f"{k}={v}" for k, v in self._map.items())

    def __repr__(self) -> str:
        return f"LabelSet({str(self)!r})"

    def with_(self, more: Mapping[str, str]) -> LabelSet:
        """A new set in which `more` wins over what is here."""
        return LabelSet({**self._map, **more})

    @classmethod
    def parse(cls, text: str) -> LabelSet:
        """Parse `k=v,k=v`; a doubled key or a part without `=` raises LabelError."""
        out: dict[str, str] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            key, sep, value = part.partition("=")
            if not sep:
                raise LabelError(f"{part!r} is not a label; write key=value")
            if key in out:
                raise LabelError(f"label key {key!r} is given twice")
            out[key] = value
        return cls(out)


def stable_id(data: bytes) -> int:
    """63-bit content id: first 8 bytes of SHA-256, top bit cleared; 0 is never returned (it means 'none')."""
    value = int.from_bytes(hashlib.sha256(data).digest()[:8], "big") & 0x7FFF_FFFF_FFFF_FFFF
    return value or 1
