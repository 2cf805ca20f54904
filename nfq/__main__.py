"""`python -m nfq --config-fd FD`: one packet worker, configured over the inherited socket FD by its agent."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from nfq.worker import serve


def main(argv: Sequence[str] | None = None) -> int:
    """Run until the agent says stop or goes away."""
    parser = argparse.ArgumentParser(prog="python -m nfq")
    parser.add_argument("--config-fd", type=int, required=True, help="inherited socket to the agent")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the agent's to handle, in order
    return serve(parser.parse_args(argv).config_fd)


if __name__ == "__main__":
    sys.exit(main())
