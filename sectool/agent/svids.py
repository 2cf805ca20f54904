"""SVIDs that workloads of this host ask for themselves, through the SPIFFE Workload API (sectool.spiffe.workloadapi).

The process that asks is attested as the packet path attests a socket's owner: same facts, same workload, same SPIFFE
ID. The SVID is another one than the packet path presents: with a key of its own and without labels (Portable).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from nfq.attestation import Attestor, Attributed
from nfq.cgroup import Cgroups, of_process
from sectool.agent.identities import workload_id
from sectool.errors import SectoolError
from sectool.events import Type, now_us
from sectool.identity.authority import Portable
from sectool.identity.workload import Facts
from sectool.labels import LabelError, stable_id
from sectool.spiffe.workloadapi import Caller, Source, Svid, WorkloadApi

if TYPE_CHECKING:
    from sectool.agent.daemon import Daemon

log = logging.getLogger("sectool.agent")

SOCKET: Final = "workload.sock"  # in the run folder
MAX_KEPT: Final = 4096
MAX_CRLS: Final = 2 << 20  # bytes; a client of gRPC takes messages of 4 MiB unless told otherwise
ATTEST_S: Final = 20.0  # for hashing an executable nobody has hashed yet


class Callers:
    """Facts of processes that connect to us, from /proc; hashing is done in the background."""

    def __init__(self, cgroups: Cgroups, proc: Path = Path("/proc")) -> None:
        self._cgroups = cgroups
        self._proc = proc
        self._attestor = Attestor(cgroups, os.fspath(proc))
        asyncio.get_running_loop().add_reader(
            self._attestor.background.fd, self._attestor.background.completed
        )

    def close(self) -> None:
        """Attest nobody any more."""
        asyncio.get_running_loop().remove_reader(self._attestor.background.fd)
        self._attestor.close()

    async def attest(self, caller: Caller) -> Facts:
        """What the kernel says of the process. SectoolError when it cannot be told, or changes meanwhile."""
        before = self._look(caller.pid)
        if before[1] != caller.uid:
            raise SectoolError(f"process {caller.pid} has changed its user since it connected")
        loop = asyncio.get_running_loop()
        told: asyncio.Future[Facts | None] = loop.create_future()
        self._attestor.later(
            Attributed(before, caller.pid, caller.uid, before[0], caller.pid, self._attestor.now),
            lambda facts: None if told.done() else told.set_result(facts),
        )
        try:
            facts = await asyncio.wait_for(told, ATTEST_S)
        except TimeoutError:
            facts = None
        if facts is None or self._look(caller.pid) != before:
            raise SectoolError(f"process {caller.pid} has ended or changed, or too many are asking")
        return facts

    def _look(self, pid: int) -> tuple[int, int, int, int, int]:
        """Cgroup, user (of what it makes) and executable of a process: what sockets are attributed by, too."""
        folder = self._proc / str(pid)
        try:
            exe = (folder / "exe").stat()
            lines = (folder / "status").read_text(encoding="utf-8", errors="replace").splitlines()
            uid = int(next(line for line in lines if line.startswith("Uid:")).split()[4])
            path = of_process(pid)
            if path is None:
                raise SectoolError(f"process {pid} is in no cgroup")
            return self._cgroups.id_of(path), uid, exe.st_dev, exe.st_ino, exe.st_ctime_ns
        except (OSError, ValueError, IndexError, StopIteration):
            raise SectoolError(f"process {pid} cannot be looked at; has it ended?") from None


class Svids:
    """The SVIDs handed out, one a workload, renewed at half their life; the oldest give way."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._known: OrderedDict[int, Portable] = OrderedDict()

    def of(self, facts: Facts) -> Svid:
        """The SVID of the workload behind these facts. SectoolError when there can be none."""
        daemon = self._daemon
        try:
            workload = daemon.workload_of(facts)
        except LabelError as error:
            raise SectoolError(f"labels do not fit together: {error}") from None
        number, now = workload_id(workload, facts), now_us()
        known = self._known.get(number)
        if known is None or known.renew_at_us <= now:
            fresh = daemon.host.authority.issue_portable(workload.path, now, daemon.settings.svid_lifetime_s)
            daemon.events.emit(
                Type.IDENTITY_ISSUED if known is None else Type.IDENTITY_ROTATED,
                identity_id=stable_id(fresh.fingerprint),
                spiffe_id=fresh.spiffe_id,
                serial=fresh.serial,
                not_after=fresh.not_after_us,
                workload_id=number,
                replaces=stable_id(known.fingerprint) if known is not None else None,
                held_by="workload",
            )
            known = self._known[number] = fresh
            if len(self._known) > MAX_KEPT:
                self._known.popitem(last=False)
        self._known.move_to_end(number)
        daemon.revoked.refuse_portable(daemon.host, known, now)
        key = known.key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        return Svid(known.spiffe_id, known.leaf_der + known.host_der, key, known.renew_at_us)

    def bundles(self) -> Mapping[str, bytes]:
        """Roots in DER, one behind the other, by trust domain."""
        return {
            domain: b"".join(root.certificate.public_bytes(Encoding.DER) for root in roots)
            for domain, roots in self._daemon.trusted_bundle.roots.items()
            if roots
        }

    def crls(self) -> list[bytes]:
        """The lists of what is revoked, in DER, those of roots first; as many as a client is sure to take."""
        lists = sorted(self._daemon.revoked.lists.known.values(), key=lambda each: not each.by_root)
        out: list[bytes] = []
        room = MAX_CRLS
        for each in lists:
            der = x509.load_pem_x509_crl(each.pem[each.pem.rindex(b"-----BEGIN X509 CRL") :]).public_bytes(
                Encoding.DER
            )
            room -= len(der)
            if room < 0:
                log.warning("the Workload API leaves out the list of %s: clients take so much only", each.who)
                room += len(der)
                continue
            out.append(der)
        return out

    def forget(self) -> None:
        """The host's CA, or what makes a workload, is another: everybody gets a new one."""
        self._known.clear()


class Endpoint:
    """The Workload API of a running daemon."""

    def __init__(self, daemon: Daemon, cgroups: Callable[[], Cgroups] = Cgroups) -> None:
        self._callers = Callers(cgroups())
        self._svids = Svids(daemon)

        async def attest(caller: Caller) -> Facts:
            facts = await self._callers.attest(caller)
            full: asyncio.Future[Facts] = asyncio.get_running_loop().create_future()
            daemon.discovery.with_container(facts, lambda f: None if full.done() else full.set_result(f))
            try:
                return await asyncio.wait_for(full, ATTEST_S)
            except TimeoutError:
                raise SectoolError(f"nobody tells of the container of process {caller.pid}") from None

        svids = self._svids
        source = Source(attest, svids.of, svids.bundles, lambda: daemon.host.trust_domain, svids.crls)
        self.api = WorkloadApi(daemon.paths.run / SOCKET, source, now_us)

    async def start(self) -> None:
        """Serve. Raises SectoolError."""
        await self.api.start()
        log.info("SPIFFE Workload API at %s", self.api.path)

    async def close(self) -> None:
        """End all calls."""
        await self.api.close()
        self._callers.close()

    def changed(self, *, identities: bool = False) -> None:
        """Trust, what is revoked, or (`identities`) what workloads are, has changed: everybody is told."""
        if identities:
            self._svids.forget()
        self.api.changed()
