"""Policy revisions for commands: from the daemon, or from the control history when no daemon runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sectool.cli.context import Session
from sectool.errors import NoDaemonError, SectoolError

if TYPE_CHECKING:
    from sectool.policy import DocumentSet


def documents_of(at: Session, name: str) -> DocumentSet:
    """The documents of a revision, given by number, or of a file."""
    from sectool.policy import load, parse

    if name.isdigit():
        meta, text = fetch_revision(at, int(name), None)
        return parse(text, f"revision {meta['revision']}")
    return load([Path(name)])


def in_force(at: Session, moment: int | None = None) -> tuple[dict[str, Any], DocumentSet]:
    """Facts and documents of the policy in force, now or at a moment."""
    from sectool.policy import parse

    meta, text = fetch_revision(at, None, moment)
    return meta, parse(text, f"revision {meta['revision']}")


def fetch_revision(at: Session, number: int | None, moment: int | None) -> tuple[dict[str, Any], str]:
    """A revision's facts and text: from the daemon, or from the control history when no daemon runs."""
    try:
        with at.control() as control:
            answer = control.call("policy.show", rev=number, at=moment)
            meta = {k: v for k, v in answer.header.items() if k not in ("ok", "payload")}
            return meta, answer.payload.decode("utf-8")
    except NoDaemonError as error:
        offline = _offline(at, error)
        revision = (
            offline.get(number) if number is not None else offline.at(moment) if moment else offline.active()
        )
        if revision is None:
            raise SectoolError(
                "no policy has been applied on this host yet", "sectool policy apply FILE"
            ) from None
        return revision.summary(), revision.text


def fetch_history(at: Session) -> list[dict[str, Any]]:
    """All revisions, newest first."""
    try:
        with at.control() as control:
            items: list[dict[str, Any]] = control.call("policy.history")["items"]
            return items
    except NoDaemonError as error:
        rows: list[dict[str, Any]] = _offline(at, error).history()
        return rows


def _offline(at: Session, error: NoDaemonError) -> Any:
    from sectool.agent.revisions import OfflineHistory

    if not at.paths.control_history.exists():
        raise error
    at.say(f"no daemon is running; reading {at.paths.control_history}")
    return OfflineHistory(at.paths.control_history)
