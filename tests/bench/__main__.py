"""The benchmarks' one home: `sudo ./dev bench [NAME…] [--json FILE] [--rounds N] [--case CASE…]`.

A benchmark is a module of this folder with `rows(rounds: int) -> list[Row]`, and perhaps a NOTE for the reader of its
table; that of datapath also takes the cases to run. Every number in the documentation comes from here.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from labs.lab import sweep
from sectool.errors import SectoolError
from tests.bench.matrix import number
from tests.bench.rows import PartialError, Row, check

ALL = (
    "path",
    "record",
    "handshake",
    "throughput",
    "store",
    "backtest",
    "policy",
    "identity",
    "kernel",
    "tui",
    "datapath",
)
ROUNDS = 5
WIDTH = 140  # columns of the table in a file or pipe


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
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="CASE",
        help="of datapath only this case (may be repeated)",
    )
    parsed = parser.parse_args(argv)
    if unknown := sorted(set(parsed.names) - set(ALL)):
        parser.error(f"there is no bench {', '.join(unknown)}; there are {', '.join(ALL)}")
    if not 1 <= parsed.rounds <= 100:
        parser.error("--rounds takes 1 to 100")
    if parsed.case and parsed.names != ["datapath"]:
        parser.error("--case goes with the bench datapath alone")
    return parsed


def main() -> int:
    """Run, print, write. Exit code 1 when a bench fails; what the others gave is kept."""
    chosen = arguments()
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    talk = Console(stderr=True, highlight=False)
    results: list[Row] = []
    notes: list[str] = []
    failed = 0
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # an exit like any other: everything made is removed
    sweep(talk.print)
    for name in chosen.names or ALL:
        begin = time.monotonic()
        talk.print(f"{name}: {chosen.rounds} rounds …")
        module: Any = importlib.import_module(f"tests.bench.{name}")
        try:
            more = (chosen.case,) if chosen.case else ()
            results += check(module.rows(chosen.rounds, *more))
            notes += [module.NOTE] if hasattr(module, "NOTE") else []
        except PartialError as error:
            failed += 1
            results += check(error.rows)
            talk.print(f"{name}: {error.message}")
        except SectoolError as error:
            failed += 1
            talk.print(f"{name} failed: {error.message}" + (f"\n  {error.hint}" if error.hint else ""))
        talk.print(f"{name}: {time.monotonic() - begin:.0f} s")
    if results:
        console.print(table(results))
        for note in notes:
            console.print(note)
    if chosen.json is not None:
        chosen.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        talk.print(f"{len(results)} rows written to {chosen.json}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
