"""The agent's conversation with the CA service: hears of roots and revocations as they happen, renews this host's CA.

state/ca-service names the URL; without it the host was enrolled by file and this does nothing.
renewal: when half of the host CA's life is over, or another root issues now (a rollover)
silence of the CA changes nothing but what `status` says; lists that expire meanwhile are told by their own age
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from sectool.agent.aside import aside
from sectool.agent.revocation import took
from sectool.caservice.client import service_of, sync
from sectool.clock import iso
from sectool.errors import CredentialError, SectoolError
from sectool.events import now_us
from sectool.identity.authority import HostAuthority
from sectool.identity.joining import accept, prepare, take_roots
from sectool.identity.profile import Profile
from sectool.identity.trust import TrustBundle

if TYPE_CHECKING:
    from sectool.agent.daemon import Daemon

log = logging.getLogger("sectool.agent")

AGAIN_S: Final = 1.0  # after an answer
PATIENCE_S: Final = 15.0  # after a failure
MISSED: Final = 4  # failures in a row before it is a problem of the daemon's
PROBLEM: Final = "CA service"


class CaClient:
    """One conversation at a time, for as long as the daemon runs."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._digest = ""
        self._missed = 0
        self._current = ""  # fingerprint of the root that issues now, as far as we heard
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, if this host has a CA service."""
        self._task = asyncio.create_task(self._keep_up(), name="CA service")

    async def close(self) -> None:
        """Stop; what is being asked is given up."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _keep_up(self) -> None:
        while True:
            try:
                url = service_of(self._daemon.paths.state)
                wait = AGAIN_S if url else PATIENCE_S
                if url:
                    await self._once(url)
                    self._missed = 0
                    self._daemon.health.clear(PROBLEM)
            except SectoolError as error:
                self._failed(error.message)
                wait = PATIENCE_S
            except Exception as error:  # a defect here must not end it for good
                log.exception("the CA service could not be asked")
                self._failed(type(error).__name__)
                wait = PATIENCE_S
            await asyncio.sleep(wait)

    def _failed(self, why: str) -> None:
        self._digest = ""
        self._missed += 1
        log.warning("the CA service could not be asked: %s", why)
        if self._missed >= MISSED:
            self._daemon.health.raise_(PROBLEM, why)

    async def _once(self, url: str) -> None:
        daemon = self._daemon
        host, state = daemon.host, daemon.paths.state
        own = daemon.revoked.lists.known.get(host.authority.key_id)
        request = b""
        if self._due(host.authority):
            request = prepare(state, host.name, host.constraints, force=True)
        roots = host.bundle.roots[host.trust_domain]
        said = await aside(
            lambda: sync(
                url,
                host.authority,
                roots,
                digest="" if request else self._digest,
                own_list=own.pem if own is not None else b"",
                request=request,
            )
        )
        self._take(said)
        self._digest, self._current = said["digest"], said["current"]

    def _due(self, authority: HostAuthority) -> bool:
        certificate = authority.certificate
        half = (
            certificate.not_valid_before_utc
            + (certificate.not_valid_after_utc - certificate.not_valid_before_utc) / 2
        )
        if half.timestamp() * 1e6 < now_us():
            return True
        root = authority.root_fingerprint
        return bool(self._current) and root != self._current

    def _take(self, said: dict[str, Any]) -> None:
        """Lists first, then roots, then our own CA: each verified by what was trusted before it."""
        daemon, now = self._daemon, now_us()
        state = daemon.paths.state
        answer = said.get("answer")
        if answer is not None:
            daemon.trust(accept(state, str(answer).encode(), now))
            log.info("this host's CA was renewed until %s", iso(daemon.host.authority.not_after_us))
        if said["digest"] == self._digest:
            return
        roots = said["roots"].encode()
        self._lists(said["lists"])
        domain = daemon.host.trust_domain
        published = TrustBundle.from_pem(said["roots"]).roots.get(domain, ())
        if _prints(published) != _prints(daemon.host.bundle.roots[domain]):
            daemon.trust(take_roots(state, roots, now))
            daemon.trust_changed(None, f"roots of {domain} as the CA publishes them")
            self._lists(said["lists"])  # those of a new root hold now

    def _lists(self, pems: list[Any]) -> None:
        daemon = self._daemon
        for pem in pems:
            try:
                taken, fresh = daemon.revoked.lists.take(str(pem).encode(), now_us())
            except CredentialError as error:
                log.debug("a list of the CA service does not hold here: %s", error.message)
                continue
            except SectoolError:  # older than what we have, or past its end: what we have says so itself
                continue
            if fresh:
                took(daemon, taken, None, "from the CA service")


def _prints(roots: Iterable[Profile]) -> set[bytes]:
    return {root.fingerprint for root in roots}
