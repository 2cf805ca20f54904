"""What each process of a daemon reads at its start: nothing heavy that it does not need, so that starts stay quick."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Each costs from 20 to 400 ms of a processor.
HEAVY = {
    *(
        "textual",
        "rich",
        "typer",
        "duckdb",
        "pyarrow",
        "pandas",
        "scapy",
        "pyroute2",
        "sqlite_utils",
        "numpy",
        "yaml",
    ),
    *("h2", "google.protobuf", "asyncio", "cryptography", "netfilterqueue", "sqlite3"),
}
MODULES = {
    "sectool.cli.main": {"typer"},
    "sectool.agent.forking": set(),
    "sectool.agent.background": set(),
    "sectool.agent.nursery": {"asyncio"},
    "sectool.agent.__main__": {
        *("asyncio", "cryptography", "google.protobuf", "h2", "netfilterqueue", "numpy", "sqlite3", "yaml")
    },
    "nfq.__main__": {"cryptography", "netfilterqueue", "numpy", "yaml"},
    "store.__main__": {"asyncio", "duckdb", "numpy", "pyarrow", "sqlite3", "yaml"},
}


@pytest.mark.parametrize("module", MODULES)
def test_a_process_reads_no_heavy_module_that_it_does_not_need(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, timeout=60
    )
    read = set(done.stdout.split()) & HEAVY
    assert read <= MODULES[module], "import it where it is used"
