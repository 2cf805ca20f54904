"""Words and signs of a sentence, with their places.

One word class covers label keys and values, addresses, services, dates and durations: what a word means is
decided by where it stands, so that the reader of an error sees one rule.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

from sectool.errors import DocumentError
from sectool.policy.yamlpos import Scalar, bad_character, closest

MAX_SENTENCE: Final = 4096  # characters
RESERVED: Final = frozenset(
    (
        "allow",
        "deny",
        "audit",
        "require",
        "encryption",
        "for",
        "to",
        "call",
        "on",
        "encrypted",
        "where",
        "and",
        "until",
        "because",
        "any",
        "in",
        "notin",
    )
)

_TOKEN = re.compile(
    r"""(?P<space>[\ \t\r\n]+)
      | (?P<word>[A-Za-z0-9._/@:+*-]+)
      | (?P<sign>==|!=|<=|>=|[=<>!,()])
      | (?P<string>"(?:[^"\\]|\\.)*")""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)


class Token(NamedTuple):
    """`kind` is word, sign, string (decoded) or end; `offset` counts characters of the sentence."""

    kind: str
    text: str
    offset: int
    spaced: bool  # white space stands before it

    def __str__(self) -> str:
        if self.kind == "end":
            return "the end"
        return quote(self.text) if self.kind == "string" else f"'{self.text}'"


def quote(text: str) -> str:
    """A text as a sentence spells it: in double quotes, with backslash before quotes and backslashes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


class Reader:
    """Walks the tokens of `scalar.value[start:end]` and makes errors that point at them."""

    def __init__(self, scalar: Scalar, start: int = 0, end: int | None = None) -> None:
        self.scalar = scalar
        text = scalar.value
        self.end = len(text) if end is None else end
        if self.end - start > MAX_SENTENCE:
            raise scalar.fail(
                f"{self.end - start} characters; a sentence has at most {MAX_SENTENCE}",
                "make two rules of it",
            )
        bad = bad_character(text[start : self.end], "\t\r\n")
        if bad >= 0:
            raise scalar.fail(
                f"character U+{ord(text[start + bad]):04X} may not stand in a sentence",
                "remove it; control and invisible characters are refused",
                start + bad,
            )
        self._tokens = self._split(text, start)
        self._next = 0

    def _split(self, text: str, at: int) -> list[Token]:
        out: list[Token] = []
        spaced = False
        while at < self.end:
            found = _TOKEN.match(text, at, self.end)
            if not found:
                if text[at] == '"':
                    raise self.scalar.fail(
                        "this quote is never closed",
                        'end the text with "; YAML takes " #" for the start of a comment, so a rule with '
                        "one in it must be put in single quotes as a whole",
                        at,
                    )
                raise self.scalar.fail(f"{text[at]!r} cannot stand here", self._sign_hint(text[at]), at)
            kind = found.lastgroup or ""
            if kind == "space":
                spaced = True
            else:
                word = self._unquote(found) if kind == "string" else found.group()
                out.append(Token(kind, word, at, spaced))
                spaced = False
            at = found.end()
        out.append(Token("end", "", self.end, spaced))
        return out

    @staticmethod
    def _sign_hint(char: str) -> str:
        if not char.isascii():
            return "labels, names and services are written in ASCII; host names in their xn-- form"
        return {
            "'": 'texts are quoted with "',
            ";": "one rule is one sentence",
            "~": "there is no regular expression; use key=prefix*",
        }.get(char, "remove it, or put the text into quotation marks")

    def _unquote(self, found: re.Match[str]) -> str:
        body = found.group()[1:-1]
        for escape in _ESCAPE.finditer(body):
            if escape.group(1) not in '"\\':
                raise self.scalar.fail(
                    f"\\{escape.group(1)} is not an escape",
                    'only \\" and \\\\ are',
                    found.start() + 1 + escape.start(),
                )
        if "\n" in body or "\t" in body or "\r" in body:
            raise self.scalar.fail(
                "a quoted text may not span lines or contain tabs",
                "put it on one line, with spaces",
                found.start(),
            )
        return _ESCAPE.sub(r"\1", body)

    @property
    def token(self) -> Token:
        """The token that is read next."""
        return self._tokens[self._next]

    @property
    def following(self) -> Token:
        return self._tokens[min(self._next + 1, len(self._tokens) - 1)]

    def take(self) -> Token:
        token = self._tokens[self._next]
        if token.kind != "end":
            self._next += 1
        return token

    def accept(self, text: str) -> bool:
        """Take the next token if it is this word or sign."""
        token = self._tokens[self._next]
        if token.text == text and token.kind != "string":
            self._next += 1
            return token.kind != "end"
        return False

    def expect(self, text: str, after: str) -> Token:
        token = self.token
        if not self.accept(text):
            raise self.unexpected(f"'{text}' {after}", [text])
        return token

    def unexpected(self, expected: str, words: Sequence[str] = (), hint: str = "") -> DocumentError:
        """The error for the next token: what stands there and what was expected instead."""
        token = self.token
        if not hint and token.kind == "word" and words:
            hint = closest(token.text, words)
        return self.fail(token, f"expected {expected}, found {token}", hint or f"put {expected} here")

    def fail(self, token: Token, message: str, hint: str, inside: int = 0) -> DocumentError:
        return self.scalar.fail(message, hint, token.offset + inside)
