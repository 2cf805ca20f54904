"""Events as sentences: what people are told, and what is left to those who ask for the whole."""

from __future__ import annotations

from typing import Any

import pytest

from store.past import History
from store.sentences import sentence

ALERT = {
    "type": "alert.raised",
    "id": 8595773503127399591,
    "alert": "guardrail violated",
    "text": "app=web -> app=db tcp/5432: Guardrail ports, rule 1 denies what Policy shop, rule 2 allows",
    "details": {"count": 1},
}


@pytest.mark.parametrize(
    ("type_", "more", "told"),
    [
        ("alert.raised", {}, f"alert: guardrail violated: {ALERT['text']}"),
        (
            "alert.raised",
            {"owners": ["security", "team-shop"]},
            f"alert: guardrail violated: {ALERT['text']} (owners: security, team-shop)",
        ),
        ("alert.cleared", {"owners": ["security"]}, f"alert is over: guardrail violated: {ALERT['text']}"),
    ],
)
def test_an_alert_is_told_without_its_details(type_: str, more: dict[str, Any], told: str) -> None:
    assert sentence(type_, ALERT | more, History(None)) == (told, [])


def test_an_alert_of_another_release_is_told_as_it_is() -> None:
    assert sentence("alert.raised", {"what": "x"}, History(None)) == ("alert.raised: what x", [])
