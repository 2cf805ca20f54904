"""Vulnerability reports while the daemon runs: imported, joined to workloads, and the labels that follow from them."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from sectool.agent.aside import aside
from sectool.agent.packages import Packages
from sectool.api.server import Reply, Request
from sectool.context.vulnreport import SEVERITIES, read_report
from sectool.context.vulns import Known, Subject, Vulnerabilities
from sectool.errors import UsageError
from sectool.events import Type, now_us
from sectool.identity.workload import Facts
from sectool.origins import Origin, Source

if TYPE_CHECKING:
    from sectool.agent.daemon import Daemon

log = logging.getLogger("sectool.agent")

FILE: Final = "vulns.json"
DPKG: Final = Path("/var/lib/dpkg/status")


class Vulns:
    """What is known of this host's vulnerabilities, and who owns its programs."""

    def __init__(self, state: Path) -> None:
        """Raises SectoolError for a damaged file."""
        self.known = Vulnerabilities(state / FILE)
        self.importing = asyncio.Lock()  # one report at a time
        self.packages = Packages()  # shared with discovery, which asks for many at once
        self._stamp = _stamp()

    def owner(self, path: str) -> str:
        """`package version` of a program of this host, '' if no package owns it."""
        known = self.packages.known(path)
        return known if known is not None else self.packages.owners([path])[path]

    def source(self, facts: Facts) -> Source:
        """The labels that follow for the workload with these facts."""
        return Source(Origin.CONTEXT, self.known.labels(facts.mapping(), self.owner), "vulnerability reports")

    def packages_changed(self) -> bool:
        """Whether packages were installed, upgraded or removed since the last look, and that matters."""
        before, self._stamp = self._stamp, _stamp()
        return before != self._stamp and any(not subject.digests for subject in self.known.subjects)


def _stamp() -> int:
    try:
        return DPKG.stat().st_mtime_ns
    except OSError:
        return 0


async def vuln_import(daemon: Daemon, request: Request) -> Reply:
    """Take the report that is the payload. Labels follow before this answers."""
    async with daemon.vulns.importing:
        report = await aside(lambda: read_report(request.payload))
        change = await aside(lambda: daemon.vulns.known.take(report, now_us()))
    daemon.workloads_changed()
    told = {
        "subject": report.name,
        "tool": report.tool,
        "new": change.new,
        "fixed": change.fixed,
        "open": change.open,
    }
    daemon.events.emit(Type.VULN_CHANGED, actor=request.peer.name, **told)
    affected = [name for name, _ in _workloads(daemon, report.digests)]
    free = daemon.host.constraints.permits
    labelled = free("vuln", "critical") and free("vuln-age", "2026-01-01T00:00:00Z")
    return Reply({**told, "digests": list(report.digests), "workloads": affected, "labelled": labelled})


async def vuln_forget(daemon: Daemon, request: Request) -> Reply:
    """No report on `subject` counts any more."""
    subject = request.text("subject")
    if not subject:
        raise UsageError("vuln.forget: subject is missing")
    async with daemon.vulns.importing:
        daemon.vulns.known.forget(subject)
    daemon.workloads_changed()
    daemon.events.emit(Type.VULN_CHANGED, actor=request.peer.name, subject=subject, forgotten=True)
    return Reply({"subject": subject})


async def vuln_list(daemon: Daemon, request: Request) -> Reply:
    """Findings, the gravest and oldest first, with the workloads that each is of; fixed ones with `all`."""
    every = bool(request.fields.get("all"))
    of = _by_finding(daemon)
    items = [
        row(subject, known, of.get((id(subject), known.finding.key), []))
        for subject in daemon.vulns.known.subjects
        for known in subject.known
        if every or not known.fixed_us
    ]
    items.sort(key=lambda r: (-SEVERITIES.index(r["severity"]), r["first_seen"], r["id"]))
    subjects = [
        {"name": s.name, "digests": list(s.digests), "tool": s.tool, "reported": s.reported_us}
        for s in daemon.vulns.known.subjects
    ]
    return Reply({"items": items, "subjects": subjects})


def row(subject: Subject, known: Known, workloads: list[str]) -> dict[str, Any]:
    """One finding as `vuln list` tells it."""
    finding = known.finding
    return {
        "severity": finding.severity,
        "id": finding.id,
        "package": finding.package,
        "version": finding.version,
        "fixed_in": finding.fixed_in,
        "path": finding.path,
        "subject": subject.name,
        "first_seen": known.first_us,
        "fixed": known.fixed_us,
        "workloads": workloads,
    }


def _workloads(daemon: Daemon, digests: tuple[str, ...]) -> list[tuple[str, list[Known]]]:
    """Workloads that run and what is open in them; with `digests` only those of such an image."""
    out: dict[str, list[Known]] = {}
    for _, running in daemon.discovery.inventory.processes():
        facts = running.facts.mapping()
        if digests and facts.get("container.digest") not in digests:
            continue
        name = running.workload.name
        if name not in out and (found := daemon.vulns.known.of(facts, daemon.vulns.owner)):
            out[name] = found
    return sorted(out.items())


def _by_finding(daemon: Daemon) -> dict[tuple[int, tuple[str, str, str]], list[str]]:
    owners = {id(known): subject for subject in daemon.vulns.known.subjects for known in subject.known}
    out: dict[tuple[int, tuple[str, str, str]], list[str]] = {}
    for name, found in _workloads(daemon, ()):
        for known in found:
            out.setdefault((id(owners[id(known)]), known.finding.key), []).append(name)
    return out
