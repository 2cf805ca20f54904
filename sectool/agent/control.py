"""The operations of the control socket: what `sectool status`, `policy …`, `run`, `identity` and `down` ask for."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING

from sectool import __version__
from sectool.agent import alerts, captures, federation, mode, vulns, workloads
from sectool.agent.apply import apply, check, promote, rollback
from sectool.agent.handover import try_installed
from sectool.agent.names import known
from sectool.agent.reload import reload
from sectool.agent.revisions import Revision
from sectool.agent.revocation import (
    identity_revoke,
    identity_rotate,
    identity_show,
    revocation_import,
    revocation_list,
)
from sectool.agent.roles import held
from sectool.api.server import Operation, Reply, Request
from sectool.errors import SectoolError, UsageError
from sectool.events import now_us
from sectool.origins import Origin, refusal

if TYPE_CHECKING:
    from sectool.agent.daemon import Daemon

STATS_S = 0.5  # how long `status` waits for a worker's fresh counters


def operations(daemon: Daemon) -> Mapping[str, Operation]:
    """All operations on `daemon`; those that write are for root alone.

    Those that change policy look at the caller's roles themselves (sectool.agent.roles).
    """

    def bind(handle: Callable[[Daemon, Request], Awaitable[Reply]], *, writes: bool = False) -> Operation:
        return Operation(lambda request: handle(daemon, request), writes)

    return {
        "status": bind(_status),
        "policy.apply": bind(apply),
        "policy.check": bind(check),
        "policy.rollback": bind(rollback),
        "policy.promote": bind(promote),
        "policy.show": bind(_policy_show),
        "policy.history": bind(_policy_history),
        "identity.list": bind(_identities),
        "identity.show": bind(identity_show),
        "identity.revoke": bind(identity_revoke, writes=True),
        "identity.rotate": bind(identity_rotate, writes=True),
        "revocation.list": bind(revocation_list),
        "revocation.import": bind(revocation_import, writes=True),
        "workload.list": bind(workloads.workload_list),
        "workload.tree": bind(workloads.workload_tree),
        "names.list": bind(_names),
        "alerts.list": bind(alerts.alerts_list),
        "alerts.test": bind(alerts.alerts_test, writes=True),
        "vuln.list": bind(vulns.vuln_list),
        "vuln.import": bind(vulns.vuln_import, writes=True),
        "vuln.forget": bind(vulns.vuln_forget, writes=True),
        "trust.list": bind(federation.trust_list),
        "trust.show": bind(federation.trust_show),
        "trust.add": bind(federation.trust_add, writes=True),
        "trust.remove": bind(federation.trust_remove, writes=True),
        "trust.refresh": bind(federation.trust_refresh, writes=True),
        "capture.note": bind(captures.note, writes=True),
        "run.register": bind(_register, writes=True),
        "mode.set": bind(mode.mode_set),
        "break_glass": bind(mode.break_glass),
        "reload": bind(_reload, writes=True),
        "restart": bind(_restart, writes=True),
        "down": bind(_down, writes=True),
    }


async def _status(daemon: Daemon, request: Request) -> Reply:
    workers = []
    for worker in daemon.workers:
        stats = await worker.fresh_stats(STATS_S)
        workers.append(
            {
                "number": worker.number,
                "pid": worker.child.pid,
                "restarts": worker.child.restarts,
                "enforcing": worker.enforcing,
                "revision": worker.revision,
                "gap_ms": worker.gap_ms,
                "stats": stats,
            }
        )
    active = daemon.revisions.active
    enforcing = daemon.state == "enforcing" and all(w.enforcing for w in daemon.workers)
    degraded = daemon.state == "enforcing" and bool(daemon.health.problems)
    return Reply(
        {
            "version": __version__,
            "state": "degraded" if degraded else daemon.state,
            "problems": [{"what": k, "why": v} for k, v in daemon.health.problems.items()],
            "enforcing": enforcing,
            **daemon.modes.describe(),
            "rules_installed": daemon.rules_installed,  # whether they still are, `problems` tells
            "pid": os.getpid(),
            "started": daemon.started_us,
            "host": daemon.host.name,
            "host_labels": dict(daemon.host.labels),
            "trust_domain": daemon.host.trust_domain,
            "trusted_domains": list(daemon.trusted_bundle.trust_domains),
            "host_ca_expires": daemon.host.authority.not_after_us,
            "namespace": os.stat("/proc/self/ns/net").st_ino,  # noqa: PTH116
            "caller": {
                "user": request.peer.name,
                "roles": list(held(request.peer, daemon.settings.roles)),
            },
            "state_dir": str(daemon.paths.state),
            "run_dir": str(daemon.paths.run),
            "enforced_networks": list(daemon.enforced_networks),
            "reject": daemon.settings.reject,
            "policy": active.summary() if active else None,
            "workers": workers,
            "store": {"pid": daemon.store.child.pid, "restarts": daemon.store.child.restarts},
            "events_lost_by_agent": daemon.events.lost,
            "workloads": len(daemon.discovery.inventory.by_id),
            "programs": len(daemon.programs.by_id),
            "inside": daemon.namespaces.describe(),
            "identities_refused": daemon.identities.refused,
        }
    )


async def _policy_show(daemon: Daemon, request: Request) -> Reply:
    """The revision `rev`, or the one in force at `at` (UTC microseconds), or the active one; text as payload."""
    revision = await _wanted(daemon, request)
    return Reply(revision.summary(), revision.text.encode())


async def _wanted(daemon: Daemon, request: Request) -> Revision:
    number = request.number("rev")
    at = request.number("at")
    if number is not None:
        return await daemon.revisions.get(number)
    if at is not None:
        return await daemon.revisions.at(at)
    if daemon.revisions.active is None:
        raise SectoolError(
            "no policy has been applied yet: every connection is denied", "sectool policy apply FILE"
        )
    return daemon.revisions.active


async def _policy_history(daemon: Daemon, request: Request) -> Reply:
    return Reply({"items": await daemon.revisions.history()})


async def _identities(daemon: Daemon, request: Request) -> Reply:
    items = []
    for entry in daemon.identities.by_workload.values():
        peer = entry.credential.peer
        items.append(
            {
                "id": peer.id,
                "spiffe_id": peer.spiffe_id,
                "labels": dict(peer.labels),
                "workload": entry.workload.name,
                "serial": peer.serial,
                "fingerprint": peer.fingerprint.hex(),
                "not_before": peer.not_before_us,
                "not_after": peer.not_after_us,
                "renew_at": entry.credential.renew_at_us,
                "rotations": entry.rotations,
                "bytes": len(entry.credential.blob),
                "refused": daemon.revoked.current.of(peer),
            }
        )
    return Reply({"items": items})


async def _names(daemon: Daemon, request: Request) -> Reply:
    active = daemon.revisions.active
    engine = active.engine if active else None
    return Reply(await asyncio.to_thread(known, daemon.paths.run, daemon.settings.workers, engine, now_us()))


async def _register(daemon: Daemon, request: Request) -> Reply:
    """Put the caller into a cgroup of its own that stands for `labels`."""
    labels = request.fields.get("labels", {})
    if not isinstance(labels, dict) or not all(isinstance(v, str) for v in labels.values()):
        raise UsageError("run.register: labels have to be key and value texts")
    name = request.fields.get("name")
    if name is not None and not isinstance(name, str):
        raise UsageError("run.register: name has to be text")
    for key, value in labels.items():
        if why := refusal(key, Origin.OPERATOR):
            raise UsageError(why, "choose another key")
        if not daemon.host.constraints.permits(key, value):
            raise UsageError(
                f"host {daemon.host.name} may not vouch for {key}={value}",
                "its label constraints were set at enrolment; enrol it again to widen them",
            )
    daemon.programs.sweep()
    program = daemon.programs.register(name, labels, request.peer.uid, request.peer.pid)
    daemon.discovery.see([request.peer.pid])
    return Reply({"name": program.name, "cgroup": program.cgroup, "cgroup_id": program.cgroup_id})


async def _reload(daemon: Daemon, request: Request) -> Reply:
    """Read settings and trust bundle anew and hand them to the workers."""
    done = reload(daemon)
    return Reply(
        {
            "applied": list(done.applied),
            "waiting": list(done.waiting),
            "trusted_domains": list(daemon.trusted_bundle.trust_domains),
        }
    )


async def _restart(daemon: Daemon, request: Request) -> Reply:
    """Become the installed program; packet workers go on until their successors stand by."""
    version = await try_installed(daemon.paths)
    daemon.restarting = True
    daemon.stopping.set()
    return Reply({"pid": os.getpid(), "started": daemon.started_us, "version": __version__, "next": version})


async def _down(daemon: Daemon, request: Request) -> Reply:
    daemon.remove_rules = True
    daemon.stopped_by = request.peer.name
    daemon.stopping.set()
    return Reply({"pid": os.getpid()})
