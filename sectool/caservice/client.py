"""The host's end of the CA service: joining with a token, and keeping up afterwards. Blocks: call it in a thread."""

from __future__ import annotations

import http.client
import json
import os
import ssl
from hmac import compare_digest
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from sectool.caservice.service import client_path
from sectool.caservice.tokens import Token
from sectool.errors import CredentialError, SectoolError, UsageError
from sectool.events import now_us
from sectool.identity.authority import HostAuthority, encode_key
from sectool.identity.files import read_file, write_atomic
from sectool.identity.profile import Profile, read_profile
from sectool.identity.trust import TrustBundle
from sectool.labels import LabelSet

SERVICE: Final = "ca-service"  # file in the state folder
MAX_ANSWER: Final = 16 << 20
TIMEOUT_S: Final = 30.0  # longer than the service waits for news


class Connection:
    """One TLS 1.3 connection whose other end is proven to be the CA before anything is said that matters."""

    def __init__(
        self, url: str, authority: HostAuthority | None = None, timeout_s: float = TIMEOUT_S
    ) -> None:
        """Connect; `authority` lends the certificate we show. SectoolError when nobody answers."""
        parts = urlsplit(url)
        try:
            address, port = parts.hostname or "", parts.port or 443
        except ValueError:
            raise UsageError(f"{url[:200]!r} is no URL", "write https://ADDRESS:PORT") from None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # judged by `prove`: by hash, or by the roots this host trusts
        if authority is not None:
            _show(context, authority)
        self.url = url
        self._http = http.client.HTTPSConnection(address, port, timeout=timeout_s, context=context)
        try:
            self._http.connect()
        except (OSError, ssl.SSLError) as error:
            raise SectoolError(
                f"the CA service at {url} does not answer: {error}",
                "is `sectool ca serve` running, and reachable?",
            ) from None
        shown = self._http.sock.getpeercert(True)
        self._leaf = read_profile(shown or b"", "CA service")

    def prove(self, roots: tuple[Profile, ...], trust_domain: str) -> None:
        """CredentialError unless one of these roots has issued the certificate that the other end showed."""
        leaf, now = self._leaf, now_us()
        leaf.check_leaf()
        if str(leaf.spiffe_id()) != f"spiffe://{trust_domain}/ca":
            raise CredentialError(0, f"the server is {leaf.spiffe_id()}, not the CA of {trust_domain}")
        if not leaf.not_before_us - 60_000_000 <= now <= leaf.not_after_us:
            raise CredentialError(
                0, "the server's certificate is not valid now", "compare the clocks of both hosts"
            )
        for root in roots:
            try:
                leaf.issued_by(root)
            except CredentialError:
                continue
            return
        raise CredentialError(
            0, "no root we trust has issued the server's certificate", "is this the right CA?"
        )

    def ask(self, method: str, path: str, body: bytes = b"") -> bytes:
        """Ask once; SectoolError with the service's words when it refuses."""
        try:
            self._http.request(method, path, body)
            answer = self._http.getresponse()
            data = answer.read(MAX_ANSWER + 1)
        except (OSError, http.client.HTTPException) as error:
            raise SectoolError(f"the CA service at {self.url} broke off: {error}", "try again") from None
        if len(data) > MAX_ANSWER:
            raise SectoolError(f"the CA service at {self.url} said more than {MAX_ANSWER} bytes")
        if answer.status != 200:
            said = data[:500].decode("utf-8", "replace").strip()
            raise SectoolError(
                f"the CA service refuses: {said} ({answer.status})", "sectool ca token list, at the CA"
            )
        return data

    def close(self) -> None:
        """Hang up."""
        self._http.close()


def _show(context: ssl.SSLContext, authority: HostAuthority) -> None:
    credential = authority.issue(client_path(authority.host_name), LabelSet(), now_us())
    assert credential.leaf_key is not None
    chain = b"".join(
        x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM)
        for der in (credential.leaf_der, credential.host_der)
    )
    fd = os.memfd_create("svid", os.MFD_CLOEXEC)  # ssl takes keys from files alone
    try:
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(chain + encode_key(credential.leaf_key))
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def remember_service(state: Path, url: str) -> None:
    """Where the agent asks for renewal, roots and lists from now on (state/ca-service)."""
    write_atomic(state / SERVICE, url.encode("ascii") + b"\n")


def service_of(state: Path) -> str:
    """The URL remembered; '' when this host did not join over the network."""
    path = state / SERVICE
    if not path.exists():
        return ""
    return (
        read_file(path, "there is no CA service", "sectool host enroll --join TOKEN")
        .decode("ascii", "replace")
        .strip()
    )


def join(token: Token, request: bytes) -> bytes:
    """Spend the token: the answer to `request`. The secret is said only to a server proven by the root in the token."""
    connection = Connection(token.url)
    try:
        bundle = TrustBundle.from_pem(connection.ask("GET", "/v1/roots").decode("ascii", "replace"))
        for domain, roots in bundle.roots.items():
            pinned = tuple(root for root in roots if compare_digest(root.fingerprint.hex(), token.root))
            if pinned:
                connection.prove(pinned, domain)
                break
        else:
            raise CredentialError(
                0,
                f"the server at {token.url} does not know the root in the token",
                "is this the CA that made it?",
            )
        fields = {"id": token.id, "secret": token.secret, "request": request.decode("ascii")}
        return connection.ask("POST", "/v1/enroll", json.dumps(fields).encode())
    finally:
        connection.close()


def sync(
    url: str,
    authority: HostAuthority,
    roots: tuple[Profile, ...],
    *,
    digest: str = "",
    own_list: bytes = b"",
    request: bytes = b"",
) -> dict[str, Any]:
    """Hand in our list or request, if any, and hear what is published; with `digest` it waits until that is other."""
    connection = Connection(url, authority)
    try:
        connection.prove(roots, authority.trust_domain)
        fields: dict[str, Any] = {
            "host": authority.certificate.public_bytes(Encoding.PEM).decode("ascii"),
            "digest": digest,
            "lists": [own_list.decode("ascii")] if own_list else [],
        }
        if request:
            fields["request"] = request.decode("ascii")
        said = json.loads(connection.ask("POST", "/v1/sync", json.dumps(fields).encode()))
        if not isinstance(said, dict) or not all(
            isinstance(said.get(k), str) for k in ("digest", "roots", "current")
        ):
            raise ValueError("shape")
        if not isinstance(said.get("lists"), list):
            raise ValueError("lists")
    except (ValueError, RecursionError):
        raise SectoolError(
            f"the CA service at {url} said what is no answer", "do the versions differ?"
        ) from None
    finally:
        connection.close()
    return said
