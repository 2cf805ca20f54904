"""Changes to the text of documents that leave everything else as it was written: comments, order, spacing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from sectool.errors import UsageError
from sectool.policy.model import DocumentKind, DocumentSet, Mode, NetworkPolicyDoc, PolicyDoc
from sectool.policy.netpolfields import MODE, is_network_policy
from sectool.policy.yamlpos import Node, Scalar, Source, Table, compose

Staged = PolicyDoc | NetworkPolicyDoc


def staged(documents: DocumentSet) -> list[Staged]:
    """Documents that are evaluated and not enforced."""
    found: tuple[Staged, ...] = (
        *documents.guardrails,
        *documents.policies,
        *documents.network_policies,
    )
    return [d for d in found if d.mode is Mode.STAGE]


def choose(documents: DocumentSet, names: Sequence[str]) -> list[Staged]:
    """Staged documents by `NAME` or `KIND/NAME`. Raises UsageError that lists what is staged."""
    waiting = staged(documents)
    out: list[Staged] = []
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


def promoted(documents: DocumentSet, chosen: Iterable[Staged]) -> str:
    """The text of a set with `mode: stage` of some documents made `mode: enforce`."""
    wanted = {(d.kind, d.name) for d in chosen}
    sources = tuple((name, _rewritten(name, text, wanted)) for name, text in documents.sources)
    return replace(documents, sources=sources).text


def _rewritten(name: str, text: str, wanted: set[tuple[DocumentKind, str]]) -> str:
    places: list[tuple[int, int]] = []
    for node in compose(Source(name, text)):
        if isinstance(node, Table):
            kind, called, mode = _of_pods(node) if is_network_policy(node) else _ours(node)
            if mode is not None and any(kind == k and called == n for k, n in wanted):
                places.append((mode.start, mode.end))
    for start, end in reversed(places):
        text = text[:start] + Mode.ENFORCE + text[end:]
    return text


def _ours(node: Table) -> tuple[str, str, Scalar | None]:
    return _word(node, "kind"), _word(node, "name"), _scalar(node, "mode")


def _of_pods(node: Table) -> tuple[str, str, Scalar | None]:
    """The same of a NetworkPolicy of Kubernetes, whose mode is an annotation."""
    metadata = _table(node, "metadata")
    space = _word(metadata, "namespace") or "default"
    return (
        DocumentKind.NETWORK_POLICY,
        f"{space}/{_word(metadata, 'name')}",
        _scalar(_table(metadata, "annotations"), MODE),
    )


def _at(node: Table | None, field: str) -> Node | None:
    return node.entries[field][1] if node is not None and field in node.entries else None


def _table(node: Table | None, field: str) -> Table | None:
    found = _at(node, field)
    return found if isinstance(found, Table) else None


def _scalar(node: Table | None, field: str) -> Scalar | None:
    found = _at(node, field)
    return found if isinstance(found, Scalar) else None


def _word(node: Table | None, field: str) -> str:
    found = _scalar(node, field)
    return found.value if found is not None else ""
