"""SPIFFE IDs (SPIFFE-ID specification, sections 2.1 to 2.4), parsed strictly.

Nothing is normalised: an id is accepted in its one canonical spelling or refused. Beyond the specification,
a trust domain must also be usable as the value of the label `domain`: it begins and ends with a letter or
digit and has at most 128 characters (the specification allows 255 and any of its letters at the edges).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from sectool.errors import CredentialError
from sectool.events import DropReason

MAX_ID = 2048  # bytes of a whole URI
MAX_TRUST_DOMAIN = 128

_SCHEME = "spiffe://"
_DOMAIN = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,126}[a-z0-9])?")
_SEGMENT = re.compile(r"[A-Za-z0-9._-]+")


def _refuse(message: str) -> CredentialError:
    return CredentialError(
        DropReason.SPIFFE_ID_INVALID, message, "a SPIFFE ID looks like spiffe://example.org/host/web1/wl/shop"
    )


def check_trust_domain(name: str) -> str:
    """Return `name`, or raise CredentialError(SPIFFE_ID_INVALID)."""
    if not _DOMAIN.fullmatch(name):
        raise _refuse(
            f"trust domain {name[:200]!r} is not valid: a-z 0-9 . _ - only, at most {MAX_TRUST_DOMAIN}"
        )
    return name


def check_path(path: str) -> str:
    """Return `path` ('' or '/a/b' with clean segments), or raise CredentialError(SPIFFE_ID_INVALID)."""
    if path and not path.startswith("/"):
        raise _refuse(f"SPIFFE path {path[:200]!r} does not begin with /")
    for segment in path.split("/")[1:]:
        if segment in ("", ".", "..") or not _SEGMENT.fullmatch(segment):
            raise _refuse(
                f"SPIFFE path {path[:200]!r} has a bad segment: A-Z a-z 0-9 . _ - only, not empty, . or .."
            )
    return path


@dataclass(frozen=True, slots=True)
class SpiffeId:
    """One SPIFFE ID; `path` is '' (a trust domain's own id) or begins with '/'."""

    trust_domain: str
    path: str

    def __post_init__(self) -> None:
        check_trust_domain(self.trust_domain)
        check_path(self.path)
        if len(_SCHEME) + len(self.trust_domain) + len(self.path) > MAX_ID:
            raise _refuse(f"SPIFFE ID is longer than {MAX_ID} bytes")

    def __str__(self) -> str:
        return f"{_SCHEME}{self.trust_domain}{self.path}"

    @classmethod
    def parse(cls, text: str) -> SpiffeId:
        """Parse a URI; anything but a canonical SPIFFE ID raises CredentialError(SPIFFE_ID_INVALID)."""
        if len(text) > MAX_ID:
            raise _refuse(f"SPIFFE ID is longer than {MAX_ID} bytes")
        if not text.startswith(_SCHEME):
            raise _refuse(f"{text[:200]!r} does not begin with spiffe://")
        domain, slash, rest = text[len(_SCHEME) :].partition("/")
        return cls(domain, slash + rest)
