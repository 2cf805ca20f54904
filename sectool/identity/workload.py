"""Which workload a process is: from attested facts to a name, a SPIFFE path and labels.

Facts are what the kernel says of a process (uid, executable, cgroup), never what it says of
itself. The order is the contract:

    1 its cgroup, or one above it, was registered    /host/<host>/run/<name>   labels as registered
    2 the first Workload document that matches       /host/<host>/wl/<name>    the document's labels
    3 nothing: an automatic identity                 /host/<host>/wl/<exe>-<8 hex of its facts>

Labels are merged by `sectool.origins`: context, host labels, those of 1 or 2, then the attested ones (`exe`, `user`,
`unit`; of a container `container`, `image`; of a pod `k8s.namespace`, `k8s.serviceaccount`, `k8s.label.*`,
`k8s.nslabel.*`, `k8s.port.*`), which nothing overrides. A document that claims more than the host CA may vouch for is
refused when the SVID is issued, not here.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

from sectool.errors import CredentialError
from sectool.events import DropReason
from sectool.labels import LabelError, LabelSet, check_label, stable_id
from sectool.origins import LeftOut, Origin, Source, merge

ATTESTED = (
    "exe",
    "user",
    "unit",
    "container",
    "image",
    "k8s.*",
)  # keys of attested labels, as constraint patterns
# Facts of a container that stay the same when it is made again: they go into its automatic name.
_LASTING = ("container.name", "container.image", "container.digest", "k8s.namespace", "k8s.serviceaccount")
_CONTAINER_LABELS = {
    "container": "container.name",
    "image": "container.image",
    "k8s.namespace": "k8s.namespace",
    "k8s.serviceaccount": "k8s.serviceaccount",
}

_POD_LABELS = ("k8s.label.", "k8s.nslabel.", "k8s.port.")  # facts that are labels as they stand

_NOT_VALUE = re.compile(r"[^A-Za-z0-9._/@:+-]")
_NOT_SEGMENT = re.compile(r"[^A-Za-z0-9._-]")
_VALUE_LIMIT = 128
_SEGMENT_LIMIT = 63
_UNIT_SUFFIXES = (".service", ".scope", ".socket", ".mount", ".swap")


@dataclass(frozen=True, slots=True)
class Facts:
    """What is attested of one process; `sha256` (hexadecimal, '' if unread) is of `executable`'s content."""

    uid: int
    user: str  # '' if the uid has no name
    executable: str
    sha256: str
    cgroup: str  # v2 path, '/' for the root
    unit: str  # see systemd_unit; '' if none
    pid: int
    more: tuple[tuple[str, str], ...] = ()  # of its container (sectool.identity.containers.Container.facts)

    def attested(self) -> dict[str, object]:
        """What the kernel says, as plain values, for the agent (which adds what is known of containers)."""
        return {
            "uid": self.uid,
            "user": self.user,
            "executable": self.executable,
            "sha256": self.sha256,
            "cgroup": self.cgroup,
            "unit": self.unit,
            "pid": self.pid,
        }

    def mapping(self) -> dict[str, str]:
        """The keys a Workload document may match on."""
        return {
            **dict(self.more),
            "systemd.unit": self.unit,
            "user": self.user or str(self.uid),
            "executable": self.executable,
            "sha256": self.sha256,
            "cgroup": self.cgroup,
        }


class WorkloadDocument(Protocol):
    """What `resolve` needs of a policy document of kind Workload."""

    @property
    def name(self) -> str:
        """The workload's name."""

    @property
    def labels(self) -> Mapping[str, str]:
        """The labels it claims for what matches."""

    def matches(self, facts: Mapping[str, str], /) -> bool:
        """Whether these facts (`Facts.mapping`) are this workload's."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A resolved workload; `path` is its SPIFFE path, `automatic`: no document or operator named it."""

    name: str
    path: str
    labels: LabelSet
    automatic: bool
    origins: Mapping[str, Origin] = field(default_factory=dict, compare=False)  # of each label
    left_out: tuple[LeftOut, ...] = field(default=(), compare=False)
    named_by: str = field(default="", compare=False)  # the document (with its place) or program that named it

    @property
    def id(self) -> int:
        """Content id: equal for equal paths and labels, on every host and after every restart."""
        return stable_id(f"{self.path}\0{self.labels}".encode())


def systemd_unit(cgroup: str) -> str:
    """The systemd unit a cgroup v2 path belongs to, '' if none.

    It is the first component that is not a slice (as in systemd's cg_path_get_unit): components below it may
    be made by whoever the unit delegated its subtree to, so a process cannot put itself into a unit by naming
    a directory `nginx.service`. A unit of a user's manager is told as `user@1000.service/app.service`: no
    system unit has a slash.
    """
    parts = iter(cgroup.strip("/").split("/"))
    unit = _next_unit(parts)
    if unit.startswith("user@") and unit.endswith(".service"):
        inner = _next_unit(parts)
        return f"{unit}/{inner}" if inner else unit
    return unit


def _next_unit(parts: Iterable[str]) -> str:
    for part in parts:
        if part.endswith(".slice"):
            continue
        name = part.removeprefix("_")  # systemd's escape for names that the kernel reserves
        return name if name.endswith(_UNIT_SUFFIXES) and not name.startswith(".") else ""
    return ""


@lru_cache(4096)  # users and units are few, and each process has them
def label_value(text: str) -> str:
    """`text` as a label value of at most 128 characters; '' stays '', what does not fit becomes `_`."""
    value = _NOT_VALUE.sub("_", text)[:_VALUE_LIMIT]
    if value and not re.match(r"[A-Za-z0-9_/]", value):
        value = f"_{value[1:]}"
    if value and not re.search(r"[A-Za-z0-9_]\Z", value):
        value = f"{value[:-1]}_" if value != "/" else value
    return value


def path_segment(text: str) -> str:
    """`text` as one SPIFFE path segment of at most 63 characters; never empty, `.` or `..`."""
    segment = _NOT_SEGMENT.sub("_", text)[:_SEGMENT_LIMIT]
    return "_" * max(len(segment), 1) if set(segment) <= {"."} else segment


def attested_labels(facts: Facts) -> dict[str, str]:
    """`exe`, `user` and `unit` of a process; a label that would be empty is left out."""
    found = {
        "exe": label_value(facts.executable.rsplit("/", 1)[-1]),
        "user": label_value(facts.user or str(facts.uid)),
        "unit": label_value(facts.unit),
    }
    more = dict(facts.more)
    found |= {label: label_value(more.get(fact, "")) for label, fact in _CONTAINER_LABELS.items()}
    named = {key: value for key, value in found.items() if value}
    return named | {key: value for key, value in more.items() if _is_pod_label(key, value)}


def _is_pod_label(key: str, value: str) -> bool:
    """Whether a fact of a pod is a label as it stands, also an empty one. Policy refuses to ask for the others."""
    if not key.startswith(_POD_LABELS):
        return False
    try:
        check_label(key, value)
    except LabelError:
        return False
    return True


def _registered(
    cgroup: str, registered: Mapping[str, Mapping[str, str]]
) -> tuple[str, Mapping[str, str]] | None:
    """The nearest registered cgroup at or above `cgroup`, and its labels."""
    path = cgroup.rstrip("/")
    while path:
        if path in registered:
            return path, registered[path]
        path = path.rpartition("/")[0]
    return None


def _facts_digest(facts: Facts) -> str:
    """8 hexadecimal digits that stay the same when the process restarts: no pid, no session scope."""
    unit = facts.unit if facts.unit.endswith(".service") else ""
    stable: tuple[str, ...] = (str(facts.uid), facts.executable, facts.sha256, unit)
    if facts.more:
        more = dict(facts.more)
        stable += tuple(more.get(key, "") for key in _LASTING)
    return hashlib.sha256("\0".join(stable).encode("utf-8", "surrogatepass")).hexdigest()[:8]


def _first_match(facts: Facts, documents: Iterable[WorkloadDocument]) -> WorkloadDocument | None:
    mapping = facts.mapping()
    return next((document for document in documents if document.matches(mapping)), None)


def resolve(
    facts: Facts,
    workload_docs: Iterable[WorkloadDocument],
    registered: Mapping[str, Mapping[str, str]],
    *,
    host: str,
    host_labels: Mapping[str, str] | None = None,
    context: Iterable[Source] = (),
) -> Workload:
    """The workload behind `facts` on `host`; `registered` maps cgroup v2 paths to labels, `context` is all else known.

    CredentialError(NO_LOCAL_IDENTITY) for host, document or registered labels outside the alphabet or the
    limits.
    """
    attested = attested_labels(facts)
    document: WorkloadDocument | None = None
    operator = Source(Origin.OPERATOR, {})
    run = _registered(facts.cgroup, registered)
    if run is not None:
        name = path_segment(run[0].rsplit("/", 1)[-1])
        path = f"/host/{host}/run/{name}"
        operator = Source(Origin.OPERATOR, run[1], f"program {name}")
    elif (document := _first_match(facts, workload_docs)) is not None:
        name = document.name
        path = f"/host/{host}/wl/{path_segment(name)}"
        where = getattr(document, "where", "")
        operator = Source(
            Origin.OPERATOR, document.labels, f"Workload {name}{f' ({where})' if where else ''}"
        )
    else:
        name = f"{path_segment(attested.get('exe', 'unknown'))[:54]}-{_facts_digest(facts)}"
        path = f"/host/{host}/wl/{name}"
    sources = (
        *context,
        Source(Origin.HOST, host_labels or {}, f"host {host}"),
        operator,
        Source(Origin.ATTESTED, attested, "the kernel"),
    )
    try:
        found = merge(sources)
    except LabelError as error:
        raise CredentialError(
            DropReason.NO_LOCAL_IDENTITY,
            f"workload {name}: {error}",
            "correct the labels of its Workload document, of the run command or of the host",
        ) from None
    automatic = run is None and document is None
    return Workload(name, path, found.labels, automatic, found.origins, found.left_out, operator.name)
