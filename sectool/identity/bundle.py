"""SPIFFE trust bundles as documents: one trust domain's X.509 authorities as a JWK set.

    {"keys": [{"kty": "EC", "crv": "P-256", "x": …, "y": …, "use": "x509-svid", "x5c": ["<base64 of a CA's DER>"]}],
     "spiffe_sequence": 7, "spiffe_refresh_hint": 300}

Sources: SPIFFE Trust Domain and Bundle, section 4; X509-SVID, section 6.1; RFC 7517, 4.7 and 5; RFC 7518, 6.2; RFC
8037, 2. The document does not say whose it is: the trust domain always comes from whoever configured it. Keys of other
kinds and uses are ignored, as the specification asks; a CA that cannot be an anchor here is left out, with its reason.
A document without any key takes back all that were published before.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from sectool.errors import CredentialError, SectoolError
from sectool.identity.profile import Profile
from sectool.identity.spiffe import check_trust_domain
from sectool.identity.trust import MAX_ROOTS, TrustBundle, read_root

MAX_DOCUMENT: Final = 256 * 1024  # bytes of a document we are willing to read
MAX_KEYS: Final = 256  # JWKs of any kind
DEFAULT_REFRESH_S: Final = 300  # what the specification recommends when a document gives no hint
MIN_REFRESH_S: Final = 60
MAX_REFRESH_S: Final = 86_400
_MAX_SEQUENCE: Final = (1 << 63) - 1

_HINT = "it has to be a SPIFFE bundle: a JWK set with x509-svid keys (sectool trust export makes one)"


@dataclass(frozen=True, slots=True)
class SpiffeBundle:
    """One trust domain's bundle. `ignored` says of each X.509 authority left out why."""

    trust_domain: str
    roots: tuple[Profile, ...]
    sequence: int | None = None
    refresh_hint_s: int | None = None
    ignored: tuple[str, ...] = ()

    @property
    def refresh_s(self) -> int:
        """How often to look for a newer one: as hinted, within bounds of our own."""
        hint = DEFAULT_REFRESH_S if self.refresh_hint_s is None else self.refresh_hint_s
        return min(max(hint, MIN_REFRESH_S), MAX_REFRESH_S)

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """SHA-256 of the roots, hexadecimal, in order."""
        return tuple(sorted(root.fingerprint.hex() for root in self.roots))

    def added_to(self, bundle: TrustBundle) -> TrustBundle:
        """`bundle` with this domain's roots, and no others for it."""
        return TrustBundle({**bundle.without(self.trust_domain).roots, self.trust_domain: self.roots})

    def to_json(self) -> str:
        """The document, as `parse_bundle` reads it."""
        document: dict[str, Any] = {"keys": [_jwk(root) for root in self.roots]}
        if self.sequence is not None:
            document["spiffe_sequence"] = self.sequence
        if self.refresh_hint_s is not None:
            document["spiffe_refresh_hint"] = self.refresh_hint_s
        return json.dumps(document, indent=2) + "\n"


def of_roots(
    trust_domain: str, roots: Iterable[Profile], sequence: int, refresh_hint_s: int = DEFAULT_REFRESH_S
) -> SpiffeBundle:
    """The bundle of these roots, to be published."""
    return SpiffeBundle(check_trust_domain(trust_domain), tuple(roots), sequence, refresh_hint_s)


def parse_bundle(data: bytes, trust_domain: str) -> SpiffeBundle:
    """Read a document for `trust_domain`; any bytes give a SpiffeBundle or SectoolError.

    A document whose X.509 authorities can all not be used here is refused; one without any is an empty bundle.
    """
    try:
        check_trust_domain(trust_domain)
    except CredentialError as error:
        raise SectoolError(error.message, "a trust domain looks like partner.example") from None
    if len(data) > MAX_DOCUMENT:
        raise _bad(trust_domain, f"it has {len(data)} bytes, more than {MAX_DOCUMENT}")
    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _bad(trust_domain, f"not JSON: {error}") from None
    keys = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(keys, list):
        raise _bad(trust_domain, "there is no list 'keys'")
    if len(keys) > MAX_KEYS:
        raise _bad(trust_domain, f"it has {len(keys)} keys, more than {MAX_KEYS}")
    roots: dict[bytes, Profile] = {}
    ignored: list[str] = []
    for number, key in enumerate(keys, 1):
        if not isinstance(key, dict):
            raise _bad(trust_domain, f"key {number} is not an object")
        if key.get("use") != "x509-svid":
            continue
        try:
            root = _root(key, trust_domain)
        except SectoolError as error:
            ignored.append(f"key {number}: {error.message}")
            continue
        roots[root.fingerprint] = root
    if ignored and not roots:
        raise _bad(trust_domain, f"no key in it can be used here; {ignored[0]}")
    if len(roots) > MAX_ROOTS:
        raise _bad(trust_domain, f"it has {len(roots)} roots; at most {MAX_ROOTS} are supported")
    return SpiffeBundle(
        trust_domain,
        tuple(roots.values()),
        _count(document, "spiffe_sequence", trust_domain, _MAX_SEQUENCE),
        _count(document, "spiffe_refresh_hint", trust_domain, _MAX_SEQUENCE),
        tuple(ignored),
    )


def read_bundle(data: bytes, trust_domain: str) -> SpiffeBundle:
    """A bundle as people hand it over: the document, or the roots' certificates in PEM. SectoolError otherwise."""
    if b"-----BEGIN" not in data[:MAX_DOCUMENT]:
        return parse_bundle(data, trust_domain)
    if len(data) > MAX_DOCUMENT:
        raise _bad(trust_domain, f"it has {len(data)} bytes, more than {MAX_DOCUMENT}")
    try:
        roots = TrustBundle().with_root(trust_domain, data.decode("ascii", "replace")).roots[trust_domain]
    except CredentialError as error:
        raise SectoolError(error.message, "a trust domain looks like partner.example") from None
    return SpiffeBundle(trust_domain, roots)


def _root(key: dict[str, Any], trust_domain: str) -> Profile:
    chain = key.get("x5c")
    if not isinstance(chain, list) or len(chain) != 1 or not isinstance(chain[0], str):
        raise SectoolError("x5c has to hold exactly one certificate")
    try:
        der = base64.b64decode(chain[0], validate=True)
        certificate = x509.load_der_x509_certificate(der)
        root = read_root(certificate.public_bytes(Encoding.PEM).decode("ascii"), trust_domain)
    except SectoolError:
        raise
    except (binascii.Error, ValueError, TypeError):
        raise SectoolError("x5c holds no certificate") from None
    except (
        Exception
    ) as error:  # the parser has further exception types for bad input; each means the same here
        raise SectoolError(f"x5c holds no well-formed certificate ({type(error).__name__})") from None
    public = _public(root)
    if any(name in key and key[name] != public.get(name) for name in ("kty", "crv", "x", "y")):
        raise SectoolError("the key is not the one of its certificate")
    if "kty" not in key:
        raise SectoolError("kty is missing")
    return root


def _jwk(root: Profile) -> dict[str, Any]:
    der = root.certificate.public_bytes(Encoding.DER)
    return {**_public(root), "use": "x509-svid", "x5c": [base64.b64encode(der).decode("ascii")]}


def _public(root: Profile) -> dict[str, str]:
    key = root.public_key
    if isinstance(key, ec.EllipticCurvePublicKey):
        numbers = key.public_numbers()
        return {"kty": "EC", "crv": "P-256", "x": _field(numbers.x), "y": _field(numbers.y)}
    raw = key.public_bytes(Encoding.Raw, PublicFormat.Raw)
    return {"kty": "OKP", "crv": "Ed25519", "x": _url64(raw)}


def _field(number: int) -> str:
    return _url64(number.to_bytes(32, "big"))


def _url64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")


def _count(document: dict[str, Any], name: str, trust_domain: str, most: int) -> int | None:
    value = document.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise _bad(trust_domain, f"{name} is not a whole number")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers of a document with a doubled member may see two documents (RFC 8259, 4)."""
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a member is given twice")
    return out


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _bad(trust_domain: str, why: str) -> SectoolError:
    return SectoolError(f"the bundle for {trust_domain} cannot be taken: {why}", _HINT)
