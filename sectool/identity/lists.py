"""The revocation lists a host goes by, as files: of each issuer the newest, verified again whenever they are read.

state/revocation/<key_id>.pem      0644; what `sectool revocation export` gives and other hosts import
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from sectool.clock import SECOND, iso
from sectool.errors import CredentialError, SectoolError, UsageError
from sectool.events import DropReason
from sectool.identity.authority import load_authority_files
from sectool.identity.enrolment import HostIdentity, host_directory
from sectool.identity.files import read_file, write_atomic
from sectool.identity.profile import key_id
from sectool.identity.revocation import (
    DEFAULT_DAYS,
    MAX_LIST,
    Entries,
    RevocationList,
    Revocations,
    read_list,
    sign_list,
)
from sectool.identity.trust import TrustBundle

log = logging.getLogger("sectool.agent")

FOLDER = "revocation"  # in the state folder


class Lists:
    """What is in one such folder.

    A file that does not hold counts for nothing; but if it is named for a root that is trusted, what that root has
    revoked is not known any more, and it counts as a list that has expired.
    """

    def __init__(self, state: Path, bundle: TrustBundle, now_us: int, clock_skew_s: int = 60) -> None:
        """Read what is there; what cannot be read is in `damaged`, by file, with the reason."""
        self.folder = state / FOLDER
        self.bundle = bundle
        self.clock_skew_s = clock_skew_s
        self.known: dict[str, RevocationList] = {}
        self.damaged: dict[str, str] = {}
        self.serious: dict[str, str] = {}  # of those: not just of an issuer that is not trusted (any more)
        self._lost: dict[str, RevocationList] = {}
        for path in sorted(self.folder.glob("*.pem")) if self.folder.is_dir() else ():
            try:
                found = self.read(read_file(path, "there is no such list", "sectool revocation list"), now_us)
            except SectoolError as error:
                self._give_up(path, error)
                continue
            if path.stem == found.issuer:
                self.known[found.issuer] = found

    def _give_up(self, path: Path, error: SectoolError) -> None:
        self.damaged[path.name] = error.message
        if getattr(error, "reason", None) not in (DropReason.UNTRUSTED_CHAIN, DropReason.CREDENTIAL_EXPIRED):
            self.serious[path.name] = error.message
        for domain, roots in self.bundle.roots.items():
            if any(key_id(root.public_key) == path.stem for root in roots):
                self.serious[path.name] = error.message
                self._lost[path.stem] = RevocationList(domain, path.stem, "", 0, 0, 0, Entries())

    def drop(self, each: RevocationList) -> None:
        """Forget a list."""
        (self.folder / f"{each.issuer}.pem").unlink(missing_ok=True)
        self.known.pop(each.issuer, None)

    def read(self, pem: bytes, now_us: int) -> RevocationList:
        """Verify a list by what this host trusts; CredentialError with the reason."""
        return read_list(pem[: MAX_LIST + 1], self.bundle, now_us, clock_skew_s=self.clock_skew_s)

    def take(self, pem: bytes, now_us: int) -> tuple[RevocationList, bool]:
        """Keep a list, in place of its issuer's one before; with it, whether that changed anything.

        CredentialError when it does not hold; UsageError when it is older than what is known, or has expired.
        """
        found = self.read(pem, now_us)
        before = self.known.get(found.issuer)
        if before is not None and _content(before) == _content(found):
            return before, False
        if before is not None and found.number <= before.number:
            raise UsageError(
                f"this list of {found.who} has number {found.number}; number {before.number} is in force",
                "an older list would bring back what has been revoked since: get the newest",
            )
        if now_us > found.next_update_us:
            raise UsageError(
                f"this list of {found.who} expired at {iso(found.next_update_us)}",
                "have its issuer sign it again: sectool ca revoke --renew",
            )
        self.folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        write_atomic(self.folder / f"{found.issuer}.pem", found.pem)
        self.known[found.issuer] = found
        self._lost.pop(found.issuer, None)
        for complaints in (self.damaged, self.serious):
            complaints.pop(f"{found.issuer}.pem", None)
        return found, True

    def missing(self, required: Iterable[str]) -> list[str]:
        """Of these trust domains ('*': all that are trusted) those of which there is no list of a root."""
        wanted = set(required)
        known = {each.trust_domain for each in (*self.known.values(), *self._lost.values()) if each.by_root}
        return [
            domain
            for domain in self.bundle.roots
            if not wanted.isdisjoint((domain, "*")) and domain not in known
        ]

    def revocations(self, *, closed: bool = True, required: Iterable[str] = ()) -> Revocations:
        """All of them for looking up. A list that is `required` and not there counts as one that has expired."""
        none = (RevocationList(domain, "", "", 0, 0, 0, Entries()) for domain in self.missing(required))
        return Revocations((*self.known.values(), *self._lost.values(), *none), closed=closed)


def _content(each: RevocationList) -> tuple[object, ...]:
    return each.number, each.next_update_us, each.entries


def next_number(before: RevocationList | None, now_us: int) -> int:
    """Of a new list: greater than the one before, and than any that another copy of the key signed earlier."""
    return max(before.number + 1 if before else 1, now_us // SECOND)


def revoke_here(
    state: Path, host: HostIdentity, lists: Lists, more: Entries, now_us: int, *, days: int = DEFAULT_DAYS
) -> RevocationList:
    """Sign this host's own list, with what it held and `more`, and keep it. `more` may be empty: that renews it."""
    folder = host_directory(state)
    profile, key = load_authority_files(
        folder / "host.crt", folder / "host.key", "host CA", "sectool host enroll"
    )
    for name in more.workloads:
        path = name.removeprefix(f"spiffe://{host.trust_domain}")
        if path == name or not host.constraints.permits_path(path):
            raise UsageError(
                f"{name} is not below {host.constraints.path_prefix}: this host has not issued it",
                "revoke it where the root is: sectool ca revoke --workload SPIFFE-ID",
            )
    before = lists.known.get(key_id(profile.public_key))
    entries = (before.entries | more) if before else more
    try:
        found, _ = lists.take(
            sign_list(profile, key, entries, next_number(before, now_us), now_us, days=days), now_us
        )
    except CredentialError as error:
        raise SectoolError(f"this host's list does not hold: {error.message}", error.hint) from None
    return found
