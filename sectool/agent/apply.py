"""Changing the policy: check first, record, switch every worker, and say truthfully what came of it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

from sectool.agent.revisions import Draft, Revision, draft
from sectool.agent.roles import permit, present
from sectool.agent.worker import Activation
from sectool.api.server import Reply, Request
from sectool.errors import PrivilegeError, SectoolError, UsageError
from sectool.events import Type
from sectool.policy import DocumentSet, diff
from sectool.policy.edits import choose, promoted
from store.control import Actor

if TYPE_CHECKING:
    from sectool.agent.daemon import Daemon

log = logging.getLogger("sectool.agent")

MAX_REASON = 500
# Of an answer, in characters: a header holds 1 MiB, and a change that was made must be told as made.
MAX_CHANGES = 400_000
MAX_CONFLICTS = 200_000
MAX_CONFLICT_LINES = 100_000


async def check(daemon: Daemon, request: Request) -> Reply:
    """What `policy.apply` would change, without changing it. Payload: the documents' text."""
    candidate = await asyncio.to_thread(draft, _text(request))
    return Reply(_foreseen(daemon, request, candidate))


def _foreseen(daemon: Daemon, request: Request, candidate: Draft) -> dict[str, Any]:
    active = daemon.revisions.active
    try:
        permit(request.peer, daemon.settings.roles, _documents(active), candidate.documents)
        refused = ""
    except PrivilegeError as error:
        refused = f"{error.message}; {error.hint}"
    return {
        "revision": active.revision if active else 0,
        "hash": candidate.hash,
        "unchanged": active is not None and active.hash == candidate.hash,
        "changes": _changes(active, candidate),
        "refused": refused,
        **_findings(candidate),
    }


async def apply(daemon: Daemon, request: Request) -> Reply:
    """Make the payload the policy in force. `reason` and the caller's name and roles are kept with it."""
    present(request.peer, daemon.settings.roles)
    # Compiling a large set takes a while; packets do not wait for it and neither does the rest of the agent.
    candidate = await asyncio.to_thread(draft, _text(request))
    return await _switch(daemon, request, candidate, Type.POLICY_APPLIED)


async def rollback(daemon: Daemon, request: Request) -> Reply:
    """Make the text of an earlier revision the policy in force, as a new revision."""
    present(request.peer, daemon.settings.roles)
    number = request.number("revision")
    if number is None:
        raise UsageError("policy.rollback: revision is missing")
    earlier = await daemon.revisions.get(number)
    candidate = await asyncio.to_thread(draft, earlier.text)
    return await _switch(
        daemon, request, candidate, Type.POLICY_ROLLED_BACK, f"rollback to revision {number}"
    )


async def promote(daemon: Daemon, request: Request) -> Reply:
    """Enforce staged documents, given by `names`, as a new revision; with `dry_run` only say what would change."""
    dry_run = request.fields.get("dry_run") is True
    if not dry_run:
        present(request.peer, daemon.settings.roles)
    names = request.fields.get("names")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UsageError("policy.promote: names is a list of documents' names")
    active = daemon.revisions.active
    documents = _documents(active)
    chosen = choose(documents, names)
    candidate = await asyncio.to_thread(draft, promoted(documents, chosen))
    if dry_run:
        return Reply(_foreseen(daemon, request, candidate))
    told = ", ".join(f"{doc.kind} {doc.name}" for doc in chosen)
    return await _switch(
        daemon, request, candidate, Type.POLICY_APPLIED, f"promoted {told}"[:MAX_REASON], base=active
    )


async def _switch(
    daemon: Daemon,
    request: Request,
    candidate: Draft,
    kind: Type,
    default_reason: str = "",
    base: Revision | None = None,
) -> Reply:
    """Change from what is in force to `candidate`; `base`: only if that is in force still."""
    reason = request.text("reason") or default_reason
    if len(reason) > MAX_REASON:
        raise UsageError(f"the reason is longer than {MAX_REASON} characters")
    async with daemon.activation:
        before = daemon.revisions.active
        if base is not None and before is not base:
            raise SectoolError(
                f"the policy has been changed meanwhile, by {before.author if before else 'nobody'}",
                "try again",
            )
        roles = permit(request.peer, daemon.settings.roles, _documents(before), candidate.documents)
        if before is not None and before.hash == candidate.hash:
            if any(worker.revision != before.revision for worker in daemon.workers):
                return Reply(
                    await _activate(daemon, before, before, candidate)
                )  # one has not switched: again
            return Reply({"revision": before.revision, "hash": before.hash, "unchanged": True})
        log.info("%s by %s (pid %d) as %s", request.op, request.peer.name, request.peer.pid, ", ".join(roles))
        revision = await daemon.revisions.add(
            candidate, Actor(request.peer.uid, request.peer.name), reason, roles
        )
        daemon.define_rules()
        daemon.events.emit(
            kind,
            revision=revision.revision,
            hash=revision.hash,
            author=revision.author,
            roles=list(roles),
            reason=revision.reason,
            previous=before.revision if before else 0,
            conflicts=dict(Counter(str(c.kind) for c in candidate.conflicts.found)),
        )
        return Reply(await _activate(daemon, before, revision, candidate))


async def _activate(
    daemon: Daemon, before: Revision | None, revision: Revision, candidate: Draft
) -> dict[str, Any]:
    text = daemon.policy_text()
    answers = await asyncio.gather(
        *(worker.activate(text, daemon.settings.activation_timeout_s) for worker in daemon.workers),
        return_exceptions=True,
    )
    problems: list[str] = []
    cut = 0
    for worker, answer in zip(daemon.workers, answers, strict=True):
        if isinstance(answer, Activation):
            cut += answer.cut
            daemon.health.clear(policy_problem(worker.number))
            continue
        if not isinstance(answer, SectoolError):
            log.error("worker %d: activating failed", worker.number, exc_info=answer)
        why = answer.message if isinstance(answer, SectoolError) else f"{type(answer).__name__}"
        problems.append(f"{why}; it goes on with revision {worker.revision}")
        daemon.health.raise_(policy_problem(worker.number), why)
    if _workloads(before) != _workloads(revision):
        daemon.identities.forget_sockets()
        if daemon.endpoint is not None:
            daemon.endpoint.changed()
        daemon.discovery.resolve_again()
        for worker in daemon.workers:
            worker.send({"t": "flush_workloads"})
    if not problems:
        await daemon.revisions.activated(revision.revision)
    slowest = max((a.us for a in answers if isinstance(a, Activation)), default=0)
    daemon.events.emit(
        Type.POLICY_ACTIVATED,
        revision=revision.revision,
        hash=revision.hash,
        cut=cut,
        us=slowest,
        problems=problems,
    )
    return {
        "revision": revision.revision,
        "hash": revision.hash,
        "unchanged": False,
        "cut": cut,
        "us": slowest,
        "changes": _changes(before, candidate),
        **_findings(candidate),
        "problems": problems,
    }


def policy_problem(number: int) -> str:
    """Name of the problem that a worker has not switched."""
    return f"policy of worker {number}"


def _text(request: Request) -> str:
    try:
        return request.payload.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"the policy is not UTF-8: {error.reason} at byte {error.start}") from None


def _documents(revision: Revision | None) -> DocumentSet:
    return revision.documents if revision else DocumentSet()


def _findings(candidate: Draft) -> dict[str, Any]:
    """What is valid and yet not well: for people in lines, for programs in full up to a bound."""
    found = candidate.conflicts.found
    told: list[dict[str, object]] = []
    room = MAX_CONFLICTS
    for conflict in found:
        one = conflict.describe()
        room -= len(json.dumps(one))
        if room < 0:
            break
        told.append(one)
    return {
        "lint": _within(candidate.lint, MAX_CONFLICT_LINES),
        "conflicts": told,
        "conflicts_found": len(found),
        "conflict_lines": _within(candidate.conflicts.lines(), MAX_CONFLICT_LINES),
    }


def _within(lines: list[str], limit: int) -> list[str]:
    """As many lines as fit, and how many do not. What is no ASCII takes six characters in an answer."""
    room = limit
    for number, line in enumerate(lines):
        room -= len(json.dumps(line)) + 2
        if room < 0:
            return [*lines[:number], f"and {len(lines) - number} more lines"]
    return lines


def _changes(before: Revision | None, candidate: Draft) -> list[str]:
    changes = diff(_documents(before), candidate.documents)
    return _within([line for change in changes for line in change.lines()], MAX_CHANGES)


def _workloads(revision: Revision | None) -> list[tuple[object, ...]]:
    documents = revision.documents.workloads if revision else ()
    return [(d.name, d.match, d.labels) for d in documents]
