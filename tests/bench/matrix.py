"""Rows of a bench as a table in Markdown, a line per case and a column per metric: `python -m tests.bench.matrix FILE`.

FILE is what `./dev bench … --json FILE` wrote. Metrics beside others than the first case are left out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.bench.rows import Row


def number(value: float) -> str:
    """A number with three significant digits, thousands grouped."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def markdown(rows: Sequence[Row], bench: str) -> str:
    """The medians of one bench; a metric that a case does not have is a dash."""
    own = [r for r in rows if r["bench"] == bench and " beside " not in r["metric"]]
    metrics = {r["metric"]: r["unit"] for r in own}
    found = {(r["case"], r["metric"]): number(r["median"]) for r in own}
    head = ["case", *(f"{metric} ({unit})" for metric, unit in metrics.items())]
    cases = dict.fromkeys(r["case"] for r in own)
    body = [[case, *(found.get((case, metric), "–") for metric in metrics)] for case in cases]
    lines = [head, ["---", *("---:" for _ in metrics)], *body]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> int:
    """Print the table of each bench in a file."""
    rows: list[Row] = json.loads(Path(sys.argv[1]).read_text())
    for bench in dict.fromkeys(r["bench"] for r in rows):
        print(markdown(rows, bench))
    return 0


if __name__ == "__main__":
    sys.exit(main())
