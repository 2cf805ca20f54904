"""Manual pages, made from the program itself: `python -m sectool.cli.manpages DIRECTORY`.

One page for `sectool` and one for each of its commands (`man sectool-policy`), in man(7)'s macros.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from sectool import __version__
from sectool.cli.lazy import Unloaded
from sectool.cli.main import app
from sectool.cli.reference import EXITS
from sectool.errors import Exit

FILES = (
    ("/var/lib/sectool", "state: enrolment, keys, control history, events, settings (sectool.yaml)"),
    ("/run/sectool", "what lives as long as the daemon: sockets, rings, journals"),
)


def escape(text: str) -> str:
    """Text as roff takes it literally."""
    out = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")
    return "\n".join("\\&" + line if line.startswith((".", "\\(aq")) else line for line in out.split("\n"))


def page(command: Any, path: str) -> str:
    """The manual page of a command (with all of its subcommands)."""
    name = path.replace(" ", "-")
    about = _first_line(command)
    lines = [
        f'.TH {escape(name.upper())} 1 "" "sectool {escape(__version__)}" "sectool"',
        ".SH NAME",
        f"{escape(name)} \\- {escape(about)}",
        ".SH SYNOPSIS",
        *_synopsis(command, path),
        ".SH DESCRIPTION",
        *_prose(inspect.cleandoc(command.help or about)),
        *_options(command, ".SH OPTIONS"),
    ]
    children = list(_children(command))
    if children and path == "sectool":
        lines.append(".SH COMMANDS")
        for child_name, child in children:
            lines += [".TP", f".BR sectool\\-{escape(child_name)} (1)", escape(_first_line(child))]
    elif children:
        lines.append(".SH COMMANDS")
        for child_name, child in children:
            lines += _subcommand(child, f"{path} {child_name}")
    lines.append(".SH EXIT STATUS")
    for code in Exit:
        lines += [".TP", f".B {int(code)}", escape(EXITS[code])]
    lines.append(".SH FILES")
    for file, what in FILES:
        lines += [".TP", f".I {escape(file)}", escape(what)]
    others = [path.split()[0]] if path != "sectool" else []
    if others:
        lines += [".SH SEE ALSO", ".BR sectool (1)"]
    return "\n".join(lines) + "\n"


def pages() -> Iterator[tuple[str, str]]:
    """Name and content of every page."""
    root = typer.main.get_command(app)
    yield "sectool.1", page(root, "sectool")
    for name, command in _children(root):
        yield f"sectool-{name}.1", page(command, f"sectool {name}")


def _children(command: Any) -> Iterator[tuple[str, Any]]:
    for name, child in sorted(getattr(command, "commands", {}).items()):
        real = child.real() if isinstance(child, Unloaded) else child
        if not getattr(real, "hidden", False):
            yield name, real


def _first_line(command: Any) -> str:
    text = inspect.cleandoc(command.help or "").split("\n\n")[0].replace("\n", " ")
    return str(text).rstrip(".") or str(command.name)


def _synopsis(command: Any, path: str) -> list[str]:
    context = command.context_class(command, info_name=path, parent=None)
    usage = " ".join(command.collect_usage_pieces(context))
    return [f".B {escape(path)}", escape(usage)]


def _prose(text: str) -> list[str]:
    """Paragraphs; what follows a backspace line (an example block) is set as it is written."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith("\b"):
            lines += [".PP", ".nf", escape(paragraph.lstrip("\b\n")), ".fi"]
        else:
            lines += [".PP", escape(paragraph)]
    return lines


def _options(command: Any, head: str) -> list[str]:
    context = command.context_class(command, info_name=command.name, parent=None)
    records = [r for r in (p.get_help_record(context) for p in command.params) if r]
    if not records:
        return []
    lines = [head]
    for names, meaning in records:
        lines += [".TP", f".B {escape(names)}", escape(meaning) or "\\&"]
    return lines


def _subcommand(command: Any, path: str) -> list[str]:
    lines = [f".SS {escape(path)}", *_synopsis(command, path), *_prose(inspect.cleandoc(command.help or ""))]
    lines += _options(command, ".PP")
    for name, child in _children(command):
        lines += _subcommand(child, f"{path} {name}")
    return lines


def main(folder: Path) -> int:
    """Write all pages to a folder; how many."""
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for name, text in pages():
        (folder / name).write_text(text, encoding="ascii", errors="replace")
        count += 1
    return count


if __name__ == "__main__":
    sys.stdout.write(f"{main(Path(sys.argv[1]))} pages\n")
