"""Why a recorded flow was decided as it was, and a draft of the smallest change that would let it through."""

from __future__ import annotations

import getpass
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

from sectool.cli.explained import Answer, Recorded
from sectool.cli.flowrow import flow_row
from sectool.errors import SectoolError
from sectool.events import Action, now_us
from sectool.labels import LabelError, LabelSet
from sectool.policy import Engine, parse
from sectool.policy.explanation import NearMiss, Remedy
from sectool.policy.inquiry import Origin, inquire, origin, rules_of_interest, widening
from sectool.policy.model import Mode
from sectool.policy.rules import Rule
from sectool.policy.yamlpos import Items, Scalar, Table, compose
from sectool.policy.yamlpos import Source as Text

if TYPE_CHECKING:
    from store.reader import Reader
    from tui.source import Source

MAX_KNOWN = 5000
LOOK_BACK_S = 3.0  # for the beginnings of rules


def explain(source: Source, reader: Reader, event_id: str) -> tuple[Answer, str]:
    """The answer and the policy text that was in force then. Raises SectoolError when no policy judged it."""
    from store.recorded import decided_by_policy, find_flow, request_of

    stored = find_flow(reader, event_id)
    if not stored["policy_revision"]:
        raise SectoolError(
            f"this connection was not judged by any policy ({stored['drop_reason'] or 'adopted'})",
            "what is known of it stands below",
        )
    request = request_of(stored)
    then = source.revision(number=stored["policy_revision"])
    engine = Engine(parse(then.text, f"revision {then.facts['revision']}"), then.facts["revision"])
    inquiry = inquire(engine, request, stored["start_us"])
    passed = inquiry.main.decision.action in (Action.ALLOW, Action.AUDIT)
    agrees = not decided_by_policy(stored) or passed == (stored["action"] in ("allow", "audit"))
    active = source.revision()
    now = None
    if active.facts["revision"] != engine.revision:
        current = Engine(parse(active.text, f"revision {active.facts['revision']}"), active.facts["revision"])
        now = inquire(current, request, now_us())
    history = [facts for facts in source.revisions() if facts["revision"] <= engine.revision]

    def revisions() -> Iterator[tuple[Origin, str]]:
        for facts in history:
            yield (
                Origin(
                    facts["revision"],
                    facts["applied"],
                    facts["author"],
                    tuple(facts.get("roles", ())),
                    facts["reason"],
                ),
                source.revision(number=facts["revision"]).text,
            )

    end = time.monotonic() + LOOK_BACK_S

    def still() -> Callable[[], bool]:
        looks = (
            count()
        )  # the revision that judged and the one before are looked at however slow the machine is
        return lambda: next(looks) < 2 or time.monotonic() < end

    begun = {rule.id: origin(rule.id, revisions(), still=still()) for rule in rules_of_interest(inquiry)}
    wider = None
    if inquiry.main.remedy is Remedy.SENTENCE:
        rows = reader.query(
            "SELECT DISTINCT text FROM labels ORDER BY text", limit=MAX_KNOWN
        ).table.to_pylist()
        wider = widening(engine, inquiry.main, list(_label_sets(rows)), now_us())
    answer = Answer(
        event_id,
        inquiry,
        {number: found for number, found in begun.items() if found is not None},
        wider,
        Recorded(flow_row(stored), agrees, now),
    )
    return answer, then.text


def rule_for(source: Source, event_id: str) -> str:
    """The rule that let a recorded flow through, or the one that would have; empty when none would."""
    answer, _ = source.explain(event_id)
    main = answer.inquiry.main
    return main.decision.rule.text if answer.inquiry.allowed and main.decision.rule else main.sentence


def _label_sets(rows: list[dict[str, str]]) -> Iterator[LabelSet]:
    for row in rows:
        try:
            yield LabelSet.parse(row["text"])
        except LabelError:
            continue  # written by another release, with labels that this one does not know


@dataclass(frozen=True, slots=True)
class Draft:
    """A whole policy set with one change in it. `document` is the staged document's name; empty: not staged."""

    text: str
    document: str
    what: str  # the change in one line


def draft(answer: Answer, in_force: str) -> Draft:
    """The smallest change to the policy in force that lets the flow of `answer` through.

    A missing permission becomes a staged Policy. A rule that denies is taken out: that cannot be staged, because
    staged documents are judged beside those in force and a denial in force wins over them.
    """
    now = answer.recorded.now if answer.recorded and answer.recorded.now else answer.inquiry
    main = now.main
    if now.allowed:
        raise SectoolError("the policy in force allows it by now", "there is nothing to mend")
    if main.remedy is Remedy.SENTENCE:
        sentence = _as_encrypted_as_before(main.sentence, main.nearest_allow)
        name = f"fix-{answer.flow[-6:].lower()}" if re.fullmatch(r"[0-9a-fA-F-]+", answer.flow) else "fix"
        document = (
            f"kind: Policy\nname: {name}\nowner: {_me()}\nmode: {Mode.STAGE}\n"
            f"description: drafted from flow {answer.flow}\nrules:\n  - {_scalar(sentence)}\n"
        )
        return Draft(f"{in_force.rstrip()}\n---\n{document}", name, f"staged Policy {name}: {sentence}")
    rule = main.decision.rule
    if rule is None:
        raise SectoolError(
            "no rule would help: it needs an enforcer on both ends", "see the last lines of the explanation"
        )
    return Draft(without(in_force, rule), "", f"take out of {rule.title}: {rule.text}")


def _as_encrypted_as_before(sentence: str, nearest: NearMiss | None) -> str:
    """The sentence, with encryption if the nearest permission has it: a fix is not to let down what others keep up."""
    wanted = nearest is not None and " encrypted" in nearest.rule.text.partition(" because ")[0]
    return f"{sentence} encrypted" if wanted and not sentence.endswith(" encrypted") else sentence


def without(text: str, rule: Rule) -> str:
    """Policy text without one rule; a document that is left with none is turned off."""
    for node in compose(Text("policy", text)):
        if not isinstance(node, Table):
            continue
        fields = {key: value for key, (_, value) in node.entries.items()}
        kind, name, rules = fields.get("kind"), fields.get("name"), fields.get("rules")
        if not isinstance(kind, Scalar) or not isinstance(name, Scalar) or not isinstance(rules, Items):
            continue
        if (kind.value, name.value) != (rule.kind, rule.policy):
            continue
        item = rules.items[rule.index - 1]
        if not isinstance(item, Scalar):
            continue
        if len(rules.items) == 1:
            return _turned_off(text, fields.get("mode"), name)
        begin = text.rfind("\n", 0, item.start) + 1
        end = text.find("\n", item.end)
        return text[:begin] + (text[end + 1 :] if end >= 0 else "")
    raise SectoolError(f"{rule.title} is not in the policy in force", "the policy has changed; open it anew")


def _turned_off(text: str, mode: object, name: Scalar) -> str:
    if isinstance(mode, Scalar):
        return text[: mode.start] + Mode.OFF + text[mode.end :]
    end = text.find("\n", name.end)
    return f"{text[:end]}\nmode: {Mode.OFF}{text[end:]}" if end >= 0 else f"{text}\nmode: {Mode.OFF}\n"


def _scalar(sentence: str) -> str:
    """A sentence as YAML takes it: quoted when a plain scalar would read as something else."""
    if any(mark in sentence for mark in (": ", " #", '"', "'")) or sentence[:1] in "[]{}&*!|>%@`":
        return "'" + sentence.replace("'", "''") + "'"
    return sentence


def _me() -> str:
    try:
        name = getpass.getuser()
    except (KeyError, OSError):
        return "operator"
    return name if re.fullmatch(r"[a-z0-9][a-z0-9-]*", name) else "operator"
