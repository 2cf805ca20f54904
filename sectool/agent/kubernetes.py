"""What is known of Kubernetes beside a pod's runtime: which labels of pods count, and the labels of namespaces.

A runtime does not know the labels of namespaces, and this daemon has no access to the API server, on purpose: whoever
has keeps them in a file (setting `kubernetes_namespaces`), as `kubectl get namespaces -o json` prints them. The file is
read again when it changes. One that cannot be read, or that others may write, changes nothing: the last good counts.
"""

from __future__ import annotations

import fnmatch
import json
import logging
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

log = logging.getLogger("sectool.agent")

MAX_FILE: Final = 4 << 20  # bytes
# Others with every rollout or run, and no policy can sensibly ask for them; each would cost room in every SYN.
PASSING: Final = (
    "pod-template-hash",
    "pod-template-generation",
    "controller-revision-hash",
    "controller-uid",
    "batch.kubernetes.io/controller-uid",
)
METADATA_NAME: Final = "kubernetes.io/metadata.name"  # said by k8s.namespace already

_Stamp = tuple[int, int, int]


def read_namespaces(data: bytes) -> dict[str, dict[str, str]]:
    """Labels by namespace out of a List of Namespaces in JSON. Raises ValueError for anything else."""
    try:
        root = json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    items = root.get("items") if isinstance(root, dict) else None
    if not isinstance(items, list):
        raise ValueError("it is no list of namespaces")
    out: dict[str, dict[str, str]] = {}
    for item in items:
        found = item.get("metadata") if isinstance(item, dict) and item.get("kind") == "Namespace" else None
        if not isinstance(found, dict) or not isinstance(found.get("name"), str):
            raise ValueError("an item of it is no Namespace with a name")
        labels = found.get("labels") or {}
        if not isinstance(labels, dict) or not all(isinstance(value, str) for value in labels.values()):
            raise ValueError(f"the labels of namespace {found['name'][:63]!r} are no texts")
        if found["name"] in out:
            raise ValueError(f"namespace {found['name'][:63]!r} is in it twice")
        out[found["name"]] = {key: value for key, value in labels.items() if key != METADATA_NAME}
    return out


@dataclass(slots=True)
class Kubernetes:
    """The operator's word on pods. `problem` says why the file does not count as it stands, '' when it does."""

    namespaces: Path | None = None
    pod_labels: tuple[str, ...] = ("*",)  # patterns of those that count
    owner: int = 0  # whose file is believed
    problem: str = ""
    _known: dict[str, dict[str, str]] = field(default_factory=dict)
    _stamp: _Stamp | None = None

    def chosen(self, labels: Mapping[str, str]) -> dict[str, str]:
        """Those of a pod's labels that its workloads bear."""
        return {
            key: value
            for key, value in labels.items()
            if any(fnmatch.fnmatchcase(key, pattern) for pattern in self.pod_labels)
            and (key not in PASSING or key in self.pod_labels)
        }

    def of_namespace(self, name: str) -> dict[str, str]:
        """The labels of a namespace, as the file has them."""
        return self._known.get(name, {})

    def look(self) -> bool:
        """Read the file if it has changed; whether labels of any namespace are others now."""
        if self.namespaces is None:
            return False
        try:
            with self.namespaces.open("rb") as file:
                st = os.fstat(file.fileno())
                stamp = st.st_ino, st.st_mtime_ns, st.st_ctime_ns
                if stamp == self._stamp:
                    return False
                if st.st_uid != self.owner or st.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                    raise ValueError("others than root may write it")
                data = file.read(MAX_FILE + 1)
            if len(data) > MAX_FILE:
                raise ValueError(f"it has more than {MAX_FILE} bytes")
            known = read_namespaces(data)
        except (OSError, ValueError) as error:
            self._tell(getattr(error, "strerror", None) or str(error))
            return False
        self.problem, self._stamp = "", stamp
        changed, self._known = known != self._known, known
        return changed

    def _tell(self, why: str) -> None:
        problem = f"{self.namespaces} does not count: {why}; labels of namespaces stay as they were"
        if problem != self.problem:
            log.warning("%s", problem)
        self.problem = problem
