"""Files and texts to a set of documents: reading, splitting, and what only shows across documents."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from sectool.errors import DocumentError, UsageError
from sectool.policy.collector import held
from sectool.policy.fields import Fields
from sectool.policy.model import (
    FILE_LINE,
    UNNAMED,
    Document,
    DocumentKind,
    DocumentSet,
    NetworkDoc,
    NetworkPolicyDoc,
    PolicyDoc,
    TestDoc,
    WorkloadDoc,
)
from sectool.policy.netpolfields import NetworkPolicyFields, is_network_policy
from sectool.policy.yamlpos import MAX_TEXT, Scalar, Source, clean, closest, compose

MAX_FILES: Final = 4096
MAX_TOTAL: Final = 4 * MAX_TEXT  # characters of one set


def load(paths: Sequence[Path]) -> DocumentSet:
    """Read files, and the *.yaml and *.yml files of folders, as one set.

    Raises UsageError for a path that cannot be read and DocumentError for what stands in it.
    """
    files: list[Path] = []
    for path in paths:
        files.extend(f for f in _files(Path(path)) if f not in files)
    if len(files) > MAX_FILES:
        raise UsageError(
            f"{len(files)} policy files; at most {MAX_FILES} are read", "put several documents into one file"
        )
    return _assemble([Source(str(file), _read(file)) for file in files])


def parse(text: str, source: str = UNNAMED) -> DocumentSet:
    """Read a text: one file's, or the `text` of a DocumentSet, whose file names then show in errors."""
    return _assemble(_split(text, source))


def join(sets: Iterable[DocumentSet]) -> DocumentSet:
    """Several sets as one. Raises DocumentError for a name that two of them define."""
    sets = list(sets)
    documents = [document for one in sets for document in one.documents()]
    _refuse_duplicates(documents)
    return _build(documents, tuple(source for one in sets for source in one.sources))


def _files(path: Path) -> list[Path]:
    try:
        if path.is_dir():
            found = sorted(f for f in path.iterdir() if f.suffix in (".yaml", ".yml") and f.is_file())
            if not found:
                raise UsageError(
                    f"no policy file in folder {clean(str(path))}", "policy files end in .yaml or .yml"
                )
            return found
        if not path.exists():
            raise UsageError(
                f"no such file: {clean(str(path))}", "give policy files or folders that hold them"
            )
    except (OSError, ValueError) as error:
        raise UsageError(
            f"cannot read {clean(str(path))}: {_cause(error)}", "check the path and its permissions"
        ) from None
    return [path]


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(4 * MAX_TEXT + 1)
    except OSError as error:
        raise UsageError(
            f"cannot read {clean(str(path))}: {_cause(error)}", "check the path and its permissions"
        ) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{clean(str(path))}:{line}: byte 0x{data[error.start]:02x} is not UTF-8",
            "save the file in UTF-8 encoding",
        ) from None


def _cause(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _split(text: str, name: str) -> list[Source]:
    """The files a DocumentSet's text was made of; a text without file lines is one file."""
    if not text.startswith(FILE_LINE):
        return [Source(name, text)]
    out: list[tuple[str, list[str]]] = []
    for line in text.splitlines(keepends=True) if text.isascii() else re.findall(r"[^\n]*\n|[^\n]+", text):
        if line.startswith(FILE_LINE):
            try:
                file = json.loads(line[len(FILE_LINE) :])
            except ValueError:
                file = None
            if isinstance(file, str):
                out.append((file, []))
                continue
        if not out:
            return [Source(name, text)]
        out[-1][1].append(line)
    return [Source(file, "".join(lines)) for file, lines in out]


@held()
def _assemble(sources: list[Source]) -> DocumentSet:
    total = sum(len(source.text) for source in sources)
    if total > MAX_TOTAL:
        raise UsageError(
            f"{total} characters of policy; at most {MAX_TOTAL} are read", "apply fewer documents"
        )
    documents: list[Document] = []
    places: dict[int, Scalar] = {}
    references: list[tuple[str, Scalar]] = []
    for source in sources:
        for node in compose(source):
            reader: Fields | NetworkPolicyFields
            reader = NetworkPolicyFields(node) if is_network_policy(node) else Fields(node)
            document = reader.document()
            places[id(document)] = reader.name_node
            references.extend(reader.references)
            documents.append(document)
    _refuse_duplicates(documents, places)
    specs = {d.name: d.spec for d in documents if isinstance(d, NetworkDoc)}
    for wanted, node in references:
        if wanted not in specs:
            found = re.search(rf"net:{re.escape(wanted)}(?![A-Za-z0-9._-])", node.value)
            raise node.fail(
                f"there is no Network named {wanted!r}",
                closest(wanted, list(specs)) or "define it in a document of kind Network, or write net:CIDR",
                found.start() + 4 if found else 0,
            )
    return _build(documents, tuple((s.name, _whole_lines(s.text)) for s in sources))


def _whole_lines(text: str) -> str:
    return text + "\n" if text and not text.endswith("\n") else text


def _build(documents: list[Document], sources: tuple[tuple[str, str], ...]) -> DocumentSet:
    ordered = sorted(documents, key=lambda d: d.name)
    policies = [d for d in ordered if isinstance(d, PolicyDoc)]
    return DocumentSet(
        tuple(d for d in policies if d.kind is DocumentKind.POLICY),
        tuple(d for d in policies if d.kind is DocumentKind.GUARDRAIL),
        tuple(d for d in ordered if isinstance(d, NetworkDoc)),
        tuple(d for d in ordered if isinstance(d, WorkloadDoc)),
        tuple(d for d in ordered if isinstance(d, TestDoc)),
        sources,
        tuple(d for d in ordered if isinstance(d, NetworkPolicyDoc)),
    )


def _refuse_duplicates(documents: list[Document], places: dict[int, Scalar] | None = None) -> None:
    seen: dict[tuple[DocumentKind, str], Document] = {}
    for document in documents:
        key = (document.kind, document.name)
        if key in seen:
            message = f"a {document.kind} named {document.name!r} exists already"
            hint = f"the other one is at {seen[key].where}; names are unique per kind"
            node = (places or {}).get(id(document))
            raise node.fail(message, hint) if node else DocumentError(document.where, message, hint)
        seen[key] = document
