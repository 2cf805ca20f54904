"""Copying packets is on record before the first is copied: who, why, of what, and what came of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sectool.api.server import Reply, Request
from sectool.errors import SectoolError, UsageError
from sectool.events import Type

if TYPE_CHECKING:
    from sectool.agent.daemon import Daemon

MAX_TEXT = 1000


async def note(daemon: Daemon, request: Request) -> Reply:
    """Record that the caller begins (`ended` missing) or ended a capture. Refuses when that cannot be recorded."""
    for name in ("reason", "filter", "file", "sha256"):
        if len(request.text(name)) > MAX_TEXT:
            raise UsageError(f"{request.op}: {name} is longer than {MAX_TEXT} characters")
    if request.fields.get("ended") is True:
        kind = Type.CAPTURE_ENDED
        facts = {"packets": request.number("packets", 0), "sha256": request.text("sha256")}
    else:
        kind = Type.CAPTURE_STARTED
        if not request.text("reason").strip():
            raise UsageError("a capture needs a reason", '--reason "why"')
        facts = {"reason": request.text("reason"), "payload": request.fields.get("whole") is True}
    told = daemon.events.emit(
        kind, actor=request.peer.name, filter=request.text("filter"), file=request.text("file"), **facts
    )
    if not told:
        raise SectoolError(
            "the capture cannot be put on record: the ring of events is full", "try again in a moment"
        )
    return Reply({"actor": request.peer.name})
