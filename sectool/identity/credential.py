"""A workload's credential, and what the other side learns from it.

`PeerIdentity` is the verified content of a credential: the packet path, the policy engine and the events know
peers by nothing else. `Credential` is our own workload's: the blob to present, the X25519 key behind it, and
the `PeerIdentity` that every verifier will derive from it.

`Credential.to_wire` is for one purpose: handing a credential from the agent to its packet worker over their
private socketpair. It holds the X25519 private key in the clear, so it goes nowhere else: not to disk, not to
a log, not into an argument list. It never holds the leaf's private key: a worker cannot issue or delegate.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric import x25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from sectool.errors import CredentialError
from sectool.events import DropReason
from sectool.identity.blob import MAX_BLOB, Blob, Delegation, SigningKey, unpack
from sectool.identity.spiffe import SpiffeId
from sectool.labels import DOMAIN_LABEL, LabelError, LabelSet, stable_id

MAX_WIRE = 64 * 1024  # bytes of Credential.to_wire

_WIRE_VERSION = 1


@dataclass(frozen=True, slots=True)
class PeerIdentity:
    """Who a peer is, as far as its certificates prove. Times are UTC microseconds, both ends inclusive."""

    spiffe_id: str
    trust_domain: str
    labels: LabelSet  # with `domain=<trust domain>`
    x25519: bytes = field(repr=False)  # 32 bytes: the Noise static key this identity is bound to
    not_before_us: int  # the latest of leaf, host CA and root
    not_after_us: int  # the earliest of leaf, host CA, root and delegation
    fingerprint: bytes  # SHA-256 of the leaf's DER
    serial: str  # the leaf's serial number, lower-case hexadecimal
    host: str  # name of the host whose CA vouches; '' for a CA that is not one of ours
    id: int  # stable_id(fingerprint): the identity's id in events
    issuer: str = ""  # SHA-256 of the host CA's public key, hexadecimal; '' where nobody looked
    issuer_serial: str = ""  # and the serial number of its certificate
    root: str = ""  # SHA-256 of the key of the root that vouches for it, hexadecimal; '' where nobody looked

    @classmethod
    def of(
        cls,
        spiffe_id: SpiffeId,
        labels: Mapping[str, str],
        x25519_public: bytes,
        validity: tuple[int, int],
        fingerprint: bytes,
        serial: int,
        host: str,
        issuer: tuple[str, str] = ("", ""),
        root: str = "",
    ) -> PeerIdentity:
        """Build one, with the label `domain`.

        Raises CredentialError: LABEL_NOT_PERMITTED for another value of that label, CREDENTIAL_MALFORMED for
        labels outside the alphabet or too many of them.
        """
        domain = spiffe_id.trust_domain
        if labels.get(DOMAIN_LABEL, domain) != domain:
            raise CredentialError(
                DropReason.LABEL_NOT_PERMITTED,
                f"label {DOMAIN_LABEL}={labels[DOMAIN_LABEL]} is not the trust domain {domain}",
                f"remove the label {DOMAIN_LABEL}: it is always set to the trust domain",
            )
        try:
            label_set = LabelSet({**labels, DOMAIN_LABEL: domain})
        except LabelError as error:
            raise CredentialError(DropReason.CREDENTIAL_MALFORMED, str(error)) from None
        return cls(
            spiffe_id=str(spiffe_id),
            trust_domain=domain,
            labels=label_set,
            x25519=x25519_public,
            not_before_us=validity[0],
            not_after_us=validity[1],
            fingerprint=fingerprint,
            serial=f"{serial:x}",
            host=host,
            id=stable_id(fingerprint),
            issuer=issuer[0],
            issuer_serial=issuer[1],
            root=root,
        )


@dataclass(frozen=True, slots=True)
class Credential:
    """One workload's credential; `not_after_us` and `renew_at_us` are UTC microseconds.

    `leaf_key` is None in a packet worker, which received the credential through `from_wire`.
    """

    leaf_der: bytes = field(repr=False)
    host_der: bytes = field(repr=False)
    delegation: Delegation = field(repr=False)
    blob: bytes = field(repr=False)  # what is presented to peers, at most MAX_BLOB bytes
    x25519_private: x25519.X25519PrivateKey = field(repr=False)
    x25519_public: bytes = field(repr=False)
    leaf_key: SigningKey | None = field(repr=False)
    peer: PeerIdentity
    not_after_us: int
    renew_at_us: int  # half of the lifetime

    def to_wire(self) -> bytes:
        """For the agent-to-worker socketpair only: holds the X25519 private key (module docstring)."""
        peer = self.peer
        private = self.x25519_private.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
        return json.dumps(
            {
                "version": _WIRE_VERSION,
                "blob": base64.b64encode(self.blob).decode(),
                "key": base64.b64encode(private).decode(),
                "renew_at": self.renew_at_us,
                "spiffe_id": peer.spiffe_id,
                "labels": str(peer.labels),
                "not_before": peer.not_before_us,
                "not_after": peer.not_after_us,
                "fingerprint": peer.fingerprint.hex(),
                "serial": peer.serial,
                "host": peer.host,
                "issuer": [peer.issuer, peer.issuer_serial, peer.root],
            },
            separators=(",", ":"),
        ).encode()

    @classmethod
    def from_wire(cls, data: bytes) -> Credential:
        """Inverse of `to_wire`, without the leaf's key; CredentialError(CREDENTIAL_MALFORMED) for anything
        else.

        The sender is trusted (it is our own agent): nothing is verified beyond the shape and that the private
        key belongs to the blob.
        """
        try:
            return cls._from_wire(data)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, binascii.Error) as error:
            kind = type(error).__name__  # never the error's text: it could quote key material
            raise CredentialError(
                DropReason.CREDENTIAL_MALFORMED,
                f"a credential handed over locally is not well-formed ({kind})",
            ) from None

    @classmethod
    def _from_wire(cls, data: bytes) -> Credential:
        if len(data) > MAX_WIRE:
            raise ValueError("too long")
        fields = json.loads(data.decode("ascii"))
        if fields["version"] != _WIRE_VERSION:
            raise ValueError("version")
        blob = base64.b64decode(fields["blob"], validate=True)
        parts: Blob = unpack(blob)
        private = x25519.X25519PrivateKey.from_private_bytes(base64.b64decode(fields["key"], validate=True))
        public = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        if public != parts.delegation.x25519:
            raise ValueError("key")
        times = [fields[name] for name in ("not_before", "not_after", "renew_at")]
        if not all(type(t) is int for t in times):
            raise TypeError("times")
        spiffe_id = SpiffeId.parse(fields["spiffe_id"])
        fingerprint = bytes.fromhex(fields["fingerprint"])
        if len(fingerprint) != 32 or not isinstance(fields["host"], str):
            raise ValueError("peer")
        issuer, issuer_serial, root = map(str, fields["issuer"])
        peer = PeerIdentity.of(
            spiffe_id,
            LabelSet.parse(fields["labels"]),
            public,
            (times[0], times[1]),
            fingerprint,
            int(fields["serial"], 16),
            fields["host"],
            (issuer, issuer_serial),
            root,
        )
        return cls(
            leaf_der=parts.leaf_der,
            host_der=parts.host_der,
            delegation=parts.delegation,
            blob=blob,
            x25519_private=private,
            x25519_public=public,
            leaf_key=None,
            peer=peer,
            not_after_us=peer.not_after_us,
            renew_at_us=times[2],
        )


__all__ = ["DOMAIN_LABEL", "MAX_BLOB", "MAX_WIRE", "Credential", "PeerIdentity"]
