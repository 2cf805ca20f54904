"""Questions about the past that need events and control history together, each by its name.

The store process answers them on events.sock (`ask`, with the question's name and fields), a reader without a store
asks the same functions itself. Answers are plain JSON documents; times are UTC microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from sectool.errors import StoreError, UsageError
from sectool.events import now_us
from sectool.filters import Filter
from store.catalog import Catalog
from store.changes import DEFAULT_PAIRS, changes
from store.connectivity import connectivity
from store.investigation import investigate
from store.state import state
from store.timeline import AROUND, DEFAULT_ENTRIES, timeline

Fields = Mapping[str, Any]
Question = Callable[[Catalog, Fields], dict[str, Any]]
MAX_TEXTS = 100


def answer(catalog: Catalog, name: object, fields: Fields) -> dict[str, Any]:
    """The answer to question `name`. Raises UsageError for unknown names and unsound fields."""
    question = QUESTIONS.get(name) if isinstance(name, str) else None
    if question is None:
        raise UsageError(f"the store knows no question {name!r}", "client and store may differ in version")
    return question(catalog, fields)


def encode(document: dict[str, Any]) -> bytes:
    """A document as it travels."""
    return json.dumps(document, separators=(",", ":"), default=str).encode()


def decode(payload: bytes) -> dict[str, Any]:
    """What `encode` made. Raises StoreError for anything else."""
    try:
        document = json.loads(payload)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise StoreError("the store's answer is no document", "client and store may differ in version")
    return document


def number(fields: Fields, name: str, default: int | None = None) -> int | None:
    """A whole number from 0 up, or what stands for none."""
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise UsageError(f"{name} has to be a whole number from 0 up")
    return value


def given(fields: Fields, name: str, default: int) -> int:
    """A whole number from 0 up."""
    value = number(fields, name, default)
    return default if value is None else value


def text(fields: Fields, name: str) -> str:
    """A text, or nothing."""
    value = fields.get(name, "")
    if not isinstance(value, str):
        raise UsageError(f"{name} has to be text")
    return value


def texts(fields: Fields, name: str) -> list[str]:
    """A list of texts."""
    value = fields.get(name) or []
    if not isinstance(value, list) or len(value) > MAX_TEXTS or not all(isinstance(v, str) for v in value):
        raise UsageError(f"{name} has to be a list of texts")
    return value


def _timeline(catalog: Catalog, fields: Fields) -> dict[str, Any]:
    return timeline(
        catalog,
        since=number(fields, "since"),
        until=number(fields, "until"),
        at=number(fields, "at"),
        around=given(fields, "around", AROUND),
        about=text(fields, "about"),
        kinds=texts(fields, "kinds"),
        limit=given(fields, "limit", DEFAULT_ENTRIES),
    ).document()


def _changes(catalog: Catalog, fields: Fields) -> dict[str, Any]:
    return changes(
        catalog,
        before=given(fields, "before", 0),
        after=given(fields, "after", 0),
        window=number(fields, "window"),
        filter_=Filter.from_json(fields.get("filter")),
        limit=given(fields, "limit", DEFAULT_PAIRS),
    )


def _connectivity(catalog: Catalog, fields: Fields) -> dict[str, Any]:
    return connectivity(
        catalog,
        by=texts(fields, "by"),
        since=number(fields, "since"),
        until=number(fields, "until"),
        at=number(fields, "at"),
        filter_=Filter.from_json(fields.get("filter")),
    )


def _state(catalog: Catalog, fields: Fields) -> dict[str, Any]:
    return state(catalog, given(fields, "at", now_us()))


def _investigate(catalog: Catalog, fields: Fields) -> dict[str, Any]:
    return investigate(
        catalog, text(fields, "about"), since=number(fields, "since"), until=number(fields, "until")
    )


QUESTIONS: dict[str, Question] = {
    "investigate": _investigate,
    "state": _state,
    "timeline": _timeline,
    "changes": _changes,
    "connectivity": _connectivity,
}
