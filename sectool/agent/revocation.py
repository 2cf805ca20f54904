"""Revocation while the daemon runs: lists taken, handed to the workers, watched for their age.

import, identity revoke, CA service ──► state/revocation/ ──► workers (refuse, end sessions, cut live flows)
                                                ├──► own workloads: no SVID any more, or a fresh one
                                                └──► events, control history, `status` before a list expires
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from sectool.api.server import Reply, Request
from sectool.clock import SECOND, iso
from sectool.errors import CredentialError, UsageError
from sectool.events import DropReason, Type, now_us
from sectool.identity.authority import BACKDATE_S, Portable
from sectool.identity.credential import Credential
from sectool.identity.enrolment import HostIdentity
from sectool.identity.lists import Lists, revoke_here
from sectool.identity.revocation import DEFAULT_DAYS, Entries, RevocationList, Revocations, plain_serial
from sectool.identity.trust import TrustBundle
from store.control import Actor

if TYPE_CHECKING:
    from sectool.agent.daemon import Daemon
    from sectool.agent.identities import Issued

log = logging.getLogger("sectool.agent")


class Revoked:
    """The lists this daemon goes by."""

    def __init__(
        self, state: Path, bundle: TrustBundle, closed: bool, clock_skew_s: int, required: Sequence[str] = ()
    ) -> None:
        """`required`: trust domains without whose root's list nobody of theirs is let in, if `closed`."""
        self._state = state
        self._told: set[str] = set()  # what is wrong with lists, as far as `status` says it
        self.reread(bundle, closed, clock_skew_s, required)

    def reread(
        self, bundle: TrustBundle, closed: bool, clock_skew_s: int, required: Sequence[str] = ()
    ) -> None:
        """Take what is on disk now, as far as this trust bundle verifies it."""
        self.lists = Lists(self._state, bundle, now_us(), clock_skew_s)
        self.closed, self.required = closed, required
        self.settle()
        for name, why in self.lists.damaged.items():
            log.warning("revocation list %s does not count: %s", name, why)

    def settle(self) -> None:
        """The lists are others now."""
        self.current: Revocations = self.lists.revocations(closed=self.closed, required=self.required)

    def to_wire(self) -> bytes:
        """For a packet worker."""
        return self.current.to_wire()

    def refuse_revoked(self, credential: Credential) -> Credential:
        """The credential, or CredentialError: what every peer would refuse is not presented."""
        if why := self.current.of(credential.peer):
            raise CredentialError(
                DropReason.CREDENTIAL_REVOKED, f"no identity for it: {why}", "sectool revocation list"
            )
        return credential

    def refuse_portable(self, host: HostIdentity, svid: Portable, now: int) -> None:
        """CredentialError if the SVID, issued now for its workload to hold, is revoked."""
        authority = host.authority
        issuer = authority.key_id, f"{authority.certificate.serial_number:x}"
        begin = now - BACKDATE_S * SECOND
        if why := self.current.why(host.trust_domain, svid.spiffe_id, svid.serial, begin, issuer):
            raise CredentialError(
                DropReason.CREDENTIAL_REVOKED, f"no identity for it: {why}", "sectool revocation list"
            )

    def watch(self, daemon: Daemon, now: int) -> None:
        """Renew our own list in time; warn of the others', well before they expire."""
        wrong = {
            f"revocation list {name}": f"it does not count: {why}" for name, why in self.lists.serious.items()
        }
        for domain in self.lists.missing(self.required):
            wrong[f"no revocation list of {domain}"] = f"one is required; {self._now}"
        own = daemon.host.authority.key_id
        for each in list(self.lists.known.values()):
            if each.issuer != own and self._of_this_host(each, daemon.host) and own not in self.lists.known:
                # A new key of ours, after a renewal: what the old one has revoked stays so.
                taken = revoke_here(self._state, daemon.host, self.lists, each.entries, now)
                took(daemon, taken, None, "carried over to the host's new CA")
            elif now <= each.warn_us:
                continue
            elif each.issuer == own:
                taken = revoke_here(self._state, daemon.host, self.lists, Entries(), now)
                took(daemon, taken, None, "renewed")
            elif now <= each.next_update_us:
                wrong[_problem(each)] = f"it expires at {iso(each.next_update_us)}; {self._then}"
            elif self._replaced(each):
                self.lists.drop(each)
                self.settle()
                daemon.tell_workers({"t": "revoked"}, self.to_wire())
            else:
                wrong[f"expired {_problem(each)}"] = f"it expired at {iso(each.next_update_us)}; {self._now}"
        for what in self._told - wrong.keys():
            daemon.health.clear(what)
        for what, why in wrong.items():
            daemon.health.raise_(what, why)
        self._told = set(wrong)

    @staticmethod
    def _of_this_host(each: RevocationList, host: HostIdentity) -> bool:
        return (each.issuer_name, each.trust_domain) == (host.name, host.trust_domain)

    def _replaced(self, old: RevocationList) -> bool:
        """Whether an expired list of a host's former key can go: there is one of its present key."""
        return not old.by_root and any(
            (each.issuer_name, each.trust_domain) == (old.issuer_name, old.trust_domain)
            and each.issued_us > old.issued_us
            for each in self.lists.known.values()
        )

    @property
    def _then(self) -> str:
        return "after that no new connection of its credentials passes" if self.closed else "get a newer one"

    @property
    def _now(self) -> str:
        if self.closed:
            return "no new connection of its credentials passes until a newer one is imported"
        return "what has been revoked since is unknown, and let pass as set"


def _problem(each: RevocationList) -> str:
    return f"revocation list of {each.who}"


def describe(each: RevocationList) -> dict[str, Any]:
    """One list as `revocation list` and `show` tell it."""
    return {
        "trust_domain": each.trust_domain,
        "issuer": each.issuer,
        "issuer_name": each.issuer_name or "root",
        "number": each.number,
        "issued": each.issued_us,
        "next_update": each.next_update_us,
        "serials": sorted(each.entries.serials),
        "keys": sorted(each.entries.keys),
        "workloads": dict(sorted(each.entries.workloads.items())),
    }


def took(daemon: Daemon, taken: RevocationList, actor: Actor | None, reason: str) -> None:
    """A list was taken: workers, our own workloads, the record and events follow."""
    revoked = daemon.revoked
    revoked.settle()
    daemon.tell_workers({"t": "revoked"}, revoked.to_wire())
    if daemon.endpoint is not None:
        daemon.endpoint.changed()
    daemon.present_again(daemon.identities.reissue(lambda e: bool(revoked.current.of(e.credential.peer))))
    fields = describe(taken)
    daemon.records.revoked(fields, actor, reason)
    daemon.events.emit(
        Type.IDENTITY_REVOKED,
        reason=reason,
        actor=actor.name if actor else "sectool agent",
        trust_domain=taken.trust_domain,
        issuer=taken.who,
        number=taken.number,
        item=_in_words(taken),
        serials=len(taken.entries.serials),
        keys=len(taken.entries.keys),
        workloads=sorted(taken.entries.workloads)[:64],
    )
    log.info("revocation list %d of %s is in force: %s", taken.number, taken.who, reason)


def _in_words(taken: RevocationList) -> str:
    entries = taken.entries
    held = [*sorted(entries.workloads), *(f"serial {s}" for s in sorted(entries.serials))]
    more = f" and {len(held) - 3} more" if len(held) > 3 else ""
    return f"list {taken.number} of {taken.who} ({', '.join(held[:3]) or 'nothing'}{more})"


# -- operations of the control socket ----------------------------------------------------------------------------------


async def revocation_list(daemon: Daemon, request: Request) -> Reply:
    """Every list that counts; of the one named by `issuer`, its file as payload."""
    known, wanted = daemon.revoked.lists.known, request.text("issuer")
    found = known.get(wanted)
    if wanted and found is None:
        raise UsageError(f"there is no list of {wanted[:80]!r}", "sectool revocation list")
    items = [describe(each) for each in known.values() if not wanted or each is found]
    return Reply({"items": items, "closed": daemon.revoked.closed}, found.pem if found else b"")


async def revocation_import(daemon: Daemon, request: Request) -> Reply:
    """Take the list in the payload."""
    taken, fresh = daemon.revoked.lists.take(request.payload, now_us())
    if fresh:
        took(daemon, taken, Actor(request.peer.uid, request.peer.name), request.text("reason") or "imported")
    return Reply({**describe(taken), "changed": fresh})


async def identity_revoke(daemon: Daemon, request: Request) -> Reply:
    """Revoke a workload of this host (`spiffe_id`, all or those `issued_before` a moment) or one SVID (`serial`)."""
    entries = entries_of(request.text("spiffe_id"), request.text("serial"), request.number("issued_before"))
    now, actor = now_us(), Actor(request.peer.uid, request.peer.name)
    days = request.number("days") or DEFAULT_DAYS
    taken = revoke_here(daemon.paths.state, daemon.host, daemon.revoked.lists, entries, now, days=days)
    took(daemon, taken, actor, request.text("reason") or "revoked on its host")
    return Reply(describe(taken), taken.pem)


async def identity_show(daemon: Daemon, request: Request) -> Reply:
    """Certificates, in PEM as payload, of the identity `id`: SVID, host CA, root."""
    wanted = request.number("id")
    for entry in daemon.identities.by_workload.values():
        credential = entry.credential
        if credential.peer.id == wanted:
            root = daemon.host.bundle.roots[daemon.host.trust_domain]
            ders = (credential.leaf_der, credential.host_der)
            chain = [*map(x509.load_der_x509_certificate, ders), *(r.certificate for r in root[:1])]
            return Reply({"id": wanted}, b"".join(each.public_bytes(Encoding.PEM) for each in chain))
    raise UsageError("this identity is not in use here any more", "sectool identity list")


async def identity_rotate(daemon: Daemon, request: Request) -> Reply:
    """New SVIDs now, for the workload with that SPIFFE ID or name, or for all; live connections go on."""
    wanted = request.text("workload")

    def meant(entry: Issued) -> bool:
        return not wanted or wanted in (entry.credential.peer.spiffe_id, entry.workload.name)

    if not any(map(meant, daemon.identities.by_workload.values())):
        raise UsageError(f"no workload here has the identity {wanted[:200]!r}", "sectool identity list")
    renewed = daemon.identities.reissue(meant)
    daemon.present_again(renewed)
    return Reply({"items": [entry.credential.peer.spiffe_id for entry in renewed]})


def entries_of(spiffe_id: str, serial: str, issued_before_us: int | None) -> Entries:
    """What one revocation names. UsageError when it is nothing."""
    if not spiffe_id and not serial:
        raise UsageError("there is nothing to revoke", "give a SPIFFE ID or a serial number")
    if issued_before_us is not None and not spiffe_id:
        raise UsageError("a serial number is revoked whenever it was issued", "leave --issued-before out")
    # Certificates of ours begin a little before they are issued.
    before = 0 if issued_before_us is None else max(1, issued_before_us // SECOND - BACKDATE_S)
    return Entries(
        frozenset({plain_serial(serial)} if serial else ()),
        workloads={spiffe_id: before} if spiffe_id else {},
    )
