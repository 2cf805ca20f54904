"""Answers about a change fit into one message, however large the change."""

from __future__ import annotations

import json

import pytest

from sectool.agent.apply import MAX_CHANGES, MAX_CONFLICT_LINES, _changes, _findings, _within
from sectool.agent.revisions import draft
from sectool.api.wire import MAX_HEADER


def test_lines_that_do_not_fit_are_counted() -> None:
    assert _within(["a", "b"], 100) == ["a", "b"]
    assert _within(["a" * 40, "b" * 40, "c" * 40], 90) == ["a" * 40, "b" * 40, "and 1 more lines"]
    assert _within(["ü" * 20], 100) == ["and 1 more lines"]


@pytest.mark.parametrize("rules", [1500])
def test_a_large_change_fits(rules: int) -> None:
    reason = "x" * 400
    body = "".join(f'- allow app=a{n} to call app=b{n} because "{reason}"\n' for n in range(rules))
    box = "kind: Guardrail\nname: box\nowner: security\nrules: [deny env=dev to call env=prod]\n---\n"
    candidate = draft(f"{box}kind: Policy\nname: p\nowner: o\nrules:\n{body}")
    changes = _changes(None, candidate)
    assert changes[-1].endswith(" more lines")
    found = _findings(candidate)
    assert found["conflicts_found"] == rules
    assert 0 < len(found["conflicts"]) < rules
    assert len(json.dumps({"changes": changes, **found})) < MAX_HEADER * 0.8
    assert MAX_CHANGES + MAX_CONFLICT_LINES < MAX_HEADER
