"""Why: what decided about one connection, since when and by whom, and the way from there to a change in force.

explained ──d──► drafted ──k──► back-tested ──a──► applied (staged) ──P──► enforced
"""

from __future__ import annotations

import tempfile
import textwrap
from pathlib import Path
from typing import Any

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.widgets import Static

from sectool.cli.text import escape, escape_block
from sectool.clock import DAY
from sectool.errors import SectoolError
from sectool.events import now_us
from sectool.policy.inquiry import Origin
from tui.inquest import Draft, draft
from tui.view import View
from tui.views.flows import detail
from tui.words import count

STEPS = ("explained", "drafted", "back-tested", "applied", "enforced")


class Why(View):
    """One connection, explained."""

    NAME = "why"
    TITLE = "Why"
    DEFAULT_CSS = """
    Why #why-title { height: 1; padding: 0 1; text-style: bold; }
    Why #steps { height: 1; padding: 0 1; }
    Why VerticalScroll { padding: 0 1; scrollbar-size-vertical: 1; }
    Why #fix { height: auto; margin-top: 1; }
    Why #answer { height: auto; }
    """

    def __init__(self) -> None:
        super().__init__()
        self.flow = ""
        self.answer: Any = None
        self.policy_text = ""
        self.draft: Draft | None = None
        self.outcome: Any = None
        self.step = -1
        self.done = ""
        self._unjudged = SectoolError("")
        self._then_draft = False

    def compose(self) -> ComposeResult:
        """Steps, explanation, fix."""
        yield Static(id="steps", markup=False)
        with VerticalScroll(id="why-body"):
            yield Static(id="answer", markup=False)
            yield Static(id="fix", markup=False)

    def first(self) -> VerticalScroll:
        """The text, to be scrolled."""
        return self.query_one("#why-body", VerticalScroll)

    def explain(self, flow: str) -> None:
        """Take up another connection."""
        if flow == self.flow:
            return
        self._then_draft = False
        self.flow, self.answer, self.draft, self.outcome, self.step, self.done = (
            flow,
            None,
            None,
            None,
            -1,
            "",
        )
        self.forget()

    def reload(self) -> None:
        """Ask for the explanation."""
        if not self.flow:
            self._show()
            return
        flow, source = self.flow, self.source
        if self.answer is None:
            self.ask("explanation", lambda: source.explain(flow))
        elif self.draft is not None and self.outcome is None:
            self.do_backtest("")  # it was called off

    def tick(self) -> None:
        """An explanation does not age."""

    def failed(self, what: str, error: SectoolError) -> None:
        """Say so in place."""
        if what != "explanation":
            self.console.trouble(error)
        else:
            self._unjudged = error
            flow, source = self.flow, self.source
            self.ask("facts", lambda: source.flow(flow))

    def got(self, what: str, answer: Any) -> None:
        """One more step done."""
        if what == "explanation":
            self.answer, self.policy_text = answer
            self.step = 0
            if self._then_draft:
                self._then_draft = False
                self.do_draft("")
        elif what == "facts":
            text = Text(escape_block(f"{self._unjudged.message}.\n\n"))
            self.query_one("#answer", Static).update(text + detail(answer, max(20, self.size.width - 4)))
            return
        elif what == "draft":
            self.draft, self.step = answer, 1
            self.outcome = None
            self.do_backtest("")
        elif what == "backtest":
            self.outcome, self.step = answer, 2
        elif what == "apply":
            staged = self.draft is not None and self.draft.document
            self.step = 3 if staged else 4
            self.done = f"revision {answer['revision']} is in force" + (
                f"; {self.draft.document} is staged, P enforces it" if staged and self.draft else ""
            )
            if answer.get("problems"):
                self.done += f"; PROBLEM: {'; '.join(answer['problems'])}"
        elif what == "before":
            self._go_before(answer["applied"], answer["revision"], answer["author"])
            return
        elif what == "promote":
            self.step, self.done = 4, f"revision {answer['revision']} is in force and enforces it"
        self._show()

    def _show(self, *, follow: bool = True) -> None:
        steps = Text(no_wrap=True)
        for number, name in enumerate(STEPS):
            if number:
                steps.append(" → ", style="dim")
            steps.append(
                name, style="bold reverse" if number == self.step else "" if number < self.step else "dim"
            )
        self.query_one("#steps", Static).update(steps)
        body = self.query_one("#answer", Static)
        if self.answer is None:
            body.update(
                Text("looking…" if self.flow else "choose a connection in Pulse or Flows and press w")
            )
            return
        body.update(_explanation(list(self.answer.lines()), max(30, self.size.width - 4)))
        self.query_one("#fix", Static).update(self._fix())
        if self.step and follow:
            self.first().scroll_end(animate=False)

    def _fix(self) -> Text:
        out = Text()
        if self.draft is None:
            return out
        out.append("Draft\n", style="bold underline")
        out.append(escape(self.draft.what) + "\n", style="bold")
        if not self.draft.document:
            out.append("taking a rule out cannot be staged: a applies it at once\n")
        if self.outcome is None:
            out.append("back-testing on the last day…\n")
            return out
        out.append("\nWhat it would have changed in the last day\n", style="bold underline")
        found = self.outcome
        if not found.changes:
            out.append(f"nothing in {count(found.flows)} recorded flows\n")
        for change in found.changes[:12]:
            bad = str(change.kind) in ("newly denied", "no longer encrypted")
            out.append(
                f"{'✗' if bad else '+'} {count(change.flows):>5}  ", style="bold red" if bad else "bold"
            )
            out.append(
                escape(f"{change.kind}: {change.source} → {change.destination} {change.service}") + "\n"
            )
        if len(found.changes) > 12:
            out.append(f"and {len(found.changes) - 12} more kinds; y copies the command that lists them\n")
        out.append(f"{count(found.judged)} of {count(found.flows)} flows were judged anew\n", style="dim")
        if self.done:
            out.append(f"\n{escape(self.done)}\n", style="bold green")
        return out

    def on_resize(self) -> None:
        """Lines are broken for the width there is."""
        if self.answer is not None:
            self._show(follow=False)

    # --- steps -----------------------------------------------------------------------------------------------

    def do_draft(self, _: str) -> None:
        """Draft against what is in force now; as soon as it is explained, if that is under way."""
        if self.answer is None and "explanation" in self._asking:
            self._then_draft = True
            return
        if self.answer is None:
            self.console.tell("there is no explained connection yet")
            return
        answer, source = self.answer, self.source
        self.ask("draft", lambda: draft(answer, source.revision().text))

    def do_before(self, _: str) -> None:
        """All views go to the moment before the deciding rule came into force, or before the revision did."""
        if self.answer is None:
            self.console.tell("there is no explained connection yet")
            return
        begun = self._origin()
        if begun is None:  # nothing allowed it: the revision that judged is what changed
            number, source = self.answer.inquiry.main.revision, self.source
            self.ask("before", lambda: source.revision(number=number).facts)
            return
        self._go_before(begun.applied_us, begun.revision, begun.author)

    def _go_before(self, applied: int, revision: int, author: str) -> None:
        self.console.move_to(self.cursor.to(applied - 1, now_us()))
        self.console.tell(
            f"just before revision {revision} by {author}: o its policy, f its flows, 0 now", 8.0
        )

    @property
    def begun(self) -> int | None:
        """When the deciding rule came into force, as far as is known; UTC microseconds."""
        found = self._origin() if self.answer is not None else None
        return found.applied_us if found is not None else None

    def _origin(self) -> Origin | None:
        main = self.answer.inquiry.main
        rule = main.decision.rule or (main.nearest_allow.rule if main.nearest_allow else None)
        found: Origin | None = self.answer.origins.get(rule.id) if rule is not None else None
        return found

    def do_backtest(self, _: str) -> None:
        """Judge the last day by the draft."""
        if self.draft is None:
            self.console.tell("d drafts a change first")
            return
        text, source, now = self.draft.text, self.source, now_us()
        self.ask("backtest", lambda: source.backtest(text, now - DAY, None))

    def do_apply(self, _: str) -> None:
        """Apply it, after a question."""
        if self.draft is None or self.outcome is None:
            self.console.tell("d drafts a change and back-tests it first")
            return
        chosen, source = self.draft, self.source
        bad = [c for c in self.outcome.changes if str(c.kind) in ("newly denied", "no longer encrypted")]
        lines = [chosen.what, ""]
        lines.append(
            "Staged: it is judged and recorded, and decides nothing yet."
            if chosen.document
            else "It counts at once, on this host. The revision before stays on record (policies, B)."
        )
        if bad:
            lines.append(f"{sum(c.flows for c in bad)} flows of the last day would fare WORSE by it.")
        reason = f"fix for flow {self.flow}: {chosen.what}"[:500]
        self.console.confirm(
            "Apply this draft?",
            lines,
            lambda: self.ask("apply", lambda: source.apply(chosen.text, reason), lasting=True),
        )

    def do_promote(self, name: str) -> None:
        """Enforce the staged draft, after a question."""
        document = name or (self.draft.document if self.draft and self.step >= 3 else "")
        if not document:
            self.console.tell("nothing of this draft is staged; a applies it")
            return
        source = self.source
        self.console.confirm(
            f"Enforce {document}?",
            ["From now on its rules decide, on this host.", "Connections it allows go through."],
            lambda: self.ask(
                "promote",
                lambda: source.promote([document], f"fix for flow {self.flow}"[:500]),
                lasting=True,
            ),
        )

    def selected_flow(self) -> str:
        """The explained one."""
        return self.flow

    def selected(self) -> Any:
        """The explanation as a document."""
        return self.answer.document() if self.answer is not None else None

    def cli(self) -> str:
        """The same explanation; of a draft, the same back-test, with the draft written to a file."""
        if self.draft is None:
            return f"sectool explain {self.flow or 'FLOW'}"
        folder = Path(tempfile.gettempdir())
        with tempfile.NamedTemporaryFile(
            "w", dir=folder, prefix="sectool-draft-", suffix=".yaml", delete=False
        ) as file:
            file.write(self.draft.text)
        return f"sectool policy backtest --staged --since 24h {file.name}"

    def hint(self) -> str:
        """What comes next."""
        return {
            -1: "w on a connection explains it  esc back",
            0: "d draft the smallest fix  b before the rule came  y as command  esc back",
            1: "back-testing…",
            2: "a apply the draft  k back-test again  y as command  esc back",
            3: "P enforce the staged draft  u pulse  esc back",
            4: "u pulse: see it recover  esc back",
        }[self.step]


def _explanation(lines: list[str], room: int) -> Text:
    """The explanation's lines: verdict and headings told apart, and what is too long continued further in."""
    out = Text()
    for line in lines:
        text = escape(line)
        style = ""
        if text.startswith("DENIED"):
            style = "bold red"
        elif text.startswith("ALLOWED"):
            style = "bold green"
        elif text.startswith("  in force"):
            style = "yellow"
        elif text.startswith("  "):
            style = "bold" if text.startswith(("  deny", "  allow", "  require", "  audit")) else ""
        elif text.endswith(":"):
            style = "underline"
        inset = " " * (len(text) - len(text.lstrip()))
        broken = textwrap.wrap(text, room, subsequent_indent=f"{inset}    ", break_on_hyphens=False)
        for part in broken or [""]:
            out.append(part + "\n", style=style)
    out.right_crop(1)
    return out
