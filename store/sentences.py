"""Events that are no flows, as sentences a person can read out in a review."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sectool.clock import iso
from sectool.errors import SectoolError
from sectool.policy.changes import Verb, diff
from store.past import History
from store.retention import from_document, words

# What an event is about, and how bad it is, by the beginning of its type.
KIND_OF = {
    "policy": "policy",
    "identity": "identity",
    "workload": "workload",
    "enforcer": "enforcer",
    "events": "loss",
    "store": "loss",
    "alert": "alert",
    "trust": "trust",
    "vuln": "vulnerability",
    "capture": "capture",
}
KINDS = ("flow", *dict.fromkeys(KIND_OF.values()), "other")
_BAD = frozenset(
    {"enforcer.degraded", "events.lost", "store.damaged", "identity.revoked", "alert.raised", "enforcer.stop"}
)
MAX_CHANGES = 12  # lines of a policy change that a sentence carries; the rest is counted


def kind_of(type_: str) -> str:
    """The kind of an event of this type."""
    return KIND_OF.get(type_.partition(".")[0], "other")


def severity_of(type_: str) -> str:
    """`bad`, `warn` or nothing."""
    if type_ in _BAD:
        return "bad"
    return "warn" if type_.startswith(("policy.", "trust.", "capture.", "store.")) else ""


def sentence(type_: str, body: Mapping[str, Any], history: History) -> tuple[str, list[str]]:
    """An event as one line, and the lines that tell more."""
    tell = _TELL.get(type_)
    if tell is None:
        return _plain(type_, body), []
    try:
        return tell(body, history)
    except (KeyError, TypeError, ValueError, AttributeError):  # written by another release
        return _plain(type_, body), []


def _plain(type_: str, body: Mapping[str, Any]) -> str:
    told = ", ".join(
        f"{key} {value}"
        for key, value in body.items()
        if key not in ("type", "ts") and value not in (None, "", [])
    )
    return f"{type_}: {told}" if told else type_


def policy_changes(history: History, before: int, after: int) -> list[str] | None:
    """What differs between two revisions, in words; None when their texts cannot be had."""
    old, new = history.documents(before), history.documents(after)
    if old is None or new is None:
        return None
    try:
        changes = diff(old, new)
    except SectoolError:
        return None
    lines: list[str] = []
    for change in changes:
        if change.field:
            gone, come = len(change.old.splitlines()), len(change.new.splitlines())
            lines.append(f"{change.kind} {change.name}: {change.field} {change.verb}")
            lines += [f"  - {line}" for line in change.old.splitlines()] if gone else []
            lines += [f"  + {line}" for line in change.new.splitlines()] if come else []
        else:
            mark = "+" if change.verb is Verb.ADDED else "-"
            lines.append(f"{change.kind} {change.name} {change.verb}")
            lines += [f"  {mark} {line}" for line in (change.new or change.old).splitlines()]
    return lines


def _policy(body: Mapping[str, Any], history: History) -> tuple[str, list[str]]:
    number, before = int(body["revision"]), int(body.get("previous") or 0)
    reason = f": {body['reason']}" if body.get("reason") else ""
    who = body.get("author") or "somebody"
    text = f"{who} applied policy revision {number}{reason}"
    if body.get("type") == "policy.rolled_back":
        text = f"{who} rolled policy back, as revision {number}{reason}"
    changes = policy_changes(history, before, number)
    if changes is None:
        return text, []
    heads = [line for line in changes if not line.startswith("  ")]
    text += (
        f" ({'; '.join(heads[:3])}{f'; {len(heads) - 3} more' if len(heads) > 3 else ''})" if heads else ""
    )
    left = len(changes) - MAX_CHANGES
    return text, [*changes[:MAX_CHANGES], *([f"… {left} more lines"] if left > 0 else [])]


def _activated(body: Mapping[str, Any], history: History) -> tuple[str, list[str]]:
    cut = int(body.get("cut") or 0)
    problems = [str(problem) for problem in body.get("problems") or ()]
    text = f"policy revision {int(body['revision'])} is in force"
    return text + (f"; {cut} live connections were cut" if cut else ""), problems


def _issued(body: Mapping[str, Any], history: History) -> tuple[str, list[str]]:
    return f"an identity was issued: {body['spiffe_id']} (serial {body.get('serial')})", []


def _rotated(body: Mapping[str, Any], history: History) -> tuple[str, list[str]]:
    return f"an identity was renewed: {body['spiffe_id']} (serial {body.get('serial')})", []


def _revoked(body: Mapping[str, Any], history: History) -> tuple[str, list[str]]:
    what = body.get("spiffe_id") or body.get("serial") or body.get("item")
    return f"an identity was revoked: {what}" + (f" ({body['reason']})" if body.get("reason") else ""), []


def _started(body: Mapping[str, Any], history: History) -> tuple[str, list[str]]:
    whose = f" of {body['user']}" if body.get("user") else ""
    pid = f", pid {body['pid']}" if body.get("pid") else ""
    return f"workload {_workload(body)} started{whose}{pid}{_program(body)}", []


def _stopped(body: Mapping[str, Any], history: History) -> tuple[str, list[str]]:
    unseen = " while the enforcer was away" if body.get("unseen") else ""
    return f"workload {_workload(body)} ended{unseen}{_program(body)}", []


def _changed(body: Mapping[str, Any], history: History) -> tuple[str, list[str]]:
    fields = ", ".join(map(str, body.get("changed") or ())) or "something"
    return f"workload {_workload(body)} changed: {fields}", []


def _program(body: Mapping[str, Any]) -> str:
    """Several programs can be one workload by name: which of them."""
    return f": {body['executable']}" if body.get("executable") else ""


def _workload(body: Mapping[str, Any]) -> str:
    return str(body.get("workload") or body.get("name") or body["workload_id"])


def _enforcer_started(body: Mapping[str, Any], history: History) -> tuple[str, list[str]]:
    number = int(body.get("revision") or 0)
    observes = body.get("mode") == "observe"
    policy = f" with policy revision {number}" if number else " without a policy"
    denied = " and observes: nothing is denied" if observes else "" if number else ": everything is denied"
    return f"the enforcer on {body['host']} started{policy}{denied}", []


def _enforcer_stopped(body: Mapping[str, Any], history: History) -> tuple[str, list[str]]:
    removed = " and removed its kernel rules" if body.get("rules_removed") else ""
    who = f" (by {body['actor']})" if body.get("actor") else ""
    return f"the enforcer on {body['host']} stopped{removed}{who}", []


def _degraded(body: Mapping[str, Any], history: History) -> tuple[str, list[str]]:
    return f"the enforcer is degraded: {body['what']}: {body['why']}", []


def _recovered(body: Mapping[str, Any], history: History) -> tuple[str, list[str]]:
    return f"the enforcer has recovered: {body['what']}", []


def _lost(body: Mapping[str, Any], history: History) -> tuple[str, list[str]]:
    return (
        f"{body['count']} events were lost in {body['where']}: {body.get('why') or 'its ring was full'}",
        [],
    )


def _damaged(body: Mapping[str, Any], history: History) -> tuple[str, list[str]]:
    kept = f" (kept as {body['kept']})" if body.get("kept") else ""
    return f"a file of the store is damaged: {body.get('where')}: {body.get('what')}{kept}", []


def _retention(body: Mapping[str, Any], history: History) -> tuple[str, list[str]]:
    why = f" ({body['reason']})" if body.get("reason") else ""
    now = words(from_document(body["setting"]))
    return f"{body['actor']} chose what is kept of the history: {now}{why}", [
        f"before: {words(from_document(body['before']))}"
    ]


_PRUNED = {
    "age": "they were older than what is kept",
    "size": "there was more than what is kept",
    "room": "the disk was full",
}


def _pruned(body: Mapping[str, Any], history: History) -> tuple[str, list[str]]:
    names = [str(name) for name in body["segments"]]
    why = _PRUNED.get(body.get("why") or "", f"{body.get('actor') or 'somebody'} asked for it")
    first, last = body.get("first_us"), body.get("last_us")
    told = f" of {iso(first)} to {iso(last)}" if isinstance(first, int) and isinstance(last, int) else ""
    return f"{len(names)} segments of history{told} were deleted: {why}", names[:MAX_CHANGES]


def _trust(body: Mapping[str, Any], history: History) -> tuple[str, list[str]]:
    domains = ", ".join(map(str, body.get("trust_domains") or ())) or "none"
    why = f" ({body['reason']})" if body.get("reason") else ""
    return f"{body.get('actor') or 'somebody'} changed trust; trusted now: {domains}{why}", []


def _captured(body: Mapping[str, Any], history: History) -> tuple[str, list[str]]:
    what = "whole packets" if body.get("payload") else "headers"
    chosen = f" of {body['filter']}" if body.get("filter") else ""
    return f"{body['actor']} began to capture {what}{chosen}: {body.get('reason') or 'no reason given'}", []


def _capture_ended(body: Mapping[str, Any], history: History) -> tuple[str, list[str]]:
    return (
        f"the capture by {body['actor']} ended with {body.get('packets')} packets (SHA-256 {body.get('sha256')})",
        [],
    )


def _mode(body: Mapping[str, Any], history: History) -> tuple[str, list[str]]:
    what = (
        "nothing is denied from now on (mode observe)" if body["mode"] == "observe" else "denial is in force"
    )
    why = f": {body['reason']}" if body.get("reason") else ""
    return (
        f"{body.get('actor') or 'somebody'} changed mode {body.get('before')} to {body['mode']}, {what}{why}",
        [],
    )


def _glass(body: Mapping[str, Any], history: History) -> tuple[str, list[str]]:
    return (
        f"{body['actor']} broke the glass: denial is suspended for {body.get('seconds')} s: {body['reason']}",
        [],
    )


def _glass_over(body: Mapping[str, Any], history: History) -> tuple[str, list[str]]:
    return (
        f"denial is in force again after {body.get('seconds')} s, by {body['actor']}: {body.get('why') or 'no reason'}",
        [],
    )


def _alert(body: Mapping[str, Any], history: History) -> tuple[str, list[str]]:
    owners = f" (owners: {', '.join(body['owners'])})" if body.get("owners") else ""
    return f"alert: {body['alert']}: {body['text']}{owners}", []


def _alert_over(body: Mapping[str, Any], history: History) -> tuple[str, list[str]]:
    return f"alert is over: {body['alert']}: {body['text']}", []


_TELL = {
    "policy.applied": _policy,
    "policy.rolled_back": _policy,
    "policy.activated": _activated,
    "identity.issued": _issued,
    "identity.rotated": _rotated,
    "identity.revoked": _revoked,
    "workload.start": _started,
    "workload.stop": _stopped,
    "workload.change": _changed,
    "enforcer.start": _enforcer_started,
    "enforcer.stop": _enforcer_stopped,
    "enforcer.degraded": _degraded,
    "enforcer.recovered": _recovered,
    "events.lost": _lost,
    "store.damaged": _damaged,
    "store.retention": _retention,
    "store.pruned": _pruned,
    "alert.raised": _alert,
    "alert.cleared": _alert_over,
    "trust.changed": _trust,
    "capture.started": _captured,
    "capture.ended": _capture_ended,
    "mode.changed": _mode,
    "break_glass.begun": _glass,
    "break_glass.ended": _glass_over,
}
