"""Engine and explanation agree: the same verdict, and every word of the explanation is so.

A thousand or so cases here; `SECTOOL_POLICY_CASES=1000000 pytest` on this file runs a million.
"""

from __future__ import annotations

import random

from sectool.events import Action, DropReason
from sectool.policy import Engine, Request, explain, parse
from sectool.policy.explanation import Explanation, Remedy
from sectool.policy.inquiry import inquire
from sectool.policy.model import DocumentSet
from tests.sectool.policy.worlds import LONG, Drawn

NOW = 1_780_000_000_000_000
CASES = LONG or 1500
PER_SET = 100


def agrees(engine: Engine, request: Request, said: Explanation) -> None:
    """The explanation against the engine's verdict and the plain reading of each rule."""
    decision = engine.evaluate(request, NOW)
    assert said.decision == decision
    matching = {rule.rule.id for rule in engine.matching(request, NOW)[0]}
    assert {r.id for r in (*said.applied, *said.staged)} == matching
    for near in said.near:
        assert len(near.misses) == 1
        assert near.rule.id not in matching
    if decision.rule is not None:
        assert decision.rule in said.applied
    if decision.reason is DropReason.DEFAULT_DENY:
        assert not any(r.text.startswith(("allow", "audit")) for r in said.applied)
    assert (said.remedy is Remedy.NOTHING_NEEDED) == (decision.action is Action.ALLOW)


def helps(documents: DocumentSet, request: Request, said: Explanation) -> None:
    """The proposed sentence, put into a Policy, allows the flow."""
    text = f"kind: Policy\nname: zz-fix\nowner: me\nrules: ['{said.sentence}']\n"
    assert Engine(documents.merge(parse(text))).evaluate(request, NOW).action is Action.ALLOW


def test_engine_and_explanation_agree() -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    drawn = Drawn(random.Random(seed))
    tried = helped = denied = 0
    while tried < CASES or (
        not helped and tried < 50 * CASES
    ):  # what can be helped is not in every small world
        documents = parse(drawn.documents())
        engine = Engine(documents, 7)
        for _ in range(PER_SET):
            request = drawn.request()
            said = explain(engine, request, NOW)
            agrees(engine, request, said)
            found = inquire(engine, request, NOW)
            assert found.allowed == (found.main.decision.action in (Action.ALLOW, Action.AUDIT))
            for side in found.sides:
                if side.explanation and not found.allowed:
                    assert found.main.decision.action is Action.DENY
            tried += 1
            denied += said.decision.action is Action.DENY
        if said.remedy is Remedy.SENTENCE and not any(
            s for s in (request.source.names, request.destination.names)
        ):
            helps(documents, request, said)
            helped += 1
    assert 0 < denied < tried  # the world is not all of one colour
    assert helped
