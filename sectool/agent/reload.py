"""`sectool reload`, SIGHUP: settings and trust read anew and applied without losing a flow. Some need a restart."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Final

from sectool.agent.settings import Settings, load_settings
from sectool.identity.enrolment import load_host

if TYPE_CHECKING:
    from sectool.agent.daemon import Daemon

log = logging.getLogger("sectool.agent")

LIVE: Final = frozenset(
    (
        "enforced_networks",
        "reject",
        "svid_lifetime_s",
        "clock_skew_s",
        "resolvers",
        "syn_rate",
        "activation_timeout_s",
        "suites",
        "enforce_inside",
        "roles",
        "revocation_expired",
        "revocation_required",
    )
)


@dataclass(frozen=True, slots=True)
class Reloaded:
    """Names of settings that have changed: those in force now, and those that wait for a restart."""

    applied: tuple[str, ...]
    waiting: tuple[str, ...]


def reload(daemon: Daemon) -> Reloaded:
    """Apply what has changed. Raises SectoolError for a file with a mistake in it; then nothing has changed."""
    wanted, host = load_settings(daemon.paths.settings), load_host(daemon.paths.state)
    daemon.alerts.reread()
    changed = [
        f.name for f in fields(Settings) if getattr(wanted, f.name) != getattr(daemon.settings, f.name)
    ]
    waiting = tuple(name for name in changed if name not in LIVE)
    # What waits is told again at every reload: compared is with what is in force.
    daemon.settings = replace(wanted, **{name: getattr(daemon.settings, name) for name in waiting})
    daemon.trust(host)
    for worker in daemon.workers:
        worker.resettle()
    applied = tuple(name for name in changed if name in LIVE)
    log.info("reloaded: %s", ", ".join(applied) or "no setting has changed")
    if waiting:
        log.warning("these settings need a restart (sectool restart): %s", ", ".join(waiting))
    return Reloaded(applied, waiting)
