"""`sectool store`: the recorded history as files: how much there is, whether it is sound, what is kept of it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sectool.cli.context import Session, require_root, session
from sectool.cli.maintaining import maintaining, parse_size
from sectool.cli.moments import show_time
from sectool.cli.output import Column, Format, emit, emit_document, paint
from sectool.cli.retention import retention, retention_now
from sectool.cli.text import escape, size
from sectool.cli.transfer import export, import_
from sectool.errors import Exit, UsageError

if TYPE_CHECKING:
    from store.verify import Verdict

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)

Output = Annotated[Format, typer.Option("--output", "-o", help="Format of the data on stdout.")]


@app.callback()
def store() -> None:
    """The recorded history as files: how much there is, whether it is sound, what is kept of it.

    \b
    Examples:
      sectool store stats
      sectool store verify
      sectool store prune --keep-days 90 --dry-run
      sectool store compact --older 7d
      sudo sectool store retention --keep-days 90 --compact-after 7d
      sudo sectool store export march --since 2026-03-01 --until 2026-04-01
    """


app.command()(retention)
app.command("export")(export)
app.command("import")(import_)


@app.command()
def verify(
    ctx: typer.Context,
    anchor: Annotated[
        list[str] | None,
        typer.Option(
            "--anchor", metavar="HASH", help="A head noted earlier that has to be there still (repeatable)."
        ),
    ] = None,
    no_index: Annotated[
        bool,
        typer.Option("--no-index", help="Leave out the index, which is made a second time to compare it."),
    ] = False,
    output: Output = Format.TABLE,
) -> None:
    """Find edits, removals and reorderings in sealed history and in the control history. Reads all of it; no daemon.

    Also finds an index that does not fit the segments: it could hide rows from answers.

    Prints the head of each chain. Note them somewhere else, now and then: given as --anchor later, they also betray
    that the newest part was cut off. Exits 1 when something does not hold, naming each place.

    \b
    Examples:
      sectool store verify
      sectool store verify -o json | jq -r '.heads[].hash'     what to note
      sectool store verify --anchor 5f1d…
    """
    from store.verify import anchor as noted
    from store.verify import verify as check

    at = session(ctx)
    anchors = [noted(text) for text in anchor or ()]
    verdict = check(at.paths.state, anchors, index=not no_index)
    if output in (Format.TABLE, Format.WIDE):
        for line in _verdict(verdict, len(anchors), at.color):
            sys.stdout.write(line + "\n")
    else:
        emit_document(_document(verdict), output, "sectool.store.verify/1")
    if verdict.problems:
        raise typer.Exit(int(Exit.DENIED))


def _document(verdict: Verdict) -> dict[str, Any]:
    return {
        "sound": not verdict.problems,
        "problems": [{"where": p.where, "what": p.what} for p in verdict.problems],
        "heads": [{"chain": h.chain, "entries": h.entries, "hash": h.hash} for h in verdict.heads],
        "segments": verdict.segments,
        "bytes": verdict.bytes,
        "unsealed": list(verdict.unsealed),
        "index": {"checked": verdict.stretches, "unchecked": verdict.unchecked},
    }


def _verdict(verdict: Verdict, anchors: int, color: bool) -> list[str]:
    out = [
        f"{paint('DOES NOT HOLD', 'bad', color)}  {escape(problem.where)} {escape(problem.what)}"
        for problem in verdict.problems
    ]
    if not verdict.problems:
        also = f", and {anchors} noted heads are in place" if anchors else ""
        out.append(
            f"{paint('sound', 'good', color)}  {verdict.segments} sealed segments ({size(verdict.bytes)})"
            f" and every recorded change are as they were written{also}"
        )
    out += [f"head of {h.chain:<8} entry {h.entries:<6} {h.hash}" for h in verdict.heads]
    if verdict.stretches:
        out.append(f"index: {verdict.stretches} stretches were made again from the segments and compared")
    elif verdict.stretches is None:
        out.append("index: left out")
    if verdict.unchecked:
        out.append(
            f"index: {verdict.unchecked} stretches are of rows that are not sealed yet, and not covered"
        )
    if verdict.unsealed:
        out.append(f"not sealed yet, and not covered: {escape(', '.join(verdict.unsealed))}")
    return out


@app.command()
def stats(ctx: typer.Context, output: Output = Format.TABLE) -> None:
    """List the segments: what time each covers, how much is in it, and how large it is.

    \b
    Examples:
      sectool store stats
      sectool store stats -o json | jq '.bytes_per_event'
    """
    from store.inventory import inventory

    at = session(ctx)
    rows = inventory(at.paths.events)
    total = sum(int(row["bytes"]) for row in rows)
    sealed = [row for row in rows if row["rows"] is not None]
    events = sum(int(row["rows"]) for row in sealed)
    extra = {
        "bytes": total,
        "rows": events,
        "bytes_per_event": round(sum(int(row["bytes"]) for row in sealed) / events, 1) if events else None,
        "retention": retention_now(at),
    }
    columns = [
        Column("SEGMENT", lambda r: r["name"]),
        Column("STATE", lambda r: r["state"], lambda r: "bad" if r["state"] == "damaged" else ""),
        Column("FROM", lambda r: show_time(r["first_us"])),
        Column("UNTIL", lambda r: show_time(r["last_us"])),
        Column("ROWS", lambda r: "" if r["rows"] is None else r["rows"], right=True),
        Column("SIZE", lambda r: size(int(r["bytes"])), right=True),
        Column("SHA-256", lambda r: r["sha256"] or "", wide=True),
    ]
    emit(rows, columns, output, "sectool.store.segment/1", color=at.color, extra=extra)
    if output in (Format.TABLE, Format.WIDE):
        _summary(at, extra)


def _summary(at: Session, extra: dict[str, Any]) -> None:
    each = f", {extra['bytes_per_event']} bytes an event when sealed" if extra["bytes_per_event"] else ""
    at.say(f"{extra['rows']} events in sealed segments, {size(extra['bytes'])} on disk{each}")
    if extra["retention"] is not None:
        from store.retention import from_document, words

        at.say(f"kept: {words(from_document(extra['retention']))}")


@app.command()
def prune(
    ctx: typer.Context,
    keep_days: Annotated[
        float | None, typer.Option("--keep-days", min=0, metavar="DAYS", help="Delete what is older.")
    ] = None,
    keep: Annotated[
        str | None, typer.Option("--keep", metavar="SIZE", help="Delete the oldest beyond so much, e.g. 20G.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    output: Output = Format.TABLE,
) -> None:
    """Delete the oldest sealed segments. Whole segments go, oldest first; the chain keeps saying that they were there.

    \b
    Examples:
      sectool store prune --keep-days 90 --dry-run
      sudo sectool store prune --keep 20G
    """
    from sectool.clock import DAY
    from sectool.events import now_us
    from store import segment

    if keep_days is None and keep is None:
        raise UsageError("say what to keep", "e.g. --keep-days 90, or --keep 20G")
    at = session(ctx)
    keep_us = None if keep_days is None else round(keep_days * DAY)
    keep_bytes = None if keep is None else parse_size(keep)
    if dry_run:
        names = [path.name for path in segment.beyond(at.paths.events, keep_bytes, keep_us, now_us())]
    else:
        require_root("deleting events", "--dry-run")
        with maintaining(at) as ask:
            names = ask("prune", keep_bytes=keep_bytes, keep_us=keep_us)["retired"]
    emit(
        [{"segment": name} for name in names],
        [Column("WOULD GO" if dry_run else "DELETED", lambda r: r["segment"])],
        output,
        "sectool.store.prune/1",
        color=at.color,
        extra={"dry_run": dry_run},
    )
    if not names:
        at.say("nothing is beyond what is kept")


@app.command()
def compact(
    ctx: typer.Context,
    older: Annotated[
        str, typer.Option("--older", metavar="DURATION", help="Only segments whose newest row is so old.")
    ] = "1d",
    output: Output = Format.TABLE,
) -> None:
    """Rewrite sealed segments as Parquet (zstd): about half the room, the same rows, checked one by one.

    Searching compact segments takes longer; what is asked for often should stay as it is. The chain records that a
    compact segment stands for the one before it.

    \b
    Examples:
      sudo sectool store compact --older 7d
    """
    from sectool.moment import parse_duration

    at = session(ctx)
    older_us = parse_duration(older)
    require_root("rewriting segments")
    rows = []
    with maintaining(at) as ask:
        while True:
            answer = ask("compact", older_us=older_us)
            if answer["done"] is None:
                break
            rows.append({"segment": answer["done"]})
            at.say(f"{answer['done']} is done, {answer['left']} to go")
    emit(rows, [Column("COMPACT", lambda r: r["segment"])], output, "sectool.store.compact/1", color=at.color)
    if not rows:
        at.say(f"no sealed segment is older than {older} and not compact yet")
