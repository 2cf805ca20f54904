"""Inputs that targets begin with: what their own builders make, in corpus/TARGET/. `python -m tests.fuzz.seeds`

Makes the files that are missing. Keys in them are of nobody: each run of a target makes its own, so that genuine
messages in an input are told by the input how they are to be changed (tests/fuzz/script.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Final, cast

HERE: Final = Path(__file__).parent
CORPUS: Final = HERE / "corpus"
TARGETS: Final = tuple(sorted(path.stem for path in (HERE / "targets").glob("[a-z]*.py")))

Target = Callable[[bytes], None]


def target(name: str) -> Target:
    """What a target does with an input; whatever it raises is a finding."""
    return cast(Target, importlib.import_module(f"tests.fuzz.targets.{name}").one)


def invariant(name: str) -> str:
    """What a target says must hold."""
    return importlib.import_module(f"tests.fuzz.targets.{name}").__doc__ or ""


def seeds(name: str) -> dict[str, bytes]:
    """Inputs made now."""
    return cast(dict[str, bytes], importlib.import_module(f"tests.fuzz.targets.{name}").seeds())


def files(name: str) -> list[Path]:
    """A target's committed inputs."""
    return sorted((CORPUS / name).iterdir())


def main() -> None:
    """Write what is missing."""
    for name in TARGETS:
        folder = CORPUS / name
        folder.mkdir(parents=True, exist_ok=True)
        for seed, data in seeds(name).items():
            path = folder / seed
            if not path.exists():
                path.write_bytes(data)


if __name__ == "__main__":
    main()
