"""A real process in a pod's cgroup, found by discovery: its workload bears what the pod's runtime and operator tell."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from nfq import cgroup as cgroups
from sectool.agent.discovery import Discovery
from sectool.agent.identities import Identities, Issued
from sectool.agent.kubernetes import Kubernetes
from sectool.agent.runtimes import Places, Runtimes
from sectool.events import now_us
from sectool.identity.authority import HostAuthority, RootAuthority
from sectool.identity.credential import Credential
from sectool.identity.extensions import LabelConstraints
from sectool.identity.workload import Facts, Workload, resolve
from tests.kernel.conftest import Namespace
from tests.sectool.agent.test_cri import Runtime, container, serving

pytestmark = pytest.mark.kernel


@pytest.fixture
def scope() -> Iterator[tuple[str, Path]]:
    """A container's id and its cgroup, where a kubelet with the systemd driver has it made."""
    identity, uid = secrets.token_hex(32), str(uuid.uuid4()).replace("-", "_")
    point = cgroups.mount()
    top = point / f"sectool{secrets.token_hex(4)}.slice"
    folder = top / f"kubepods-pod{uid}.slice" / f"cri-containerd-{identity}.scope"
    folder.mkdir(parents=True)
    yield identity, folder
    (folder / "cgroup.kill").write_text("1")
    while "populated 1" in (folder / "cgroup.events").read_text():
        os.sched_yield()
    for each in (folder, folder.parent, top):
        each.rmdir()


def namespaces(path: Path, team: str) -> None:
    """What an operator does: a new file in the old one's place."""
    fresh = path.with_suffix(".new")
    item = {"kind": "Namespace", "metadata": {"name": "shop", "labels": {"team": team}}}
    fresh.write_text(json.dumps({"items": [item]}))
    fresh.rename(path)


def test_a_pods_workload_has_its_labels_and_follows_those_of_its_namespace(
    namespace: Namespace, scope: tuple[str, Path], tmp_path: Path
) -> None:
    identity, folder = scope
    runtime, socket, names = Runtime(), tmp_path / "cri.sock", tmp_path / "namespaces.json"
    runtime.containers.append(container(identity, "web", []))
    namespaces(names, "a")
    root = RootAuthority.create(tmp_path / "ca", "example.org", now_us())
    key = ec.generate_private_key(ec.SECP256R1())
    constraints = LabelConstraints({"*": ["*"]}, "/host/node1/")
    host = HostAuthority(
        root.issue_host(key.public_key(), "node1", constraints, now_us()), key, root.certificate
    )
    process = namespace.popen(
        "sleep", "600", preexec_fn=lambda: cgroups.join(folder, os.getpid()), stdin=subprocess.DEVNULL
    )
    nothing = dict.fromkeys(("sockets", "bundles", "storage", "states"), ())
    places = Places(**nothing, cri=(("containerd", socket),), kubelet=tmp_path / "pods")  # type: ignore[arg-type]

    async def found() -> list[dict[str, str]]:
        issued: asyncio.Queue[dict[str, str]] = asyncio.Queue()

        def issue(workload: Workload) -> Credential:
            return host.issue(workload.path, workload.labels, now_us())

        def told(entry: Issued, before: Credential | None) -> None:
            if entry.facts.pid == process.pid:
                issued.put_nowait(dict(entry.credential.peer.labels))

        def which(facts: Facts) -> Workload:
            return resolve(facts, (), {}, host="node1")

        discovery = Discovery(
            Identities(which, issue, told),
            cgroups.Cgroups(),
            lambda turn: None,
            ours=lambda other: other.pid != process.pid,
            runtimes=Runtimes(places, Kubernetes(names)),
        )
        await discovery.start()
        try:
            async with asyncio.timeout(60):
                first = await issued.get()
                namespaces(names, "b")
                return [first, await issued.get()]
        finally:
            await discovery.close()

    with serving(socket, runtime), namespace.enter():
        first, second = asyncio.run(found())
    assert first["k8s.label.app"] == "web"
    assert first["k8s.port.http"] == "8080/tcp"
    assert (first["k8s.namespace"], first["k8s.nslabel.team"]) == ("shop", "a")
    assert second == {**first, "k8s.nslabel.team": "b"}
