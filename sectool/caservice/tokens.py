"""Join tokens: good for one enrolment, until they expire, with the constraints that the host will get.

    join1.<base64url of JSON: url, root (SHA-256 of the root's certificate), id, secret>

The CA keeps the SHA-256 of the 32 random bytes of the secret, never the secret; ca/tokens.json, 0600, under a lock.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import fcntl
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Final

from sectool.clock import DAY, SECOND
from sectool.errors import CredentialError, SectoolError, UsageError
from sectool.identity.extensions import LabelConstraints
from sectool.identity.files import read_file, write_atomic
from sectool.identity.profile import is_host_name

PREFIX: Final = "join1."
MAX_TOKEN: Final = 2048  # characters
MAX_TOKENS: Final = 4096
KEPT_US: Final = 30 * DAY  # how long one that is used, revoked or expired is still listed
_FILE = "tokens.json"


@dataclass(frozen=True, slots=True)
class Token:
    """What a host shows to join, decoded."""

    url: str
    root: str  # SHA-256 of the root's certificate, hexadecimal
    id: str
    secret: str

    def __repr__(self) -> str:
        """Without the secret: it may end up in a message."""
        return f"Token({self.id!r})"

    def encode(self) -> str:
        """The text that is handed to the host."""
        body = json.dumps({"url": self.url, "root": self.root, "id": self.id, "secret": self.secret})
        return PREFIX + base64.urlsafe_b64encode(body.encode()).decode().rstrip("=")

    @classmethod
    def decode(cls, text: str) -> Token:
        """Inverse of `encode`; UsageError for anything else, which never quotes it."""
        text = text.strip()
        try:
            if not text.startswith(PREFIX) or len(text) > MAX_TOKEN:
                raise ValueError("shape")
            body = text.removeprefix(PREFIX).encode("ascii")
            fields = json.loads(base64.b64decode(body + b"=" * (-len(body) % 4), b"-_", validate=True))
            token = cls(**fields)
            if not all(isinstance(value, str) for value in asdict(token).values()):
                raise TypeError("text")
            if len(bytes.fromhex(token.root)) != 32 or not token.url.startswith("https://"):
                raise ValueError("root or url")
        except (ValueError, TypeError, AttributeError, RecursionError, binascii.Error):
            raise UsageError("this is not a join token", "it comes from: sectool ca token create") from None
        return token


@dataclass(frozen=True, slots=True)
class Kept:
    """What the CA knows of a token. Times are UTC microseconds; `state`: open, used or revoked."""

    id: str
    digest: str  # SHA-256 of the secret, hexadecimal
    name: str  # the host's; '' for any
    allow: dict[str, list[str]]
    path_prefix: str  # '' for /host/<name>/
    created_us: int
    expires_us: int
    state: str = "open"
    used_us: int = 0
    used_by: str = ""

    def constraints(self, host: str) -> LabelConstraints:
        """What the host gets."""
        return LabelConstraints(
            {key: tuple(values) for key, values in self.allow.items()}, self.path_prefix or f"/host/{host}/"
        )


class Tokens:
    """The tokens of one CA folder; every change is made under a lock and on disk before it counts."""

    def __init__(self, ca_dir: Path) -> None:
        self._dir = ca_dir

    @contextlib.contextmanager
    def _locked(self) -> Iterator[dict[str, Kept]]:
        try:
            fd = os.open(self._dir / ".tokens.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise SectoolError(
                f"cannot open {self._dir}: {error.strerror}", "run it where the root is"
            ) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield self._read()
        finally:
            os.close(fd)

    def _read(self) -> dict[str, Kept]:
        path = self._dir / _FILE
        if not path.exists():
            return {}
        try:
            rows = json.loads(read_file(path, "there are no tokens", "sectool ca token create", secret=True))
            return {row["id"]: Kept(**row) for row in rows}
        except (ValueError, TypeError, KeyError) as error:
            raise SectoolError(
                f"{path} is damaged ({type(error).__name__})", "remove it: open tokens are void then"
            ) from None

    def _write(self, known: dict[str, Kept]) -> None:
        text = json.dumps([asdict(kept) for kept in known.values()], indent=1)
        write_atomic(self._dir / _FILE, text.encode(), 0o600)

    def all(self) -> list[Kept]:
        """Every token that is still listed, oldest first."""
        with self._locked() as known:
            return sorted(known.values(), key=lambda kept: kept.created_us)

    def create(
        self, url: str, root: str, name: str, constraints: LabelConstraints, ttl_s: int, now_us: int
    ) -> Token:
        """Make one. UsageError for bad values and when there are too many."""
        if name and not is_host_name(name):
            raise UsageError(
                f"host name {name[:100]!r} is not valid", "letters, digits and . _ - inside, at most 63"
            )
        if not url.startswith("https://"):
            raise UsageError(f"{url[:200]!r} is not the CA service's URL", "write https://ADDRESS:PORT")
        if not 1 <= ttl_s <= 30 * 86_400:
            raise UsageError(
                "a token is good for at least a second and at most 30 days", "choose a shorter time"
            )
        secret = secrets.token_bytes(32)
        token = Token(url, root, secrets.token_hex(6), secret.hex())
        kept = Kept(
            token.id,
            hashlib.sha256(secret).hexdigest(),
            name,
            {key: list(values) for key, values in constraints.allow.items()},
            constraints.path_prefix,
            now_us,
            now_us + ttl_s * SECOND,
        )
        with self._locked() as known:
            known = {k: v for k, v in known.items() if max(v.expires_us, v.used_us) > now_us - KEPT_US}
            if len(known) >= MAX_TOKENS:
                raise UsageError(
                    f"there are {len(known)} tokens already", "revoke some: sectool ca token revoke ID"
                )
            self._write({**known, kept.id: kept})
        return token

    def consume(self, token_id: str, secret: str, host: str, now_us: int) -> Kept:
        """Use a token up for a host, for good, before anything is issued. CredentialError, the same for every cause
        that a stranger could probe for; a token that names a host is used up by no other.
        """
        try:
            digest = hashlib.sha256(bytes.fromhex(secret)).hexdigest()
        except ValueError:
            digest = ""
        with self._locked() as known:
            kept = known.get(token_id)
            same = hmac.compare_digest(digest, kept.digest if kept is not None else "0" * 64)
            if kept is None or not same or kept.state != "open" or now_us > kept.expires_us:
                raise CredentialError(
                    0,
                    "the token is not known here, used, revoked or expired",
                    "make another: sectool ca token create",
                )
            if kept.name and kept.name != host:
                raise CredentialError(
                    0, f"the token is for host {kept.name}", "name the host so, or make another token"
                )
            used = replace(kept, state="used", used_us=now_us, used_by=host)
            self._write({**known, token_id: used})
        return used

    def revoke(self, token_id: str, now_us: int) -> Kept:
        """Void an open token; UsageError when there is none of that id."""
        with self._locked() as known:
            kept = known.get(token_id)
            if kept is None or kept.state != "open":
                raise UsageError(f"there is no open token {token_id[:40]!r}", "sectool ca token list")
            gone = replace(kept, state="revoked", used_us=now_us)
            self._write({**known, token_id: gone})
        return gone
