"""The door: every public name is there, and reading documents stays light."""

from __future__ import annotations

import subprocess
import sys

import pytest

import sectool.policy


def test_every_public_name_resolves() -> None:
    for name in sectool.policy.__all__:
        assert getattr(sectool.policy, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = sectool.policy.nonsense


def test_reading_documents_loads_no_engine_and_nothing_heavy() -> None:
    code = (
        "import sys; from sectool.policy import parse; parse('kind: Network\\nname: n\\ncidrs: [10.0.0.0/8]');"
        "print(sorted(set(sys.modules) & {'numpy', 'duckdb', 'scapy', 'textual', 'sectool.policy.engine'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
