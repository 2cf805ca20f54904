"""The NFQUEUE probe, on the real kernel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.kernel


def test_a_packet_comes_through() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "labs.probe"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_without_iptables_it_names_the_command_that_failed() -> None:
    inside = [sys.executable, "-m", "labs.probe", "--inside"]
    dropped = ["setpriv", "--bounding-set", "-net_admin", "--", *inside]
    done = subprocess.run(
        ["unshare", "--net", *dropped], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "this command failed: ip link set lo up" in done.stderr.splitlines()[-1]
