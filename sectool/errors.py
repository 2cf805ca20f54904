"""The one error family a user ever meets.

Each error says what happened (`message`), optionally what to do next (`hint`), and carries the exit
code of the command that fails with it. Anything else that reaches the top is a defect of ours.
"""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of every `sectool` command (documented in docs/reference.md)."""

    OK = 0
    DENIED = 1  # denied, different, or a failed check
    USAGE = 2
    NO_DAEMON = 3
    PARTIAL = 4


class SectoolError(Exception):
    """Base of all expected failures; `exit_code` is what the CLI exits with."""

    exit_code: Exit = Exit.DENIED

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(SectoolError):
    """The caller asked for something that makes no sense: a bad flag, filter, time or file name."""

    exit_code = Exit.USAGE


class DocumentError(UsageError):
    """A policy document that cannot be taken. `where` is `file:line:column` (1-based)."""

    def __init__(self, where: str, message: str, hint: str, excerpt: str = "") -> None:
        super().__init__(f"{where}: {message}", hint)
        self.where = where
        self.excerpt = excerpt  # the offending line with a caret line below it, or ""


class NoDaemonError(SectoolError):
    """No daemon answers where one is needed."""

    exit_code = Exit.NO_DAEMON


class PrivilegeError(SectoolError):
    """The caller lacks a privilege; the hint names it and what works without it."""

    exit_code = Exit.USAGE


class CredentialError(SectoolError):
    """A certificate, delegation or credential blob is refused; `reason` names why."""

    def __init__(self, reason: int, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.reason = reason  # a sectool.events.DropReason


class StoreError(SectoolError):
    """The event store or control history cannot be read or written as asked."""

    exit_code = Exit.PARTIAL
