"""Container ids and pod uids from cgroup paths, as the runtimes make them and as liars would."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectool.identity.containers import Container, ContainerRef, container_of

ID = "3f1c" * 16
OTHER = "ab12" * 16
POD = "9a8b7c6d-1234-4abc-8def-0123456789ab"
POD_ = POD.replace("-", "_")
BESTEFFORT = "/kubepods.slice/kubepods-besteffort.slice"
STATIC = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(
    ("path", "runtime", "pod"),
    [
        (f"/system.slice/docker-{ID}.scope", "docker", ""),
        (f"/docker/{ID}", "docker", ""),
        (f"/docker/{ID}/init", "docker", ""),
        (f"/machine.slice/libpod-{ID}.scope/container", "podman", ""),
        (f"/machine.slice/machine-libpod_pod_{OTHER}.slice/libpod-{ID}.scope", "podman", ""),
        (f"/libpod_parent/libpod-{ID}", "podman", ""),
        (f"/system.slice/nerdctl-{ID}.scope", "containerd", ""),
        (f"/default/{ID}", "containerd", ""),
        (
            f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{POD_}.slice/cri-containerd-{ID}.scope",
            "containerd",
            POD,
        ),
        (f"/kubepods.slice/kubepods-pod{POD_}.slice/crio-{ID}.scope", "cri-o", POD),
        (f"{BESTEFFORT}/kubepods-besteffort-pod{STATIC}.slice/docker-{ID}.scope", "docker", STATIC),
        (
            "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/"
            f"kubelet-kubepods-burstable-pod{POD_}.slice/cri-containerd-{ID}.scope",
            "containerd",
            POD,
        ),
        (f"/kubepods/burstable/pod{POD}/{ID}", "", POD),
        (f"/kubepods/pod{POD}/crio-{ID}", "cri-o", POD),
        (f"/kubelet/kubepods/besteffort/pod{POD}/{ID}/sub", "", POD),
    ],
)  # fmt: skip
def test_forms_of_the_runtimes(path: str, runtime: str, pod: str) -> None:
    assert container_of(path) == ContainerRef(runtime, ID, pod)


@pytest.mark.parametrize(
    "path",
    [
        "/", "", "/system.slice/nginx.service", f"/system.slice/docker-{ID}.service", f"/docker-{ID}",
        f"/user.slice/user-1000.slice/user@1000.service/app.slice/docker-{ID}.scope",
        f"/user.slice/user-1000.slice/user@1000.service/docker/{ID}",
        f"/system.slice/ssh.service/docker-{ID}.scope",
        f"/session.scope/kubepods/burstable/pod{POD}/{ID}",
        f"/kubepods/burstable/{ID}", f"/docker/{ID[:-1]}", f"/docker/{ID}0", f"/docker/{ID.upper()}",
        f"/system.slice/libpod-conmon-{ID}.scope", f"/kubepods/pod{POD}/../{ID}",
    ],
)  # fmt: skip
def test_what_only_looks_like_one(path: str) -> None:
    assert container_of(path) is None


def test_a_container_inside_a_container_is_the_outer_one() -> None:
    found = container_of(f"/docker/{ID}/docker/{OTHER}")
    assert found is not None
    assert found.id == ID
    found = container_of(f"/system.slice/docker-{ID}.scope/kubepods/pod{POD}/{OTHER}")
    assert found == ContainerRef("docker", ID)


@given(st.text(max_size=40))
def test_a_name_inside_a_container_never_hides_or_changes_it(below: str) -> None:
    assert container_of(f"/system.slice/docker-{ID}.scope/{below}") == ContainerRef("docker", ID)
    inside = container_of(f"/user.slice/user@1000.service/{below}/docker-{ID}.scope")
    assert inside is None


def test_facts_are_what_is_known_and_bounded() -> None:
    ref = ContainerRef("docker", ID)
    assert Container(ref).facts() == (("container.id", ID), ("container.runtime", "docker"))
    many = Container(ref, name="n" * 9999, labels={f"k{i}": "v" * 9999 for i in range(1000)}).facts()
    assert len(many) == 64 + 3
    assert max(len(value) for _, value in many) == 512
