"""Other trust domains, while the daemon runs: relationships changed on request, bundles refreshed when due.

    trust add/remove/refresh ──► state/trust/ ──► workers (bundle, labels that count) ──► live flows cut where need be
                                     └──► control history

A refresh that fails changes nothing but what is shown: the last good bundle stays in force, whatever its age.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sectool.agent.aside import aside
from sectool.agent.records import TrustRecord
from sectool.api.server import Reply, Request
from sectool.errors import SectoolError, UsageError
from sectool.events import now_us
from sectool.identity.bundle import SpiffeBundle, of_roots, read_bundle
from sectool.identity.federation import Federation, Profile, Relationship, Source, accepted_labels
from sectool.identity.files import write_atomic
from sectool.identity.profile import Profile as Certificate
from sectool.identity.spiffe import SpiffeId
from sectool.spiffe.endpoint import fetch_bundle
from store.control import Actor

if TYPE_CHECKING:
    from sectool.agent.daemon import Daemon
    from sectool.identity.enrolment import HostIdentity
    from sectool.identity.trust import TrustBundle

log = logging.getLogger("sectool.agent")

TRUST = "trust"  # folder in the state folder
STALE = 3  # refreshes missed in a row before it is a problem of the daemon's


class Relations:
    """The daemon's relationships with other trust domains."""

    def __init__(self, state: Path, own: str, web_roots: Path | None = None) -> None:
        """Raises SectoolError for a damaged file."""
        self._state = state
        self._web_roots = web_roots
        self.federation = Federation(state / TRUST, own)
        self._asking: dict[str, asyncio.Task[None]] = {}
        self._missed: dict[str, int] = {}

    def reread(self, own: str) -> None:
        """Take what is on disk now."""
        self.federation = Federation(self._state / TRUST, own)

    def records(self, bundle: TrustBundle) -> dict[str, TrustRecord]:
        """What the control history keeps of every domain trusted."""
        out: dict[str, TrustRecord] = {}
        for domain, roots in bundle.roots.items():
            body: TrustRecord = {"roots": sorted(root.fingerprint.hex() for root in roots)}
            found = self.federation.known.get(domain)
            if found is not None:
                body |= {
                    "accept": {key: list(values) for key, values in found.accept.allow.items()},
                    "profile": found.source.profile.value,
                    "url": found.source.url,
                    "endpoint_id": found.source.endpoint_id,
                    "sequence": found.bundle.sequence,
                    "bundle": json.loads(found.bundle.to_json()),
                }
            out[domain] = body
        return out

    # -- refreshing ------------------------------------------------------------------------------------------------

    def refresh_due(self, daemon: Daemon, now: int) -> None:
        """Begin to ask every endpoint whose time has come; never waits."""
        for domain, relationship in self.federation.known.items():
            due = relationship.due_us
            if due and due <= now and domain not in self._asking:
                self._asking[domain] = asyncio.create_task(self._refresh_later(daemon, domain))

    async def _refresh_later(self, daemon: Daemon, domain: str) -> None:
        try:
            await self.refresh(daemon, domain, None)
        except SectoolError as error:
            log.warning("bundle of %s not refreshed: %s", domain, error.message)
        except Exception:  # a defect here must not end refreshing for good
            log.exception("bundle of %s not refreshed", domain)
        finally:
            self._asking.pop(domain, None)

    async def refresh(self, daemon: Daemon, domain: str, actor: Actor | None) -> bool:
        """Ask the endpoint of `domain` now; whether its bundle has changed. SectoolError: it could not be had."""
        before = self.federation.get(domain)
        if before.source.profile is Profile.FILE:
            raise UsageError(
                f"the bundle of {domain} came from a file",
                f"give a newer file: sectool trust add {domain} --bundle FILE",
            )
        try:
            fresh = await self.ask(before.source, domain)
            after = self._still(before).with_bundle(fresh, now_us())
        except SectoolError as error:
            current = self.federation.known.get(domain)
            if current is not None:
                self.federation.put(current.failed(error.message, now_us()))
                self._missed[domain] = self._missed.get(domain, 0) + 1
                if self._missed[domain] >= STALE:
                    daemon.health.raise_(f"bundle of {domain}", error.message)
            raise
        self._missed.pop(domain, None)
        daemon.health.clear(f"bundle of {domain}")
        changed = after.bundle.fingerprints != before.bundle.fingerprints
        self.federation.put(after)
        if changed:
            log.info("trust domain %s has %d roots now", domain, len(after.bundle.roots))
            daemon.trust_changed(actor, f"bundle of {domain} refreshed")
        return changed

    def _still(self, before: Relationship) -> Relationship:
        """The relationship as it is now: it may have been changed while its endpoint was being asked."""
        current = self.federation.known.get(before.trust_domain)
        if current is None or current.source != before.source:
            raise SectoolError(f"the relationship with {before.trust_domain} has been changed meanwhile")
        return current

    async def ask(self, source: Source, domain: str, given: Relationship | None = None) -> SpiffeBundle:
        """What an endpoint publishes for `domain`, verified by what is known (`given` first)."""
        anchors: tuple[Certificate, ...] = ()
        if source.profile is Profile.HTTPS_SPIFFE:
            server = SpiffeId.parse(source.endpoint_id).trust_domain
            mine = given is not None and given.trust_domain == server
            known = given if mine else self.federation.known.get(server)
            anchors = known.bundle.roots if known is not None else ()
        return await aside(lambda: fetch_bundle(source, domain, anchors, web_roots=self._web_roots))

    async def close(self) -> None:
        """Give up what is under way."""
        for task in list(self._asking.values()):
            task.cancel()
        await asyncio.gather(*self._asking.values(), return_exceptions=True)


# -- operations of the control socket ----------------------------------------------------------------------------------


def describe(relationship: Relationship) -> dict[str, Any]:
    """One relationship as `trust list` and `trust show` tell it."""
    bundle, source = relationship.bundle, relationship.source
    return {
        "trust_domain": relationship.trust_domain,
        "own": False,
        "profile": source.profile.value,
        "url": source.url,
        "endpoint_id": source.endpoint_id,
        "accept": {key: list(values) for key, values in relationship.accept.allow.items()},
        "sequence": bundle.sequence,
        "refresh_s": bundle.refresh_s if relationship.due_us else None,
        "added": relationship.added_us,
        "fetched": relationship.fetched_us,
        "checked": relationship.checked_us,
        "error": relationship.error,
        "ignored": list(bundle.ignored),
        "roots": [
            {
                "fingerprint": root.fingerprint.hex(),
                "not_before": root.not_before_us,
                "not_after": root.not_after_us,
            }
            for root in bundle.roots
        ],
    }


def describe_all(host: HostIdentity, federation: Federation) -> list[dict[str, Any]]:
    """Every trust domain: our own first, then what else came with enrolment, then relationships."""
    own = host.trust_domain
    enrolled = [own, *(d for d in host.bundle.roots if d != own and d not in federation.known)]
    return [*(_enrolled(host, domain) for domain in enrolled), *map(describe, federation.known.values())]


def _enrolled(host: HostIdentity, domain: str) -> dict[str, Any]:
    roots = host.bundle.roots.get(domain, ())
    return {
        "trust_domain": domain,
        "own": domain == host.trust_domain,
        "profile": "enrolment",
        "url": "",
        "endpoint_id": "",
        "accept": {},
        "sequence": None,
        "refresh_s": None,
        "added": 0,
        "fetched": 0,
        "checked": 0,
        "error": "",
        "ignored": [],
        "roots": [
            {"fingerprint": r.fingerprint.hex(), "not_before": r.not_before_us, "not_after": r.not_after_us}
            for r in roots
        ],
    }


async def trust_list(daemon: Daemon, request: Request) -> Reply:
    """Every trust domain, as `describe_all`."""
    return Reply({"items": describe_all(daemon.host, daemon.relations.federation)})


async def trust_show(daemon: Daemon, request: Request) -> Reply:
    """One trust domain (default: our own); its bundle document as payload."""
    domain = request.text("domain") or daemon.host.trust_domain
    if domain == daemon.host.trust_domain:
        return Reply(_enrolled(daemon.host, domain), export(daemon.paths.state, daemon.host).encode())
    found = daemon.relations.federation.get(domain)
    return Reply(describe(found), found.bundle.to_json().encode())


async def trust_add(daemon: Daemon, request: Request) -> Reply:
    """Begin or change a relationship. Payload: a bundle document, if one is given."""
    relations, actor, now = daemon.relations, Actor(request.peer.uid, request.peer.name), now_us()
    wanted = relationship_of(request.fields, request.payload, now, relations.federation)
    domain, source = wanted.trust_domain, wanted.source
    if source.profile is not Profile.FILE and request.fields.get("profile"):
        fresh = await relations.ask(source, domain, wanted)
        wanted = wanted.with_bundle(fresh, now)
    before = relations.federation.known.get(domain)
    relations.federation.put(wanted)
    what = "added" if before is None else "changed"
    daemon.trust_changed(actor, request.text("reason") or f"trust domain {domain} {what}")
    return Reply({**describe(wanted), "new": before is None})


def relationship_of(fields: Mapping[str, Any], document: bytes, now: int, known: Federation) -> Relationship:
    """What `trust add` asks for, as far as it can be had without asking anybody else. Raises SectoolError.

    Without a profile the relationship's source and bundle stay as they are, and only the labels accepted change. A
    document for a domain that is known already must not be an older copy.
    """
    domain, profile, accept = fields.get("domain"), fields.get("profile", ""), fields.get("accept", [])
    url, endpoint_id = fields.get("url", ""), fields.get("endpoint_id", "")
    if (
        not isinstance(domain, str)
        or not isinstance(profile, str)
        or not isinstance(url, str)
        or not isinstance(endpoint_id, str)
    ):
        raise UsageError("trust.add: domain, profile, url and endpoint_id have to be text")
    if not isinstance(accept, list) or not all(isinstance(text, str) for text in accept):
        raise UsageError("trust.add: accept has to be a list of texts")
    labels = accepted_labels(accept)
    if not profile:
        return replace(known.get(domain), accept=labels)
    try:
        kind = Profile(profile)
    except ValueError:
        raise UsageError(
            f"there is no endpoint profile {profile!r}", "file, https_web or https_spiffe"
        ) from None
    source = Source(kind, url, endpoint_id)
    if kind is Profile.FILE and not document:
        raise UsageError(
            "there is no bundle to trust", "give one with --bundle FILE, or an endpoint with --url"
        )
    before = known.known.get(domain)
    if document and before is not None:
        before = before.with_bundle(read_bundle(document, domain), now)
    if before is not None:
        return replace(before, source=source, accept=labels, error="")
    return Relationship(read_bundle(document or b'{"keys": []}', domain), source, labels, now, now, now)


async def trust_remove(daemon: Daemon, request: Request) -> Reply:
    """End a relationship; the domain's live flows are cut."""
    domain = request.text("domain")
    daemon.relations.federation.remove(domain)
    daemon.health.clear(f"bundle of {domain}")
    actor = Actor(request.peer.uid, request.peer.name)
    daemon.trust_changed(actor, request.text("reason") or f"trust domain {domain} removed")
    return Reply({"trust_domain": domain})


async def trust_refresh(daemon: Daemon, request: Request) -> Reply:
    """Ask the endpoint of one trust domain, or of all, now; what came of each."""
    relations, domain = daemon.relations, request.text("domain")
    actor = Actor(request.peer.uid, request.peer.name)
    domains = [domain] if domain else [d for d, r in relations.federation.known.items() if r.due_us]
    items = []
    for each in domains:
        try:
            changed = await relations.refresh(daemon, each, actor)
            items.append({"trust_domain": each, "changed": changed, "error": ""})
        except UsageError:
            raise
        except SectoolError as error:
            items.append({"trust_domain": each, "changed": False, "error": error.message})
    return Reply({"items": items})


def export(state: Path, host: HostIdentity) -> str:
    """Our own domain's bundle as a document.

    Its sequence is the second in which this host first saw these roots: it grows with every change, on every host.
    """
    roots = host.bundle.roots.get(host.trust_domain, ())
    prints = sorted(root.fingerprint.hex() for root in roots)
    path = state / TRUST / "published"
    known: dict[str, Any] = {}
    try:
        known = json.loads(path.read_text(encoding="ascii"))
        same = known["roots"] == prints
        sequence = int(known["sequence"])
    except (OSError, ValueError, KeyError, TypeError):
        same, sequence = False, 0
    if not same:
        sequence = max(sequence + 1, now_us() // 1_000_000)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"roots": prints, "sequence": sequence}).encode("ascii"))
    return of_roots(host.trust_domain, roots, sequence).to_json()
