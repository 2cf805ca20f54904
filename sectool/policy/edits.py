"""Changes to the text of documents that leave everything else as it was written: comments, order, spacing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from sectool.errors import UsageError
from sectool.policy.model import DocumentKind, DocumentSet, Mode, PolicyDoc
from sectool.policy.yamlpos import Scalar, Source, Table, compose


def staged(documents: DocumentSet) -> list[PolicyDoc]:
    """Documents that are evaluated and not enforced."""
    return [d for d in (*documents.guardrails, *documents.policies) if d.mode is Mode.STAGE]


def choose(documents: DocumentSet, names: Sequence[str]) -> list[PolicyDoc]:
    """Staged documents by `NAME` or `KIND/NAME`. Raises UsageError that lists what is staged."""
    waiting = staged(documents)
    out: list[PolicyDoc] = []
    for name in names:
        found = [d for d in waiting if name in (d.name, f"{d.kind}/{d.name}")]
        if len(found) > 1:
            raise UsageError(
                f"{name!r} is staged as {' and as '.join(d.kind for d in found)}",
                f"say which: {' or '.join(f'{d.kind}/{d.name}' for d in found)}",
            )
        if not found:
            there = ", ".join(f"{d.kind}/{d.name}" for d in waiting) or "nothing"
            raise UsageError(f"no staged document is named {name!r}", f"staged is: {there}")
        out += [d for d in found if d not in out]
    return out


def promoted(documents: DocumentSet, chosen: Iterable[PolicyDoc]) -> str:
    """The text of a set with `mode: stage` of some documents made `mode: enforce`."""
    wanted = {(d.kind, d.name) for d in chosen}
    sources = tuple((name, _rewritten(name, text, wanted)) for name, text in documents.sources)
    return replace(documents, sources=sources).text


def _rewritten(name: str, text: str, wanted: set[tuple[DocumentKind, str]]) -> str:
    places: list[tuple[int, int]] = []
    for node in compose(Source(name, text)):
        if not isinstance(node, Table):
            continue
        fields = {key: value for key, (_, value) in node.entries.items() if isinstance(value, Scalar)}
        kind, called, mode = fields.get("kind"), fields.get("name"), fields.get("mode")
        if kind is None or called is None or mode is None:
            continue
        if any(kind.value == k and called.value == n for k, n in wanted):
            places.append((mode.start, mode.end))
    for start, end in reversed(places):
        text = text[:start] + Mode.ENFORCE + text[end:]
    return text
