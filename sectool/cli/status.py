"""`sectool status`: what is enforced right now, and how well."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from sectool.cli.context import session
from sectool.cli.moments import moment_us, show_time
from sectool.cli.output import Format, emit_document, paint
from sectool.cli.text import duration, escape, size
from sectool.errors import Exit, SectoolError

app = typer.Typer(rich_markup_mode=None)


@app.command()
def status(
    ctx: typer.Context,
    at_: Annotated[
        str | None, typer.Option("--at", metavar="TIME", help="How it stood then, by what is on record.")
    ] = None,
    output: Annotated[Format, typer.Option("--output", "-o", help="table, json or yaml.")] = Format.TABLE,
) -> None:
    """Show what is enforced right now, and how well.

    Exits 0 when enforcing, 1 when degraded, observing, not enforcing or not recording, 3 when no daemon runs.

    \b
    Examples:
      sectool status
      sectool status -o json | jq .workers[].stats.packets
      sectool status --at 02:00
    """
    at = session(ctx)
    if at_:
        from sectool.cli.statusthen import status_then

        status_then(at, moment_us(at_), output)
        return
    with at.control() as control:
        document = {k: v for k, v in control.call("status").header.items() if k not in ("ok", "payload")}
    document["store"] = {**document["store"], **_store_stats(ctx)}
    if output in (Format.JSON, Format.JSONL, Format.YAML):
        emit_document(document, output, "sectool.status/1")
    else:
        for line in _lines(document, at.color):
            sys.stdout.write(line + "\n")
    well = document["enforcing"] and document["state"] == "enforcing" and not document.get("observing")
    if not well or document["store"].get("degraded"):
        raise typer.Exit(int(Exit.DENIED))


def _store_stats(ctx: typer.Context) -> dict[str, Any]:
    """The store's own counters; its failure to answer is part of the status, not an error of this command."""
    from sectool.api.client import Client

    try:
        with Client(session(ctx).paths.events_socket, timeout=3.0) as store:
            answer = store.call("stats").header
    except SectoolError as error:
        return {"error": error.message}
    return {k: v for k, v in answer.items() if k not in ("ok", "payload")}


def _lines(s: dict[str, Any], color: bool) -> list[str]:
    def row(title: str, text: str, style: str = "") -> str:
        return f"{title:<12} {paint(escape(text), style, color)}"

    now_ish = max(s["started"], _now())
    good = s["state"] == "enforcing" and s["enforcing"]
    state = s["state"] if good or s["state"] != "enforcing" else "NOT ENFORCING"
    if said := suspended(s):
        state = said if good else f"{said}; {state}"
    out = [row("state", state, "bad" if said or not good else "good")]
    out += [row("problem", f"{p['what']}: {p['why']}", "bad") for p in s["problems"]]
    out.append(row("host", f"{s['host']} in {s['trust_domain']}"))
    policy = s["policy"]
    if policy is None:
        becomes = "would be" if s.get("observing") else "is"
        out.append(row("policy", f"none applied yet: every connection {becomes} denied", "warn"))
    else:
        reason = f" ({policy['reason']})" if policy["reason"] else ""
        out.append(
            row(
                "policy",
                f"revision {policy['revision']} by {policy['author']}, {show_time(policy['applied'])}{reason}",
            )
        )
    rules = "installed" if s["rules_installed"] else "NOT INSTALLED: nothing is enforced"
    out.append(row("rules", rules, "" if s["rules_installed"] else "bad"))
    out.append(
        row(
            "daemon", f"pid {s['pid']}, up {duration((now_ish - s['started']) / 1e6)}, version {s['version']}"
        )
    )
    out.append(row("networks", ", ".join(s["enforced_networks"])))
    for worker in s["workers"]:
        out += _worker(worker, row)
    out.append(row("store", _store(s["store"]), "bad" if "error" in s["store"] else ""))
    if s["store"].get("retention"):
        out.append(row("history", _kept(s["store"]["retention"])))
    if s["store"].get("degraded"):
        out.append(row("  trouble", f"{s['store']['degraded']}; {_lost(s['store'])}", "bad"))
    refused = f", {s['identities_refused']} refused an identity" if s["identities_refused"] else ""
    out.append(
        row(
            "workloads", f"{s['workloads']} with an identity, {s['programs']} started by sectool run{refused}"
        )
    )
    for inside in s.get("inside", ()):
        works = inside["enforcing"]
        what = f"{inside['name']}: {'enforcing' if works else 'not enforcing yet'}"
        out.append(row("inside", what, "" if works else "bad"))
    lost = s["events_lost_by_agent"] + sum(w["stats"].get("lost", 0) for w in s["workers"])
    out.append(row("events lost", str(lost), "bad" if lost else ""))
    return out


def suspended(s: Mapping[str, Any]) -> str:
    """That nothing is denied, and why, of the answer to `status`; "" when denial is in force."""
    if s.get("mode") == "observe":
        by = f", chosen by {s['mode_by']} {show_time(s['mode_since'])}" if s.get("mode_since") else ""
        why = f" ({s['mode_reason']})" if s.get("mode_reason") else ""
        return f"OBSERVE: NOTHING IS DENIED{by}{why}"
    broken = s.get("break_glass")
    if broken is not None:
        left = duration(broken["left_s"])
        return f"GLASS BROKEN: NOTHING IS DENIED for {left} more, by {broken['by']}: {broken['reason']}"
    return ""


def _now() -> int:
    import time

    return time.time_ns() // 1000


def _worker(worker: dict[str, Any], row: Any) -> list[str]:
    stats = worker["stats"]
    restarts = f", {worker['restarts']} restarts" if worker["restarts"] else ""
    state = f"revision {worker['revision']}" if worker["enforcing"] else "NOT ENFORCING"
    packets = stats.get("packets", 0) + stats.get("bulk", {}).get("packets", 0)
    flows = f"{stats.get('live', 0)} live flows, {stats.get('encrypted', 0)} of them encrypted"
    if stats.get("restored"):
        flows += f" ({stats['restored']} taken over from the worker before)"
    out = [
        row(
            f"worker {worker['number']}",
            f"pid {worker['pid']}, {state}, {packets} packets queued, {flows}{restarts}",
            "" if worker["enforcing"] else "bad",
        )
    ]
    for title, counters in (("verdicts", stats.get("verdicts")), ("reasons", stats.get("reasons"))):
        shown = _counts(counters)
        if shown:
            out.append(row(f"  {title}", shown))
    queue = stats.get("queue") or {}
    trouble = {
        "dropped by a full queue": queue.get("dropped", 0) + queue.get("user_dropped", 0),
        "not judged for a failure": stats.get("failures", 0),
        "denied flows not cut yet": stats.get("uncut", 0),
        "flows a restart would forget": stats.get("journal_skipped", 0),
        "flows a restart forgot": stats.get("forgotten", 0),
        "end notifications missed": stats.get("endings_missed", 0),
    }
    if any(trouble.values()):
        text = _counts(trouble)
        if stats.get("last_failure"):
            text += f" (last failure: {stats['last_failure']})"
        out.append(row("  trouble", text, "bad"))
    return out


def _counts(counters: Any) -> str:
    if not isinstance(counters, dict):
        return ""
    return ", ".join(
        f"{name} {count}" for name, count in sorted(counters.items(), key=lambda i: -i[1]) if count
    )


def _lost(store: dict[str, Any]) -> str:
    """What the rings hold until it is over, and what did not fit."""
    rings = (store.get("rings") or {}).values()
    waiting, lost = (sum(int(ring.get(name, 0)) for ring in rings) for name in ("pending", "lost"))
    return f"{waiting} events wait in the rings, {lost} were lost"


def _kept(setting: dict[str, Any]) -> str:
    from store.retention import from_document, words

    try:
        return words(from_document(setting))
    except ValueError:  # of another release
        return "kept by a setting that is not known here"


def _store(store: dict[str, Any]) -> str:
    if "error" in store:
        return f"not answering: {store['error']}"
    parts = [f"pid {store.get('pid')}"]
    if store.get("restarts"):
        parts.append(f"{store['restarts']} restarts")
    if "events" in store:
        parts.append(f"{store['events']} events")
    if "segments" in store:
        parts.append(f"{store['segments']} segments")
    if "bytes" in store:
        parts.append(size(int(store["bytes"])))
    return ", ".join(parts)
