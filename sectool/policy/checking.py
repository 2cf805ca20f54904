"""Everything that can be said of policy files without a host: what a pipeline asks before anybody applies them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sectool.policy.conflicts import Conflict, ConflictKind, Conflicts, find_conflicts
from sectool.policy.documents import load
from sectool.policy.engine import Engine
from sectool.policy.lint import lint
from sectool.policy.model import DocumentSet
from sectool.policy.testing import TestResult, run_tests

# A rule of which nothing is left is a mistake; one of which a guardrail takes a part is how guardrails work.
GRAVE = (ConflictKind.UNREACHABLE, ConflictKind.VOID, ConflictKind.SHADOWED)


@dataclass(frozen=True, slots=True)
class Checked:
    """The findings on one set of files."""

    documents: DocumentSet
    lint: list[str]
    conflicts: Conflicts
    tests: list[TestResult]

    @property
    def failed(self) -> int:
        """Lines of tests that failed."""
        return sum(not result.passed for result in self.tests)

    @property
    def grave(self) -> list[Conflict]:
        """Conflicts that leave nothing of a rule, as long as it is not only staged."""
        return [c for c in self.conflicts.of(*GRAVE) if not c.pending]

    def passed(self, *, strict: bool = False) -> bool:
        """Whether a pipeline may go on; `strict`: conflicts of any kind and lint notes stop it, too."""
        if self.failed or self.grave:
            return False
        return not strict or not (self.lint or self.conflicts.found)


def check_files(paths: Sequence[Path], now_us: int) -> Checked:
    """Parse, lint, conflicts and tests at a moment (UTC microseconds). Raises DocumentError with the place."""
    documents = load(paths)
    conflicts = find_conflicts(Engine(documents), now_us)
    return Checked(documents, lint(documents), conflicts, run_tests(documents, now_us))
