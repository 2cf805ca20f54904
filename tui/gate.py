"""Who may look at the console in a browser: whoever has the token of the printed address, once; then their browser.

    token ──first use──► session (a cookie of this browser, for a secret place) ──► page, script, terminal
      └── any further use ──► refused

Other users of the host reach the port, too, and so do the pages that a browser has open elsewhere. So every request
needs the session, the name it asks for has to be ours (else any name that resolves to this host would do), and a
terminal is opened for our own page only. A browser sends a cookie to every port of a host: so it is for a random place
in our address alone, which what listens on other ports is never asked for. Secrets are compared in constant time.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto

COOKIE = "sectool-top"
BYTES = 32


class Entry(Enum):
    """What becomes of a request."""

    REFUSED = auto()
    ADMITTED = auto()  # by the token: it gets the session
    KNOWN = auto()


@dataclass(slots=True)
class Gate:
    """One console's gate; `hosts` are the names (with port) under which it may be asked for."""

    hosts: frozenset[str]
    token: str = field(default_factory=lambda: secrets.token_urlsafe(BYTES), repr=False)
    session: str = field(default_factory=lambda: secrets.token_urlsafe(BYTES), repr=False)
    place: str = field(default_factory=lambda: f"/{secrets.token_urlsafe(BYTES)}/", repr=False)

    def enter(
        self, path: str, query: Mapping[str, str], cookies: Mapping[str, str], headers: Mapping[str, str]
    ) -> Entry:
        """Judge one request. The token opens the page alone, and is used up by that."""
        if headers.get("Host", "").lower() not in self.hosts:
            return Entry.REFUSED
        origin = headers.get("Origin")
        if origin is not None and origin.lower().removeprefix("http://") not in self.hosts:
            return Entry.REFUSED
        if _same(cookies.get(COOKIE, ""), self.session):
            return Entry.KNOWN
        if path == "/" and _same(query.get("token", ""), self.token):
            self.token = ""
            return Entry.ADMITTED
        return Entry.REFUSED


def _same(given: str, secret: str) -> bool:
    return bool(secret) and hmac.compare_digest(given.encode("utf-8", "replace"), secret.encode())
