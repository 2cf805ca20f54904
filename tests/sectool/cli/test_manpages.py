"""Every command has a manual page that man(1) takes without a warning, and that loses nothing of the help."""

from __future__ import annotations

import subprocess
from pathlib import Path

from sectool.cli.main import COMMANDS
from sectool.cli.manpages import escape, main, pages


def test_there_is_a_page_for_every_command() -> None:
    names = [name for name, _ in pages()]
    assert names == ["sectool.1", *(f"sectool-{name}.1" for name in sorted(COMMANDS))]


def test_groff_takes_all_of_them(tmp_path: Path) -> None:
    main(tmp_path)
    for page in sorted(tmp_path.iterdir()):
        done = subprocess.run(
            ["man", "--warnings", "-l", str(page)],
            capture_output=True,
            text=True,
            check=False,
            env={"MANWIDTH": "100", "PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
        )
        assert done.returncode == 0, page.name
        assert done.stderr == "", page.name


def test_options_and_examples_are_there() -> None:
    text = dict(pages())["sectool-flows.1"]
    assert "\\-\\-verdict" in text
    assert "sectool flows" in text
    assert ".SH EXIT STATUS" in text


def test_what_roff_would_take_for_itself_is_escaped() -> None:
    assert escape(".so /etc/passwd\n'x\\n-") == "\\&.so /etc/passwd\n\\&\\(aqx\\en\\-"
