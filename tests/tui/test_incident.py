"""The incident from the first denial to a shop that works again, with keys alone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.kernel.conftest import wait_until
from tests.tui.incident import REASON, Operator, Step, draw, night, split, watch

ROOT = Path(__file__).parents[2]
MOST_KEYS = 25


def test_the_change_of_that_night_is_the_one_told(tmp_path: Path) -> None:
    text = (ROOT / "labs/policies/shop.yaml").read_text()
    changed = split(text)
    assert "allow app=web to call app=db" in text
    assert "allow app=web to call app=db" not in changed
    assert changed.count("kind: Guardrail") == text.count("kind: Guardrail") + 1
    draw([Step("words", ("a",), "text", "<svg/>")], tmp_path / "new")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["01.svg"]


@pytest.mark.kernel
def test_the_incident_is_found_understood_and_mended_in_few_keys() -> None:
    with night() as here:
        operator: Operator = asyncio.run(watch(here))
        assert len(operator.keys) <= MOST_KEYS
        assert here.read()[0] == "1000"
        count = len(here.read())
        assert "no" in here.read()
        wait_until(lambda: here.read(count)[-2:] == ["1000", "1000"], "orders again")
        steps = operator.steps
        why = next(step.text for step in steps if step.words.startswith("Why"))
        for told in ("Guardrail zone-split", "owner security", "revision 2", f"by root: {REASON}"):
            assert told in why, told
        before = next(step.text for step in steps if step.words.startswith("Policies"))
        assert "AS OF" in before
        assert "zone-split" not in before
        assert "take out of Guardrail zone-split" in str(here.lab["db"].json("policy", "history"))
        staged = here.lab["db"].sectool("policy", "show", "--rev", "4")
        final = here.lab["db"].sectool("policy", "show")
        assert "mode: stage" in staged
        assert "mode: stage" not in final
        assert "drafted from flow" in final
