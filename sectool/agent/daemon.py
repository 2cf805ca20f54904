"""The daemon's root process: brings everything up in an order that fails closed, and takes it down again.

    enrolment, settings          nothing is touched yet
    namespace lock               one daemon per network namespace
    control history              the active policy revision; none: everything is denied
    event store, packet workers  as children, kept alive
    control socket
    kernel rules                 last: from here on packets are queued, and stay queued if we crash
    announced

Rules are removed by an orderly `down` and by nothing else: after a crash, or SIGTERM, no new connection passes until
a daemon is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.serialization import Encoding

from nfq import cgroup, rules
from nfq.marks import MASK
from nfq.netns import NamespaceLock
from nfq.preflight import preflight
from sectool import __version__
from sectool.agent import control, keyfolder
from sectool.agent.alerts import Alerts
from sectool.agent.apply import policy_problem
from sectool.agent.background import prepare_run_folder
from sectool.agent.caclient import CaClient
from sectool.agent.cleanup import remove_run_files
from sectool.agent.discovery import Discovery
from sectool.agent.eventlog import EventLog
from sectool.agent.federation import Relations
from sectool.agent.handover import Given, Handover, Predecessor, taken
from sectool.agent.health import Health
from sectool.agent.identities import Identities, Issued, read_facts
from sectool.agent.kubernetes import Kubernetes
from sectool.agent.logs import Announcer, start_logging
from sectool.agent.mode import Mode, Modes
from sectool.agent.namespaces import Namespaces
from sectool.agent.nursery import Nursery
from sectool.agent.programs import Program, Programs, forget_programs
from sectool.agent.records import Records
from sectool.agent.reload import reload
from sectool.agent.revisions import Revisions, draft
from sectool.agent.revocation import Revoked
from sectool.agent.rulewatch import RuleWatch
from sectool.agent.settings import load_settings, rules_config
from sectool.agent.storeproc import StoreProcess
from sectool.agent.surroundings import Surroundings
from sectool.agent.svids import Endpoint
from sectool.agent.vulns import Vulns
from sectool.agent.worker import Key, PolicyText, Setup, Worker
from sectool.agent.workloads import tell
from sectool.api.paths import Paths
from sectool.api.server import Server
from sectool.errors import Exit, SectoolError
from sectool.events import Type, now_us
from sectool.identity.credential import Credential
from sectool.identity.enrolment import HostIdentity, load_host
from sectool.identity.federation import to_wire
from sectool.identity.spiffe import SpiffeId
from sectool.identity.trust import TrustBundle
from sectool.identity.verify import path_labels, path_rules
from sectool.identity.workload import Facts, Workload, resolve
from sectool.labels import DOMAIN_LABEL, LabelSet
from sectool.origins import Source
from sectool.policy import load
from sectool.spiffe.spire import Spire, credential_of
from store.control import Actor

log = logging.getLogger("sectool.agent")

STORE_START_S = 15.0
WORKER_START_S = 20.0
SPIRE_START_S = 2.0
WORKER_GRACE_S = 5.0
WORKER_SILENCE_S = 20.0
PREDECESSOR_S = 8.0  # for what a killed daemon's children still hold
DEFINE_S = 3600.0
TICK_S = 1.0


def serve(
    paths: Paths,
    *,
    verbose: bool = False,
    announce_fd: int | None = None,
    policy: Sequence[Path] = (),
    mode: Mode | None = None,
) -> int:
    """Run the daemon until it is told to stop; returns the exit code.

    `policy` files become the policy in force before anything is enforced; `mode` stays until another is chosen, None
    is the one chosen last. A failed start raises SectoolError, or,
    when somebody waits at `announce_fd`, tells them.
    """
    nursery = Nursery()  # before there are threads, handlers, and anything that its children should not have
    start_logging(verbose)
    handover = taken()
    if (
        handover is not None
    ):  # whoever waited for the program before was told then, and its policy is in force
        announce_fd, policy, mode = None, (), None
    announcer = Announcer(announce_fd)
    try:
        asyncio.run(Daemon(paths, announcer, nursery, policy, handover, mode).run())
    except SectoolError as error:
        if announce_fd is None and handover is None:
            raise
        log.error("not started: %s", error.message)
        announcer.failed(error.message, error.hint, int(error.exit_code))
        return int(error.exit_code)
    except Exception as error:
        if announce_fd is None and handover is None:
            raise
        log.exception("not started, because of a defect")
        announcer.failed(
            f"a defect in sectool: {type(error).__name__}: {error}", f"see {paths.log_file}", int(Exit.DENIED)
        )
        return int(Exit.DENIED)
    finally:
        nursery.close()
    return int(Exit.OK)


class Daemon:
    """All parts of one daemon. Control operations (sectool.agent.control) work on it."""

    def __init__(
        self,
        paths: Paths,
        announcer: Announcer,
        nursery: Nursery,
        policy: Sequence[Path] = (),
        handover: Handover | None = None,
        mode: Mode | None = None,
    ) -> None:
        self.paths = paths
        self.nursery = nursery
        self.settings = load_settings(paths.settings)
        self.host = load_host(paths.state)
        self.started_us = now_us()
        self.mask = MASK if self.settings.mask is None else self.settings.mask
        self.rules_config = rules_config(self.settings)
        self.state = "starting"
        self.relations = Relations(paths.state, self.host.trust_domain)
        self.surroundings = Surroundings(paths.state, self.settings.context, self.workloads_changed)
        self.vulns = Vulns(paths.state)
        self._labels_told: dict[int, LabelSet] = {}  # by workload id: what live connections are judged by
        self.endpoint: Endpoint | None = None
        self.spire: Spire | None = None
        self._path_labels = path_labels(path_rules(self.settings.path_labels))
        self.revoked = Revoked(paths.state, self.trusted_bundle, *self._revocation_settings)
        self._first_policy = draft(load(policy).text) if policy else None
        self._adopt = False  # until the first start is through: connections that exist already are let live
        self.rules_installed = False
        self.remove_rules = False  # set by `down`, with who asked for it
        self.restarting = False  # set by `restart`: the workers go on
        self.handover = handover
        self._given: list[Given] = []
        self._lock = NamespaceLock(paths.run)
        self._placing = threading.Lock()
        self.stopped_by = ""
        self.stopping = asyncio.Event()
        self.workers: list[Worker] = []
        self.health = Health(self._health_changed)
        self.identities = Identities(self._resolve, self._issue, self._issued)
        self.alerts = Alerts(self)
        self.modes = Modes(self, mode)
        self._announcer = announcer
        self._defined = time.monotonic()
        self._stack = contextlib.AsyncExitStack()
        self.activation = asyncio.Lock()  # one policy change at a time

    @property
    def enforced_networks(self) -> tuple[str, ...]:
        """Networks inside which a peer has to present an identity."""
        return self.settings.enforced_networks or tuple(str(n) for n in self.host.enforced_networks)

    async def run(self) -> None:
        """Up, until told to stop, and down."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_stop, number)
        loop.add_signal_handler(signal.SIGHUP, self._told_to_reload)
        try:
            await self._bring_up()
            self._announcer.enforcing(
                pid=os.getpid(),
                host=self.host.name,
                trust_domain=self.host.trust_domain,
                revision=self.revisions.active.revision if self.revisions.active else 0,
                mode=str(self.modes.mode),
            )
            ticking = asyncio.create_task(self._tick(), name="tick")
            await self.stopping.wait()
            ticking.cancel()
        finally:
            self.state = "stopping"
            await self._stack.aclose()
        if self.restarting:
            self.nursery.close()
            Handover(__version__, tuple(self._given), self._steering, self._lock.give_away()).become()
        if not self.remove_rules and self.rules_installed:
            log.warning(
                "stopped; the kernel rules stay and no new connection passes (`sectool down` removes them)"
            )

    @property
    def _steering(self) -> tuple[int, int, int]:
        """What leads a packet to its worker."""
        return self.rules_config.queue, self.rules_config.workers, self.rules_config.mask

    def _told_to_reload(self) -> None:
        if self.state == "enforcing":
            try:
                reload(self)
            except SectoolError as error:
                log.error("not reloaded: %s", error.message)

    def _told_to_stop(self, number: int) -> None:
        log.info("stopping: %s", signal.Signals(number).name)
        self.stopping.set()

    async def _bring_up(self) -> None:
        push = self._stack
        prepare_run_folder(self.paths)
        self.keys = keyfolder.key_folder(self.paths.run)
        if self.handover is not None:
            self._lock.inherit(self.handover.lock)
        else:
            self._lock.acquire()
        push.callback(self._unlock)
        push.callback(self._remove_traces)
        after_crash = self.paths.pid_file.exists()  # an orderly end removes it
        self.paths.pid_file.write_text(f"{os.getpid()}\n", encoding="ascii")
        self.records = Records(self.paths.control_history, self.host.name)
        push.push_async_callback(self.records.close)
        self.revisions = Revisions(self.records)
        await self.revisions.load()
        if self._first_policy is not None:
            active = self.revisions.active
            if active is None or active.hash != self._first_policy.hash:
                await self.revisions.add(self._first_policy, Actor.me(), "given to sectool up")
        self.events = EventLog(self.paths.agent_ring())
        push.callback(self.events.close)
        bound = after_crash or self.handover is not None
        for finding in await asyncio.to_thread(preflight, self.rules_config, bound=bound):
            if not finding.ok:
                raise SectoolError(finding.message, finding.hint)
        self._adopt = self.handover is None and not rules.present()
        self.store = StoreProcess(
            self.paths,
            self.settings.socket_group,
            self.nursery,
            lambda why: self.health.raise_("event store", why),
        )
        push.push_async_callback(self.store.stop)
        if not await self.store.begin(STORE_START_S):
            self.health.raise_("event store", f"it has not answered for {STORE_START_S:.0f} s")
        self.programs = Programs(cgroup.mount(), self.paths.programs, self._program_ended)
        self.programs.load()
        known = await self.records.workloads_open()
        self.discovery = Discovery(
            self.identities,
            cgroup.Cgroups(),
            lambda turn: tell(self, turn, known),
            self._moved,
            packages=self.vulns.packages,
            kubernetes=Kubernetes(self.settings.kubernetes_namespaces, self.settings.pod_labels),
        )
        push.callback(self._say_stopped)
        await self.surroundings.start()
        push.push_async_callback(self.surroundings.close)
        if self.settings.spire_socket is not None:
            await self._ask_spire(self.settings.spire_socket)
        await self._start_workers(PREDECESSOR_S if after_crash else 0.0)
        server = Server(self.paths.control_socket, control.operations(self), self.settings.socket_group)
        await server.start()
        push.push_async_callback(server.close)
        await self.discovery.start()
        push.push_async_callback(self.discovery.close)
        self.namespaces = Namespaces(self)
        self.rule_watch = RuleWatch(self.health, rules.installed, self._put_rules)
        self.discovery.elsewhere = self.namespaces.consider
        push.push_async_callback(self.namespaces.close)
        self._install_rules()
        self._adopt = False
        self.state = "enforcing"
        self.alerts.start()
        push.push_async_callback(self.alerts.close)
        self.modes.start()
        active = self.revisions.active
        self.events.emit(
            Type.ENFORCER_START,
            host=self.host.name,
            pid=os.getpid(),
            revision=active.revision if active else 0,
            hash=active.hash if active else "",
            mode=str(self.modes.mode),  # it may have been chosen while no daemon ran
        )
        if active is None:
            denied = "would be denied" if self.modes.observing else "is denied"
            log.warning("no policy has been applied yet: every connection %s", denied)
        else:
            self.define_rules()
            await self.revisions.activated(active.revision)
        self.records.trusted(self.relations.records(self.trusted_bundle))
        push.push_async_callback(self.relations.close)
        self.ca_client = CaClient(self)
        self.ca_client.start()
        push.push_async_callback(self.ca_client.close)
        if self.settings.workload_api:
            self.endpoint = Endpoint(self)
            push.push_async_callback(self.endpoint.close)
            await self.endpoint.start()
        log.info(
            "%s as %s in %s",
            "observing" if self.modes.observing else "enforcing",
            self.host.name,
            self.host.trust_domain,
        )
        if self.handover is not None:
            gaps = ", ".join(
                f"{worker.gap_ms:.0f} ms" for worker in self.workers if worker.gap_ms is not None
            )
            log.info(
                "took over from version %s; packets waited for %s", self.handover.version, gaps or "a start"
            )

    async def _start_workers(self, patience_s: float) -> None:
        before = (
            {given.number: Predecessor(given) for given in self.handover.workers} if self.handover else {}
        )
        if self.handover is not None and self.handover.steering != self._steering:
            for predecessor in before.values():  # packets are led differently now
                await predecessor.stop(WORKER_GRACE_S)
            before = {}
        for number in range(self.settings.workers):
            worker = Worker(
                number,
                Setup(
                    partial(self.worker_config, number), self.bundle, self.policy_text, self.revoked.to_wire
                ),
                identify=self.identify,
                changed=lambda why, n=number: self._worker_changed(n, why),  # type: ignore[misc]
                nursery=self.nursery,
            )
            self.workers.append(worker)
            self._stack.push_async_callback(self._end, worker)
            await worker.begin(WORKER_START_S, patience_s, before.get(number))

    async def _end(self, worker: Worker) -> None:
        given = await worker.give_away() if self.restarting else None
        if given is not None:
            self._given.append(given)
        else:
            await worker.stop(WORKER_GRACE_S)

    def _unlock(self) -> None:
        if not self.restarting:
            self._lock.release()

    def worker_config(self, number: int) -> dict[str, Any]:
        """What a packet worker is told at its start."""
        settings = self.settings
        return {
            "run_dir": str(self.paths.run),
            "number": number,
            "ring": str(self.paths.worker_ring(number)),
            "journal": str(self.keys / f"flows-worker-{number}"),
            "journals": [str(path) for path in keyfolder.journals(self.paths.run)],
            "adopt": self._adopt,
            "queue": settings.queue,
            "workers": settings.workers,
            "mask": self.mask,
            "reject": settings.reject,
            "enforced_networks": list(self.enforced_networks),
            **self.modes.told(),
            "host": self.host.name,
            "trust_domain": self.host.trust_domain,
            "path_labels": [[pattern, dict(labels)] for pattern, labels in settings.path_labels],
            "accepted": to_wire(self.relations.federation.accepted),
            "clock_skew_s": settings.clock_skew_s,
            "syn_rate": settings.syn_rate,
            "resolvers": None if settings.resolvers is None else list(settings.resolvers),
            "suites": list(settings.suites),
        }

    @property
    def trusted_bundle(self) -> TrustBundle:
        """Roots of our own trust domain and of those we have a relationship with."""
        return self.relations.federation.added_to(self.host.bundle)

    @property
    def _revocation_settings(self) -> tuple[bool, int, tuple[str, ...]]:
        settings = self.settings
        return settings.revocation_expired == "closed", settings.clock_skew_s, settings.revocation_required

    def bundle(self) -> bytes:
        """The roots that workers trust, in PEM."""
        return self.trusted_bundle.to_pem().encode("ascii")

    def policy_text(self) -> PolicyText:
        """What workers enforce now; revision 0 is the empty set, which denies everything."""
        active = self.revisions.active
        return PolicyText(active.revision, active.hash, active.text) if active else PolicyText(0, "", "")

    def _install_rules(self) -> None:
        self._put_rules()
        self.rules_installed = True
        self._stack.callback(self._maybe_remove_rules)

    @property
    def mode_rules(self) -> rules.RulesConfig:
        """The kernel rules as the mode wants them."""
        return replace(self.rules_config, observe=self.modes.mode is Mode.OBSERVE)

    async def follow_mode(self) -> None:
        """Have the kernel rules be as the mode wants them, here and inside. Raises SectoolError."""
        await asyncio.to_thread(self._put_rules)
        await self.namespaces.follow_mode()

    def _put_rules(self) -> None:
        """Install the rules as the mode wants them when it is our turn. Raises SectoolError; for any thread.

        One at a time: whoever began with an older mode must not end last. And never behind their removal: a thread
        outlives the task that waits for it, and nobody would be there to judge what the rules queue.
        """
        with self._placing:
            if not self.remove_rules:
                rules.install(self.mode_rules, self.paths.run)

    def _maybe_remove_rules(self) -> None:
        if self.remove_rules:
            with self._placing:
                rules.remove(self.paths.run)
            self.rules_installed = False

    def _remove_traces(self) -> None:
        if self.remove_rules:
            forget_programs(cgroup.mount(), self.paths.programs)
        remove_run_files(self.paths, everything=self.remove_rules)

    def _say_stopped(self) -> None:
        if self.restarting:
            return
        self.events.emit(
            Type.ENFORCER_STOP,
            host=self.host.name,
            actor=self.stopped_by,
            rules_removed=not self.rules_installed,
        )

    # What the parts report.

    async def _ask_spire(self, socket: Path) -> None:
        """Take SVIDs from a SPIRE agent from now on; without one at the start, from when it answers."""

        def problem(why: str) -> None:
            if why:
                self.health.raise_("SPIRE", why)
            else:
                self.health.clear("SPIRE")

        self.spire = Spire(socket, problem)
        following = asyncio.create_task(self.spire.run(), name="spire")
        self._stack.callback(following.cancel)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.spire.heard.wait(), SPIRE_START_S)

    def _health_changed(self, degraded: bool, what: str, why: str) -> None:
        if degraded:
            log.error("degraded: %s: %s", what, why)
        else:
            log.info("recovered: %s", what)
        kind = Type.ENFORCER_DEGRADED if degraded else Type.ENFORCER_RECOVERED
        self.events.emit(kind, host=self.host.name, what=what, why=why)

    def _worker_changed(self, number: int, why: str) -> None:
        if self.stopping.is_set() or self.state != "enforcing":
            return
        if why:
            self.health.raise_(f"worker {number}", why)
            return
        self.health.clear(f"worker {number}")
        active = self.revisions.active
        late = policy_problem(number)
        if late in self.health.problems and active and self.workers[number].revision == active.revision:
            self.health.clear(late)
            self.records.activated_later(active.revision)

    def workload_of(self, facts: Facts) -> Workload:
        """Which workload these facts are. Raises SectoolError, LabelError."""
        return self._resolve(facts)

    def _resolve(self, facts: Facts) -> Workload:
        registered = {program.cgroup: program.labels for program in self.programs.by_id.values()}
        return resolve(
            facts,
            self.revisions.workload_documents,
            registered,
            host=self.host.name,
            host_labels=self.host.labels,
            context=self._context(facts),
        )

    def _context(self, facts: Facts) -> tuple[Source, ...]:
        """Labels of the weakest origin, as far as this host may vouch for them: without them it has an identity too."""
        allowed = self.host.constraints
        found = self.vulns.source(facts)
        labels = {key: value for key, value in found.labels.items() if allowed.permits(key, value)}
        return self.surroundings.source(allowed), replace(found, labels=labels)

    def _relabel(self) -> None:
        """Connections that live are judged by the labels that their workloads have now."""
        told: dict[int, LabelSet] = {}
        for number, entry in self.identities.by_workload.items():
            found = self.identities.resolve(entry.facts)
            if (
                isinstance(found, SectoolError) or not entry.credential.peer.host
            ):  # of another issuer: not ours to say
                continue
            labels = told[number] = found[1].labels
            if labels != self._labels_told.get(number, entry.workload.labels):
                whole = {**labels, DOMAIN_LABEL: entry.credential.peer.trust_domain}
                self.tell_workers({"t": "relabel", "workload": number, "labels": whole})
        self._labels_told = told

    def workloads_changed(self) -> None:
        """What makes a workload of facts is another matter now: sockets are asked for again, labels follow."""
        if self.state != "enforcing":
            return
        self._relabel()
        self.identities.forget_sockets()
        self.discovery.resolve_again()
        self.tell_workers({"t": "flush_workloads"})
        if self.endpoint is not None:
            self.endpoint.changed()

    def _issue(self, workload: Workload) -> Credential:
        taken = self.spire.of(workload.name) if self.spire is not None else None
        if taken is not None:  # and if it cannot be used, there is no identity: not another one instead
            labels = self._path_labels(SpiffeId.parse(taken.spiffe_id))
            return credential_of(taken, labels, now_us())
        made = self.host.authority.issue(
            workload.path, workload.labels, now_us(), self.settings.svid_lifetime_s
        )
        return self.revoked.refuse_revoked(made)

    def identify(self, worker: Worker, key: Key, raw: Mapping[str, Any]) -> None:
        """Answer a worker that asks for the workload behind a socket."""
        try:
            facts = read_facts(raw)
        except SectoolError as error:
            self._refuse(worker, key, raw, error)
            return
        self.discovery.with_container(facts, lambda full: self._present(worker, key, full))

    def _present(self, worker: Worker, key: Key, facts: Facts) -> None:
        try:
            entry = self.identities.identify(key, facts)
        except SectoolError as error:
            self._refuse(worker, key, {"executable": facts.executable or "a socket"}, error)
            return
        worker.send(*_credential(key, entry))
        self.discovery.connected(entry.workload_id)

    def _moved(self, key: Key, before: int, now: int) -> None:
        """A socket's owner is another workload by what is known now: who presents the old credential gets the new."""
        entry = self.identities.move(key, before, now)
        if entry is not None:
            for worker in self.workers:
                worker.send(*_credential(key, entry))

    def _refuse(self, worker: Worker, key: Key, raw: Mapping[str, Any], error: SectoolError) -> None:
        log.warning("no identity for %s: %s", raw.get("executable", "a socket"), error.message)
        worker.send({"t": "credential", "key": key, "error": error.message})

    def _issued(self, entry: Issued, before: Credential | None) -> None:
        # The connection that waits comes first: what is to be recorded follows once the answer is on its way.
        asyncio.get_running_loop().call_soon(
            self.records.issued, self.events, entry, entry.credential, before
        )

    def _program_ended(self, program: Program) -> None:
        self.identities.forget_cgroup(program.cgroup)

    def define_rules(self) -> None:
        """Dictionary entries for every rule of the active revision, ahead of the flows they decide."""
        active = self.revisions.active
        self._defined = time.monotonic()
        for rule in active.engine.rules if active else ():
            self.events.define(
                Type.DICT_RULE,
                rule.id,
                policy=rule.policy,
                kind=rule.kind,
                owner=rule.owner,
                index=rule.index,
                text=rule.text,
                revision=active.revision if active else 0,
            )

    def trust(self, host: HostIdentity) -> None:
        """Take this enrolment and the relationships on disk, and hand their trust bundles to the workers."""
        before = self.host.authority.certificate
        renewed = host.authority.certificate != before
        if renewed and self.endpoint is not None:
            self.endpoint.changed(identities=True)
        self.host = host
        self.relations.reread(host.trust_domain)
        self.trust_changed(None, "")
        if renewed:  # what the CA before has issued holds only as long as everybody trusts its root
            by_old = before.public_bytes(Encoding.DER)
            self.present_again(self.identities.reissue(lambda e: e.credential.host_der == by_old))

    def trust_changed(self, actor: Actor | None, reason: str) -> None:
        """Whom we trust is another matter now: workers, record and events follow."""
        self.revoked.reread(self.trusted_bundle, *self._revocation_settings)
        for worker in self.workers:
            self.tell_trust(worker)
        self.records.trusted(self.relations.records(self.trusted_bundle), actor, reason)
        if self.endpoint is not None:
            self.endpoint.changed()
        if reason:
            self.events.emit(
                Type.TRUST_CHANGED,
                reason=reason,
                actor=actor.name if actor else "sectool agent",
                trust_domains=list(self.trusted_bundle.trust_domains),
            )

    def tell_trust(self, worker: Worker) -> None:
        """Whom to trust, and what is revoked."""
        accepted = to_wire(self.relations.federation.accepted)
        worker.send({"t": "bundle", "accepted": accepted}, self.bundle())
        worker.send({"t": "revoked"}, self.revoked.to_wire())

    def tell_workers(self, header: dict[str, Any], payload: bytes = b"") -> None:
        """One frame to every packet worker."""
        for worker in self.workers:
            worker.send(header, payload)

    def present_again(self, entries: Sequence[Issued]) -> None:
        """Hand the credentials of these workloads to whoever speaks for them."""
        for entry in entries:
            for key in entry.keys:
                self.tell_workers(*_credential(key, entry))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._announcer.alive()
            await self._every_second()

    async def _every_second(self) -> None:
        for work in (
            self.modes.watch,
            self._renew,
            lambda: self.revoked.watch(self, now_us()),
            lambda: self.relations.refresh_due(self, now_us()),
            self._look_at_packages,
            self._check_workers,
            self.programs.sweep,
            self.namespaces.sweep,
        ):
            try:
                work()
            except (
                Exception
            ):  # what fails every second, as on a full disk, must not keep the rest from its turn
                log.exception("a part of the agent's regular work failed")
        try:
            await self._look_after()
        except Exception:
            log.exception("a part of the agent's regular work failed")

    def _renew(self) -> None:
        self.present_again(self.identities.renew_due(now_us(), self.discovery.inventory.wanted))

    def _look_at_packages(self) -> None:
        if self.vulns.packages_changed():
            self.workloads_changed()

    def _check_workers(self) -> None:
        for worker in self.workers:
            worker.check(WORKER_SILENCE_S)

    async def _look_after(self) -> None:
        """Kernel rules, and what is told of problems."""
        if self.state == "enforcing" and self.rules_installed and not self.restarting:
            await self.rule_watch.check()
        if self.discovery.problem:
            self.health.raise_("labels of namespaces", self.discovery.problem)
        else:
            self.health.clear("labels of namespaces")
        if time.monotonic() - self._defined > DEFINE_S:
            self.define_rules()
        if (
            self.store.child.pid is not None
            and "event store" in self.health.problems
            and await self.store.answers()
        ):
            self.health.clear("event store")


def _credential(key: Key, entry: Issued) -> tuple[dict[str, Any], bytes]:
    peer = entry.credential.peer
    header = {
        "t": "credential",
        "key": key,
        "workload": {
            "id": entry.workload_id,
            "path": entry.workload.path,
            "labels": dict(peer.labels),
            **entry.describe(),
        },
    }
    return header, entry.credential.to_wire()
