"""SVIDs of another issuer on this host, usually a SPIRE agent: taken from its Workload API and made credentials of.

What such an SVID needs to be one is the shape that every verifier asks for (docs/decisions/0013): a leaf with a P-256
or Ed25519 key, issued by an intermediate CA with path length 0, issued by a root of the bundle. Its key signs a
delegation, like a leaf's of ours; the blob has the same form and size.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, x25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_private_key

from sectool.clock import SECOND
from sectool.errors import CredentialError, SectoolError
from sectool.events import DropReason
from sectool.identity.blob import MAX_BLOB, Delegation, SigningKey, compress, pack, size_with
from sectool.identity.credential import Credential, PeerIdentity
from sectool.identity.profile import Profile, key_id, read_profile
from sectool.spiffe.grpc import call
from sectool.spiffe.messages import FETCH_SVID, DecodeError, X509SVIDResponse
from sectool.spiffe.workloadapi import REQUIRED

log = logging.getLogger("sectool.spiffe")

MAX_SVIDS: Final = 1024
PAUSE_S: Final = 1.0  # before asking again, doubled each time up to
LONGEST_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Taken:
    """One SVID as it came: DER certificates (leaf first), its key, its domain's roots.

    `hint` is the issuer's name for what it is for.
    """

    spiffe_id: str
    hint: str
    chain: tuple[bytes, ...] = field(repr=False)
    key: SigningKey = field(repr=False)
    roots: tuple[bytes, ...] = field(repr=False)

    @property
    def name(self) -> str:
        """Of the workload it is for: the hint, or the last part of its SPIFFE ID."""
        return self.hint or self.spiffe_id.rsplit("/", 1)[-1]


def read_answer(message: bytes) -> list[Taken]:
    """The SVIDs of one X509SVIDResponse; any bytes give a list or SectoolError. One that cannot be read fails all."""
    answer = X509SVIDResponse()
    try:
        answer.ParseFromString(message)
    except DecodeError:
        raise SectoolError("the Workload API's answer is no X509SVIDResponse") from None
    if len(answer.svids) > MAX_SVIDS:
        raise SectoolError(f"the Workload API answers with {len(answer.svids)} SVIDs")
    return [
        Taken(
            str(svid.spiffe_id),
            str(svid.hint),
            _certificates(bytes(svid.x509_svid)),
            _key(bytes(svid.x509_svid_key)),
            _certificates(bytes(svid.bundle)),
        )
        for svid in answer.svids
    ]


def _certificates(data: bytes) -> tuple[bytes, ...]:
    """DER certificates that stand one behind the other."""
    out = []
    while data:
        head = 2 if len(data) > 1 and data[1] < 0x80 else 2 + (data[1] & 0x7F) if len(data) > 1 else 0
        size = data[1] if head == 2 else int.from_bytes(data[2:head], "big")
        if data[0] != 0x30 or not 2 <= head <= 5 or head + size > len(data):
            raise SectoolError("the Workload API's answer holds no DER certificates")
        out.append(data[: head + size])
        data = data[head + size :]
    return tuple(out)


def _key(der: bytes) -> SigningKey:
    try:
        key = load_der_private_key(der, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise SectoolError("the Workload API's answer holds no private key") from None
    if isinstance(key, ed25519.Ed25519PrivateKey) or (
        isinstance(key, ec.EllipticCurvePrivateKey) and isinstance(key.curve, ec.SECP256R1)
    ):
        return key
    raise SectoolError("the SVID's key is neither P-256 nor Ed25519", "set the issuer's key type to ec-p256")


def credential_of(taken: Taken, labels: Mapping[str, str], now_us: int) -> Credential:
    """A credential that presents this SVID; `labels` are those that verifiers map its SPIFFE ID to.

    Raises CredentialError with what is in the way: a chain of another shape, a CA that allows more CAs, a certificate
    that is over, a SYN too small for it.
    """
    if len(taken.chain) != 2:
        raise CredentialError(
            DropReason.UNTRUSTED_CHAIN,
            f"{taken.spiffe_id} comes with {len(taken.chain)} certificates; a leaf and one intermediate are needed",
            "give the SPIRE server an UpstreamAuthority, so that an intermediate issues",
        )
    leaf, issuer = read_profile(taken.chain[0], "leaf"), read_profile(taken.chain[1], "intermediate CA")
    leaf.check_leaf()
    issuer.check_ca()
    if issuer.path_length != 0:
        raise CredentialError(
            DropReason.KEY_USAGE_INVALID,
            f"the CA that issued {taken.spiffe_id} may issue further CAs (path length is not 0)",
            "have the upstream CA set a path length of 0",
        )
    leaf.issued_by(issuer)
    spiffe_id = leaf.spiffe_id()
    if str(spiffe_id) != taken.spiffe_id or not spiffe_id.path:
        raise CredentialError(
            DropReason.SPIFFE_ID_INVALID, f"the certificate of {taken.spiffe_id} is for {spiffe_id}"
        )
    if taken.key.public_key() != leaf.public_key:
        raise CredentialError(
            DropReason.DELEGATION_INVALID, f"the key of {taken.spiffe_id} is not its certificate's"
        )
    root = _root(issuer, taken.roots)
    chain = (leaf, issuer, root)
    end_us = min(profile.not_after_us for profile in chain)
    if end_us <= now_us:
        raise CredentialError(DropReason.CREDENTIAL_EXPIRED, f"the SVID {taken.spiffe_id} has expired")
    stream = compress(taken.chain[0], taken.chain[1])
    if size_with(stream) > MAX_BLOB:
        raise CredentialError(
            DropReason.CREDENTIAL_OVERSIZED,
            f"the credential of {taken.spiffe_id} takes {size_with(stream)} bytes; a SYN holds {MAX_BLOB}",
            "shorten names and extensions in the issuer's certificates",
        )
    private = x25519.X25519PrivateKey.generate()
    public = private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    delegation = Delegation.sign(taken.key, public, end_us // SECOND, stream)
    begin_us = max(profile.not_before_us for profile in chain)
    issuer_names = key_id(issuer.public_key), f"{issuer.serial:x}"
    peer = PeerIdentity.of(
        spiffe_id,
        labels,
        public,
        (begin_us, end_us),
        leaf.fingerprint,
        leaf.serial,
        "",
        issuer_names,
        key_id(root.public_key),
    )
    return Credential(
        leaf_der=taken.chain[0],
        host_der=taken.chain[1],
        delegation=delegation,
        blob=pack(delegation, stream),
        x25519_private=private,
        x25519_public=public,
        leaf_key=taken.key,
        peer=peer,
        not_after_us=end_us,
        renew_at_us=end_us
        - (end_us - begin_us) // 4,  # its issuer renews at half life; then ours is taken in time
    )


def _root(issuer: Profile, roots: tuple[bytes, ...]) -> Profile:
    for der in roots:
        root = read_profile(der, "root")
        try:
            issuer.issued_by(root)
        except CredentialError:
            continue
        return root
    raise CredentialError(DropReason.UNTRUSTED_CHAIN, "no root in the SVID's bundle issued its CA")


class Spire:
    """The SVIDs that a Workload API on this host gives to us, kept up to date."""

    def __init__(
        self, socket: Path, problem: Callable[[str], None], pause_s: Callable[[float], float] = float
    ) -> None:
        """`problem` hears why there are none now, and '' when there are again."""
        self.socket = socket
        self._problem = problem
        self._pause_s = pause_s
        self._known: dict[str, Taken] = {}
        self.heard = asyncio.Event()  # an answer has come

    async def run(self) -> None:
        """Follow the stream of answers; what has come stays when it breaks off. Ends when cancelled."""
        pause = PAUSE_S
        while True:
            try:
                async for message in call(self.socket, FETCH_SVID, b"", dict([REQUIRED])):
                    self._known = {taken.name: taken for taken in read_answer(message)}
                    pause = PAUSE_S
                    self.heard.set()
                    self._problem("")
                self._problem("it has ended the stream of SVIDs")
            except SectoolError as error:
                self._problem(error.message)
            await asyncio.sleep(self._pause_s(pause))
            pause = min(2 * pause, LONGEST_S)

    def names(self) -> list[str]:
        """The workloads there are SVIDs for."""
        return sorted(self._known)

    def of(self, name: str) -> Taken | None:
        """The SVID for the workload of that name, if there is one."""
        return self._known.get(name)
