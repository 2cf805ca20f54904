"""Events and verdicts in a few words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sectool.events import DropReason
from tui.words import plural

MAIN = ("app", "workload", "exe", "user", "zone")  # what a workload is called by, the most telling first


def brief(labels: str | None) -> str:
    """The telling labels of `k=v,k=v`: `web·prod`; an address or anything else as it is."""
    if not labels:
        return "?"
    if "=" not in labels:
        return labels
    return _called(dict(part.partition("=")[::2] for part in labels.split(",") if part)) or labels


def _called(labels: Mapping[str, str]) -> str:
    key = next((key for key in MAIN if labels.get(key)), "")
    name = labels[key].rpartition("/")[2] if key == "exe" else labels.get(key, "")
    return "·".join(part for part in (name, labels.get("env", "")) if part)


def end_of(row: Mapping[str, Any], side: str) -> str:
    """One end of a flow: its telling labels, or its address."""
    return _called(row.get(f"{side}.labels") or {}) or str(
        row.get(f"{side}.workload") or row.get(f"{side}.ip") or "?"
    )


def reason_words(reason: object) -> str:
    """A drop reason, by number or name, in words."""
    if isinstance(reason, int):
        try:
            reason = DropReason(reason).name
        except ValueError:
            return f"reason {reason}"
    return str(reason or "").lower().replace("_", " ")


def event_line(kind: str, body: Mapping[str, Any]) -> tuple[str, str]:
    """An event in a few words, and the style it is shown in."""
    name = str(body.get("workload") or body.get("name") or "")
    match kind:
        case "policy.applied" | "policy.rolled_back":
            verb = "applied" if kind == "policy.applied" else "rolled back"
            why = f": {body['reason']}" if body.get("reason") else ""
            return f"policy r{body.get('revision')} {verb} by {body.get('author')}{why}", "warn"
        case "policy.activated":
            number = body.get("cut")
            cut = f", {plural(number, 'flow')} cut" if isinstance(number, int) and number else ""
            bad = body.get("problems")
            return f"policy r{body.get('revision')} in force{cut}{', NOT EVERYWHERE' if bad else ''}", (
                "bad" if bad else ""
            )
        case "enforcer.degraded":
            return f"degraded: {body.get('what', '')} {body.get('why', '')}", "bad"
        case "enforcer.recovered":
            return f"recovered: {body.get('what', '')}", "good"
        case "enforcer.start":
            return "enforcer started", "good"
        case "enforcer.stop":
            return "enforcer stopped", "bad"
        case "events.lost":
            number = body.get("count")
            lost = plural(number, "event") if isinstance(number, int) else f"{number} events"
            return f"{lost} lost in {body.get('where')}: {body.get('why', '')}", "bad"
        case "store.damaged":
            return f"store damaged: {body.get('file', body.get('what', ''))}", "bad"
        case "identity.revoked":
            return f"identity revoked: {body.get('spiffe_id') or name}", "bad"
        case "identity.issued" | "identity.rotated":
            return f"{kind.rpartition('.')[2]} {body.get('spiffe_id') or name}", ""
        case "workload.start" | "workload.stop" | "workload.change":
            return f"workload {kind.rpartition('.')[2]}: {name}", ""
        case "alert.raised":
            return f"ALERT {body.get('what') or body.get('title') or body.get('alert') or ''}", "bad"
    rest = " ".join(
        f"{key}={value}"
        for key, value in body.items()
        if key not in ("type", "ts") and value not in (None, "", [])
    )
    return f"{kind} {rest}".strip(), ""
