"""`sectool store retention`: what this host keeps of its history, shown and chosen."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sectool.cli.context import Session, require_root, session
from sectool.cli.maintaining import maintaining, parse_size
from sectool.cli.moments import show_time
from sectool.cli.output import Format, emit_document
from sectool.cli.text import escape, size
from sectool.errors import NoDaemonError, SectoolError, StoreError, UsageError

SCHEMA = "sectool.store.retention/1"
NEVER = ("all", "never", "none")


def retention(
    ctx: typer.Context,
    keep_days: Annotated[
        str | None,
        typer.Option("--keep-days", metavar="DAYS", help="Delete segments whose newest row is older; `all`."),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option("--keep", metavar="SIZE", help="Delete the oldest beyond so much, e.g. 20G; `all`."),
    ] = None,
    compact_after: Annotated[
        str | None,
        typer.Option(
            "--compact-after", metavar="DURATION", help="Make older ones compact, e.g. 7d; `never`."
        ),
    ] = None,
    when_full: Annotated[
        str | None,
        typer.Option(
            "--when-full",
            metavar="stop|drop-oldest",
            help="What to do when the disk is full: take nothing in, or delete the oldest segments.",
        ),
    ] = None,
    spare: Annotated[
        str | None,
        typer.Option(
            "--spare", metavar="DURATION", help="Never delete for room what is younger [default: 1d]."
        ),
    ] = None,
    off: Annotated[bool, typer.Option("--off", help="Keep everything, as it is.")] = False,
    reason: Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why, for the record.")] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Change nothing, say what would go at once.")
    ] = False,
    output: Annotated[Format, typer.Option("--output", "-o", help="table, json or yaml.")] = Format.TABLE,
) -> None:
    """Show what this host keeps of its history, or choose it. Only what is given changes; it holds from then on.

    The running store minds it at once, and after every start. Who chose it and why is on record (store.retention), and
    so is every deletion (store.pruned). Without a choice nothing is ever deleted: a full disk stops recording, counts
    what is lost, and goes on when there is room.

    \b
    Examples:
      sectool store retention
      sudo sectool store retention --keep-days 90 --compact-after 7d --reason "data protection, 90 days"
      sudo sectool store retention --keep 20G --when-full drop-oldest --spare 7d
      sudo sectool store retention --keep-days 30 --dry-run
      sudo sectool store retention --off
    """
    at = session(ctx)
    wanted: dict[str, Any] = {
        "keep_us": None if keep_days is None else _days(keep_days),
        "keep_bytes": None if keep is None else 0 if keep in NEVER else _above(parse_size(keep), "--keep"),
        "compact_us": None if compact_after is None else _duration(compact_after, "--compact-after"),
        "when_full": when_full,
        "spare_us": None if spare is None else _duration(spare, ""),
        "off": off,
    }
    chosen = off or any(value is not None for value in list(wanted.values())[:-1])
    if reason and not chosen:
        raise UsageError("a reason for what?", "give it with --keep-days, --keep, --compact-after, …")
    if dry_run or not chosen:
        shown = _would(at, wanted, reason) if chosen else retention_now(at)
        if shown is None:
            raise StoreError(f"no setting can be read in {at.paths.state}", "run it with sudo")
        _show(at, shown, output, gone=_goes(at, shown) if chosen else None)
        return
    if at.offline:
        raise UsageError(
            "--store DIR shows a copy, which nobody keeps", "without it the setting is that of this host"
        )
    require_root("choosing what is kept", "`sectool store retention` alone, which shows it")
    with maintaining(at) as ask:
        answer = ask("retain", **wanted, reason=reason)
    fields = retention_now(at)
    _show(at, fields if fields is not None else dict(answer), output)


def retention_now(at: Session) -> dict[str, Any] | None:
    """The setting that counts: as the store process says, else as it is in the file; None: neither can be read."""
    from sectool.api.client import Client
    from store.retention import load

    try:
        if at.offline:
            raise NoDaemonError("--store asks no daemon")
        with Client(at.paths.events_socket, timeout=5.0) as client:
            told = client.call("stats").header.get("retention")
        if isinstance(told, dict):
            return told
    except SectoolError:
        pass
    try:
        return load(at.paths.state).document()
    except StoreError as error:
        at.warn(f"{error.message}; {error.hint}")
        return None


def _would(at: Session, wanted: dict[str, Any], reason: str) -> dict[str, Any]:
    from sectool.events import now_us
    from store.retention import changed, from_document

    now = retention_now(at)
    if now is None:
        raise StoreError("the setting before cannot be read", "run it with sudo")
    return changed(from_document(now), {**wanted, "reason": reason}, "you", now_us()).document()


def _goes(at: Session, setting: dict[str, Any]) -> list[Path]:
    from sectool.events import now_us
    from store import segment

    if setting["keep_bytes"] is None and setting["keep_us"] is None:
        return []
    return segment.beyond(at.paths.events, setting["keep_bytes"], setting["keep_us"], now_us())


def _show(at: Session, setting: dict[str, Any], output: Format, gone: list[Path] | None = None) -> None:
    from store import segment
    from store.retention import room, span

    if output not in (Format.TABLE, Format.WIDE):
        would = {} if gone is None else {"would_delete": [path.name for path in gone]}
        emit_document({**setting, **would}, output, SCHEMA)
        return

    def told(name: str, how: Any, otherwise: str) -> str:
        return otherwise if setting[name] is None else str(how(setting[name]))

    full = "stop: nothing more is taken in until there is room"
    if setting["when_full"] != "stop":
        spare = span(setting["spare_us"]) if setting["spare_us"] else "0s"
        full = f"{setting['when_full']}, but nothing younger than {spare}"
    lines = [
        ("age", told("keep_us", span, "all")),
        ("size", told("keep_bytes", room, "all")),
        ("compact", "after " + span(setting["compact_us"]) if setting["compact_us"] else "never"),
        ("when full", full),
    ]
    if setting["by"] and gone is None:
        why = f": {setting['reason']}" if setting["reason"] else ""
        lines.append(("chosen", f"by {setting['by']}, {show_time(setting['since_us'])}{why}"))
    for title, text in lines:
        sys.stdout.write(f"{title:<10} {escape(text)}\n")
    if gone is not None:
        total = size(sum(segment.size_of(path) for path in gone))
        at.say(f"nothing was changed; {len(gone)} segments ({total}) would go at once")


def _days(text: str) -> int:
    from sectool.clock import DAY

    if text in NEVER:
        return 0
    try:
        return _above(round(float(text) * DAY), "--keep-days")
    except (ValueError, OverflowError):
        raise UsageError(f"--keep-days: {text!r} is no number of days", "e.g. 90, 0.5, or all") from None


def _duration(text: str, option: str) -> int:
    from sectool.moment import parse_duration

    if option and text in NEVER:
        return 0
    value = parse_duration(text)
    return _above(value, option) if option else value


def _above(value: int, option: str) -> int:
    if value <= 0:
        raise UsageError(f"{option} has to be more than nothing", "`sectool store prune` deletes once")
    return value
