"""Pods over the Container Runtime Interface: a server that speaks gRPC and CRI's messages, on a unix socket."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sectool.agent import cri
from sectool.agent.cri import named_ports
from sectool.agent.kubernetes import Kubernetes
from sectool.agent.runtimes import Places, Runtimes
from sectool.errors import SectoolError
from sectool.identity.containers import Container, ContainerRef
from sectool.identity.workload import Facts, resolve
from sectool.policy.netpol import pod_of
from sectool.spiffe.grpc import GrpcError, ServerConnection, Status

EXAMPLES = int(os.environ.get("SECTOOL_CRI_EXAMPLES", "60"))
ID, SIDECAR, SANDBOX = "3f1c" * 16, "5a5a" * 16, "77aa" * 16
UID = "9a8b7c6d-1234-4abc-8def-0123456789ab"
DIGEST = "sha256:" + "cd" * 32
POD_LABELS = {
    "app": "web",
    "app.kubernetes.io/name": "shop-web",
    "empty": "",
    "pod-template-hash": "6f7d",
    "io.kubernetes.pod.name": "web-6f7d",
    "io.kubernetes.pod.namespace": "shop",
    "io.kubernetes.pod.uid": UID,
    "example.com/a-key-that-is-much-too-long-for-a-label-of-ours-to-hold": "x",
}
PORTS = [
    {"name": "http", "containerPort": 8080, "protocol": "TCP"},
    {"containerPort": 9090, "protocol": "TCP"},
]


def container(identity: str, name: str, ports: list[Any]) -> Any:
    """As CRI encodes it, with fields that are not described here, too."""
    found = cri.ListContainersResponse().containers.add(
        id=identity, pod_sandbox_id=SANDBOX, image_ref=f"registry/shop@{DIGEST}"
    )
    found.metadata.name = name
    found.image.image = "registry/shop:2"
    found.annotations[cri.PORTS] = json.dumps(ports)
    found.MergeFromString(bytes((6 << 3, 1, 7 << 3, 5)))  # state = CONTAINER_RUNNING, created_at = 5
    return found


class Runtime:
    """containerd's part of a conversation."""

    def __init__(self) -> None:
        self.containers = [container(ID, "web", PORTS), container(SIDECAR, "dns", [])]
        self.containers[1].annotations[cri.PORTS] = json.dumps(
            [{"name": "dns", "containerPort": 53, "protocol": "UDP"}]
        )
        self.asked: list[str] = []
        self.fails: dict[str, GrpcError | bytes] = {}

    async def list_containers(self, caller: None, data: bytes) -> AsyncIterator[bytes]:
        self.asked.append("ListContainers")
        if found := self.fails.get("ListContainers"):
            if isinstance(found, bytes):
                yield found
                return
            raise found
        chosen = cri.ListContainersRequest.FromString(data).filter
        answer = cri.ListContainersResponse()
        answer.containers.extend(
            each
            for each in self.containers
            if chosen.id in ("", each.id) and chosen.pod_sandbox_id in ("", each.pod_sandbox_id)
        )
        yield answer.SerializeToString()

    async def status(self, caller: None, data: bytes) -> AsyncIterator[bytes]:
        self.asked.append("PodSandboxStatus")
        if isinstance(found := self.fails.get("PodSandboxStatus"), GrpcError):
            raise found
        if cri.PodSandboxStatusRequest.FromString(data).pod_sandbox_id != SANDBOX:
            raise GrpcError(Status.NOT_FOUND, "no such sandbox")
        answer = cri.PodSandboxStatusResponse()
        answer.status.id = SANDBOX
        answer.status.metadata.name, answer.status.metadata.namespace = "web-6f7d", "shop"
        answer.status.metadata.uid = UID
        answer.status.labels.update(POD_LABELS)
        yield answer.SerializeToString()


@contextmanager
def serving(path: Path, runtime: Runtime) -> Iterator[None]:
    """The runtime at `path`, in a thread of its own."""
    ready, loop = threading.Event(), asyncio.new_event_loop()
    ending = asyncio.Event()

    async def client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        methods = {
            "/runtime.v1.RuntimeService/ListContainers": runtime.list_containers,
            "/runtime.v1.RuntimeService/PodSandboxStatus": runtime.status,
        }
        await ServerConnection(reader, writer, methods, None, (":method", "POST")).run()

    async def serve() -> None:
        server = await asyncio.start_unix_server(client, path)
        ready.set()
        await ending.wait()
        server.close()
        clients = asyncio.all_tasks() - {asyncio.current_task()}
        for each in clients:
            each.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        await asyncio.sleep(0)  # their connections are closed in the next round

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    try:
        assert ready.wait(10)
        yield
    finally:
        loop.call_soon_threadsafe(ending.set)
        thread.join(10)
        loop.close()


def runtimes(folder: Path, socket: Path, kubernetes: Kubernetes | None = None) -> Runtimes:
    nothing: dict[str, Any] = dict.fromkeys(("sockets", "bundles", "storage", "states"), ())
    places = Places(**nothing, cri=(("containerd", socket),), kubelet=folder / "pods", owner=os.getuid())
    return Runtimes(places, kubernetes or Kubernetes(owner=os.getuid()))


def test_a_pod_tells_its_labels_and_named_ports(tmp_path: Path) -> None:
    names = tmp_path / "namespaces.json"
    names.write_text(
        json.dumps({"items": [{"kind": "Namespace", "metadata": {"name": "shop", "labels": {"team": "a"}}}]})
    )
    kubernetes = Kubernetes(names, owner=os.getuid())
    kubernetes.look()
    with serving(tmp_path / "cri.sock", Runtime()):
        found = runtimes(tmp_path, tmp_path / "cri.sock", kubernetes).read(
            ContainerRef("containerd", ID, UID)
        )
    assert (found.told_by, found.name, found.image) == (str(tmp_path / "cri.sock"), "web", "registry/shop:2")
    assert (found.digest, found.pod, found.namespace) == (DIGEST, "web-6f7d", "shop")
    facts = Facts(0, "root", "/usr/bin/web", "", "/kubepods", "", 1, found.facts())
    labels = resolve(facts, (), {}, host="node1").labels
    assert {key: value for key, value in labels.items() if key.startswith("k8s.")} == {
        "k8s.namespace": "shop",
        "k8s.label.app": "web",
        "k8s.label.app.kubernetes.io/name": "shop-web",
        "k8s.label.empty": "",
        "k8s.nslabel.team": "a",
        "k8s.port.http": "8080/tcp",
        "k8s.port.dns": "53/udp",
    }
    pod = pod_of(labels)
    assert pod is not None
    assert (pod.labels["app"], pod.of_namespace["team"], pod.port("dns")) == ("web", "a", (17, 53))


def test_the_sandbox_itself_is_of_its_pod(tmp_path: Path) -> None:
    with serving(tmp_path / "cri.sock", Runtime()):
        found = runtimes(tmp_path, tmp_path / "cri.sock").read(ContainerRef("containerd", SANDBOX, UID))
    assert (found.pod, found.name, found.pod_labels["app"]) == ("web-6f7d", "", "web")


def test_a_container_of_no_pod_is_not_asked_for(tmp_path: Path) -> None:
    runtime = Runtime()
    with serving(tmp_path / "cri.sock", runtime):
        read = runtimes(tmp_path, tmp_path / "cri.sock").read
        assert read(ContainerRef("containerd", ID)).pod == ""
        assert read(ContainerRef("cri-o", ID, UID)).pod == ""  # that one's socket is elsewhere
    assert runtime.asked == []


def test_a_container_that_is_not_known_there_is_none_of_its_pods(tmp_path: Path) -> None:
    with serving(tmp_path / "cri.sock", Runtime()):
        found = runtimes(tmp_path, tmp_path / "cri.sock").read(ContainerRef("containerd", "0" * 64, UID))
    assert (found.told_by, found.pod) == ("", "")


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("ListContainers", GrpcError(Status.UNIMPLEMENTED, "unknown service runtime.v1.RuntimeService")),
        ("ListContainers", b"\xff\xff\xff"),
        ("PodSandboxStatus", GrpcError(Status.UNAVAILABLE, "starting")),
        ("PodSandboxStatus", GrpcError(Status.NOT_FOUND, "just removed")),
    ],
)
def test_a_pod_whose_runtime_does_not_answer_is_none_until_it_does(
    tmp_path: Path, method: str, answer: GrpcError | bytes
) -> None:
    """Not even what its files tell counts: a policy selecting it by label would seem not to."""
    write = tmp_path / "task" / "k8s.io" / ID / "config.json"
    write.parent.mkdir(parents=True)
    write.write_text(json.dumps({"annotations": {"io.kubernetes.cri.sandbox-namespace": "shop"}}))
    runtime, ref = Runtime(), ContainerRef("containerd", ID, UID)
    runtime.fails[method] = answer
    asked = runtimes(tmp_path, tmp_path / "cri.sock")
    asked.places = Places(
        sockets=(),
        bundles=(("containerd", tmp_path / "task"),),
        cri=asked.places.cri,
        owner=os.getuid(),
    )
    with serving(tmp_path / "cri.sock", runtime):
        assert asked.read(ref) == Container(ref)
        runtime.fails.clear()
        assert asked.read(ref).pod_labels["app"] == "web"


def test_a_runtime_that_says_nothing_is_waited_for_only_so_long(tmp_path: Path) -> None:
    path = tmp_path / "cri.sock"

    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        with pytest.raises(SectoolError, match="has not answered"):
            cri.ask(path, ID, 0.05)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    st.lists(
        st.text(max_size=30)
        | st.lists(
            st.fixed_dictionaries(
                {},
                optional={
                    "name": st.text(max_size=5) | st.integers(),
                    "containerPort": st.integers(-1, 70000) | st.booleans() | st.text(max_size=3),
                    "protocol": st.sampled_from(["TCP", "UDP", "SCTP", "tcp", "", 6, None]),
                },
            )
            | st.integers()
        ).map(json.dumps),
        max_size=4,
    )
)
def test_any_annotation_gives_ports_or_nothing(texts: list[str]) -> None:
    for name, port in named_ports(texts).items():
        number, _, protocol = port.partition("/")
        assert name
        assert 0 < int(number) < 65536
        assert protocol in ("tcp", "udp", "sctp")


def test_numbers_are_fields_of_the_specification() -> None:
    """Bytes made by hand from api.proto's numbers."""

    def text(number: int, value: str) -> bytes:
        return struct.pack("BB", number << 3 | 2, len(value)) + value.encode()

    assert cri.PodSandboxStatusRequest(pod_sandbox_id="a").SerializeToString() == text(1, "a")
    request = cri.ListContainersRequest()
    request.filter.pod_sandbox_id = "b"
    assert request.SerializeToString() == b"\x0a\x03" + text(3, "b")
    entry = text(1, "k") + text(2, "v")
    answer = cri.PodSandboxStatusResponse.FromString(
        b"\x0a\x11" + text(1, "id") + text(2, text(1, "p").decode()) + b"\x3a\x06" + entry
    )
    assert (answer.status.id, answer.status.metadata.name, dict(answer.status.labels)) == (
        "id",
        "p",
        {"k": "v"},
    )
