"""Which container a cgroup is: read from its path, as the runtimes and Kubernetes' kubelet name cgroups.

    /system.slice/docker-<id>.scope            docker, systemd driver          /docker/<id>            cgroupfs driver
    /machine.slice/libpod-<id>.scope           podman                          /libpod_parent/libpod-<id>
    /system.slice/nerdctl-<id>.scope           containerd (nerdctl)            /default/<id>
    /kubepods.slice/…/kubepods-burstable-pod<uid>.slice/cri-containerd-<id>.scope, crio-<id>.scope      Kubernetes
    /kubepods/burstable/pod<uid>/<id>                                                                   cgroupfs driver

A path counts only from its beginning: slices, then the container. What stands below a unit, a session or another
container was made by whoever that subtree is delegated to, who can give a directory any name. So a user's
`user@1000.service/…/docker-<id>.scope` is no container, and a container inside a container is the outer one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

_ID = r"(?P<id>[0-9a-f]{64})"
_UID = r"(?P<pod>[0-9a-f]{8}(?:[-_]?[0-9a-f]{4}){3}[-_]?[0-9a-f]{12})"
_SLICES = r"(?:/[^/]+\.slice)*"
_SCOPES = {
    "docker": "docker",
    "libpod": "podman",
    "cri-containerd": "containerd",
    "crio": "cri-o",
    "nerdctl": "containerd",
}
_BELOW = r"(?s:/.*)?"
_SCOPE = re.compile(rf"{_SLICES}/(?P<kind>{'|'.join(_SCOPES)})-{_ID}\.scope{_BELOW}")
_POD_SLICE = re.compile(
    rf"(?:/[^/]+\.slice)*/(?:[^/]*-)?kubepods(?:-burstable|-besteffort)?-pod{_UID}\.slice{_BELOW}"
)
_POD_PLAIN = re.compile(
    rf"(?:/kubelet)?/kubepods(?:/burstable|/besteffort)?/pod{_UID}/(?P<kind>crio-|cri-containerd-|)"
    rf"{_ID}{_BELOW}"
)
_PLAIN = (
    (re.compile(rf"/docker/{_ID}{_BELOW}"), "docker"),
    (re.compile(rf"/libpod_parent/libpod-{_ID}{_BELOW}"), "podman"),
    (re.compile(rf"/(?:default|moby|k8s\.io)/{_ID}{_BELOW}"), "containerd"),
)
MAX_LABELS = 64  # of a container, kept
MAX_TEXT = 512  # characters of one fact


@dataclass(frozen=True, slots=True)
class ContainerRef:
    """What a cgroup path says: runtime ('' if it does not tell), container id, uid of its pod ('' if none)."""

    runtime: str
    id: str
    pod_uid: str = ""


@dataclass(frozen=True, slots=True)
class Container:
    """A container with what its runtime knows of it; texts are '' where it did not say."""

    ref: ContainerRef
    name: str = ""
    image: str = ""
    digest: str = ""  # of the image, `sha256:…`
    labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    namespace: str = ""  # Kubernetes
    pod: str = ""
    service_account: str = ""
    pod_labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    namespace_labels: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    ports: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))  # by name, as `8080/tcp`
    pid: int = 0  # of its first process, 0 if not told
    told_by: str = ""  # where that comes from; '' when nobody could be asked

    def facts(self) -> tuple[tuple[str, str], ...]:
        """What Workload documents can match, sorted; only what is known."""
        plain = {
            "container.id": self.ref.id,
            "container.runtime": self.ref.runtime,
            "container.name": self.name,
            "container.image": self.image,
            "container.digest": self.digest,
            "k8s.pod-uid": self.ref.pod_uid,
            "k8s.namespace": self.namespace,
            "k8s.pod": self.pod,
            "k8s.serviceaccount": self.service_account,
        }
        found = {key: value[:MAX_TEXT] for key, value in plain.items() if value}
        for prefix, labels in (
            ("container.label.", self.labels),
            ("k8s.label.", self.pod_labels),
            ("k8s.nslabel.", self.namespace_labels),
            ("k8s.port.", self.ports),
        ):
            for key in sorted(labels)[:MAX_LABELS]:
                found[f"{prefix}{key[:MAX_TEXT]}"] = labels[key][:MAX_TEXT]
        return tuple(sorted(found.items()))


def container_of(cgroup: str) -> ContainerRef | None:
    """The container a cgroup v2 path belongs to by its name; None when it is none of the forms above."""
    if found := _SCOPE.fullmatch(cgroup):
        pod = _POD_SLICE.fullmatch(cgroup)
        return ContainerRef(_SCOPES[found["kind"]], found["id"], _dashed(pod["pod"]) if pod else "")
    if found := _POD_PLAIN.fullmatch(cgroup):
        runtime = {"crio-": "cri-o", "cri-containerd-": "containerd", "": ""}[found["kind"]]
        return ContainerRef(runtime, found["id"], _dashed(found["pod"]))
    for pattern, runtime in _PLAIN:
        if found := pattern.fullmatch(cgroup):
            return ContainerRef(runtime, found["id"])
    return None


def _dashed(uid: str) -> str:
    """A pod's uid as Kubernetes writes it; systemd slices have `_` for `-`. Those of static pods have neither."""
    return uid.replace("_", "-")
