"""Everything the console can do, once: keys, the `:` prompt, the palette, help and the key reference come from here.

An action is carried out by the method `do_NAME` of the view in sight, else of the app (dashes become underscores).
`cli` is what `sectool` is asked for the same, for the view's state at the moment; `{…}` is filled in by the app.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tui.cursor import WINDOWS
from tui.rights import Need


@dataclass(frozen=True, slots=True)
class Action:
    """One thing to do. `views`: where (empty: everywhere). `takes`: what may follow its name. `needs`: who may."""

    name: str
    keys: tuple[str, ...]
    help: str
    cli: str
    views: tuple[str, ...] = ()
    takes: str = ""
    needs: Need = Need.NOTHING
    group: str = "do"

    @property
    def shown_keys(self) -> str:
        """For people."""
        return " ".join(SHOWN.get(key, key) for key in self.keys)


SHOWN: Final = {
    "slash": "/",
    "colon": ":",
    "question_mark": "?",
    "left_square_bracket": "[",
    "right_square_bracket": "]",
    "plus": "+",
    "minus": "-",
    "escape": "esc",
    "equals_sign": "=",
    "comma": ",",
    "full_stop": ".",
}

VIEWS: Final = (
    ("pulse", "u", "Pulse", "what is denied now, how much is decided, what is new, what changed", "status"),
    ("flows", "f", "Flows", "every connection with its verdict and reason", "flows {filter} {window}"),
    ("why", "w", "Why", "why the chosen connection was decided so, and the smallest fix", "explain {flow}"),
    ("map", "m", "Map", "who talks to whom, by a label", "map {by} {window}"),
    (
        "policies",
        "o",
        "Policies",
        "documents in force, their text, history and differences",
        "policy history",
    ),
    ("identities", "i", "Identities", "identities of this host, their labels and expiry", "identity list"),
    ("timeline", "l", "Timeline", "all that happened, in order", "timeline {window}"),
    ("query", "s", "SQL", "ask the event store", "query {sql}"),
    ("hosts", "h", "Health", "workers, queue, losses, store, certificates", "status"),
)

ACTIONS: Final[tuple[Action, ...]] = (
    *(Action(name, (key,), f"{title}: {what}", cli, group="go") for name, key, title, what, cli in VIEWS),
    Action(
        "back",
        ("escape",),
        "stop what takes long; back where you came from; out of a prompt",
        "status",
        group="go",
    ),
    # time
    Action(
        "earlier", ("left_square_bracket",), "a fifth of the window earlier", "flows {window}", group="time"
    ),
    Action("later", ("right_square_bracket",), "a fifth of the window later", "flows {window}", group="time"),
    *(
        Action(f"window-{i}", (str(i),), f"look at {span} at a time", "flows {window}", group="time")
        for i, (span, _) in enumerate(WINDOWS, 1)
    ),
    Action("live", ("0",), "back to now", "flows --last 50", group="time"),
    Action(
        "time",
        ("t",),
        "go to a moment: 10m (ago), 14:30, or a timestamp",
        "flows {window}",
        takes="TIME",
        group="time",
    ),
    Action("replay", ("R",), "play the window back; again to stop", "flows {window}", group="time"),
    Action("faster", ("plus", "equals_sign"), "replay faster (to 100 times)", "flows {window}", group="time"),
    Action("slower", ("minus",), "replay slower", "flows {window}", group="time"),
    Action(
        "before",
        ("b",),
        "go to just before the deciding rule came",
        "policy show --at {start}",
        ("why",),
        group="time",
    ),
    # do
    Action("filter", ("slash",), "filter flows, as the CLI does", "flows {filter} {window}", takes="FILTER"),
    Action("pause", ("p",), "hold the live view still, or let it go on", "flows --follow {filter}"),
    Action(
        "zoom-in",
        ("z",),
        "a shorter window about the chosen entry",
        "timeline {window}",
        ("timeline",),
        group="time",
    ),
    Action("zoom-out", ("Z",), "a longer window", "timeline {window}", ("timeline",), group="time"),
    Action("kinds", ("c",), "choose the kinds of entries", "timeline {kinds} {window}", ("timeline",)),
    Action("columns", ("c",), "choose the columns", "flows -o wide {window}", ("flows",)),
    Action("label", ("b",), "group the map by the next label", "map {by} {window}", ("map",)),
    Action("previous", ("comma",), "the revision before", "policy show --rev {revision}", ("policies",)),
    Action("next", ("full_stop",), "the revision after", "policy show --rev {revision}", ("policies",)),
    Action("diff", ("d",), "what this revision changed", "policy diff {before} {revision}", ("policies",)),
    Action(
        "draft", ("d",), "draft the smallest change that lets it through", "policy check {file}", ("why",)
    ),
    Action(
        "backtest",
        ("k",),
        "what the draft would have changed in the last day",
        "policy backtest {file}",
        ("why",),
    ),
    Action(
        "apply",
        ("a",),
        "apply the draft (staged, where it can be)",
        "policy apply {file}",
        ("why",),
        needs=Need.ROLE,
    ),
    Action(
        "promote",
        ("P",),
        "enforce a staged document",
        "policy promote {document}",
        ("why", "policies"),
        "NAME",
        needs=Need.ROLE,
    ),
    Action(
        "rollback",
        ("B",),
        "return to the revision shown",
        "policy rollback {revision}",
        ("policies",),
        needs=Need.ROLE,
    ),
    Action(
        "edit",
        ("e",),
        "edit the policy in $EDITOR, checked before it counts",
        "policy apply {file}",
        ("policies",),
        needs=Need.ROLE,
    ),
    Action(
        "revoke",
        ("x",),
        "revoke the chosen identity, for good",
        "identity revoke {identity} --reason {reason}",
        ("identities",),
        "REASON",
        needs=Need.ROOT,
    ),
    Action("run", ("f5",), "run the query", "query {sql}", ("query",)),
    Action("cancel", ("f8",), "stop the query that runs (esc does so everywhere)", "query {sql}", ("query",)),
    Action("copy-cli", ("y",), "copy the command that shows the same", "{cli}"),
    Action("copy-json", ("Y",), "copy the chosen row as JSON", "flows -o json {filter} {window}"),
    Action("cli", (), "show and copy the command that does the same as an action", "{cli}", takes="NAME"),
    Action(
        "copy-rule", ("ctrl+y",), "copy the rule that lets the chosen connection through", "explain {flow}"
    ),
    Action("save", (), "remember view, filter and window by a name", "flows {filter} {window}", takes="NAME"),
    Action("open", ("v",), "go to what was remembered by a name", "flows {filter} {window}", takes="NAME"),
    Action("refresh", ("r",), "ask again", "{cli}"),
    # console
    Action("prompt", ("colon",), "name an action", "--help", group="console"),
    Action("help", ("question_mark",), "this help", "--help", group="console"),
    Action("theme", ("T",), "dark, light, terminal's own colours", "--color auto", group="console"),
    Action("quit", ("q",), "leave", "--version", group="console"),
)

BY_NAME: Final = {action.name: action for action in ACTIONS}
GROUPS: Final = {"go": "Screens", "time": "Time", "do": "Actions", "console": "Console"}
MOVES: Final = (
    ("j k  ↓ ↑", "down, up"),
    ("g G", "first, last row"),
    ("ctrl+d ctrl+u", "a page down, up"),
    ("enter", "open the row"),
    ("space", "mark the row"),
    ("tab", "next pane"),
    ("ctrl+p", "palette of all actions"),
)


def available(view: str) -> list[Action]:
    """What can be done in a view."""
    return [action for action in ACTIONS if not action.views or view in action.views]


def reference() -> str:
    """The key reference, as Markdown."""
    lines = [
        "# Keys of `sectool top`",
        "",
        "Made from the program: `python -m tui.keys > docs/keys.md`. Every action has a name for the `:` prompt and",
        "the palette (ctrl+p), and a command of `sectool` that shows or does the same: `y` copies that of the view as",
        "it stands, `:cli NAME` that of an action, with what is chosen on the screen filled in.",
        "",
        "| moving | |",
        "|---|---|",
        *(f"| `{keys}` | {what} |" for keys, what in MOVES),
    ]
    for group, title in GROUPS.items():
        lines += [
            "",
            f"## {title}",
            "",
            "| key | name | does | where | in the CLI |",
            "|---|---|---|---|---|",
        ]
        for action in ACTIONS:
            if action.group == group:
                name = f"`:{action.name}{' ' + action.takes if action.takes else ''}`"
                where = ", ".join(action.views) or "everywhere"
                cli = action.cli if action.cli.startswith("{cli") else f"sectool {action.cli}"
                lines.append(
                    f"| `{action.shown_keys}` | {name} | {action.help} | {where} | `{cli.replace('|', '')}` |"
                )
    return "\n".join(lines) + "\n"
