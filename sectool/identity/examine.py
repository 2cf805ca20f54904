"""What a credential in a file is worth, judged by the verifier of the packet path: for `sectool identity verify`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from sectool.clock import iso
from sectool.events import DropReason
from sectool.identity.enrolment import load_host
from sectool.identity.federation import Federation
from sectool.identity.lists import Lists
from sectool.identity.profile import read_profile, refusal
from sectool.identity.revocation import MAX_LIST
from sectool.identity.verify import Verifier

_CHAIN = (2, 3)  # leaf and host CA; the root behind them is read over: only the trust bundle's counts


def examine(
    data: bytes, state: Path, now_us: int, *, closed: bool = True, required: Sequence[str] = ()
) -> dict[str, Any]:
    """Who a PEM chain, a credential blob or a revocation list is by what `state` trusts; CredentialError when refused.

    `closed` and `required` are the settings on lists that have expired or are not there.
    UsageError when this host is not enrolled: then it trusts nobody.
    """
    host = load_host(state)
    federation = Federation(state / "trust", host.trust_domain)
    bundle = federation.added_to(host.bundle)
    lists = Lists(state, bundle, now_us)
    if len(data) > MAX_LIST:
        raise refusal(DropReason.CREDENTIAL_OVERSIZED, f"there are more than {MAX_LIST} bytes")
    if b"-----BEGIN X509 CRL-----" in data:
        found = lists.read(data, now_us)
        if now_us > found.next_update_us:
            raise refusal(DropReason.REVOCATION_STALE, f"the list expired at {iso(found.next_update_us)}")
        return {
            "list_of": found.who,
            "number": found.number,
            "fresh_until": iso(found.next_update_us),
            "serials": len(found.entries.serials),
            "keys": len(found.entries.keys),
            "workloads": len(found.entries.workloads),
        }
    verifier = Verifier(bundle, own_domain=host.trust_domain, accepted=federation.accepted)
    verifier.set_revocations(lists.revocations(closed=closed, required=required))
    pem = b"-----BEGIN" in data
    peer = verifier.verify_chain(*_chain(data), now_us) if pem else verifier.verify(data, now_us)
    return {
        "spiffe_id": peer.spiffe_id,
        "labels": str(peer.labels),
        "host": peer.host or "-",
        "serial": peer.serial,
        "valid_from": iso(peer.not_before_us),
        "valid_until": iso(peer.not_after_us),
    }


def _chain(pem: bytes) -> tuple[bytes, bytes]:
    try:
        certificates = x509.load_pem_x509_certificates(pem)
        ders = [each.public_bytes(Encoding.DER) for each in certificates]
    except Exception as error:  # a dozen types for bad input
        raise refusal(
            DropReason.CREDENTIAL_MALFORMED, f"a certificate is not well-formed ({type(error).__name__})"
        ) from None
    if len(ders) not in _CHAIN:
        raise refusal(
            DropReason.UNTRUSTED_CHAIN,
            f"the chain has {len(ders)} certificates; it is SVID, host CA, and if need be the root",
        )
    if len(ders) == 3:
        last = read_profile(ders[2], "root")
        last.check_ca()
        last.issued_by(last)
    return ders[0], ders[1]
