"""The operating system as labels."""

from __future__ import annotations

from pathlib import Path

import pytest

from sectool.context.system import labels


@pytest.mark.parametrize(
    ("text", "release", "found"),
    [
        ('ID=debian\nVERSION_ID="12"\n', "6.18.1-amd64", {"os": "debian-12", "kernel": "6.18"}),
        ("# none\nID='arch'\n\n=x\n", "6.9.0", {"os": "arch", "kernel": "6.9"}),
        ('ID="a b\x1b[0m"\n', "strange", {"os": "a_b__0m"}),
        ("", "5.4.0", {"kernel": "5.4"}),
    ],
)
def test_what_os_release_says(tmp_path: Path, text: str, release: str, found: dict[str, str]) -> None:
    path = tmp_path / "os-release"
    path.write_text(text)
    assert labels((tmp_path / "none", path), release) == found


def test_this_host_has_a_kernel() -> None:
    assert labels()["kernel"]
