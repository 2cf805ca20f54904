"""The reference is made from the program: nothing is missing in it, and it is up to date."""

from __future__ import annotations

from pathlib import Path

from sectool.agent.settings import Settings
from sectool.cli.main import COMMANDS
from sectool.cli.reasons import MEANING
from sectool.cli.reference import EVENTS, EXITS, SETTINGS, reference
from sectool.errors import Exit
from sectool.events import DropReason, Type
from sectool.filters import FLAGS

REFERENCE = Path(__file__).parents[3] / "docs" / "reference.md"


def test_it_is_up_to_date() -> None:
    assert REFERENCE.read_text() == reference(), "run: python -m sectool.cli.reference > docs/reference.md"


def test_every_reason_code_event_and_setting_has_a_meaning() -> None:
    assert set(MEANING) == set(DropReason)
    assert len(set(MEANING.values())) == len(MEANING)
    assert set(EXITS) == set(Exit)
    assert set(EVENTS) == set(Type)
    assert len(set(EVENTS.values())) == len(EVENTS)
    assert set(SETTINGS) == set(Settings.__dataclass_fields__)


def test_every_command_and_filter_is_in_it() -> None:
    text = REFERENCE.read_text()
    assert all(f"### sectool {name}\n" in text for name in COMMANDS)
    assert all(f"--{name}" in text for name in FLAGS)
