"""`python -m sectool.agent`: the daemon itself, as `sectool up --background` has it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from sectool.agent.daemon import serve
from sectool.agent.handover import trial
from sectool.agent.mode import Mode
from sectool.api.paths import Paths


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon until it is told to stop; returns its exit code."""
    parser = argparse.ArgumentParser(prog="sectool.agent")
    parser.add_argument("--state", required=True)
    parser.add_argument("--run", required=True)
    parser.add_argument("--announce-fd", type=int)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--policy", action="append", type=Path, default=[])
    parser.add_argument("--mode", type=Mode, choices=list(Mode))
    parser.add_argument("--try", dest="trial", action="store_true", help="only see whether it could start")
    options = parser.parse_args(argv)
    if options.trial:
        sys.stdout.write(json.dumps(trial(Paths.resolve(options.state, options.run))) + "\n")
        return 0
    return serve(
        Paths.resolve(options.state, options.run),
        verbose=options.verbose,
        announce_fd=options.announce_fd,
        policy=options.policy,
        mode=options.mode,
    )


if __name__ == "__main__":
    sys.exit(main())
