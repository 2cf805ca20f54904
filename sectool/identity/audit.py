"""What is wrong with the keys, certificates and lists of a state folder, as findings."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

from sectool.clock import DAY, iso
from sectool.errors import SectoolError
from sectool.identity.enrolment import load_host
from sectool.identity.lists import Lists

SOON_US = 30 * DAY
Finding = dict[str, str]


def audit(state: Path, now_us: int) -> list[Finding]:
    """Findings, each with `what` and `finding`; none: all is in order."""
    return list(_findings(state, now_us))


def _findings(state: Path, now_us: int) -> Iterator[Finding]:
    for path in sorted(state.rglob("*.key")):
        info = path.lstat()
        if not stat.S_ISREG(info.st_mode):
            yield {"what": str(path), "finding": "it is not a regular file"}
        elif info.st_mode & 0o077:
            mode = f"{stat.S_IMODE(info.st_mode):04o}"
            yield {
                "what": str(path),
                "finding": f"a private key with mode {mode}; others may have read it: replace it",
            }
    try:
        host = load_host(state)
    except SectoolError as error:
        yield {"what": str(state / "host"), "finding": error.message}
        return
    end = host.authority.not_after_us
    if end < now_us + SOON_US:
        past = "has expired" if end < now_us else "expires"
        yield {"what": f"CA of host {host.name}", "finding": f"{past} at {iso(end)}: sectool host renew"}
    for root in host.bundle.roots.get(host.trust_domain, ()):
        if root.not_after_us < now_us + 12 * SOON_US:
            finding = f"its root expires at {iso(root.not_after_us)}: sectool ca rollover begin"
            yield {"what": host.trust_domain, "finding": finding}
    lists = Lists(state, host.bundle, now_us)
    for name, why in lists.damaged.items():
        yield {"what": name, "finding": f"this revocation list does not count: {why}"}
    for each in lists.known.values():
        if now_us > each.warn_us:
            yield {
                "what": f"revocation list of {each.who}",
                "finding": f"fresh until {iso(each.next_update_us)} only",
            }
    if why := lists.revocations().why(
        host.trust_domain,
        f"spiffe://{host.trust_domain}{host.constraints.path_prefix.rstrip('/')}",
        "",
        now_us,
        (host.authority.key_id, f"{host.authority.certificate.serial_number:x}"),
    ):
        yield {"what": f"CA of host {host.name}", "finding": why}
