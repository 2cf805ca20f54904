"""`sectool explain`, also known as `sectool policy explain`."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sectool.cli.context import Session, session
from sectool.cli.moments import moment_us
from sectool.cli.output import Format, emit_document
from sectool.cli.revisions import fetch_history, fetch_revision, in_force
from sectool.cli.text import escape_block
from sectool.errors import Exit, SectoolError, UsageError

if TYPE_CHECKING:
    from sectool.cli.explained import Recorded
    from sectool.labels import LabelSet
    from sectool.policy import Engine, Request
    from sectool.policy.inquiry import Inquiry, Origin

app = typer.Typer(rich_markup_mode=None)

LOOK_BACK_S = 5.0  # for the beginnings of rules
MAX_KNOWN = 5000
_ID = re.compile(r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}(?:-[0-9a-fA-F]{4}){2}-[0-9a-fA-F]{12}")

Output = Annotated[Format, typer.Option("--output", "-o", help="Format of the data on stdout.")]


@app.command()
def explain(
    ctx: typer.Context,
    flow: Annotated[
        str,
        typer.Argument(
            metavar="FLOW",
            help="'LABELS -> LABELS SERVICE' (also ip:, net:, fqdn:), or the event.id of a recorded connection.",
        ),
    ],
    file: Annotated[
        list[Path] | None,
        typer.Option("--file", "-f", metavar="FILE", help="Ask these files instead of the policy in force."),
    ] = None,
    at: Annotated[
        str | None, typer.Option("--at", metavar="TIME", help="Ask the policy that was in force then.")
    ] = None,
    output: Output = Format.TABLE,
) -> None:
    """Why a connection is allowed or denied, which rule decides, who owns it, and what would allow it.

    The answer comes from the code that decides. A connection by its id (`sectool flows -o wide` or json shows it) is
    explained by the policy text that was in force then, and by the one in force now. Exits 0 for allowed, 1 for denied.

    \b
    Examples:
      sectool explain 'app=web -> app=db tcp/5432'
      sectool explain 'ip:198.51.100.7 -> app=web tcp/443' --at 2h
      sectool explain 019aab3c-7f52-7c11-8e0a-3d2f5b6a7c88
      sectool policy explain 'app=web -> app=db tcp/5432' --file shop.yaml
    """
    from sectool.cli.explained import SCHEMA, Answer
    from sectool.policy.explanation import Remedy
    from sectool.policy.inquiry import widening

    here = session(ctx)
    if file and at:
        raise UsageError("--file and --at exclude each other", "--at asks the history of this host")
    recorded: Recorded | None = None
    if _ID.fullmatch(flow.strip()):
        if at:
            raise UsageError("--at and a recorded connection exclude each other", "it has a time of its own")
        engine, inquiry, recorded, now = _of_record(here, flow.strip().lower(), file)
    else:
        engine, inquiry, now = _of_words(here, flow, file, moment_us(at) if at else None)
    origins = {} if file else _origins(here, inquiry)
    main = inquiry.main
    known = None if main.remedy is not Remedy.SENTENCE else _known(here)
    answer = Answer(
        flow, inquiry, origins, None if known is None else widening(engine, main, known, now), recorded
    )
    if output in (Format.TABLE, Format.WIDE):
        sys.stdout.write("".join(escape_block(line) + "\n" for line in answer.lines()))
    else:
        emit_document(answer.document(), output, SCHEMA)
    if not inquiry.allowed:
        raise typer.Exit(int(Exit.DENIED))


def _of_words(
    here: Session, flow: str, file: list[Path] | None, at: int | None
) -> tuple[Engine, Inquiry, int]:
    from sectool.events import now_us
    from sectool.policy import parse_flow
    from sectool.policy.inquiry import inquire

    spec = parse_flow(flow)
    now = at if at is not None else now_us()
    engine = _engine(here, file, None, at)
    request = spec.request({doc.name: doc.spec for doc in engine.documents.networks})
    return engine, inquire(engine, request, now), now


def _engine(here: Session, file: list[Path] | None, revision: int | None, at: int | None) -> Engine:
    from sectool.policy import Engine, load, parse

    if file:
        return Engine(load(file))
    if revision is not None:
        meta, text = fetch_revision(here, revision, None)
        return Engine(parse(text, f"revision {meta['revision']}"), meta["revision"])
    meta, documents = in_force(here, at)
    return Engine(documents, meta["revision"])


def _of_record(
    here: Session, event_id: str, file: list[Path] | None
) -> tuple[Engine, Inquiry, Recorded, int]:
    """A recorded connection: by the text of its own revision (or the files), and by the one in force."""
    from sectool.cli.explained import Recorded
    from sectool.cli.flowrow import flow_row
    from sectool.cli.reading import reading
    from sectool.events import Action, now_us
    from sectool.policy.inquiry import inquire
    from store.recorded import decided_by_policy, find_flow, request_of

    with reading(here) as reader:
        stored = find_flow(reader, event_id)
    request: Request = request_of(stored)
    revision, then = stored["policy_revision"], stored["start_us"]
    if file:
        engine, moment = _engine(here, file, None, None), now_us()
    elif revision:
        engine, moment = _engine(here, None, revision, None), then
    else:
        raise SectoolError(
            f"connection {event_id} was not judged by any policy ({stored['drop_reason'] or 'adopted'})",
            "sectool flows -o json shows everything that is known about it",
        )
    inquiry = inquire(engine, request, moment)
    decision = inquiry.main.decision
    passed = decision.action in (Action.ALLOW, Action.AUDIT)
    agrees = not decided_by_policy(stored) or passed == (stored["action"] in ("allow", "audit"))
    now: Inquiry | None = None
    if not file:
        current = _engine(here, None, None, None)
        if current.revision != revision or stored["open"]:
            now = inquire(current, request, now_us())
    row: dict[str, Any] = flow_row(stored)
    return engine, inquiry, Recorded(row, agrees, now), moment


def _origins(here: Session, inquiry: Inquiry) -> dict[int, Origin]:
    """Since when the rules of interest have been there, and by whom."""
    from sectool.policy.inquiry import Origin, origin, rules_of_interest

    rules = rules_of_interest(inquiry)
    if not rules:
        return {}
    deadline = time.monotonic() + LOOK_BACK_S
    history = [meta for meta in fetch_history(here) if meta["revision"] <= inquiry.main.revision]
    texts: dict[int, str] = {}

    def revisions() -> Iterator[tuple[Origin, str]]:
        for meta in history:
            number = meta["revision"]
            if number not in texts:
                texts[number] = fetch_revision(here, number, None)[1]
            begun = Origin(
                number, meta["applied"], meta["author"], tuple(meta.get("roles", ())), meta["reason"]
            )
            yield begun, texts[number]

    found = {
        rule.id: origin(rule.id, revisions(), still=lambda: time.monotonic() < deadline) for rule in rules
    }
    return {number: begun for number, begun in found.items() if begun is not None}


def _known(here: Session) -> list[LabelSet] | None:
    """Label sets of all workloads in the inventory and in the recorded history; None when neither can be read."""
    from sectool.labels import LabelError, LabelSet
    from store.reader import open_reader

    if not here.paths.events_socket.exists() and not here.paths.events.is_dir():
        return None
    try:
        reader = open_reader(here.paths.state, here.paths.run)
    except SectoolError:
        return None
    try:
        rows = reader.query(
            "SELECT DISTINCT text FROM labels ORDER BY text", limit=MAX_KNOWN
        ).table.to_pylist()
    except SectoolError:
        return None  # an answer without what else would be let in is better than none
    finally:
        reader.close()
    out = []
    for row in rows:
        try:
            out.append(LabelSet.parse(row["text"]))
        except LabelError:
            continue  # written by another release, with labels that this one does not know
    return out
