"""Every parser of network bytes: its committed inputs, some hundred random ones; for two, a second of the engine."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz.__main__ import executed, fuzz, main, missing
from tests.fuzz.seeds import CORPUS, TARGETS, files, invariant, seeds, target

RANDOM = 200
SMALL = 64 << 10  # bytes of one target's committed inputs
EVERY = pytest.mark.parametrize("name", TARGETS)


@EVERY
def test_committed_inputs(name: str) -> None:
    one = target(name)
    for path in files(name):
        one(path.read_bytes())


@EVERY
def test_random_inputs(name: str) -> None:
    """Random bytes, and committed inputs with some of theirs changed. The same ones each time: a failure stays."""
    one, chance = target(name), random.Random(name)
    known = [path.read_bytes() for path in files(name)]
    for number in range(RANDOM):
        data = bytearray(chance.choice(known))
        for _ in range(chance.randrange(4)):
            if data:
                data[chance.randrange(len(data))] = chance.randrange(256)
        _try(one, bytes(data), name, number)
        _try(one, chance.randbytes(chance.randrange(200)), name, number)


def _try(one: object, data: bytes, name: str, number: int) -> None:
    assert callable(one)
    try:
        one(data)
    except Exception as error:
        raise AssertionError(f"{name}, random input {number}: {data.hex()}") from error


@EVERY
def test_a_target_says_what_must_hold_and_has_a_small_corpus(name: str) -> None:
    assert len(invariant(name).split()) > 12
    assert len(files(name)) >= 5
    assert sum(path.stat().st_size for path in files(name)) < SMALL


@EVERY
def test_the_corpus_is_what_the_builders_make(name: str) -> None:
    """Under the same names; its contents differ by the keys of the day."""
    assert {path.name for path in files(name)} == set(seeds(name))


def test_no_corpus_without_a_target() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(TARGETS)


if not missing():

    @pytest.mark.parametrize("name", ("segment", "records"))  # instrumenting what is imported takes long
    def test_a_second_of_the_engine(name: str, tmp_path: Path) -> None:
        found, words = fuzz(name, 1, tmp_path)
        assert found == [], words[-4000:]
        assert executed(words) > len(files(name))


def test_an_input_is_repeated_without_the_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "input"
    path.write_bytes(b"\0")
    assert main(["dns", "--replay", str(path)]) == 0
    assert "what must hold" in capsys.readouterr().out


def test_where_there_is_no_engine_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert main(["dns", "--seconds", "1"]) == 1
    said = capsys.readouterr().err
    assert "atheris" in said
    assert "./dev test tests/fuzz" in said
