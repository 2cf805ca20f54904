"""Whom else we trust: relationships with other trust domains, one file each below state/trust/.

    state/trust/partner.example.json    the bundle in force, where it came from, which of its labels are taken

A relationship is one-way: it lets us verify their workloads, not them ours. Nothing in it is shared: each side keeps
its own copy, and goes on with the last good one for as long as nothing better comes.

Which labels of a federated peer count is decided here, at the one who relies on them: none, unless the relationship
names their key (and value) under `accept`. Taken labels keep their names; a rule can match them only if it says the
domain (sectool.policy.rules). `domain` and `federated` are set by the verifier and cannot be accepted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from sectool.errors import CredentialError, SectoolError, UsageError
from sectool.identity.bundle import SpiffeBundle, parse_bundle
from sectool.identity.extensions import LabelConstraints
from sectool.identity.files import read_file, write_atomic
from sectool.identity.spiffe import SpiffeId, check_trust_domain
from sectool.identity.trust import MAX_DOMAINS, TrustBundle
from sectool.labels import DOMAIN_LABEL, FEDERATED_LABEL

NO_LABELS: Final = LabelConstraints({})
_RESERVED: Final = frozenset((DOMAIN_LABEL, FEDERATED_LABEL))
_MAX_URL: Final = 2048


class Profile(StrEnum):
    """How a bundle is obtained: once from a file, or again and again from an endpoint (SPIFFE Federation, 5.2)."""

    FILE = "file"
    HTTPS_WEB = "https_web"  # authenticated by the public CAs of this host
    HTTPS_SPIFFE = "https_spiffe"  # authenticated by an X.509-SVID of `endpoint_id`


@dataclass(frozen=True, slots=True)
class Source:
    """Where a bundle comes from. `endpoint_id` is the server's SPIFFE ID, for https_spiffe alone."""

    profile: Profile
    url: str = ""
    endpoint_id: str = ""

    def __post_init__(self) -> None:
        if self.profile is Profile.FILE:
            return
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme == "https" and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        plain = self.url.isascii() and self.url.isprintable() and " " not in self.url
        if not usable or not plain or len(self.url) > _MAX_URL:
            raise UsageError(
                f"{self.url[:200]!r} is not the URL of a bundle endpoint", "write https://HOST[:PORT]/PATH"
            )
        if "@" in parts.netloc:
            raise UsageError("the URL of a bundle endpoint holds no user name or password")
        if self.profile is Profile.HTTPS_SPIFFE:
            SpiffeId.parse(self.endpoint_id)


@dataclass(frozen=True, slots=True)
class Relationship:
    """What we hold of one other trust domain. Times are UTC microseconds, 0 for never.

    `fetched_us`: when the bundle in force came; `checked_us`: when its source was last asked; `error`: why the last
    try failed, '' when it did not.
    """

    bundle: SpiffeBundle
    source: Source
    accept: LabelConstraints = field(default=NO_LABELS)
    added_us: int = 0
    fetched_us: int = 0
    checked_us: int = 0
    error: str = ""

    @property
    def trust_domain(self) -> str:
        """The other domain's name."""
        return self.bundle.trust_domain

    @property
    def due_us(self) -> int:
        """When its source is to be asked again; 0: never, it came from a file."""
        if self.source.profile is Profile.FILE:
            return 0
        return max(self.checked_us, self.fetched_us) + self.bundle.refresh_s * 1_000_000

    def failed(self, why: str, now_us: int) -> Relationship:
        """The same bundle goes on; what was in the way is kept for people to see."""
        return replace(self, checked_us=now_us, error=why)

    def with_bundle(self, fresh: SpiffeBundle, now_us: int) -> Relationship:
        """This relationship with a newer bundle.

        SectoolError for other roots without a greater sequence number: an old copy must not bring back what was
        taken back.
        """
        known = self.bundle
        if fresh.fingerprints == known.fingerprints:
            sequences = [s for s in (known.sequence, fresh.sequence) if s is not None]
            fresh = replace(fresh, sequence=max(sequences, default=None))
        elif known.sequence is not None and fresh.sequence is not None and fresh.sequence <= known.sequence:
            raise SectoolError(
                f"the bundle of {self.trust_domain} offered has sequence {fresh.sequence}, "
                f"the one in force {known.sequence}: an old copy",
                "if the other side has started over, remove the trust domain and add it again",
            )
        elif known.sequence is not None and fresh.sequence is None:
            raise SectoolError(
                f"the bundle of {self.trust_domain} offered has no sequence number, the one in force has",
                "if the other side has started over, remove the trust domain and add it again",
            )
        return replace(self, bundle=fresh, fetched_us=now_us, checked_us=now_us, error="")

    def to_json(self) -> str:
        """The file's content."""
        return (
            json.dumps(
                {
                    "version": 1,
                    "trust_domain": self.trust_domain,
                    "source": {
                        "profile": self.source.profile.value,
                        "url": self.source.url,
                        "endpoint_id": self.source.endpoint_id,
                    },
                    "accept": {key: list(values) for key, values in self.accept.allow.items()},
                    "added_us": self.added_us,
                    "fetched_us": self.fetched_us,
                    "checked_us": self.checked_us,
                    "error": self.error,
                    "bundle": json.loads(self.bundle.to_json()),
                },
                indent=2,
            )
            + "\n"
        )

    @classmethod
    def from_json(cls, data: bytes) -> Relationship:
        """Read `to_json`'s text; SectoolError for anything else."""
        try:
            fields = json.loads(data.decode("utf-8"))
            if fields["version"] != 1:
                raise ValueError(f"version {fields['version']}")
            domain = fields["trust_domain"]
            source = fields["source"]
            times = added, fetched, checked = [
                fields[name] for name in ("added_us", "fetched_us", "checked_us")
            ]
            if not isinstance(domain, str) or any(type(t) is not int for t in times):
                raise TypeError("trust_domain or times")
            return cls(
                parse_bundle(json.dumps(fields["bundle"]).encode(), domain),
                Source(Profile(source["profile"]), str(source["url"]), str(source["endpoint_id"])),
                LabelConstraints({str(k): tuple(map(str, v)) for k, v in fields["accept"].items()}),
                added,
                fetched,
                checked,
                str(fields["error"]),
            )
        except SectoolError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SectoolError(
                f"the file is not a trust relationship ({type(error).__name__}: {error})",
                "remove the trust domain and add it again",
            ) from None


def accepted_labels(texts: Iterable[str]) -> LabelConstraints:
    """What `--accept` says: `KEY` (any value), `KEY=VALUE`, `KEY=PREFIX*`; repeated keys add values."""
    allow: dict[str, list[str]] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if key.rstrip("*") in _RESERVED or "*" in key:
            raise UsageError(
                f"the label {key!r} of other domains cannot be accepted",
                "name each key that counts; domain and federated are always set by this host",
            )
        allow.setdefault(key, []).append(value if equals else "*")
    try:
        return LabelConstraints(allow)
    except CredentialError as error:
        raise UsageError(error.message, "write --accept KEY or --accept KEY=VALUE") from None


class Federation:
    """The relationships of a state folder. Immutable values in files: what is on disk is what is in force."""

    def __init__(self, folder: Path, own: str) -> None:
        """Read all of `folder` (there need be none). SectoolError for a damaged file."""
        self.folder = folder
        self.own = own
        self.known: dict[str, Relationship] = {}
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
            data = read_file(path, "there is no such trust relationship", "sectool trust list")
            try:
                found = Relationship.from_json(data)
            except SectoolError as error:
                raise SectoolError(f"{path}: {error.message}", error.hint) from None
            if path.stem != found.trust_domain or found.trust_domain == own:
                raise SectoolError(
                    f"{path} is a relationship with {found.trust_domain}",
                    "restore the file, or remove it and add the trust domain again",
                )
            self.known[found.trust_domain] = found

    def get(self, trust_domain: str) -> Relationship:
        """One relationship; UsageError when there is none."""
        found = self.known.get(trust_domain)
        if found is None:
            known = ", ".join(self.known) or "none yet"
            raise UsageError(
                f"there is no relationship with trust domain {trust_domain[:200]!r}", f"known are: {known}"
            )
        return found

    def put(self, relationship: Relationship) -> None:
        """Keep it, in place of the one before. UsageError for our own domain and for too many."""
        domain = check_trust_domain(relationship.trust_domain)
        if domain == self.own:
            raise UsageError(
                f"{domain} is this host's own trust domain",
                "its roots come with enrolment, not with trust add",
            )
        if domain not in self.known and len(self.known) >= MAX_DOMAINS - 1:
            raise UsageError(f"there are {len(self.known)} federated domains; no more are supported")
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(self._path(domain), relationship.to_json().encode("ascii"))
        self.known[domain] = relationship

    def remove(self, trust_domain: str) -> Relationship:
        """Forget it; UsageError when there is none."""
        found = self.get(trust_domain)
        self._path(trust_domain).unlink(missing_ok=True)
        del self.known[trust_domain]
        return found

    def _path(self, trust_domain: str) -> Path:
        return self.folder / f"{trust_domain}.json"

    def added_to(self, bundle: TrustBundle) -> TrustBundle:
        """`bundle` and what the relationships hold, each domain's roots apart from the others'."""
        for relationship in self.known.values():
            bundle = relationship.bundle.added_to(bundle)
        return bundle

    @property
    def accepted(self) -> Mapping[str, LabelConstraints]:
        """Which labels count, by domain."""
        return {domain: relationship.accept for domain, relationship in self.known.items()}


def to_wire(accepted: Mapping[str, LabelConstraints]) -> dict[str, dict[str, list[str]]]:
    """`Federation.accepted` for the socketpair between agent and packet worker."""
    return {
        domain: {key: list(values) for key, values in constraints.allow.items()}
        for domain, constraints in accepted.items()
    }


def from_wire(fields: Mapping[str, Any]) -> dict[str, LabelConstraints]:
    """Inverse of `to_wire`; the sender is our own agent."""
    return {
        str(domain): LabelConstraints({str(k): tuple(map(str, v)) for k, v in allow.items()})
        for domain, allow in fields.items()
    }
