"""Verification of peers' credentials: arbitrary bytes in, a `PeerIdentity` or a named refusal out.

The order is the contract, cheap checks before public-key operations, and nothing is remembered before all
hold:

    1 size, cache                    CREDENTIAL_OVERSIZED
    2 decompress, parse              CREDENTIAL_OVERSIZED, CREDENTIAL_MALFORMED, UNTRUSTED_CHAIN (algorithm)
    3 SPIFFE ids, trust domain       SPIFFE_ID_INVALID, UNTRUSTED_DOMAIN, UNTRUSTED_CHAIN
    4 CA and key usage flags         KEY_USAGE_INVALID
    5 validity, delegation's bound   CREDENTIAL_EXPIRED, CREDENTIAL_NOT_YET_VALID,
                                     DELEGATION_INVALID, DELEGATION_EXPIRED
    6 revocation                     CREDENTIAL_REVOKED, REVOCATION_STALE
    7 path and labels                SPIFFE_ID_INVALID, LABEL_NOT_PERMITTED
    8 host CA signed by a root       UNTRUSTED_CHAIN     (remembered per host CA)
    9 leaf signed by the host CA     UNTRUSTED_CHAIN
   10 delegation signed by the leaf  DELEGATION_INVALID

The chain is leaf <- host CA <- root, never shorter or longer. Credentials that held are remembered by the
SHA-256 of their blob until they expire; refusals are remembered for NEGATIVE_TTL_S in a cache of their own,
so that a flood of garbage evicts no good one. One Verifier belongs to one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256

from sectool.clock import SECOND, iso
from sectool.errors import CredentialError
from sectool.events import DropReason
from sectool.identity.blob import MAX_BLOB, Blob, unpack
from sectool.identity.credential import PeerIdentity
from sectool.identity.extensions import LabelConstraints, decode_constraints, decode_labels
from sectool.identity.profile import Profile, key_id, read_profile, refusal
from sectool.identity.revocation import Revocations
from sectool.identity.spiffe import SpiffeId
from sectool.identity.trust import TrustBundle
from sectool.labels import DOMAIN_LABEL, FEDERATED_LABEL, LabelSet

NEGATIVE_TTL_S = 5
NEGATIVE_SIZE = 4096
HOST_SIZE = 4096

__all__ = ["PathLabels", "PathRule", "PeerIdentity", "TrustBundle", "Verifier", "path_labels", "path_rules"]

PathLabels = Callable[[SpiffeId], Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class PathRule:
    """Labels for SVIDs that carry none: `pattern` is a SPIFFE ID, or its beginning with a trailing `*`."""

    pattern: str
    labels: LabelSet


def path_rules(pairs: Iterable[tuple[str, Iterable[tuple[str, str]]]]) -> list[PathRule]:
    """Rules from patterns and labels, as settings and the packet worker's configuration hold them."""
    return [PathRule(pattern, LabelSet(dict(labels))) for pattern, labels in pairs]


def path_labels(rules: Sequence[PathRule]) -> PathLabels:
    """A mapping from SPIFFE ids to labels; of the rules that match, later ones win key by key."""

    def labels_of(spiffe_id: SpiffeId) -> Mapping[str, str]:
        text = str(spiffe_id)
        found: dict[str, str] = {}
        for rule in rules:
            head, star, _ = rule.pattern.partition("*")
            if text.startswith(head) if star else text == rule.pattern:
                found.update(rule.labels)
        return found

    return labels_of


@dataclass(frozen=True, slots=True)
class _Host:
    """A host CA, read; once it is in the cache, also signed by `root`."""

    profile: Profile
    spiffe_id: SpiffeId
    constraints: LabelConstraints | None  # None: not one of ours, its leaves may carry no labels
    name: str
    key: str  # key_id
    serial: str


def _read_host(der: bytes) -> _Host:
    profile = read_profile(der, "host CA")
    raw = profile.constraints
    constraints = decode_constraints(raw) if raw is not None else None
    name = profile.host_name() if constraints else ""
    return _Host(
        profile, profile.spiffe_id(), constraints, name, key_id(profile.public_key), f"{profile.serial:x}"
    )


def _keys(bundle: TrustBundle) -> frozenset[str]:
    return frozenset(key_id(root.public_key) for roots in bundle.roots.values() for root in roots)


class Verifier:
    """Verifies credential blobs against a trust bundle; the time is a parameter of each call."""

    __slots__ = (
        "_accepted",
        "_bundle",
        "_good",
        "_good_size",
        "_hosts",
        "_own",
        "_path_labels",
        "_refused",
        "_revocations",
        "_revoked",
        "_root_keys",
        "_skew_us",
    )

    def __init__(
        self,
        bundle: TrustBundle,
        *,
        clock_skew_s: int = 30,
        cache_size: int = 65536,
        path_labels: PathLabels | None = None,
        own_domain: str = "",
        accepted: Mapping[str, LabelConstraints] | None = None,
    ) -> None:
        """`clock_skew_s` is how long before its beginning a credential is accepted; its end is never
        stretched.

        `path_labels` gives labels to SVIDs without the labels extension (see `path_labels` above).

        Peers of a trust domain other than `own_domain` ('': there is no such distinction) are federated: of their
        labels only those `accepted` for their domain count, and they get the label `federated`.
        """
        self._own = own_domain
        self._accepted = dict(accepted or {})
        self._bundle, self._root_keys = bundle, _keys(bundle)
        self._skew_us = clock_skew_s * SECOND
        self._good_size = cache_size
        self._path_labels = path_labels
        self._good: dict[bytes, PeerIdentity] = {}
        self._refused: dict[bytes, tuple[int, int, str, str]] = {}
        self._hosts: dict[bytes, tuple[_Host, Profile, str]] = {}
        self._revoked: frozenset[str] = frozenset()
        self._revocations = Revocations()

    @property
    def cached(self) -> tuple[int, int]:
        """How many good credentials and how many refusals are remembered."""
        return len(self._good), len(self._refused)

    def forget(self) -> None:
        """Empty every cache."""
        self._good.clear()
        self._refused.clear()
        self._hosts.clear()

    def set_clock_skew(self, seconds: int) -> None:
        """How long before its beginning a credential is accepted from now on."""
        self._skew_us = seconds * SECOND

    @property
    def bundle(self) -> TrustBundle:
        """What is trusted now."""
        return self._bundle

    @property
    def accepted(self) -> Mapping[str, LabelConstraints]:
        """Which labels of federated peers count, by their trust domain."""
        return self._accepted

    def set_accepted(self, accepted: Mapping[str, LabelConstraints]) -> None:
        """Take these labels of federated peers from now on, and no others."""
        self._accepted = dict(accepted)
        self.forget()

    def set_bundle(self, bundle: TrustBundle) -> None:
        """Trust `bundle` from now on, and nothing that only the old one vouched for."""
        self._bundle, self._root_keys = bundle, _keys(bundle)
        self.forget()

    def doubts(self) -> Callable[[PeerIdentity], DropReason | None]:
        """Why an identity that was verified before is not trusted by the bundle as it is now: its domain or root is
        not in it.

        Of our own domain a root leaves at the end of a rollover only, when nothing depends on it any more: what lives
        goes on. Why one of another domain left nobody here knows. What is wanted gone at once is revoked.
        """
        bundle, keys, own = self._bundle, self._root_keys, self._own

        def doubt(peer: PeerIdentity) -> DropReason | None:
            if not bundle.roots.get(peer.trust_domain):
                return DropReason.UNTRUSTED_DOMAIN
            if not peer.root or peer.trust_domain == own or peer.root in keys:
                return None
            return DropReason.UNTRUSTED_CHAIN

        return doubt

    @property
    def revocations(self) -> Revocations:
        """The signed lists that count now."""
        return self._revocations

    def set_revocations(self, revocations: Revocations) -> None:
        """Refuse from now on what these signed lists revoke, in place of those before."""
        self._revocations = revocations
        self.forget()

    def set_revoked(self, revoked: Iterable[str]) -> None:
        """Refuse exactly these from now on: SHA-256 fingerprints or serial numbers, of leaves or host CAs.

        In hexadecimal; case, colons and leading zeros do not matter.
        """
        self._revoked = frozenset(item.replace(":", "").lower().lstrip("0") for item in revoked)
        self.forget()

    def revoke(self, item: str | bytes) -> None:
        """Refuse one more: a fingerprint (32 bytes or hexadecimal) or a serial number (hexadecimal)."""
        text = item.hex() if isinstance(item, bytes) else item
        self.set_revoked((*self._revoked, text))

    def verify(self, blob: bytes, now_us: int) -> PeerIdentity:
        """The identity `blob` proves at `now_us` (UTC microseconds), or CredentialError with a DropReason.

        Proves what the CAs say, not that the sender holds the X25519 key: the handshake does that.
        """
        if len(blob) > MAX_BLOB:
            message = f"the credential has {len(blob)} bytes, more than {MAX_BLOB}"
            raise refusal(DropReason.CREDENTIAL_OVERSIZED, message)
        key = sha256(blob).digest()
        peer = self._good.get(key)
        if peer is not None:
            if peer.not_before_us - self._skew_us <= now_us <= peer.not_after_us:
                if now_us > self._revocations.first_stale_us:
                    self._check_fresh(peer.trust_domain, peer.issuer, now_us)
                return peer
            del self._good[key]
        known = self._refused.get(key)
        if known is not None:
            until_us, reason, message, hint = known
            if until_us - NEGATIVE_TTL_S * SECOND <= now_us < until_us:
                raise CredentialError(reason, message, hint)
            del self._refused[key]
        try:
            parts = unpack(blob)
            peer = self._verify(parts.leaf_der, parts.host_der, parts, now_us)
        except CredentialError as error:
            if len(self._refused) >= NEGATIVE_SIZE:
                del self._refused[next(iter(self._refused))]
            until_us = now_us + NEGATIVE_TTL_S * SECOND  # the error itself would keep its frames alive
            self._refused[key] = (until_us, error.reason, error.message, error.hint)
            raise
        if len(self._good) >= self._good_size:
            del self._good[next(iter(self._good))]
        self._good[key] = peer
        return peer

    def verify_chain(self, leaf_der: bytes, host_der: bytes, now_us: int) -> PeerIdentity:
        """The identity that an SVID and its host CA stand for, without a delegation: no handshake accepts that.

        Same checks, same errors as `verify`; `x25519` of what is returned is empty. Nothing is remembered.
        """
        return self._verify(leaf_der, host_der, None, now_us)

    def _verify(self, leaf_der: bytes, host_der: bytes, blob: Blob | None, now_us: int) -> PeerIdentity:
        leaf = read_profile(leaf_der, "leaf")
        host_key = sha256(host_der).digest()
        proven = self._hosts.get(host_key)
        host = proven[0] if proven else _read_host(host_der)

        spiffe_id = leaf.spiffe_id()
        self._check_names(spiffe_id, host)
        leaf.check_leaf()
        host.profile.check_ca()
        if host.profile.path_length != 0:
            raise refusal(
                DropReason.KEY_USAGE_INVALID, "the host CA may issue further CAs (path length is not 0)"
            )
        self._check_time(leaf, now_us)
        self._check_time(host.profile, now_us)
        delegated_us = blob.delegation.not_after_s * SECOND if blob else leaf.not_after_us
        if delegated_us > leaf.not_after_us:
            raise refusal(DropReason.DELEGATION_INVALID, "the delegation outlives its certificate")
        if now_us > delegated_us:
            raise refusal(DropReason.DELEGATION_EXPIRED, f"the delegation expired at {iso(delegated_us)}")
        if self._revoked:
            self._check_revoked(leaf)
            self._check_revoked(host.profile)
        if self._revocations:
            self._check_lists(leaf, spiffe_id, host, now_us)
        labels = self._labels(leaf, spiffe_id, host)

        root = proven[1] if proven else self._root_of(host, now_us)
        root_key = proven[2] if proven else key_id(root.public_key)
        self._check_time(root, now_us)
        leaf.issued_by(host.profile)
        if blob is not None:
            blob.delegation.verify(leaf.public_key, blob.stream)
        if blob is not None and not proven:
            if len(self._hosts) >= HOST_SIZE:
                del self._hosts[next(iter(self._hosts))]
            self._hosts[host_key] = (host, root, root_key)
        chain = (leaf, host.profile, root)
        begin_us = max(profile.not_before_us for profile in chain)
        end_us = min(delegated_us, *(profile.not_after_us for profile in chain))
        return PeerIdentity.of(
            spiffe_id,
            labels,
            blob.delegation.x25519 if blob else b"",
            (begin_us, end_us),
            leaf.fingerprint,
            leaf.serial,
            host.name,
            (host.key, host.serial),
            root_key,
        )

    def _check_names(self, leaf: SpiffeId, host: _Host) -> None:
        if not leaf.path:
            raise refusal(DropReason.SPIFFE_ID_INVALID, "the leaf speaks for a whole trust domain")
        if host.spiffe_id.path:
            raise refusal(DropReason.SPIFFE_ID_INVALID, "the host CA's SPIFFE ID has a path")
        if leaf.trust_domain not in self._bundle.roots:
            raise refusal(
                DropReason.UNTRUSTED_DOMAIN,
                f"trust domain {leaf.trust_domain} is not trusted here",
                f"if it should be: sectool trust add {leaf.trust_domain} --bundle FILE",
            )
        if host.spiffe_id.trust_domain != leaf.trust_domain:
            raise refusal(
                DropReason.UNTRUSTED_CHAIN,
                f"a host CA of {host.spiffe_id.trust_domain} issued a leaf of {leaf.trust_domain}",
            )

    def _check_time(self, profile: Profile, now_us: int) -> None:
        if now_us > profile.not_after_us:
            raise refusal(
                DropReason.CREDENTIAL_EXPIRED, f"the {profile.role} expired at {iso(profile.not_after_us)}"
            )
        if now_us + self._skew_us < profile.not_before_us:
            raise refusal(
                DropReason.CREDENTIAL_NOT_YET_VALID,
                f"the {profile.role} is valid from {iso(profile.not_before_us)} only",
                "compare the clocks of both hosts",
            )

    def _check_revoked(self, profile: Profile) -> None:
        names = [f"{profile.serial:x}", *(each.hex().lstrip("0") for each in profile.fingerprints())]
        if not self._revoked.isdisjoint(names):
            raise refusal(DropReason.CREDENTIAL_REVOKED, f"the {profile.role} {profile.serial:x} is revoked")

    def _check_lists(self, leaf: Profile, spiffe_id: SpiffeId, host: _Host, now_us: int) -> None:
        begin = max(leaf.not_before_us, host.profile.not_before_us)
        domain = spiffe_id.trust_domain
        why = self._revocations.why(
            domain, str(spiffe_id), f"{leaf.serial:x}", begin, (host.key, host.serial)
        )
        if why:
            raise refusal(DropReason.CREDENTIAL_REVOKED, why)
        self._check_fresh(domain, host.key, now_us)

    def _check_fresh(self, trust_domain: str, issuer: str, now_us: int) -> None:
        if why := self._revocations.stale(trust_domain, issuer, now_us):
            raise refusal(
                DropReason.REVOCATION_STALE,
                why,
                "get a newer list: sectool revocation import FILE; or set revocation_expired: open",
            )

    def _labels(self, leaf: Profile, spiffe_id: SpiffeId, host: _Host) -> Mapping[str, str]:
        constraints = host.constraints
        if constraints is not None and not constraints.permits_path(spiffe_id.path):
            raise refusal(
                DropReason.SPIFFE_ID_INVALID,
                f"{spiffe_id} is not below {constraints.path_prefix}, all that its host CA may issue",
            )
        if leaf.labels is None and constraints is not None:
            raise refusal(
                DropReason.KEY_USAGE_INVALID, "the SVID was handed to its workload, not made for handshakes"
            )
        if leaf.labels is None:
            mapped = self._path_labels(spiffe_id) if self._path_labels else {}
            return self._as_we_see_it(spiffe_id.trust_domain, mapped, mapped)
        labels = decode_labels(leaf.labels)
        for key, value in labels.items():
            if constraints is None or not constraints.permits(key, value):
                raise refusal(DropReason.LABEL_NOT_PERMITTED, f"its host CA may not vouch for {key}={value}")
        domain = spiffe_id.trust_domain
        if FEDERATED_LABEL in labels or labels.get(DOMAIN_LABEL, domain) != domain:
            raise refusal(
                DropReason.LABEL_NOT_PERMITTED,
                f"it claims {DOMAIN_LABEL} or {FEDERATED_LABEL} itself, which are for its verifier to say",
            )
        accepted = self._accepted.get(domain)
        taken = {k: v for k, v in labels.items() if accepted is not None and accepted.permits(k, v)}
        return self._as_we_see_it(domain, labels, taken)

    def _as_we_see_it(
        self, domain: str, own: Mapping[str, str], federated: Mapping[str, str]
    ) -> Mapping[str, str]:
        """Labels of a peer of our domain, or else those of a federated one, marked as such."""
        if not self._own or domain == self._own:
            return own
        return {**federated, FEDERATED_LABEL: "true"}

    def _root_of(self, host: _Host, now_us: int) -> Profile:
        """The root that signed `host`: several roots of one name are tried, those valid now first."""
        named = [
            r for r in self._bundle.roots[host.spiffe_id.trust_domain] if r.subject == host.profile.issuer
        ]
        for root in sorted(named, key=lambda r: not r.not_before_us <= now_us <= r.not_after_us):
            try:
                host.profile.issued_by(root)
            except CredentialError:
                continue
            return root
        raise refusal(
            DropReason.UNTRUSTED_CHAIN, f"no root of {host.spiffe_id.trust_domain} signed the host CA"
        )
