"""What the CA service answers: a request's path and body and the client's certificate in, status and body out.

    GET  /v1/roots    nothing to show        the roots, PEM: the client compares them with the hash in its token
    POST /v1/enroll   a token                {"id", "secret", "request"}  ──► the answer to the request (joining)
    POST /v1/sync     a host's certificate   {"host", "digest", "lists", "request"?}
                                             ──► {"digest", "roots", "lists", "answer"?}; waits for news a while

Whatever is wrong with a request gives 4xx and a sentence, changes nothing, and is counted. Of a token that does not
hold nobody learns why.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding

from sectool.caservice.tokens import Tokens
from sectool.errors import CredentialError, SectoolError
from sectool.identity import rollover
from sectool.identity.authority import RootAuthority
from sectool.identity.credential import PeerIdentity
from sectool.identity.enrolment import within_reach
from sectool.identity.files import read_file, write_atomic
from sectool.identity.joining import grant, pinned, read_request
from sectool.identity.register import Registered, read_host_certificate
from sectool.identity.revocation import RevocationList, Revocations, read_list
from sectool.identity.verify import Verifier

log = logging.getLogger("sectool.caservice")

LISTS: Final = "lists"  # folder of the hosts' own revocation lists
MAX_LISTS: Final = 4096
DIGEST_S: Final = 0.2
Note = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer."""

    status: int
    body: bytes
    kind: str = "text/plain"


class RefusedError(SectoolError):
    """A request that is turned down; `status` is the HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def client_path(host: str) -> str:
    """SPIFFE path of the identity a host's agent shows to the CA service."""
    return f"/host/{host}/ca-client"


class Service:
    """The CA behind the wire. One thread."""

    def __init__(self, ca_dir: Path, root: RootAuthority, note: Note) -> None:
        """`note` puts on record what has happened: a kind and its fields."""
        self.ca_dir, self.root, self.note = ca_dir, root, note
        self.tokens = Tokens(ca_dir)
        self._said: tuple[float, str] = (float("-inf"), "")

    # -- what is published ---------------------------------------------------------------------------------------------

    def lists(self, now_us: int) -> list[RevocationList]:
        """The root's newest list and the hosts' own, each verified again."""
        bundle = rollover.bundle(self.ca_dir)
        found = []
        for path in (self.ca_dir / "revoked.pem", *sorted((self.ca_dir / LISTS).glob("*.pem"))[:MAX_LISTS]):
            if path.exists():
                try:
                    pem = read_file(path, "there is no such list", "sectool ca revoke")
                    found.append(read_list(pem, bundle, now_us))
                except SectoolError as error:
                    log.warning("%s is not passed on: %s", path, error.message)
        return found

    def digest_now(self, now_us: int, now_s: float) -> str:
        """`digest`, at most DIGEST_S old: many may wait for it to change."""
        if now_s - self._said[0] > DIGEST_S:
            self._said = now_s, self.digest(self.lists(now_us))
        return self._said[1]

    def digest(self, lists: list[RevocationList]) -> str:
        """Names what is published now."""
        said = rollover.bundle(self.ca_dir).to_pem().encode() + b"".join(each.pem for each in lists)
        return hashlib.sha256(said).hexdigest()

    # -- requests ------------------------------------------------------------------------------------------------------

    def enroll(self, body: bytes, now_us: int) -> Answer:
        """Spend a token on a host CA."""
        fields = _fields(body)
        try:
            wanted = read_request(_text(fields, "request").encode())
            kept = self.tokens.consume(_text(fields, "id"), _text(fields, "secret"), wanted.name, now_us)
            given = kept.constraints(wanted.name)
            limits = within_reach(given, wanted.name, pinned(given))
            roots = rollover.bundle(self.ca_dir)
            answer = grant(self.root, wanted, limits, roots, now_us, ca_dir=self.ca_dir)
        except RefusedError:
            raise
        except SectoolError as error:
            self.note("refused", {"why": error.message})
            raise RefusedError(403, error.message) from None
        self.note("enrolled", {"host": wanted.name, "token": kept.id, "constraints": str(limits)})
        return Answer(200, answer, "application/x-pem-file")

    def client(self, leaf_der: bytes, host_pem: str, now_us: int) -> tuple[PeerIdentity, Registered]:
        """Whose certificate the TLS client showed; RefusedError unless it is a host's agent, and not revoked."""
        try:
            host = read_host_certificate(host_pem.encode())
            verifier = Verifier(rollover.bundle(self.ca_dir))
            verifier.set_revocations(Revocations(self.lists(now_us), closed=False))
            der = host.profile.certificate.public_bytes(Encoding.DER)
            peer = verifier.verify_chain(leaf_der, der, now_us)
        except SectoolError as error:
            self.note("refused", {"why": error.message})
            raise RefusedError(403, error.message) from None
        if peer.spiffe_id != f"spiffe://{self.root.trust_domain}{client_path(host.name)}":
            raise RefusedError(403, "this identity is not a host's agent")
        return peer, host

    def sync(self, leaf_der: bytes, body: bytes, now_us: int) -> tuple[dict[str, Any], str]:
        """What a host is to know; with it the digest that the host has now."""
        fields = _fields(body)
        _, host = self.client(leaf_der, _text(fields, "host"), now_us)
        given = fields.get("lists", [])
        if not isinstance(given, list) or len(given) > 1 or not all(isinstance(each, str) for each in given):
            raise RefusedError(400, "lists has to be a list of one text at most")
        for pem in given:
            self._take(pem.encode(), host, now_us)
        answer: dict[str, Any] = {}
        request = fields.get("request")
        if request is not None:
            answer["answer"] = self._renew(str(request), host, now_us)
        return answer, str(fields.get("digest", ""))

    def _take(self, pem: bytes, host: Registered, now_us: int) -> None:
        """Keep a host's own list, if it is newer than what is known."""
        try:
            found = read_list(pem, rollover.bundle(self.ca_dir), now_us)
        except CredentialError as error:
            raise RefusedError(400, f"the host's list does not hold: {error.message}") from None
        if found.issuer != host.key:
            raise RefusedError(403, "a host hands in no list but its own")
        path = self.ca_dir / LISTS / f"{found.issuer}.pem"
        known = next((each for each in self.lists(now_us) if each.issuer == found.issuer), None)
        if known is None or found.number > known.number:
            path.parent.mkdir(mode=0o755, exist_ok=True)
            write_atomic(path, found.pem)
            self.note("revoked", {"host": host.name, "number": found.number})

    def _renew(self, request: str, host: Registered, now_us: int) -> str:
        """A new CA for a host that has one: same name, same constraints, its new key."""
        try:
            wanted = read_request(request.encode())
        except CredentialError as error:
            raise RefusedError(400, error.message) from None
        if wanted.name != host.name:
            raise RefusedError(403, f"a renewal is for the same host: {host.name}")
        roots = rollover.bundle(self.ca_dir)
        made = grant(self.root, wanted, host.constraints, roots, now_us, ca_dir=self.ca_dir)
        self.note("renewed", {"host": host.name, "constraints": str(host.constraints)})
        return made.decode("ascii")

    def news(self, answer: dict[str, Any], now_us: int) -> Answer:
        """The answer to `sync`, with all that is published."""
        lists = self.lists(now_us)
        said = {
            **answer,
            "digest": self.digest(lists),
            "roots": rollover.bundle(self.ca_dir).to_pem(),
            "current": self.root.certificate.fingerprint(_SHA256).hex(),
            "lists": [each.pem.decode("ascii") for each in lists],
        }
        return Answer(200, json.dumps(said).encode(), "application/json")


def _fields(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise RefusedError(400, "the body is not JSON") from None
    if not isinstance(fields, dict):
        raise RefusedError(400, "the body is not a JSON object")
    return fields


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise RefusedError(400, f"{name} has to be text")
    return value


_SHA256 = SHA256()
