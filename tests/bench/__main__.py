"""The benchmarks' one home: `sudo ./dev bench [NAME…] [--json FILE] [--rounds N]`.

A benchmark is a module of this folder with `rows(rounds: int) -> list[Row]`. Every number in the documentation
comes from here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from labs.lab import sweep
from sectool.errors import SectoolError
from tests.bench.rows import Row, check

ALL = ("path", "record", "handshake", "throughput", "store", "policy", "identity", "kernel")
ROUNDS = 5
WIDTH = 140  # columns of the table in a file or pipe


def number(value: float) -> str:
    """A number with three significant digits, thousands grouped."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def table(rows: list[Row]) -> Table:
    """What a person reads: median, spread, and the ratio to the case beside it."""
    out = Table(
        box=box.SIMPLE_HEAD,
        title=f"median of rounds, {platform.system()} {platform.release()}",
        title_justify="left",
    )
    for title in ("bench", "case", "metric"):
        out.add_column(title)
    for title in ("median", "min", "max"):
        out.add_column(title, justify="right")
    out.add_column("unit")
    out.add_column("ratio", justify="right")
    out.add_column("to")
    for one in rows:
        ratio = "" if one["ratio"] is None else f"{one['ratio']:.3f}"
        spread = (number(min(one["rounds"])), number(max(one["rounds"])))
        names = (str(one["bench"]), str(one["case"]), str(one["metric"]))
        out.add_row(
            *names, number(one["median"]), *spread, str(one["unit"]), ratio, str(one["ratio_to"] or "")
        )
    return out


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="./dev bench", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(ALL)} (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--rounds", type=int, default=ROUNDS, metavar="N", help=f"default: {ROUNDS}")
    parsed = parser.parse_args(argv)
    if unknown := sorted(set(parsed.names) - set(ALL)):
        parser.error(f"there is no bench {', '.join(unknown)}; there are {', '.join(ALL)}")
    if not 1 <= parsed.rounds <= 100:
        parser.error("--rounds takes 1 to 100")
    return parsed


def main() -> int:
    """Run, print, write. Exit code 1 when a bench fails; what the others gave is kept."""
    chosen = arguments()
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    talk = Console(stderr=True, highlight=False)
    results: list[Row] = []
    failed = 0
    sweep(talk.print)
    for name in chosen.names or ALL:
        begin = time.monotonic()
        talk.print(f"{name}: {chosen.rounds} rounds …")
        module: Any = importlib.import_module(f"tests.bench.{name}")
        try:
            results += check(module.rows(chosen.rounds))
        except SectoolError as error:
            failed += 1
            talk.print(f"{name} failed: {error.message}" + (f"\n  {error.hint}" if error.hint else ""))
        talk.print(f"{name}: {time.monotonic() - begin:.0f} s")
    if results:
        console.print(table(results))
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        talk.print(f"{len(results)} rows written to {chosen.json}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
