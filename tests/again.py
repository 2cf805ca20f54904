"""`python -m tests.again [OPTIONS OF PYTEST]`: pytest, and the few tests that failed once more, alone.

Kernel tests have real time in them (retransmissions, handshakes that end after some seconds), and a machine that runs
others beside them may be too slow for one by chance. A failure that comes back alone is real. One that does not is told
as `UNSTEADY`, on stderr when it is found and at the end of stdout: it passes, but not in silence. More than `FEW`
failures are no chance: they fail at once.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest

FEW = 3
UNSTEADY = "UNSTEADY: passed alone, failed beside others:"


class Failures:
    """Which tests failed, by the names that pytest takes (pytest's plugin, of the process that shares out)."""

    def __init__(self) -> None:
        self.names: dict[str, None] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A test's own part, or what comes before or after it."""
        if report.failed:
            self.names[plain(report.nodeid)] = None

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that cannot be read fails as a whole."""
        if report.failed:
            self.names[report.nodeid] = None


def plain(name: str) -> str:
    """A test's name without the group that xdist appends to it (after the parameters, which may have an @)."""
    return name.rpartition("@")[0] if name.rfind("@") > name.rfind("]") else name


def main(args: Sequence[str]) -> int:
    """Run pytest with these options, no paths; its exit code, 0 when all that failed passes alone."""
    failures = Failures()
    code = int(pytest.main(list(args), plugins=[failures]))
    names = list(failures.names)
    if code != pytest.ExitCode.TESTS_FAILED or not 0 < len(names) <= FEW:
        return code
    print(f"once more, alone: {' '.join(names)}", file=sys.stderr, flush=True)
    steady = [name for name in names if not passes(name, args)]
    unsteady = [name for name in names if name not in steady]
    for stream in (sys.stderr, sys.stdout):
        for name in unsteady:
            print(f"{UNSTEADY} {name}", file=stream, flush=True)
    for name in steady:
        print(f"FAILED alone, too: {name}", file=sys.stderr, flush=True)
    return int(pytest.ExitCode.TESTS_FAILED if steady else pytest.ExitCode.OK)


def passes(name: str, args: Sequence[str]) -> bool:
    """Whether one test passes in a process of its own, with nothing beside it."""
    own = [sys.executable, "-m", "pytest", *args, "-n", "0", name]
    return subprocess.run(own, check=False).returncode == pytest.ExitCode.OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
