"""What a container runtime tells of a pod over the Container Runtime Interface, as the kubelet asks it, too.

    ListContainers(id)             the container: names, image, and the sandbox it is in
    PodSandboxStatus(sandbox)      the pod: name, namespace, uid, labels (the kubelet puts the pod's there)
    ListContainers(sandbox)        ports of all its containers, in an annotation of the kubelet's

gRPC over containerd's or CRI-O's unix socket, service runtime.v1.RuntimeService (kubernetes/cri-api, api.proto). The
fields used are described here, all others are skipped. A sandbox keeps the labels that its pod had when it was made.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sectool.errors import SectoolError
from sectool.spiffe.grpc import GrpcError, Status, call
from sectool.spiffe.protobuf import DecodeError, Messages

SERVICE: Final = "/runtime.v1.RuntimeService/"
PORTS: Final = "io.kubernetes.container.ports"  # the containers' `ports` of the pod's specification, JSON
OF_THE_KUBELET: Final = ("io.kubernetes.pod.name", "io.kubernetes.pod.namespace", "io.kubernetes.pod.uid")
MAX_PORTS: Final = 64  # of a pod, kept

_messages = Messages("sectool/cri.proto", "runtime.v1")
_messages.describe("ContainerMetadata").scalar("name", 1)
_messages.describe("ImageSpec").scalar("image", 1)
_messages.describe("ContainerFilter").scalar("id", 1).scalar("pod_sandbox_id", 3)
_messages.describe("ListContainersRequest").of("filter", 1, "ContainerFilter")
_messages.describe("Container").scalar("id", 1).scalar("pod_sandbox_id", 2).of(
    "metadata", 3, "ContainerMetadata"
).of("image", 4, "ImageSpec").scalar("image_ref", 5).map("labels", 8).map("annotations", 9)
_messages.describe("ListContainersResponse").of("containers", 1, "Container", many=True)
_messages.describe("PodSandboxMetadata").scalar("name", 1).scalar("uid", 2).scalar("namespace", 3)
_messages.describe("PodSandboxStatusRequest").scalar("pod_sandbox_id", 1)
_messages.describe("PodSandboxStatus").scalar("id", 1).of("metadata", 2, "PodSandboxMetadata").map(
    "labels", 7
)
_messages.describe("PodSandboxStatusResponse").of("status", 1, "PodSandboxStatus")

ListContainersRequest: type[Any] = _messages.type("ListContainersRequest")
ListContainersResponse: type[Any] = _messages.type("ListContainersResponse")
PodSandboxStatusRequest: type[Any] = _messages.type("PodSandboxStatusRequest")
PodSandboxStatusResponse: type[Any] = _messages.type("PodSandboxStatusResponse")


@dataclass(frozen=True, slots=True)
class Told:
    """A container and its pod. Texts are '' where the runtime did not say; `ports` by name, as `8080/tcp`."""

    pod: str
    namespace: str
    uid: str
    labels: Mapping[str, str]
    ports: Mapping[str, str]
    container: str = ""
    image: str = ""
    digest: str = ""
    notes: Mapping[str, str] = field(default_factory=dict)  # annotations of the container


def ask(socket: Path, container: str, timeout_s: float) -> Told | None:
    """What is told of a container or sandbox; None when it is not known there. Blocks: not for an event loop.

    Raises SectoolError when there is no answer within `timeout_s`, or none that makes sense.
    """
    return asyncio.run(_ask(socket, container, timeout_s))


async def _ask(socket: Path, container: str, timeout_s: float) -> Told | None:
    try:
        async with asyncio.timeout(timeout_s):
            mine = next(iter(await _containers(socket, id=container)), None)
            sandbox = mine.pod_sandbox_id if mine is not None else container
            pod = await _sandbox(socket, sandbox, known=mine is not None)
            if pod is None:
                return None
            all_of_pod = await _containers(socket, pod_sandbox_id=sandbox)
    except TimeoutError:
        raise SectoolError(
            f"the container runtime at {socket} has not answered for {timeout_s:g} s"
        ) from None
    except DecodeError:
        raise SectoolError(f"the container runtime at {socket} does not speak CRI v1") from None
    told = Told(
        pod.metadata.name,
        pod.metadata.namespace,
        pod.metadata.uid,
        {key: value for key, value in sorted(pod.labels.items()) if key not in OF_THE_KUBELET},
        named_ports(each.annotations.get(PORTS, "") for each in all_of_pod),
    )
    return told if mine is None else _with_container(told, mine)


def _with_container(told: Told, mine: Any) -> Told:
    digest = mine.image_ref.rpartition("@")[2]
    return Told(
        told.pod,
        told.namespace,
        told.uid,
        told.labels,
        told.ports,
        mine.metadata.name,
        mine.image.image,
        digest if digest.startswith("sha256:") else "",
        dict(sorted(mine.annotations.items())),
    )


async def _containers(socket: Path, **chosen: str) -> list[Any]:
    request = ListContainersRequest()
    for name, value in chosen.items():
        setattr(request.filter, name, value)
    answer = await _call(socket, "ListContainers", request)
    return list(ListContainersResponse.FromString(answer).containers)


async def _sandbox(socket: Path, sandbox: str, *, known: bool) -> Any:
    """The sandbox's status; None when there is none of that id."""
    try:
        answer = await _call(socket, "PodSandboxStatus", PodSandboxStatusRequest(pod_sandbox_id=sandbox))
    except GrpcError as error:
        if known or error.status != Status.NOT_FOUND:  # one that has a container was there just now
            raise
        return None
    status = PodSandboxStatusResponse.FromString(answer).status
    return status if status.metadata.name else None


async def _call(socket: Path, method: str, request: Any) -> bytes:
    answer = b""
    async for message in call(socket, SERVICE + method, request.SerializeToString(), {}):
        answer = message
    return answer


def named_ports(annotations: Iterable[str]) -> dict[str, str]:
    """Ports by their names, as `8080/tcp`, out of the kubelet's annotations; what makes no sense is left out.

    The first of two that have the same name counts.
    """
    out: dict[str, str] = {}
    for text in annotations:
        try:
            found = json.loads(text) if text else []
        except (ValueError, RecursionError):
            continue
        for port in found if isinstance(found, list) else ():
            if not isinstance(port, dict):
                continue
            name, number, protocol = port.get("name"), port.get("containerPort"), port.get("protocol", "TCP")
            if not isinstance(name, str) or not isinstance(protocol, str) or type(number) is not int:
                continue
            if name and 0 < number < 1 << 16 and protocol in ("TCP", "UDP", "SCTP") and len(out) < MAX_PORTS:
                out.setdefault(name, f"{number}/{protocol.lower()}")
    return out
