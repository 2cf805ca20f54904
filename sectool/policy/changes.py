"""What differs between two document sets, in words of the language."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from sectool.policy.model import Document, DocumentKind, DocumentSet, canonical_document


class Verb(StrEnum):
    """What happened to a document or to a part of it."""

    ADDED = "added"
    REMOVED = "removed"
    CHANGED = "changed"


@dataclass(frozen=True, slots=True)
class Change:
    """One difference. `field` is "" for a whole document; `old`, `new`: canonical text, "" if none."""

    verb: Verb
    kind: DocumentKind
    name: str
    field: str = ""
    old: str = ""
    new: str = ""
    owner: str = ""

    def lines(self) -> list[str]:
        """A heading, and what went (-) and came (+)."""
        what = f"{self.kind} {self.name}" + (f" (owner {self.owner})" if self.owner else "")
        if not self.field:
            mark = "+" if self.verb is Verb.ADDED else "-"
            return [f"{mark} {what}", *(f"{mark}   {line}" for line in (self.new or self.old).splitlines())]
        out = [f"  {what}: {self.field} {self.verb}"]
        out += [f"-   {line}" for line in self.old.splitlines()]
        out += [f"+   {line}" for line in self.new.splitlines()]
        return out


def diff(old: DocumentSet, new: DocumentSet) -> list[Change]:
    """All differences in meaning, by kind and name; empty exactly when the hashes are equal."""
    before = {(d.kind, d.name): d for d in old.documents()}
    after = {(d.kind, d.name): d for d in new.documents()}
    order = list(DocumentKind)
    out: list[Change] = []
    for key in sorted(before.keys() | after.keys(), key=lambda k: (order.index(k[0]), k[1])):
        a, b = before.get(key), after.get(key)
        if a is None and b is not None:
            out.append(Change(Verb.ADDED, *key, new=_whole(b), owner=b.owner))
        elif b is None and a is not None:
            out.append(Change(Verb.REMOVED, *key, old=_whole(a), owner=a.owner))
        elif a is not None and b is not None:
            out.extend(_fields(a, b))
    return out


def _fields(a: Document, b: Document) -> Iterator[Change]:
    old, new = canonical_document(a), canonical_document(b)
    for field in dict.fromkeys((*old, *new)):
        was, now = old.get(field), new.get(field)
        if was == now:
            continue
        before, after = _entries(was), _entries(now)
        gone = [e for e in before if e not in after]
        come = [e for e in after if e not in before]
        if not gone and not come:
            yield Change(
                Verb.CHANGED,
                b.kind,
                b.name,
                f"order of {field}",
                "\n".join(before),
                "\n".join(after),
                b.owner,
            )
            continue
        verb = Verb.CHANGED if gone and come else Verb.ADDED if come else Verb.REMOVED
        yield Change(verb, b.kind, b.name, field, "\n".join(gone), "\n".join(come), b.owner)


def _entries(value: object) -> list[str]:
    if value is None:
        return []
    if isinstance(value, dict):
        return [f"{key}={entry}" for key, entry in sorted(value.items())]
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [str(entry) for entry in value]
    return [str(value)]


def _whole(document: Document) -> str:
    out: list[str] = []
    for field, value in canonical_document(document).items():
        if field in ("kind", "name", "owner"):
            continue
        entries = _entries(value)
        if isinstance(value, str) and len(value.splitlines()) == 1:
            out.append(f"{field}: {value}")
        elif entries:
            out.append(f"{field}:")
            out += [f"  {line}" for entry in entries for line in entry.splitlines()]
    return "\n".join(out)
