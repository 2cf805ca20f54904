"""Passphrases: asked at the terminal or read from a file descriptor, never from an argument or the environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from sectool.errors import UsageError

MAX_PASSPHRASE = 1024

PassphraseFd = Annotated[
    int | None,
    typer.Option(
        "--passphrase-fd", metavar="N", help="Read the root key's passphrase from this file descriptor."
    ),
]


def from_fd(fd: int) -> bytes:
    """The first line of a file descriptor."""
    data = b""
    try:
        while b"\n" not in data and len(data) <= MAX_PASSPHRASE:
            more = os.read(fd, 256)
            if not more:
                break
            data += more
    except OSError as error:
        raise UsageError(
            f"cannot read the passphrase from descriptor {fd}: {error.strerror}",
            "for example: --passphrase-fd 3 3<FILE",
        ) from None
    line = data.split(b"\n")[0]
    if not line or len(line) > MAX_PASSPHRASE:
        raise UsageError(
            f"descriptor {fd} gives no passphrase of 1 to {MAX_PASSPHRASE} bytes", "one line of text"
        )
    return line


def ask_once(fd: int | None) -> Callable[[], bytes]:
    """For a key that may be encrypted: the passphrase, should it be needed."""
    known: list[bytes] = []

    def ask() -> bytes:
        if not known:
            known.append(from_fd(fd) if fd is not None else _typed("passphrase of the root key: "))
        return known[0]

    return ask


def ask_new(fd: int | None) -> bytes:
    """For a new key: from the descriptor, or typed twice. UsageError when they differ or are too short."""
    if fd is not None:
        return from_fd(fd)
    first = _typed("new passphrase for the root key: ")
    if len(first) < 8:
        raise UsageError("a passphrase has at least 8 characters", "several words are better")
    if first != _typed("the same again: "):
        raise UsageError("the two are not the same", "try again")
    return first


def _typed(prompt: str) -> bytes:
    if not sys.stdin.isatty():
        raise UsageError(
            "the root key is encrypted, and nobody is here to type its passphrase", "use --passphrase-fd N"
        )
    from getpass import getpass

    return getpass(prompt).encode()
