"""One target under atheris, until it finds something or its time is over: `python -m tests.fuzz.engine TARGET ARGS…`

ARGS go to libFuzzer. A process of its own for each target: the engine takes over signals and ends the process.
"""

from __future__ import annotations

import sys

import atheris

from tests.fuzz.seeds import target

OURS = ["nfq", "sectool", "tests.fuzz.targets"]

if __name__ == "__main__":
    with atheris.instrument_imports(include=OURS):
        one = target(sys.argv[1])
    atheris.Setup([sys.argv[0], *sys.argv[2:]], one)
    atheris.Fuzz()
