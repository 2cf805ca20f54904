"""Is this host fit to enforce, and is what it has in order: every check, its finding, and the remedy.

Nothing is changed. What the packet path needs is tried in a throwaway network namespace (nfq.preflight); everything
else is read. `examine` runs all checks; `sectool doctor` prints them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from nfq import netns, rules
from nfq.preflight import preflight
from sectool.agent import hostchecks, statechecks
from sectool.agent.settings import Settings, load_settings, rules_config
from sectool.api.client import Client
from sectool.api.paths import Paths
from sectool.errors import NoDaemonError, SectoolError


class Level(StrEnum):
    """How much a finding matters."""

    GOOD = "good"
    NOTE = "note"  # worth knowing, nothing to do
    WARNING = "warning"  # works, but not as well or as safely as it should
    BAD = "bad"  # does not work, or is not safe


@dataclass(frozen=True, slots=True)
class Finding:
    """One check: `check` names it, `message` says what was found, `hint` what to do."""

    area: str
    check: str
    level: Level
    message: str
    hint: str = ""


def examine(paths: Paths) -> list[Finding]:
    """All findings, in the order an operator should read them. Without root fewer checks can be made, which is one."""
    found: list[Finding] = []
    settings = _settings(paths, found)
    running = _daemon(paths, found)
    found += _kernel(settings, running=running)
    found += _all("host", hostchecks.checks(settings))
    found += _all("state", statechecks.checks(paths, settings))
    return found


def worst(findings: Iterable[Finding]) -> Level:
    """The level that matters most."""
    order = list(Level)
    return max((f.level for f in findings), key=order.index, default=Level.GOOD)


def _all(area: str, checked: Iterable[tuple[str, str, str, str]]) -> list[Finding]:
    return [Finding(area, check, Level(level), message, hint) for check, level, message, hint in checked]


def _settings(paths: Paths, found: list[Finding]) -> Settings:
    try:
        settings = load_settings(paths.settings)
    except SectoolError as error:
        hint = error.hint or "correct the file; until then the daemon does not start with it"
        found.append(Finding("state", "settings", Level.BAD, error.message, hint))
        return Settings()
    there = "read" if paths.settings.exists() else "no sectool.yaml: defaults hold"
    found.append(Finding("state", "settings", Level.GOOD, there))
    return settings


def _daemon(paths: Paths, found: list[Finding]) -> bool:
    """Whether a daemon enforces here, and whether its rules and it belong together."""
    if os.geteuid() != 0:
        found.append(
            Finding(
                "daemon",
                "privilege",
                Level.WARNING,
                "not run as root: kernel, keys and rules were not looked at",
                "run it with sudo",
            )
        )
        return False
    running, said = True, None
    try:
        with Client(paths.control_socket, timeout=5.0) as control:
            said = control.call("status").header
    except NoDaemonError:
        running = False
    except SectoolError as error:
        found.append(
            Finding(
                "daemon",
                "daemon",
                Level.BAD,
                error.message,
                "see agent.log in the run folder; sectool restart",
            )
        )
    holder = netns.lock_holder()
    if said is not None:
        good = said.get("state") == "enforcing"
        found.append(
            Finding(
                "daemon",
                "daemon",
                Level.GOOD if good else Level.WARNING,
                f"pid {said.get('pid')}, version {said.get('version')}, {said.get('state')}",
                "" if good else "sectool status says why",
            )
        )
        if said.get("observing"):
            found.append(
                Finding(
                    "daemon",
                    "mode",
                    Level.WARNING,
                    "nothing is denied: "
                    + ("the glass is broken" if said.get("break_glass") else "mode observe"),
                    "sectool mode enforce, or sectool break-glass --end; sectool status says who chose it, and why",
                )
            )
    elif not running and holder is not None:
        found.append(
            Finding(
                "daemon",
                "daemon",
                Level.BAD,
                f"process {holder or '(unseen)'} enforces here, but does not answer at {paths.control_socket}",
                "give the --run and --state folders it was started with",
            )
        )
    elif not running:
        found.append(
            Finding("daemon", "daemon", Level.NOTE, "not running", "start it: sudo sectool up --background")
        )
    try:
        present, whole = rules.present(), rules.installed()
    except SectoolError as error:
        found.append(Finding("daemon", "kernel rules", Level.BAD, error.message, error.hint))
        return running
    enforced = running or holder is not None
    if present and not enforced:
        found.append(
            Finding(
                "daemon",
                "kernel rules",
                Level.BAD,
                "in place without a daemon: no new connection passes",
                "start it again: sectool up --background; or give enforcing up: sectool down",
            )
        )
    elif enforced and not whole:
        found.append(
            Finding(
                "daemon",
                "kernel rules",
                Level.BAD,
                "incomplete: somebody has flushed or changed them, and connections may pass unseen",
                "a running daemon puts them back within seconds; find who did it (a firewall that reloads?)",
            )
        )
    else:
        found.append(
            Finding("daemon", "kernel rules", Level.GOOD, "in place" if present else "none, as it should be")
        )
    return enforced


def _kernel(settings: Settings, *, running: bool) -> list[Finding]:
    if os.geteuid() != 0:
        return []
    return [
        Finding("kernel", f.what, Level.GOOD if f.ok else Level.BAD, f.message, f.hint)
        for f in preflight(rules_config(settings), bound=running)
    ]
