"""Workloads towards the outside: their events and records, and the operations of the control socket that show them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sectool.agent.inventory import Running, Turn
from sectool.api.server import Reply, Request
from sectool.events import Type, now_us

if TYPE_CHECKING:
    from sectool.agent.daemon import Daemon

_TELLING = (
    "name",
    "labels",
    "executable",
    "sha256",
    "user",
    "unit",
    "cgroup",
)  # what makes a workload another one


def tell(daemon: Daemon, turn: Turn, known: dict[int, dict[str, Any]]) -> None:
    """Put starts, changes and ends on record.

    `known` is what a daemon before has put there; it is used up. Once all that runs was found (`turn.complete`), what
    is left of it ended while nobody looked.
    """
    for running in turn.began:
        if known.pop(running.number, None) == running.noted:
            running.told = running.noted
            continue
        events, body = daemon.events, running.noted
        what: dict[str, Any] = {
            "workload_id": running.number,
            "workload": body["name"],
            "labels": body["labels"],
            "executable": body["executable"],
            "since": running.since_us,
        }
        if running.before is None:
            pid = min(running.pids, default=running.facts.pid)
            events.emit(Type.WORKLOAD_START, pid=pid, user=body["user"], unit=body["unit"], **what)
            reason = "started"
        else:
            changed = [key for key in _TELLING if body[key] != running.told.get(key)] or ["labels"]
            events.emit(Type.WORKLOAD_CHANGE, was=running.before, changed=changed, **what)
            reason = f"changed: {', '.join(changed)}"
        daemon.records.workload(running.number, body, running.since_us, reason)
    for running in turn.changed:
        changed = sorted(k for k in running.noted if running.noted[k] != running.told.get(k))
        daemon.events.emit(
            Type.WORKLOAD_CHANGE,
            workload_id=running.number,
            workload=running.workload.name,
            changed=changed,
            **{key: running.noted[key] for key in changed},
        )
        daemon.records.workload(running.number, running.noted, now_us(), f"changed: {', '.join(changed)}")
    for running in turn.ended:
        if running.became is None:
            daemon.events.emit(
                Type.WORKLOAD_STOP,
                workload_id=running.number,
                workload=running.workload.name,
                executable=running.facts.executable,
                ended=running.ended_us,
            )
        daemon.records.workload_ended(running.number, running.ended_us)
    for running in (*turn.began, *turn.changed):
        running.told = running.noted
    if turn.complete and known:
        moment = now_us()
        for number, body in known.items():
            if number not in daemon.discovery.inventory.by_id:
                name = str(body.get("name", ""))
                daemon.events.emit(Type.WORKLOAD_STOP, workload_id=number, workload=name, unseen=True)
                daemon.records.workload_ended(number, moment)
        known.clear()


async def workload_list(daemon: Daemon, request: Request) -> Reply:
    """Workloads that run; with `ended` those that have ended, too; `at`: those of a moment, from the record."""
    at = request.number("at")
    if at is not None:
        rows = [
            {"id": number, "since": since, "until": until, **body}
            for number, since, until, body in await daemon.records.workloads_at(at)
        ]
        return Reply({"items": sorted(rows, key=_by_name), "at": at})
    inventory = daemon.discovery.inventory
    found = [r for r in inventory.by_id.values() if r.pids or r.connected]
    if request.fields.get("ended") is True:
        found += inventory.ended.values()
    return Reply({"items": sorted((_row(daemon, running) for running in found), key=_by_name)})


def _by_name(row: dict[str, Any]) -> tuple[str, int]:
    return row["name"], row["id"]


def _row(daemon: Daemon, running: Running) -> dict[str, Any]:
    entry = daemon.identities.by_workload.get(running.number)
    return {
        "id": running.number,
        "since": running.since_us,
        "until": running.ended_us or None,
        **running.body(),
        "pids": sorted(running.pids),
        "connected": running.connected,
        "spiffe_id": entry.credential.peer.spiffe_id if entry is not None else "",
        "not_after": entry.credential.not_after_us if entry is not None else None,
    }


async def workload_tree(daemon: Daemon, request: Request) -> Reply:
    """Processes of the workloads that run, with their parents and cgroups."""
    rows = [
        {
            "pid": process.pid,
            "parent": process.parent,
            "cgroup": process.cgroup,
            "uid": process.uid,
            "user": running.facts.user,
            "since": process.started_us,
            "executable": running.facts.executable,
            "workload": running.workload.name,
            "workload_id": running.number,
        }
        for process, running in daemon.discovery.inventory.processes()
    ]
    return Reply({"items": sorted(rows, key=lambda row: (row["cgroup"], row["pid"]))})
