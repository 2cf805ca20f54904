"""YAML to nodes that know their place.

PyYAML's event stream (libyaml when it is there) is composed here rather than by PyYAML's own composer: an
event carries its exact place, nothing is ever constructed or resolved, and the bounds below hold while
reading, before memory is spent. Every scalar stays the text that was written: `1.10`, `off` and `no` are
words, not a number and two booleans. Anchors, aliases, tags and directives have no use in a policy and are
refused, and so is a key given twice (PyYAML alone would let the later one win in silence).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import yaml

from sectool.errors import DocumentError

MAX_TEXT: Final = 8 * 1024 * 1024  # characters of one source
MAX_DEPTH: Final = 12  # values of a NetworkPolicy's expressions are at 11
MAX_NODES: Final = 500_000  # of one source

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# What may stand in a file: printable text, tab and line ends. The rest could steer a terminal or hide text.
_UNWANTED = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]|\r(?!\n)")
_REFUSED_CATEGORIES: Final = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_EXCERPT: Final = 100
# Escapes of double-quoted YAML whose meaning is not the letter itself (YAML 1.1, 5.6; white space apart).
_ESCAPES: Final = {"0": "\0", "a": "\a", "b": "\b", "e": "\x1b", "_": "\xa0"}


def bad_character(text: str, allowed: str = "") -> int:
    """Offset of the first character that may not stand in a text field, or -1.

    Refused are control and format characters (terminal sequences, direction overrides, invisible joiners).
    """
    if text.isascii() and text.isprintable():
        return -1
    for offset, char in enumerate(text):
        if char not in allowed and unicodedata.category(char) in _REFUSED_CATEGORIES:
            return offset
    return -1


def clean(text: str) -> str:
    """A text that is safe to print on one line: what may not stand in a text field becomes U+FFFD."""
    if bad_character(text) < 0:
        return text
    return "".join(c if bad_character(c) < 0 else "\N{REPLACEMENT CHARACTER}" for c in text)


def closest(word: str, known: Sequence[str]) -> str:
    """'did you mean …?' for a word that is nearly one of `known`, or an empty string."""
    import difflib

    found = difflib.get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)
    if not found:
        by_lower = {k.lower(): k for k in known}
        found = [
            by_lower[m] for m in difflib.get_close_matches(word.lower(), list(by_lower), n=1, cutoff=0.6)
        ]
    return f"did you mean {found[0]!r}?" if found else ""


class Source:
    """One file's text and name; makes errors that point into it."""

    def __init__(self, name: str, text: str) -> None:
        self.name = clean(name)
        self.text = text

    @cached_property
    def lines(self) -> list[str]:
        return re.split(r"\r\n|\n", self.text)

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *(m.end() for m in re.finditer(r"\n", self.text))]

    def place(self, offset: int) -> tuple[int, int]:
        """1-based line and column of a character offset."""
        from bisect import bisect_right

        line = bisect_right(self._starts, offset)
        return line, offset - self._starts[line - 1] + 1

    def where(self, line: int, column: int) -> str:
        return f"{self.name}:{line}:{column}"

    def error(self, line: int, column: int, message: str, hint: str) -> DocumentError:
        """A DocumentError at a 1-based line and column, with the line and a caret under the column."""
        return DocumentError(self.where(line, column), message, hint, self._excerpt(line, column))

    def _excerpt(self, line: int, column: int) -> str:
        if not 1 <= line <= len(self.lines):
            return ""
        text = self.lines[line - 1]
        first = max(0, column - 1 - _EXCERPT // 2) if len(text) > _EXCERPT else 0
        shown = text[first : first + _EXCERPT]
        return f"{clean(shown.replace(chr(9), ' '))}\n{' ' * (column - 1 - first)}^"


@dataclass(frozen=True, slots=True, eq=False)
class Scalar:
    """A word or sentence. `value` is its text; `start` and `end` are character offsets into the source."""

    source: Source
    value: str
    start: int
    end: int
    line: int
    column: int
    style: str = ""  # "" plain, ' or " quoted, | or > block

    @classmethod
    def whole(cls, text: str, name: str) -> Scalar:
        """A text that stands for itself, outside any YAML."""
        return cls(Source(name, text), text, 0, len(text), 1, 1)

    @property
    def is_null(self) -> bool:
        return self.style == "" and self.value in ("", "~", "null", "Null", "NULL")

    @property
    def where(self) -> str:
        return self.source.where(self.line, self.column)

    def fail(self, message: str, hint: str, offset: int = 0) -> DocumentError:
        """An error at `offset` characters into the value, mapped back through quoting and folding."""
        line, column = self.source.place(self._raw_offset(offset)) if offset else (self.line, self.column)
        return self.source.error(line, column, message, hint)

    def _raw_offset(self, offset: int) -> int:
        """Where the value's character `offset` stands in the source text.

        Walks value and raw text side by side. White space is matched loosely, because folding changes it and
        no error ever points at it.
        """
        raw = self.source.text
        at = self.start
        if self.style in ("'", '"'):
            at += 1
        elif self.style in ("|", ">"):
            at = raw.find("\n", at, self.end) + 1 or at
        for position, char in enumerate(self.value):
            if char.isspace():
                if position == offset:
                    break
                continue
            at, width = self._align(raw, at, char)
            if position == offset:
                break
            at += width
        return min(at, self.end)

    def _align(self, raw: str, at: int, char: str) -> tuple[int, int]:
        """Offset of the raw spelling of `char` at or after `at`, and the spelling's width."""
        while at < self.end:
            here = raw[at]
            if self.style == '"' and here == "\\":
                code = raw[at + 1 : at + 2]
                width = {"x": 4, "u": 6, "U": 10}.get(code, 2)
                meant = chr(int(raw[at + 2 : at + width], 16)) if width > 2 else _ESCAPES.get(code, code)
                if meant == char:
                    return at, width
                at += width
            elif here.isspace():
                at += 1
            else:
                return at, 2 if self.style == "'" and here == "'" else 1
        return at, 0


@dataclass(frozen=True, slots=True, eq=False)
class Items:
    """A YAML sequence."""

    source: Source
    items: tuple[Node, ...]
    line: int
    column: int

    def fail(self, message: str, hint: str) -> DocumentError:
        return self.source.error(self.line, self.column, message, hint)


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """A YAML mapping; keys are words and unique."""

    source: Source
    entries: dict[str, tuple[Scalar, Node]]
    line: int
    column: int

    @property
    def where(self) -> str:
        return self.source.where(self.line, self.column)

    def fail(self, message: str, hint: str) -> DocumentError:
        return self.source.error(self.line, self.column, message, hint)


Node = Scalar | Items | Table


def compose(source: Source) -> Iterator[Node]:
    """The root node of each document in a source; empty documents are left out. Raises DocumentError."""
    if len(source.text) > MAX_TEXT:
        raise DocumentError(
            source.where(1, 1),
            f"{len(source.text)} characters; at most {MAX_TEXT} are read from one file",
            "split the policy into several files",
        )
    bad = _UNWANTED.search(source.text)
    if bad:
        raise source.error(
            *source.place(bad.start()),
            f"character U+{ord(bad.group()):04X} may not stand in a policy file",
            "remove it; only printable text, tabs and line ends are allowed",
        )
    composer = _Composer(source)
    try:
        yield from composer.documents()
    except yaml.MarkedYAMLError as error:
        raise _yaml_error(source, error) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = " ".join(str(error).split())
        raise source.error(1, 1, f"not readable as YAML: {problem}", "is it a YAML file at all?") from None


def _yaml_error(source: Source, error: yaml.MarkedYAMLError) -> DocumentError:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
    problem = error.problem or error.context or "unreadable"
    hint = "look for a missing quote, bracket or colon, and at the indentation"
    if "mapping values" in problem:
        hint = "a text with ': ' in it must be quoted as a whole, e.g. - 'allow … because \"a: b\"'"
    elif "cannot start any token" in problem:
        hint = "a text that starts with this character, or a tab used to indent, must be quoted or replaced"
    return source.error(line, column, f"not readable as YAML: {problem}", hint)


class _Composer:
    def __init__(self, source: Source) -> None:
        self.source = source
        self.nodes = 0
        self.events: Iterator[Any] = iter(yaml.parse(source.text, Loader=_LOADER))

    def documents(self) -> Iterator[Node]:
        for event in self.events:
            if isinstance(event, yaml.DocumentStartEvent):
                if event.version or event.tags:
                    raise self.error(
                        event, "YAML directives are not used in policy files", "remove the line with %"
                    )
                node = self.node(next(self.events), 1)
                if not (isinstance(node, Scalar) and node.is_null):
                    yield node

    def error(self, event: Any, message: str, hint: str) -> DocumentError:
        mark = event.start_mark
        return self.source.error(mark.line + 1, mark.column + 1, message, hint)

    def node(self, event: Any, depth: int) -> Node:
        self.nodes += 1
        if self.nodes > MAX_NODES:
            raise self.error(
                event, f"more than {MAX_NODES} values in one file", "split the policy into several files"
            )
        if isinstance(event, yaml.AliasEvent):
            raise self.error(event, f"alias *{event.anchor} is not allowed", "write the value out")
        if event.anchor is not None:
            raise self.error(
                event, f"anchor &{event.anchor} is not allowed", "write the value out where it is needed"
            )
        if event.tag is not None and event.tag != "!":
            raise self.error(
                event, f"tag {event.tag} is not allowed", "remove the tag; quote the text if it is one"
            )
        start: Any = event.start_mark
        end: Any = event.end_mark
        line, column = start.line + 1, start.column + 1
        if isinstance(event, yaml.ScalarEvent):
            return Scalar(
                self.source,
                event.value,
                start.index,
                end.index,
                line,
                column,
                event.style or "",
            )
        if depth > MAX_DEPTH:
            raise self.error(
                event, f"nested more than {MAX_DEPTH} levels deep", "no document needs that many"
            )
        if isinstance(event, yaml.SequenceStartEvent):
            return Items(self.source, tuple(self.items(depth)), line, column)
        return Table(self.source, self.entries(depth), line, column)

    def items(self, depth: int) -> Iterator[Node]:
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            yield self.node(event, depth + 1)

    def entries(self, depth: int) -> dict[str, tuple[Scalar, Node]]:
        out: dict[str, tuple[Scalar, Node]] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.node(event, depth + 1)
            if not isinstance(key, Scalar):
                raise key.fail("a list or mapping cannot be a key", "keys are plain words")
            if key.value in out:
                first = out[key.value][0]
                raise key.fail(
                    f"{key.value!r} is given twice", f"the first is on line {first.line}; keep one of them"
                )
            out[key.value] = (key, self.node(next(self.events), depth + 1))
        return out
