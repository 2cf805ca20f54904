"""How a failure looks: `error: …`, `hint: …` on stderr, the right exit code, and never a traceback."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
import traceback

from sectool.cli.text import escape, escape_block
from sectool.errors import DocumentError, Exit, PrivilegeError, SectoolError, StoreError

INTERRUPTED = 130


def report(error: SectoolError) -> int:
    """Tell about an expected failure; returns its exit code."""
    _line("error", error.message)
    if isinstance(error, DocumentError) and error.excerpt:
        sys.stderr.write(escape_block(error.excerpt) + "\n")
    if error.hint:
        _line("hint", error.hint)
    return int(error.exit_code)


def usage(message: str, command: str) -> int:
    """Tell about a command line that makes no sense."""
    _line("error", message.rstrip("."))
    _line("hint", f"see {command} --help")
    return int(Exit.USAGE)


def from_os(error: OSError) -> SectoolError:
    """An operating system's refusal in our words."""
    name = f"{error.filename}: " if error.filename else ""
    text = f"{name}{error.strerror or error}"
    match error.errno:
        case errno.EACCES | errno.EPERM:
            hint = "" if os.geteuid() == 0 else "run it with sudo, or as a user who may read that path"
            return PrivilegeError(text, hint)
        case errno.ENOSPC | errno.EDQUOT:
            return StoreError(
                text, "free some space there and run the command again; nothing was changed half-way"
            )
        case _:
            return SectoolError(text)


def defect(error: BaseException) -> int:
    """Tell about an error nobody expected: one line, the trace in a file (or shown, with SECTOOL_DEBUG=1)."""
    trace = "".join(traceback.format_exception(error))
    _line("error", f"a defect in sectool: {type(error).__name__}: {error}")
    if os.environ.get("SECTOOL_DEBUG") == "1":
        sys.stderr.write(trace)
        return int(Exit.DENIED)
    try:
        fd, path = tempfile.mkstemp(prefix="sectool-trace-", suffix=".txt")  # 0600
        with os.fdopen(fd, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(trace)
        _line("hint", f"please report it together with {path}")
    except OSError:
        _line("hint", "run it again with SECTOOL_DEBUG=1 to see where")
    return int(Exit.DENIED)


def _line(word: str, text: str) -> None:
    first, *rest = text.split("\n")
    sys.stderr.write(f"{word}: {escape(first)}\n" + "".join(f"  {escape(line)}\n" for line in rest))
