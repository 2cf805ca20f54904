"""Another trust domain's bundle, as its endpoint or a file brings it: `read_bundle`.

Any bytes raise SectoolError or are read; what is read are CAs, and their document reads the same again.
"""

from __future__ import annotations

import json
from contextlib import suppress

from cryptography.hazmat.primitives.serialization import Encoding

from sectool.errors import SectoolError
from sectool.identity.bundle import of_roots, parse_bundle, read_bundle
from sectool.identity.trust import read_root
from tests.fuzz.script import Script
from tests.fuzz.world import root

DOMAIN = "lab.example"


def one(data: bytes) -> None:
    """A first byte: the rest is a document (even), or changes a true one (odd)."""
    script = Script(data)
    text = script.changed(_true()) if script.below(2) else script.rest()
    with suppress(SectoolError):
        found = read_bundle(text, DOMAIN)
        assert all(profile.is_ca for profile in found.roots)
        again = parse_bundle(found.to_json().encode(), DOMAIN)
        assert (again.fingerprints, again.sequence) == (found.fingerprints, found.sequence)
        assert 60 <= found.refresh_s <= 86_400


def _true() -> bytes:
    profile = read_root(root().certificate.public_bytes(Encoding.PEM).decode(), DOMAIN)
    return of_roots(DOMAIN, [profile], 7).to_json().encode()


def seeds() -> dict[str, bytes]:
    """A true document, PEM, and documents that are nearly one."""
    document = json.loads(_true())
    key = document["keys"][0]
    odd = {
        "empty": {"keys": []},
        "jwt": {"keys": [{"use": "jwt-svid", "kty": "EC"}]},
        "twice": {**document, "keys": [key, key]},
        "no-kty": {**document, "keys": [{k: v for k, v in key.items() if k != "kty"}]},
        "hint": {**document, "spiffe_refresh_hint": 0},
    }
    return {
        "true": b"\0" + _true(),
        "pem": b"\0" + root().certificate.public_bytes(Encoding.PEM),
        **{name: b"\0" + json.dumps(each).encode() for name, each in odd.items()},
    }
