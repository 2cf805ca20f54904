"""What runtimes tell of containers: over a unix socket that speaks the Docker Engine API, and from their files."""

from __future__ import annotations

import base64
import json
import os
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sectool.agent.runtimes import Places, Runtimes
from sectool.identity.containers import ContainerRef

ID = "3f1c" * 16
POD = "9a8b7c6d-1234-4abc-8def-0123456789ab"
IMAGE = "sha256:" + "ab" * 32
DIGEST = "sha256:" + "cd" * 32
INSPECTED = {
    "Id": ID,
    "Name": "/shop-web",
    "Image": IMAGE,
    "State": {"Status": "running", "Pid": 4711},
    "Config": {"Image": "shop/web:2.1", "Labels": {"com.example.team": "shop"}},
}
ANSWERS: dict[str, Any] = {
    f"/containers/{ID}/json": INSPECTED,
    f"/images/{IMAGE}/json": {"Id": IMAGE, "RepoDigests": [f"shop/web@{DIGEST}"]},
}
REF = ContainerRef("docker", ID)


class _Server(socketserver.ThreadingUnixStreamServer):
    answers: dict[str, Any]
    asked: list[str]
    daemon_threads = True


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        assert isinstance(self.server, _Server)
        self.server.asked.append(self.path)
        found = self.server.answers.get(self.path)
        body = (
            found
            if isinstance(found, bytes)
            else json.dumps(found or {"message": "No such container"}).encode()
        )
        self.send_response(200 if found is not None else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "unix"

    def log_message(self, *args: Any) -> None:
        return


@contextmanager
def engine(path: Path, answers: dict[str, Any]) -> Iterator[_Server]:
    """A server of the Docker Engine API at `path`."""
    server = _Server(os.fspath(path), _Handler)
    server.answers, server.asked = answers, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def places(folder: Path, **more: Any) -> Places:
    nothing: dict[str, Any] = {
        "sockets": (),
        "bundles": (),
        "storage": (),
        "states": (),
        "kubelet": folder / "pods",
    }
    return Places(**{**nothing, **more})


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def test_docker_tells_name_image_digest_and_labels(tmp_path: Path) -> None:
    path = tmp_path / "docker.sock"
    with engine(path, ANSWERS):
        found = Runtimes(places(tmp_path, sockets=(("docker", path),))).read(REF)
    assert dict(found.facts()) == {
        "container.id": ID,
        "container.runtime": "docker",
        "container.name": "shop-web",
        "container.image": "shop/web:2.1",
        "container.digest": DIGEST,
        "container.label.com.example.team": "shop",
    }
    assert (found.pid, found.told_by) == (4711, str(path))


def test_only_the_runtime_that_made_it_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "docker.sock"
    with engine(path, ANSWERS) as server:
        found = Runtimes(places(tmp_path, sockets=(("docker", path),))).read(ContainerRef("podman", ID))
        assert server.asked == []
    assert dict(found.facts()) == {"container.id": ID, "container.runtime": "podman"}


def test_a_socket_of_somebody_else_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "docker.sock"
    with engine(path, ANSWERS) as server:
        found = Runtimes(places(tmp_path, sockets=(("docker", path),), owner=os.getuid() + 1)).read(REF)
        assert server.asked == []
    assert found.told_by == ""


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"Config": 1, "Name": 2, "State": [], "Image": {}}',
        b"\xff" * 9,
        b"[" * 100_000,
    ],
)
def test_an_answer_that_is_none_costs_the_names_only(tmp_path: Path, answer: bytes) -> None:
    path = tmp_path / "docker.sock"
    with engine(path, {f"/containers/{ID}/json": answer}):
        found = Runtimes(places(tmp_path, sockets=(("docker", path),))).read(REF)
    assert dict(found.facts()) == {"container.id": ID, "container.runtime": "docker"}


def test_nobody_listens(tmp_path: Path) -> None:
    path = tmp_path / "docker.sock"
    with engine(path, {}):
        pass
    assert Runtimes(places(tmp_path, sockets=(("docker", path),))).read(REF).told_by == ""


def test_a_pod_of_containerd_with_its_service_account(tmp_path: Path) -> None:
    write(
        tmp_path / "task" / "k8s.io" / ID / "config.json",
        {
            "annotations": {
                "io.kubernetes.cri.container-name": "web",
                "io.kubernetes.cri.image-name": "registry/shop:2",
                "io.kubernetes.cri.sandbox-namespace": "shop",
                "io.kubernetes.cri.sandbox-name": "web-6f7d",
                "note": "kept",
            }
        },
    )
    claims = {"kubernetes.io": {"namespace": "shop", "serviceaccount": {"name": "web-sa"}}}
    token = ".".join(
        base64.urlsafe_b64encode(json.dumps(c).encode()).decode().rstrip("=") for c in ({}, claims, {})
    )
    write(
        tmp_path / "pods" / POD / "volumes" / "kubernetes.io~projected" / "kube-api-access-x" / "token", token
    )
    found = Runtimes(places(tmp_path, bundles=(("containerd", tmp_path / "task"),))).read(
        ContainerRef("containerd", ID, POD)
    )
    assert dict(found.facts()) == {
        "container.id": ID,
        "container.runtime": "containerd",
        "container.name": "web",
        "container.image": "registry/shop:2",
        "container.label.note": "kept",
        "k8s.pod-uid": POD,
        "k8s.namespace": "shop",
        "k8s.pod": "web-6f7d",
        "k8s.serviceaccount": "web-sa",
    }


def test_a_container_of_cri_o(tmp_path: Path) -> None:
    notes = {
        "io.kubernetes.container.name": "db",
        "io.kubernetes.pod.namespace": "shop",
        "io.kubernetes.pod.name": "db-0",
        "io.kubernetes.cri-o.ImageName": "postgres:16",
        "io.kubernetes.cri-o.ImageRef": f"docker.io/postgres@{DIGEST}",
    }
    write(tmp_path / "overlay" / ID / "userdata" / "config.json", {"annotations": notes})
    found = Runtimes(places(tmp_path, storage=(("cri-o", tmp_path / "overlay"),))).read(
        ContainerRef("cri-o", ID, POD)
    )
    assert (found.name, found.image, found.digest) == ("db", "postgres:16", DIGEST)
    assert (found.namespace, found.pod) == ("shop", "db-0")


def test_an_image_that_calls_itself_a_pod_is_none(tmp_path: Path) -> None:
    notes = {"io.kubernetes.pod.namespace": "prod", "io.kubernetes.cri.sandbox-name": "db-0", "team": "x"}
    write(tmp_path / "task" / "default" / ID / "config.json", {"annotations": notes})
    runtimes = Runtimes(places(tmp_path, bundles=(("containerd", tmp_path / "task"),)))
    facts = dict(runtimes.read(ContainerRef("containerd", ID)).facts())
    assert facts["container.label.team"] == "x"
    assert not [key for key in facts if key.startswith("k8s.")]


def test_a_cgroup_whose_path_says_nothing_is_known_by_the_state_of_its_runtime(tmp_path: Path) -> None:
    group = tmp_path / "cgroup" / "any" / "name"
    group.mkdir(parents=True)
    state = {
        "cgroup_paths": {"": "/sys/fs/cgroup/any/name"},
        "init_process_pid": 99,
        "config": {"labels": [f"bundle={tmp_path}/bundle", "tier=front"]},
    }
    write(tmp_path / "bundle" / "config.json", {"annotations": {"team": "shop"}})
    write(tmp_path / "runc" / "web" / "state.json", state)
    runtimes = Runtimes(places(tmp_path, states=(("runc", tmp_path / "runc"),), cgroups=tmp_path / "cgroup"))
    ref = runtimes.by_cgroup()[group.stat().st_ino]
    assert ref == ContainerRef("runc", "web")
    found = runtimes.read(ref)
    assert (found.name, found.pid, dict(found.labels)) == ("web", 99, {"team": "shop", "tier": "front"})
    (tmp_path / "runc" / "web" / "state.json").unlink()
    (tmp_path / "runc" / "web").rmdir()
    assert runtimes.by_cgroup() == {}


_json: Callable[..., Any] = st.recursive  # the shapes below are any JSON, with keys that mean something
_values = _json(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["annotations", "config", "labels", "cgroup_paths", "", "x"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)


@settings(max_examples=int(os.environ.get("HYPOTHESIS_MANY", "60")), suppress_health_check=list(HealthCheck))
@given(_values)
def test_any_state_file_gives_a_container_or_nothing(tmp_path: Path, content: Any) -> None:
    write(tmp_path / "runc" / ID / "state.json", content)
    write(tmp_path / "task" / "n" / ID / "config.json", content)
    runtimes = Runtimes(
        places(tmp_path, states=(("runc", tmp_path / "runc"),), bundles=(("containerd", tmp_path / "task"),))
    )
    runtimes.by_cgroup()
    found = runtimes.read(ContainerRef("", ID))
    assert found.ref.id == ID
    assert all(isinstance(v, str) for _, v in found.facts())
