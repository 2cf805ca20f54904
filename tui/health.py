"""How the host does, as lines: good things quiet, bad ones with a sign and in red. Pure text."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from sectool.cli.status import suspended
from sectool.cli.text import escape
from sectool.clock import DAY
from tui.words import ago, count, day_clock, left, octets

BAD = "bold red"
WARN = "yellow"
GOOD = "bold green"
SIGNS = {BAD: "✗", GOOD: "✓", WARN: "!"}
FULL = 0.5  # of a ring: the store does not keep up
NAME = 14
_LEVELS = {"bad": BAD, "warning": WARN, "note": "dim", "good": GOOD}

Facts = Mapping[str, Any]


class Lines:
    """Titles and rows, one below the other; what is longer than `room` columns goes on below where it began."""

    def __init__(self, room: int) -> None:
        self.text = Text()
        self._across = max(20, room - NAME - 3)

    def title(self, text: str) -> None:
        """A heading, apart from what is above it."""
        self.text.append(("\n" if self.text else "") + text + "\n", style="bold underline")

    def row(self, name: str, value: object, style: str = "") -> None:
        """A name and what is to be said of it."""
        sign = SIGNS.get(style, " ")
        self.text.append(f"{sign} {name:<{NAME}} ", style="bold" if sign != " " else "")
        self.more(value, style, first=True)

    def more(self, value: object, style: str = "", *, first: bool = False) -> None:
        """What goes on in the next line, below the value."""
        for number, line in enumerate(textwrap.wrap(escape(value), self._across) or [""]):
            inset = "" if first and not number else " " * (NAME + 3)
            self.text.append(f"{inset}{line}\n", style=style)


def enforcement(s: Facts, now: int, room: int) -> Text:
    """Whether the host enforces, its workers and their queues; of a daemon's `status`."""
    out = Lines(room)
    out.title("Enforcement")
    off = suspended(s)
    good = bool(s["enforcing"]) and s["state"] == "enforcing" and not off
    out.row("state", off or s["state"], GOOD if good else BAD)
    for problem in s["problems"]:
        out.row("problem", f"{problem['what']}: {problem['why']}", BAD)
    rules = s["rules_installed"]
    out.row(
        "kernel rules",
        "installed" if rules else "NOT INSTALLED: nothing is enforced",
        "" if rules else BAD,
    )
    out.row(
        "host", f"{s['host']} in {s['trust_domain']}, version {s['version']}, up {ago(s['started'], now)}"
    )
    policy = s["policy"]
    out.row(
        "policy",
        f"revision {policy['revision']} by {policy['author']}, {ago(policy['applied'], now)} ago"
        if policy
        else "none yet: everything is denied",
        "" if policy else BAD,
    )
    out.row("networks", ", ".join(s["enforced_networks"]) or "none")
    refused = s["identities_refused"]
    out.row(
        "workloads",
        f"{s['workloads']} with an identity" + (f", {refused} refused one" if refused else ""),
        WARN if refused else "",
    )
    out.title("Workers")
    for worker in s["workers"]:
        _worker(out, worker)
    lost = s["events_lost_by_agent"] + sum(w["stats"].get("lost", 0) for w in s["workers"])
    out.row("events lost", lost, BAD if lost else GOOD)
    return out.text


def _worker(out: Lines, worker: Facts) -> None:
    stats = worker["stats"]
    packets = stats.get("packets", 0) + stats.get("bulk", {}).get("packets", 0)
    restarts = worker["restarts"]
    out.row(
        f"worker {worker['number']}",
        (f"revision {worker['revision']}" if worker["enforcing"] else "NOT ENFORCING")
        + f", pid {worker['pid']}"
        + (f", {restarts} restart{'' if restarts == 1 else 's'}" if restarts else ""),
        GOOD if worker["enforcing"] else BAD,
    )
    live, sealed = stats.get("live", 0), stats.get("encrypted", 0)
    out.row("", f"{count(live)} live flow{'' if live == 1 else 's'}, {count(sealed)} of them encrypted")
    queue = stats.get("queue") or {}
    waiting = queue.get("waiting", 0)
    out.row(
        "",
        f"queue: {count(packets)} packets, {count(waiting)} waiting, {stats.get('held', 0)} held for an identity",
    )
    for number, what in (
        (queue.get("dropped", 0) + queue.get("user_dropped", 0), "packets dropped by a full queue"),
        (stats.get("failures", 0), f"packets not judged for a failure ({stats.get('last_failure') or '?'})"),
        (stats.get("uncut", 0), "denied flows not cut yet"),
        (stats.get("forgotten", 0), "flows that a restart forgot"),
    ):
        if number:
            out.row("", f"{count(number)} {what}", BAD)


def store(s: Facts, room: int, *, live: bool) -> Text:
    """The rings and the store; of the store's counters."""
    out = Lines(room)
    out.title("Store")
    if "error" in s:
        out.row("store", f"not answering: {s['error']}", BAD)
        return out.text
    kept = s.get("segments", "?")
    out.row("kept", f"{octets(s.get('bytes', 0))} in {kept} segment{'' if kept == 1 else 's'}")
    if live:
        out.row(
            "since start",
            f"{count(s.get('flow_records', 0))} flow records, {count(s.get('events', 0))} events",
        )
        p50, p99 = s.get("insert_p50_ms"), s.get("insert_p99_ms")
        if p50 is not None and p99 is not None:
            out.row("writes", f"{p50:.0f} ms usual, {p99:.0f} ms at worst (p99)")
        for name, ring in (s.get("rings") or {}).items():
            full = ring["pending"] / max(1, ring["capacity"])
            lost = f", {count(ring['lost'])} LOST" if ring["lost"] else ""
            out.row(
                f"ring {name}"[:NAME],
                f"{count(ring['pending'])} waiting, {full:.0%} full{lost}",
                BAD if ring["lost"] else WARN if full > FULL else "",
            )
    if s.get("restarts"):
        out.row("restarts", s["restarts"], WARN)
    if s.get("degraded"):
        out.row("state", s["degraded"], BAD if live else "")
    for name in s.get("unopened_segments", ()):
        out.row("unreadable", name, BAD)
    return out.text


def certificates(s: Facts, identities: Sequence[Facts], lists: Sequence[Facts], now: int, room: int) -> Text:
    """The host's CA, its identities and the revocation lists it goes by."""
    out = Lines(room)
    out.title("Certificates")
    expires = s["host_ca_expires"]
    style = BAD if expires <= now else WARN if expires < now + DAY else GOOD
    out.row("host CA", f"expires {left(expires, now)}" if expires > now else "EXPIRED", style)
    out.row("trusts", ", ".join(s.get("trusted_domains") or [s["trust_domain"]]))
    if identities:
        first = min(identities, key=lambda i: i["not_after"])
        over = [i for i in identities if i["not_after"] <= now or i.get("refused")]
        out.row(
            "identities",
            f"{len(identities)} in use, the first to expire {left(first['not_after'], now)}",
            BAD if over else "",
        )
        for item in over[:5]:
            out.row("", f"{item['spiffe_id']}: {item.get('refused') or 'expired'}", BAD)
    for each in lists:
        held = len(each["serials"]) + len(each["workloads"]) + len(each["keys"])
        late = each["next_update"] <= now
        out.row(
            "revocations",
            f"{each['issuer_name']}: list {each['number']}, {held} revoked, "
            + ("NOT FRESH any more" if late else f"fresh until {day_clock(each['next_update'])}"),
            BAD if late else "",
        )
    return out.text


def findings(found: Sequence[Facts] | None, room: int, why: str = "") -> Text:
    """What `sectool doctor` says, the worst first; what is in order is counted."""
    out = Lines(room)
    out.title("Doctor")
    if found is None:
        out.row("", why or "examining…", WARN if why else "dim")
        return out.text
    order = list(_LEVELS)
    for item in sorted((f for f in found if f["level"] != "good"), key=lambda f: order.index(f["level"])):
        out.row(item["area"], f"{item['check']}: {item['message']}", _LEVELS[item["level"]])
        if item["hint"]:
            out.more(item["hint"], "italic")
    good = sum(f["level"] == "good" for f in found)
    out.row("in order", f"{good} of {len(found)} checks", GOOD if good == len(found) else "")
    return out.text


def then(document: Facts, room: int) -> Text:
    """How the host stood at a moment; of the store's answer to `state`."""
    out = Lines(room)
    out.title("Then")
    enforcer = document["enforcer"]
    since = f" since {day_clock(enforcer['since'])}" if enforcer["since"] else ""
    out.row("state", f"{enforcer['state']}{since}", GOOD if enforcer["state"] == "enforcing" else BAD)
    for what, why in enforcer["problems"].items():
        out.row("problem", f"{what}: {why}", BAD)
    revisions = {row["key"]: row for row in document["policy"]}
    for active in document["activation"]:
        by = revisions.get(str(active["revision"]), {}).get("author")
        out.row("policy", f"revision {active['revision']}{f' by {by}' if by else ''} on {active['key']}")
    if not document["activation"]:
        out.row("policy", "none that is on record", WARN)
    out.row("flows", f"{count(document['flows_open'])} open")
    out.row("identities", len(document["identity"]))
    out.row("workloads", len(document["workload"]))
    out.row("trusted", ", ".join(row["key"] for row in document["trust"]) or "-")
    for warning in document["warnings"]:
        out.row("", warning, WARN)
    return out.text
