"""Which labels of pods count, and the operator's file of namespaces."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sectool.agent.kubernetes import MAX_FILE, Kubernetes, read_namespaces

EXAMPLES = int(os.environ.get("SECTOOL_NAMESPACES_EXAMPLES", "60"))
LISTED = {
    "apiVersion": "v1",
    "kind": "List",
    "items": [
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {
                "name": "shop",
                "labels": {"kubernetes.io/metadata.name": "shop", "team": "a", "empty": ""},
            },
        },
        {"kind": "Namespace", "metadata": {"name": "bare", "labels": None}},
        {"kind": "Namespace", "metadata": {"name": "barer"}},
    ],
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4) | st.sampled_from(["Namespace", "shop"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["items", "kind", "metadata", "name", "labels"]) | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


def test_labels_of_namespaces_as_kubectl_prints_them() -> None:
    found = read_namespaces(json.dumps(LISTED).encode())
    assert found == {"shop": {"team": "a", "empty": ""}, "bare": {}, "barer": {}}


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.binary(max_size=40) | JSON.map(lambda v: json.dumps(v).encode()))
def test_any_file_gives_texts_or_is_refused(data: bytes) -> None:
    try:
        found = read_namespaces(data)
    except ValueError as error:
        assert str(error)
        return
    assert all(
        isinstance(name, str) and all(isinstance(v, str) for v in labels.values())
        for name, labels in found.items()
    )


def test_a_namespace_twice_or_nested_too_deeply_is_refused() -> None:
    twice = {"items": [LISTED["items"][0], LISTED["items"][0]]}
    with pytest.raises(ValueError, match="twice"):
        read_namespaces(json.dumps(twice).encode())
    with pytest.raises(ValueError, match="deeply"):
        read_namespaces(b"[" * 200_000)


def test_the_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "namespaces.json"
    known = Kubernetes(path, owner=os.getuid())
    assert not known.look()
    assert "does not count" in known.problem
    path.write_text(json.dumps(LISTED))
    assert known.look()
    assert (known.of_namespace("shop"), known.of_namespace("none"), known.problem) == (
        {"team": "a", "empty": ""},
        {},
        "",
    )
    assert not known.look()
    again = tmp_path / "again"
    again.write_text(json.dumps({"items": []}))
    again.rename(path)
    assert known.look()
    assert known.of_namespace("shop") == {}


@pytest.mark.parametrize("how", ["damaged", "of another", "writable", "too large", "gone"])
def test_a_file_that_does_not_count_changes_nothing(tmp_path: Path, how: str) -> None:
    path = tmp_path / "namespaces.json"
    path.write_text(json.dumps(LISTED))
    known = Kubernetes(path, owner=os.getuid())
    known.look()
    if how == "gone":
        path.unlink()
    else:
        path.unlink()
        size = MAX_FILE if how == "too large" else 0
        path.write_text("{" if how == "damaged" else json.dumps({"items": []}) + " " * size)
    if how == "writable":
        path.chmod(0o666)
    if how == "of another":
        known.owner += 1
    assert not known.look()
    assert known.problem
    assert known.of_namespace("shop") == {"team": "a", "empty": ""}


def test_labels_that_pass_with_a_rollout_are_left_out_unless_named() -> None:
    labels = {"app": "web", "app.kubernetes.io/name": "web", "pod-template-hash": "6f7d"}
    assert Kubernetes().chosen(labels) == {"app": "web", "app.kubernetes.io/name": "web"}
    assert Kubernetes(pod_labels=("app.kubernetes.io/*",)).chosen(labels) == {"app.kubernetes.io/name": "web"}
    assert Kubernetes(pod_labels=("pod-template-hash",)).chosen(labels) == {"pod-template-hash": "6f7d"}
    assert Kubernetes(pod_labels=()).chosen(labels) == {}
