"""Where a label comes from, and whose word counts when two sources give the same key.

    weakest   context    found out about the host: cloud metadata, operating system, vulnerability reports
              host       given to the host at its enrolment
              operator   a Workload document's, or those of `sectool run`
    strongest attested   what the kernel, or the container runtime under an id that the kernel attests, says

A stronger source wins, unless the key is reserved (RESERVED): then only its owner's word counts, whatever others
claim. Documents, `sectool run` and enrolment refuse reserved keys where they are written (`reserved_by`); `merge` is
the second line, and tells what it left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Final

from sectool.labels import DOMAIN_LABEL, FEDERATED_LABEL, LabelSet


class Origin(StrEnum):
    """Who says so, from weak to strong."""

    CONTEXT = "context"
    HOST = "host"
    OPERATOR = "operator"
    ATTESTED = "attested"


_STRENGTH: Final = {origin: strength for strength, origin in enumerate(Origin)}

# Keys, and prefixes ending in `.`, that one origin alone gives.
RESERVED: Final[Mapping[str, Origin]] = MappingProxyType(
    {
        DOMAIN_LABEL: Origin.ATTESTED,  # set by whoever verifies
        FEDERATED_LABEL: Origin.ATTESTED,
        "exe": Origin.ATTESTED,
        "user": Origin.ATTESTED,
        "unit": Origin.ATTESTED,
        "container": Origin.ATTESTED,
        "container.": Origin.ATTESTED,
        "image": Origin.ATTESTED,
        "k8s.": Origin.ATTESTED,
        "vuln": Origin.CONTEXT,
        "vuln-age": Origin.CONTEXT,
    }
)


@dataclass(frozen=True, slots=True)
class Source:
    """Labels of one origin; `name` says where exactly, for people (`Workload web`, `host enrolment`)."""

    origin: Origin
    labels: Mapping[str, str]
    name: str = ""


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A label that did not count: `by` is the origin whose word stands instead, or that owns the key."""

    key: str
    value: str
    origin: Origin
    name: str
    by: Origin


@dataclass(frozen=True, slots=True)
class Merged:
    """The labels, for each key where it comes from, and what was left out because another's word counts more."""

    labels: LabelSet
    origins: Mapping[str, Origin]
    left_out: tuple[LeftOut, ...] = ()


def reserved_by(key: str) -> Origin | None:
    """The only origin that may give `key`; None when anybody may."""
    owner = RESERVED.get(key)
    if owner is None and "." in key:
        owner = RESERVED.get(key[: key.index(".") + 1])
    return owner


def refusal(key: str, origin: Origin) -> str:
    """Why `origin` may not give `key`, as a sentence; '' when it may."""
    owner = reserved_by(key)
    if owner is None or owner is origin:
        return ""
    if key == DOMAIN_LABEL:
        return f"the label {key} is set by the trust domain"
    if owner is Origin.ATTESTED:
        return f"the label {key} is attested of each workload, nobody can claim it"
    return f"the label {key} is {owner}: it is found out, nobody can claim it"


def merge(sources: Iterable[Source]) -> Merged:
    """All labels of `sources`; of two of one origin the later wins. Raises LabelError outside alphabet or limits."""
    winners: dict[str, tuple[str, Source]] = {}
    left_out: list[LeftOut] = []

    def leave_out(key: str, value: str, source: Source, by: Origin) -> None:
        left_out.append(LeftOut(key, value, source.origin, source.name, by))

    for source in sorted(sources, key=lambda s: _STRENGTH[s.origin]):
        for key, value in source.labels.items():
            owner = reserved_by(key)
            if owner is not None and owner is not source.origin:
                leave_out(key, value, source, owner)
                continue
            before = winners.get(key)
            if before is not None and before[0] != value:
                leave_out(key, before[0], before[1], source.origin)
            winners[key] = value, source
    labels = LabelSet({key: value for key, (value, _) in winners.items()})
    return Merged(labels, {key: winners[key][1].origin for key in labels}, tuple(left_out))
