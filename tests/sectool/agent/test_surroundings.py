"""Labels from the surroundings: asked once, remembered until the machine boots, never more than the host may say."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from sectool.agent import surroundings
from sectool.agent.surroundings import FILE, Surroundings
from sectool.context.cloud import Place
from sectool.errors import SectoolError
from sectool.identity.extensions import LabelConstraints
from sectool.origins import Origin

PLACE = Place("aws", "eu-central-1", "eu-central-1a", "i-1", "m7i.large")
ANYTHING = LabelConstraints({"*": ("*",)})


def start(
    folder: Path, answer: Place | SectoolError | None, monkeypatch: pytest.MonkeyPatch, *wanted: str
) -> tuple[Surroundings, int]:
    """Surroundings that have started and asked; how often `changed` was told."""
    told: list[None] = []

    def ask() -> Place | None:
        if isinstance(answer, SectoolError):
            raise answer
        return answer

    monkeypatch.setattr(surroundings, "ask", ask)
    made = Surroundings(folder, wanted or ("cloud",), lambda: told.append(None))

    async def run() -> None:
        await made.start()
        if made._task is not None:
            await made._task
        await made.close()

    asyncio.run(run())
    return made, len(told)


def test_what_the_cloud_says_becomes_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, told = start(tmp_path, PLACE, monkeypatch)
    source = made.source(ANYTHING)
    assert source.origin is Origin.CONTEXT
    assert source.labels == PLACE.labels()
    assert told == 1
    narrow = LabelConstraints({"zone": ("eu-*",), "region": ("us-*",)})
    assert made.source(narrow).labels == {"zone": "eu-central-1a"}


def test_it_is_remembered_when_nobody_answers_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(tmp_path, PLACE, monkeypatch)
    for answer in (None, SectoolError("no answer")):
        made, told = start(tmp_path, answer, monkeypatch)
        assert made.place == PLACE
        assert told == 0


def test_another_boot_is_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(tmp_path, PLACE, monkeypatch)
    known = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps({**known, "boot": "another"}))
    assert start(tmp_path, None, monkeypatch)[0].place is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"boot": 1}', "\x00"])
def test_a_damaged_memory_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (tmp_path / FILE).write_text(text)
    assert start(tmp_path, None, monkeypatch)[0].place is None


def test_nobody_is_asked_who_was_not_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = start(tmp_path, PLACE, monkeypatch, "os")
    assert made.place is None
    assert set(made.source(ANYTHING).labels) <= {"os", "kernel"}
    assert not (tmp_path / FILE).exists()
