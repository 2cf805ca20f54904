"""Our two private X.509 extensions: the labels of a leaf and the label constraints of a host CA.

Both values are one DER UTF8String (so that any ASN.1 tool prints them) of restricted ASCII in one canonical
spelling: equal values have equal bytes, and every other spelling is refused. Both are non-critical: a SPIFFE
verifier that does not know them still accepts the certificates, and simply learns no labels.

    labels        env=prod,tier=web                      keys in order: LabelSet's canonical text
    constraints   /host/web1/;*=*;env=dev|test;zone=eu*  path prefix, key patterns and values in order

The OIDs live below an arc made from a random UUID (ITU-T X.667, {2 25 uuid}), which needs no registry.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from uuid import UUID

from cryptography.x509 import ObjectIdentifier

from sectool.errors import CredentialError
from sectool.events import DropReason
from sectool.identity.spiffe import check_path
from sectool.labels import MAX_LABELS, LabelSet

ARC = f"2.25.{UUID('fd579ee4-f553-47fc-a9a9-a2ec7ffea88f').int}"
LABELS_OID = ObjectIdentifier(f"{ARC}.1")
CONSTRAINTS_OID = ObjectIdentifier(f"{ARC}.2")

MAX_EXTENSION = 4096  # bytes of an extension's DER we are willing to look at
MAX_VALUES = 64  # value patterns of one key

_KEY_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,62}\*?|\*")
_VALUE_PATTERN = re.compile(r"(?:[A-Za-z0-9_/][A-Za-z0-9._/@:+-]{0,127})?\*?")


def _malformed(message: str) -> CredentialError:
    return CredentialError(DropReason.CREDENTIAL_MALFORMED, message)


def _der_text(text: str) -> bytes:
    """DER UTF8String (X.690, 8.1.3 and 8.23) of ASCII text."""
    body = text.encode("ascii")
    n = len(body)
    if n > MAX_EXTENSION:
        raise _malformed(f"{n} bytes of labels or constraints; at most {MAX_EXTENSION} are allowed")
    if n < 0x80:
        return bytes((0x0C, n)) + body
    if n < 0x100:
        return bytes((0x0C, 0x81, n)) + body
    return bytes((0x0C, 0x82)) + n.to_bytes(2, "big") + body


def _text_of_der(data: bytes, what: str) -> str:
    """The text inside exactly one DER UTF8String of ASCII, or CredentialError(CREDENTIAL_MALFORMED)."""
    if len(data) > MAX_EXTENSION:
        raise _malformed(f"the {what} extension is longer than {MAX_EXTENSION} bytes")
    if len(data) < 2 or data[0] != 0x0C:
        raise _malformed(f"the {what} extension is not a UTF8String")
    head = 2 if data[1] < 0x80 else 3 if data[1] == 0x81 else 4
    try:
        text = data[head:].decode("ascii")
    except UnicodeDecodeError:
        raise _malformed(f"the {what} extension is not ASCII") from None
    if _der_text(text) != data:  # wrong, non-minimal or trailing length
        raise _malformed(f"the {what} extension is not in its canonical encoding")
    return text


def encode_labels(labels: LabelSet) -> bytes:
    """The labels extension's value."""
    return _der_text(str(labels))


def decode_labels(data: bytes) -> dict[str, str]:
    """Parse a labels extension's value; CredentialError(CREDENTIAL_MALFORMED) for anything not canonical.

    The keys come in order, each once; their alphabet is for LabelSet to check.
    """
    text = _text_of_der(data, "labels")
    labels: dict[str, str] = {}
    last = ""
    for part in text.split(",") if text else ():
        key, equals, value = part.partition("=")
        if not equals or key <= last or "=" in value or len(labels) == MAX_LABELS:
            raise _malformed("the labels extension is not in its canonical order")
        labels[key] = value
        last = key
    return labels


@dataclass(frozen=True, slots=True, init=False)
class LabelConstraints:
    """What a host's CA may vouch for.

    `allow` maps a key pattern to the value patterns allowed under it; a pattern is literal text, or a prefix
    with a trailing `*`. Of the key patterns that match a label's key only the most specific one counts (a
    literal key, then the longest prefix), so `{"*": ("*",), "env": ("dev",)}` means: anything, but env only
    dev. A key that no pattern matches is not allowed; an empty tuple forbids its key. `path_prefix` is ''
    (any) or begins and ends with '/': every SPIFFE path below this CA must begin with it.
    """

    allow: Mapping[str, tuple[str, ...]]
    path_prefix: str
    _prefixes: tuple[str, ...] = field(repr=False, compare=False)  # key patterns with *, longest first

    def __init__(self, allow: Mapping[str, Iterable[str]], path_prefix: str = "") -> None:
        """Raise CredentialError(CREDENTIAL_MALFORMED) for patterns outside alphabet or limits."""
        if len(allow) > MAX_LABELS:
            raise _malformed(f"{len(allow)} label constraints; at most {MAX_LABELS} are allowed")
        clean: dict[str, tuple[str, ...]] = {}
        for key in sorted(allow):
            values = tuple(sorted(set(allow[key])))
            if not _KEY_PATTERN.fullmatch(key):
                raise _malformed(
                    f"label constraint key {key[:100]!r} is not valid: a label key, a prefix* or *"
                )
            if len(values) > MAX_VALUES:
                raise _malformed(f"label constraint {key!r} lists {len(values)} values; at most {MAX_VALUES}")
            for value in values:
                if not _VALUE_PATTERN.fullmatch(value):
                    raise _malformed(
                        f"label constraint {key}={value[:200]!r} is not valid: a label value or prefix*"
                    )
            clean[key] = values
        if path_prefix:
            if not path_prefix.endswith("/"):
                raise _malformed(f"path prefix {path_prefix[:200]!r} does not end with /")
            check_path(path_prefix[:-1])
        object.__setattr__(self, "allow", MappingProxyType(clean))
        object.__setattr__(self, "path_prefix", path_prefix)
        starred = sorted((key for key in clean if key.endswith("*")), key=len, reverse=True)
        object.__setattr__(self, "_prefixes", tuple(starred))

    def __hash__(self) -> int:
        return hash(str(self))

    def __str__(self) -> str:
        parts = (key + ("=" + "|".join(values) if values else "") for key, values in self.allow.items())
        return ";".join((self.path_prefix, *parts))

    def permits(self, key: str, value: str) -> bool:
        """Whether a workload of this host may carry `key=value`."""
        values = self.allow.get(key)
        if values is None:
            pattern = next((p for p in self._prefixes if key.startswith(p[:-1])), None)
            if pattern is None:
                return False
            values = self.allow[pattern]
        return value in values or any(v.endswith("*") and value.startswith(v[:-1]) for v in values)

    def permits_path(self, path: str) -> bool:
        """Whether an SVID with this SPIFFE path may come from this host."""
        return path.startswith(self.path_prefix)


def encode_constraints(constraints: LabelConstraints) -> bytes:
    """The constraints extension's value."""
    return _der_text(str(constraints))


def decode_constraints(data: bytes) -> LabelConstraints:
    """Parse a constraints extension's value; CredentialError for anything not canonical."""
    prefix, *parts = _text_of_der(data, "label constraints").split(";")
    allow: dict[str, tuple[str, ...]] = {}
    for part in parts:
        key, equals, values = part.partition("=")
        allow[key] = tuple(values.split("|")) if equals else ()
    constraints = LabelConstraints(allow, prefix)
    if encode_constraints(constraints) != data:
        raise _malformed("the label constraints extension is not in its canonical encoding")
    return constraints
