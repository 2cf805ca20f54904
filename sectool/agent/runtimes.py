"""What container runtimes know of a container: asked over their sockets, or read from the files they keep.

    docker, podman       GET /containers/<id>/json and /images/<image>/json over a unix socket (Docker Engine API)
    containerd, CRI-O,   config.json of the OCI bundle, whose annotations name pod, namespace, image
    runc, crun           state.json of the OCI runtime, which also names the cgroup
    pods                 the runtime's CRI socket tells the pod's labels and ports (sectool.agent.cri), a file of the
                         operator's the labels of namespaces (sectool.agent.kubernetes)
    kubelet              the pod's projected token names its service account

Only sockets and files of root count: a container's own word is not asked. Every answer is bounded in time and size, and
a runtime that does not answer costs the container its names, not its id. A pod whose runtime does not answer over CRI
has no namespace either until it does: without its labels a NetworkPolicy that selects it would not seem to.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import logging
import os
import socket
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from sectool.agent import cri
from sectool.agent.kubernetes import Kubernetes
from sectool.errors import SectoolError
from sectool.identity.containers import MAX_LABELS, Container, ContainerRef

log = logging.getLogger("sectool.agent")

TIMEOUT_S: Final = 1.0
CRI_TIMEOUT_S: Final = 3.0  # for all that is asked of one pod
MAX_ANSWER: Final = 4 << 20  # bytes
MAX_STATES: Final = 2048  # of containers without a telling cgroup path, looked through


@dataclass(frozen=True, slots=True)
class Places:
    """Where runtimes are found."""

    sockets: tuple[tuple[str, Path], ...] = (
        ("docker", Path("/run/docker.sock")),
        ("podman", Path("/run/podman/podman.sock")),
    )
    bundles: tuple[tuple[str, Path], ...] = (  # folders of <namespace>/<id>/config.json
        ("containerd", Path("/run/containerd/io.containerd.runtime.v2.task")),
    )
    storage: tuple[tuple[str, Path], ...] = (  # folders of <id>/userdata/config.json
        ("cri-o", Path("/run/containers/storage/overlay-containers")),
    )
    states: tuple[tuple[str, Path], ...] = (  # folders of <id>/state.json
        ("runc", Path("/run/runc")),
        ("containerd", Path("/run/containerd/runc/default")),
        ("containerd", Path("/run/containerd/runc/k8s.io")),
        ("docker", Path("/run/docker/runtime-runc/moby")),
        ("docker", Path("/run/containerd/runc/moby")),
        ("crun", Path("/run/crun")),
    )
    cri: tuple[tuple[str, Path], ...] = (  # unix sockets of the Container Runtime Interface
        ("containerd", Path("/run/containerd/containerd.sock")),
        ("containerd", Path("/run/k3s/containerd/containerd.sock")),
        ("cri-o", Path("/run/crio/crio.sock")),
        ("docker", Path("/run/cri-dockerd.sock")),
    )
    kubelet: Path = Path("/var/lib/kubelet/pods")
    cgroups: Path = Path("/sys/fs/cgroup")  # where cgroup v2 is mounted for us
    owner: int = 0  # whose sockets and files are believed


@dataclass(slots=True)
class Runtimes:
    """Questions about containers. They block, for at most some seconds: not for the event loop."""

    places: Places = field(default_factory=Places)
    kubernetes: Kubernetes = field(default_factory=Kubernetes)
    _stamp: tuple[int, ...] | None = None
    _by_cgroup: dict[int, ContainerRef] = field(default_factory=dict)

    def read(self, ref: ContainerRef) -> Container:
        """All that can be found out of a container; only `ref` when nobody knows it."""
        found = self._over_sockets(ref) or self._bundle(ref) or self._state(ref) or Container(ref)
        if ref.pod_uid:
            return self._pod(found)
        # Labels and annotations of a container begin with those of its image, whose author may call it any pod's.
        return replace(found, namespace="", pod="")

    def _pod(self, found: Container) -> Container:
        ref = found.ref
        for runtime, path in self.places.cri:
            if ref.runtime not in (runtime, "") or not self._trusted(path, stat.S_ISSOCK):
                continue
            try:
                told = cri.ask(path, ref.id, CRI_TIMEOUT_S)
            except SectoolError as error:
                log.warning("pod of container %s: %s", ref.id[:12], error.message)
                return Container(ref)
            if told is not None:
                found = replace(
                    found,
                    ref=replace(ref, runtime=runtime),
                    name=told.container or found.name,
                    image=told.image or found.image,
                    digest=told.digest or found.digest,
                    namespace=told.namespace,
                    pod=told.pod,
                    pod_labels=self.kubernetes.chosen(told.labels),
                    ports=told.ports,
                    told_by=str(path),
                )
                break
        return replace(
            found,
            namespace_labels=self.kubernetes.of_namespace(found.namespace),
            service_account=found.service_account or self._service_account(ref.pod_uid),
        )

    def by_cgroup(self) -> Mapping[int, ContainerRef]:
        """Containers by the id of the cgroup that their OCI runtime made; for cgroups whose path does not tell.

        Looks into the state files only when containers have come or gone.
        """
        stamp = tuple(_mtime(folder) for _, folder in self.places.states)
        if stamp != self._stamp:
            found: dict[int, ContainerRef] = {}
            for runtime, folder in self.places.states:
                for entry in _entries(folder)[:MAX_STATES]:
                    state = self._json(entry / "state.json")
                    if state is None:
                        stamp = ()  # being made: look again
                    for path in self._cgroup_paths(state):
                        with contextlib.suppress(OSError):
                            found[path.stat().st_ino] = ContainerRef(runtime, entry.name[:128])
            self._by_cgroup, self._stamp = found, stamp
        return self._by_cgroup

    def _cgroup_paths(self, state: Mapping[str, Any] | None) -> list[Path]:
        """As the runtime saw them: cgroup v2 may be mounted elsewhere for us."""
        told = _mapping((state or {}).get("cgroup_paths")).values()
        paths = [Path(path) for path in told if isinstance(path, str) and path.startswith("/")]
        usual = ("/sys/fs/cgroup/unified", "/sys/fs/cgroup")
        ours = [
            self.places.cgroups / path.relative_to(mount)
            for path in paths
            for mount in usual
            if path.is_relative_to(mount) and path != Path(mount)
        ]
        return paths + ours

    # -- over a socket ----------------------------------------------------------------------------------------

    def _over_sockets(self, ref: ContainerRef) -> Container | None:
        for runtime, path in self.places.sockets:
            if ref.runtime in (runtime, "") and self._trusted(path, stat.S_ISSOCK):
                found = self._ask(path, f"/containers/{ref.id}/json")
                if found:
                    return self._inspected(replace(ref, runtime=runtime), path, found)
        return None

    def _inspected(self, ref: ContainerRef, path: Path, found: Mapping[str, Any]) -> Container:
        config = _mapping(found.get("Config"))
        image = _text(found.get("Image"))
        digest = ""
        if image:
            known = self._ask(path, f"/images/{quote(image, safe=':')}/json") or {}
            digests = known.get("RepoDigests")
            if isinstance(digests, list) and digests:
                digest = _text(digests[0]).rpartition("@")[2]
        labels = _labels(config.get("Labels"))
        pid = _mapping(found.get("State")).get("Pid")
        return Container(
            ref,
            name=_text(found.get("Name")).removeprefix("/"),
            image=_text(config.get("Image")),
            digest=digest or (image if image.startswith("sha256:") else ""),
            labels=labels,
            namespace=labels.get("io.kubernetes.pod.namespace", ""),
            pod=labels.get("io.kubernetes.pod.name", ""),
            pid=pid if isinstance(pid, int) and not isinstance(pid, bool) else 0,
            told_by=str(path),
        )

    def _ask(self, path: Path, what: str) -> dict[str, Any] | None:
        connection = _UnixConnection(path)
        try:
            connection.request("GET", what, headers={"Accept": "application/json"})
            answer = connection.getresponse()
            body = answer.read(MAX_ANSWER + 1)
            if answer.status != 200 or len(body) > MAX_ANSWER:
                return None
            found = json.loads(body)
        except (OSError, http.client.HTTPException, ValueError, RecursionError):
            return None
        finally:
            connection.close()
        return found if isinstance(found, dict) else None

    # -- from files -------------------------------------------------------------------------------------------

    def _bundle(self, ref: ContainerRef) -> Container | None:
        for runtime, folder in self.places.bundles:
            for namespace in _entries(folder):
                found = self._configured(
                    replace(ref, runtime=ref.runtime or runtime), namespace / ref.id / "config.json"
                )
                if found is not None:
                    return found
        for runtime, folder in self.places.storage:
            path = folder / ref.id / "userdata" / "config.json"
            found = self._configured(replace(ref, runtime=ref.runtime or runtime), path)
            if found is not None:
                return found
        return None

    def _configured(self, ref: ContainerRef, path: Path) -> Container | None:
        config = self._json(path)
        if config is None:
            return None
        notes = _labels(config.get("annotations"), most=4 * MAX_LABELS)

        def first(*keys: str) -> str:
            return next((notes[key] for key in keys if notes.get(key)), "")

        return Container(
            ref,
            name=first("io.kubernetes.cri.container-name", "io.kubernetes.container.name", "nerdctl/name"),
            image=first("io.kubernetes.cri.image-name", "io.kubernetes.cri-o.ImageName", "nerdctl/image-ref"),
            digest=_digest(first("io.kubernetes.cri-o.ImageRef")),
            labels={k: v for k, v in notes.items() if not k.startswith(("io.kubernetes.", "nerdctl/"))},
            namespace=first("io.kubernetes.cri.sandbox-namespace", "io.kubernetes.pod.namespace"),
            pod=first("io.kubernetes.cri.sandbox-name", "io.kubernetes.pod.name"),
            told_by=str(path),
        )

    def _state(self, ref: ContainerRef) -> Container | None:
        for runtime, folder in self.places.states:
            path = folder / ref.id / "state.json"
            state = self._json(path)
            if state is None:
                continue
            entries = _mapping(state.get("config")).get("labels")
            pairs = (_text(e).partition("=") for e in entries) if isinstance(entries, list) else ()
            labels = {key: value for key, _, value in pairs if key}
            bundle = labels.pop("bundle", "")
            pid = state.get("init_process_pid")
            found = self._configured(ref, Path(bundle) / "config.json") if bundle.startswith("/") else None
            found = found or Container(replace(ref, runtime=ref.runtime or runtime), told_by=str(path))
            return replace(
                found,
                name=found.name or (ref.id if len(ref.id) < 64 else ""),
                labels={**found.labels, **labels},
                pid=pid if isinstance(pid, int) and not isinstance(pid, bool) else 0,
            )
        return None

    def _service_account(self, pod_uid: str) -> str:
        """From the token that the kubelet wrote for the pod: a JWT, not verified, for the file is root's own."""
        folder = self.places.kubelet / pod_uid / "volumes" / "kubernetes.io~projected"
        for volume in _entries(folder):
            token = self._text_file(volume / "token")
            parts = token.split(".") if token else []
            if len(parts) != 3:
                continue
            try:
                claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
            except (ValueError, RecursionError):
                continue
            account = _mapping(_mapping(_mapping(claims).get("kubernetes.io")).get("serviceaccount"))
            if name := _text(account.get("name")):
                return name
        return ""

    def _json(self, path: Path) -> dict[str, Any] | None:
        text = self._text_file(path)
        try:
            found = json.loads(text) if text else None
        except (ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def _text_file(self, path: Path) -> str:
        if not self._trusted(path, stat.S_ISREG):
            return ""
        try:
            with path.open("rb") as file:
                return file.read(MAX_ANSWER).decode("utf-8", "replace")
        except OSError:
            return ""

    def _trusted(self, path: Path, kind: Any) -> bool:
        try:
            found = path.stat()
        except (OSError, ValueError):
            return False
        return bool(kind(found.st_mode)) and found.st_uid == self.places.owner


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = os.fspath(path)

    def connect(self) -> None:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.settimeout(TIMEOUT_S)
        try:
            sock.connect(self._path)
        except BaseException:
            sock.close()
            raise
        self.sock = sock


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _mtime(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return 0


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _labels(value: Any, most: int = MAX_LABELS) -> dict[str, str]:
    pairs = [(k, v) for k, v in _mapping(value).items() if isinstance(k, str) and isinstance(v, str)]
    return dict(sorted(pairs)[:most])


def _digest(text: str) -> str:
    digest = text.rpartition("@")[2]
    return digest if digest.startswith("sha256:") else ""
