"""What the CA service and importing hosts read: `read_list`, `read_request`, `read_answer`, `Token.decode`.

Any bytes give a SectoolError (of a list and a request: CredentialError with a reason) or a value that says again what
was signed; nothing that the genuine issuer has not signed is ever taken.
"""

from __future__ import annotations

import base64
from contextlib import suppress
from functools import cache

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from sectool.caservice.tokens import Token
from sectool.errors import CredentialError, SectoolError, UsageError
from sectool.events import now_us
from sectool.identity.joining import make_request, read_answer, read_request
from sectool.identity.profile import read_profile
from sectool.identity.revocation import Entries, read_list, sign_list
from sectool.identity.trust import TrustBundle
from tests.fuzz.script import FLIP, Script, change
from tests.fuzz.world import root

SOME = Entries(frozenset({"aa", "bb"}), frozenset({"0" * 64}), {"spiffe://fuzz.example/host/a/wl/x": 7})
TOKEN = Token("https://10.0.0.1:8443", "ab" * 32, "1a2b3c", "cd" * 32)


@cache
def _bundle() -> TrustBundle:
    certificate = root().certificate
    return TrustBundle().with_root(root().trust_domain, certificate.public_bytes(Encoding.PEM).decode())


@cache
def _list() -> bytes:
    profile = read_profile(root().certificate.public_bytes(Encoding.DER), "root")
    pem = sign_list(profile, root()._key, SOME, 7, now_us(), days=3650)
    return x509.load_pem_x509_crl(pem).public_bytes(Encoding.DER)


@cache
def _request() -> bytes:
    pem = make_request(ec.generate_private_key(ec.SECP256R1()), "web-1")
    return x509.load_pem_x509_csr(pem).public_bytes(Encoding.DER)


def _pem(what: str, der: bytes) -> bytes:
    body = base64.encodebytes(der).decode()
    return f"-----BEGIN {what}-----\n{body}-----END {what}-----\n".encode()


def one(data: bytes) -> None:
    """A first byte: which reader, and whether the rest is what it reads, or changes something genuine."""
    script = Script(data)
    match script.below(256) % 6:
        case 0:
            _read_list(_pem("X509 CRL", script.changed(_list())))
        case 1:
            _read_list(script.rest())
        case 2:
            with suppress(CredentialError):
                assert read_request(_pem("CERTIFICATE REQUEST", script.changed(_request()))).name == "web-1"
        case 3:
            with suppress(CredentialError):
                read_request(script.rest())
        case 4:
            with suppress(SectoolError):
                read_answer(script.rest())
        case _:
            with suppress(UsageError):
                token = Token.decode(script.rest().decode("latin-1"))
                assert Token.decode(token.encode()) == token


def _read_list(pem: bytes) -> None:
    try:
        found = read_list(pem, _bundle(), now_us())
    except CredentialError as error:
        assert error.reason
        return
    assert found.entries == SOME


def seeds() -> dict[str, bytes]:
    """Genuine lists, requests, answers and tokens, whole and changed."""
    out = {
        "list": b"\1" + _pem("X509 CRL", _list()),
        "request": b"\3" + _pem("CERTIFICATE REQUEST", _request()),
        "answer": b"\4" + root().certificate.public_bytes(Encoding.PEM) + _bundle().to_pem().encode(),
        "roots": b"\4" + _bundle().to_pem().encode(),
        "token": b"\5" + TOKEN.encode().encode(),
    }
    for kind, der in ((0, _list()), (2, _request())):
        for at in range(0, 200, 40):
            out[f"flip-{kind}-{at}"] = bytes((kind, 1)) + change(FLIP, at, 0, size=len(der))
    return out
