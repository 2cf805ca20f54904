"""The messages of the SPIFFE Workload API (workloadapi.proto of the specification), for protobuf.

Messages that only JWT and WIT methods use are left out, like those methods.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from sectool.spiffe.protobuf import BYTES, DecodeError, Message, Messages

SERVICE: Final = "SpiffeWorkloadAPI"  # without package: its name on the wire
FETCH_SVID: Final = f"/{SERVICE}/FetchX509SVID"
FETCH_BUNDLES: Final = f"/{SERVICE}/FetchX509Bundles"
UNSUPPORTED: Final = tuple(
    f"/{SERVICE}/{name}"
    for name in ("FetchJWTSVID", "FetchJWTBundles", "ValidateJWTSVID", "FetchWITSVID", "FetchWITBundles")
)

_messages = Messages("sectool/workloadapi.proto")
_messages.describe("X509SVID").scalar("spiffe_id", 1).scalar("x509_svid", 2, BYTES).scalar(
    "x509_svid_key", 3, BYTES
).scalar("bundle", 4, BYTES).scalar("hint", 5)
_messages.describe("X509SVIDResponse").of("svids", 1, "X509SVID", many=True).scalar(
    "crl", 2, BYTES, many=True
).map("federated_bundles", 3, BYTES)
_messages.describe("X509BundlesResponse").scalar("crl", 1, BYTES, many=True).map("bundles", 2, BYTES)

X509SVIDResponse: type[Any] = _messages.type("X509SVIDResponse")
X509BundlesResponse: type[Any] = _messages.type("X509BundlesResponse")

__all__ = [
    "FETCH_BUNDLES",
    "FETCH_SVID",
    "SERVICE",
    "UNSUPPORTED",
    "DecodeError",
    "Message",
    "X509BundlesResponse",
    "X509SVIDResponse",
    "bundles_response",
    "svid_response",
]


def svid_response(
    spiffe_id: str,
    chain: bytes,
    key: bytes,
    bundle: bytes,
    federated: Mapping[str, bytes],
    crls: Iterable[bytes] = (),
) -> bytes:
    """One SVID: DER chain with the leaf first, PKCS #8 key, DER roots; other domains' roots by SPIFFE ID; DER CRLs."""
    message = X509SVIDResponse()
    message.svids.add(spiffe_id=spiffe_id, x509_svid=chain, x509_svid_key=key, bundle=bundle)
    message.federated_bundles.update(federated)
    message.crl.extend(crls)
    return bytes(message.SerializeToString(deterministic=True))


def bundles_response(bundles: Mapping[str, bytes], crls: Iterable[bytes] = ()) -> bytes:
    """DER roots by SPIFFE ID of their trust domain; DER CRLs."""
    message = X509BundlesResponse()
    message.bundles.update(bundles)
    message.crl.extend(crls)
    return bytes(message.SerializeToString(deterministic=True))
