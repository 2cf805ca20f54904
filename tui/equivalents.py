"""The command of `sectool` that does the same as an action, as things stand on the screen."""

from __future__ import annotations

import shlex
import tempfile
from typing import TYPE_CHECKING

from sectool.clock import iso
from sectool.events import now_us
from tui.actions import Action
from tui.views.identities import Identities
from tui.views.map import BY, Map
from tui.views.policies import Policies
from tui.views.query import STARTERS, Query
from tui.views.timeline import Timeline
from tui.views.why import Why

if TYPE_CHECKING:
    from tui.app import Console

FILE = "FILE"  # stands for a file that is yet to be written
FLOW = "FLOW"
NAME = "NAME"
REASON = "REASON"
IDENTITY = "WORKLOAD"


def command(console: Console, action: Action) -> str:
    """A whole command line. What nobody has chosen yet stands in capitals. A draft is written to a file for it."""
    if action.cli == "{cli}":
        return console.view.cli()
    values = {
        "window": console.cursor.flags(),
        "filter": console.filter_flags(),
        "revision": str(_revision(console)),
        "before": str(max(1, _revision(console) - 1)),
        "by": _by(console),
        "kinds": _kinds(console),
    }
    for name, find in (
        ("flow", _flow),
        ("sql", _sql),
        ("file", _file),
        ("document", _document),
        ("start", _start),
        ("identity", _identity),
        ("reason", lambda *_: REASON),
    ):
        if f"{{{name}}}" in action.cli:
            values[name] = shlex.quote(find(console, action))
    return f"sectool {action.cli.format(**values)}".replace("  ", " ").strip()


def _flow(console: Console, _: Action) -> str:
    return console.view.selected_flow() or FLOW


def _revision(console: Console) -> int:
    view = console.view
    if isinstance(view, Policies) and view.shown is not None:
        return int(view.shown.revision.facts["revision"])
    return int((console.facts.get("policy") or {}).get("revision") or 1)


def _sql(console: Console, _: Action) -> str:
    asked = next(iter(console.screen_stack[0].query(Query)), None)
    return asked.sql if asked else STARTERS[0]


def _by(console: Console) -> str:
    view = next(iter(console.screen_stack[0].query(Map)), None)
    return view.by_flags if view else " ".join(f"--by {key}" for key in BY[0])


def _kinds(console: Console) -> str:
    view = console.view
    return " ".join(view.kind_flags) if isinstance(view, Timeline) else ""


def _file(console: Console, _: Action) -> str:
    view = console.view
    if not isinstance(view, Why) or view.draft is None:
        return FILE
    with tempfile.NamedTemporaryFile("w", prefix="sectool-draft-", suffix=".yaml", delete=False) as file:
        file.write(view.draft.text)
    return file.name


def _document(console: Console, _: Action) -> str:
    view = console.view
    if isinstance(view, Why):
        return (view.draft.document if view.draft else "") or NAME
    if isinstance(view, Policies):
        return view.document or NAME
    return NAME


def _identity(console: Console, _: Action) -> str:
    view = console.view
    chosen = view.chosen if isinstance(view, Identities) else None
    return str(chosen["spiffe_id"]) if chosen else IDENTITY


def _start(console: Console, _: Action) -> str:
    view = console.view
    begun = view.begun if isinstance(view, Why) else None
    return iso(begun - 1 if begun is not None else console.cursor.until(now_us()))
