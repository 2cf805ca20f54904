from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sectool.errors import CredentialError
from sectool.events import DropReason
from sectool.identity.spiffe import check_path
from sectool.identity.workload import Facts, attested_labels, label_value, path_segment, resolve, systemd_unit
from sectool.labels import LabelSet, check_label

NGINX = Facts(
    33, "www-data", "/usr/sbin/nginx", "ab" * 32, "/system.slice/nginx.service", "nginx.service", 4711
)


@dataclass(frozen=True)
class Document:
    name: str
    match: Mapping[str, str]
    labels: Mapping[str, str]

    def matches(self, facts: Mapping[str, str], /) -> bool:
        return all(facts.get(key) == value for key, value in self.match.items())


WEB = Document("web", {"systemd.unit": "nginx.service"}, {"app": "web"})


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("/", ""),
        ("", ""),
        ("/init.scope", "init.scope"),
        ("/system.slice", ""),
        ("/system.slice/nginx.service", "nginx.service"),
        ("/system.slice/nginx.service/", "nginx.service"),
        ("/system.slice/nginx.service/worker", "nginx.service"),
        ("/system.slice/system-getty.slice/getty@tty1.service", "getty@tty1.service"),
        ("/system.slice/docker-0a1b.scope/payload", "docker-0a1b.scope"),
        ("/user.slice/user-1000.slice/session-3.scope", "session-3.scope"),
        ("/user.slice/user-1000.slice/user@1000.service", "user@1000.service"),
        (
            "/user.slice/user-1000.slice/user@1000.service/app.slice/editor.service",
            "user@1000.service/editor.service",
        ),
        ("/system.slice/_cgroup.service", "cgroup.service"),
        ("/sectool/web", ""),
        ("/machine/nginx.service", ""),  # not below slices: systemd did not make it
        # names made by whoever was handed the subtree
        ("/user.slice/user-1000.slice/user@1000.service/nginx.service", "user@1000.service/nginx.service"),
        ("/system.slice/docker-0a1b.scope/system.slice/nginx.service", "docker-0a1b.scope"),
        ("/system.slice/web.service/nginx.service", "web.service"),
    ],
)
def test_the_unit_of_a_cgroup(cgroup: str, unit: str) -> None:
    assert systemd_unit(cgroup) == unit


def test_a_document_names_a_workload() -> None:
    workload = resolve(NGINX, [WEB], {}, host="web1", host_labels={"zone": "eu"})
    assert (workload.name, workload.path, workload.automatic) == ("web", "/host/web1/wl/web", False)
    assert str(workload.labels) == "app=web,exe=nginx,unit=nginx.service,user=www-data,zone=eu"


def test_the_first_matching_document_counts() -> None:
    other = Document("other", {"user": "www-data"}, {"app": "other"})
    assert resolve(NGINX, [other, WEB], {}, host="web1").name == "other"
    assert resolve(replace(NGINX, user="x"), [other, WEB], {}, host="web1").name == "web"


def test_what_matches_nothing_gets_an_automatic_identity() -> None:
    facts = Facts(
        1000, "ana", "/home/ana/My Tool (v2)", "cd" * 32, "/user.slice/session-3.scope", "session-3.scope", 7
    )
    workload = resolve(facts, [WEB], {}, host="web1", host_labels={"env": "dev"})
    assert workload.automatic
    assert workload.path == f"/host/web1/wl/{workload.name}"
    assert workload.name.startswith("My_Tool__v2_-")
    assert len(workload.name.rpartition("-")[2]) == 8
    assert str(workload.labels) == "env=dev,exe=My_Tool__v2_,unit=session-3.scope,user=ana"


def test_an_automatic_identity_stays_the_same_across_restarts_and_sessions() -> None:
    base = Facts(1000, "ana", "/usr/bin/curl", "cd" * 32, "/user.slice/session-3.scope", "session-3.scope", 7)
    name = resolve(base, [], {}, host="h").name
    assert resolve(replace(base, pid=8, cgroup="/x", unit="session-4.scope"), [], {}, host="h").name == name
    for other in (
        replace(base, uid=1001),
        replace(base, executable="/opt/bin/curl"),
        replace(base, sha256="ef" * 32),
        replace(base, unit="fetch.service"),
    ):
        assert resolve(other, [], {}, host="h").name != name


def test_a_registered_cgroup_counts_before_documents_and_covers_what_is_below() -> None:
    registered = {"/sectool/run-1": {"app": "batch"}, "/sectool": {"app": "outer"}}
    for cgroup in ("/sectool/run-1", "/sectool/run-1/child/deep"):
        workload = resolve(replace(NGINX, cgroup=cgroup), [WEB], registered, host="web1")
        assert (workload.path, workload.labels["app"]) == ("/host/web1/run/run-1", "batch")
        assert not workload.automatic
    assert (
        resolve(replace(NGINX, cgroup="/sectool/run-10"), [WEB], registered, host="web1").labels["app"]
        == "outer"
    )
    assert resolve(replace(NGINX, cgroup="/elsewhere/run-1"), [WEB], registered, host="web1").name == "web"


def test_attested_labels_cannot_be_overridden() -> None:
    lie = {"exe": "sshd", "user": "root", "unit": "ssh.service", "app": "x"}
    expected = {"exe": "nginx", "user": "www-data", "unit": "nginx.service", "app": "x"}
    liar = Document("liar", {"user": "www-data"}, lie)
    assert dict(resolve(NGINX, [liar], {}, host="h").labels) == expected
    assert dict(resolve(NGINX, [], {NGINX.cgroup: lie}, host="h").labels) == expected
    assert resolve(NGINX, [WEB], {}, host="h", host_labels=lie).labels["user"] == "www-data"


def test_a_document_wins_over_the_host_labels() -> None:
    """Where the host CA pins a label, issuing such an SVID is refused: nothing is dropped silently."""
    assert resolve(NGINX, [WEB], {}, host="h", host_labels={"app": "host"}).labels["app"] == "web"


def test_unknown_users_are_told_by_number_and_empty_facts_left_out() -> None:
    facts = Facts(4242, "", "", "", "/", "", 0)
    assert attested_labels(facts) == {"user": "4242"}
    assert resolve(facts, [], {}, host="h").name.startswith("unknown-")


def test_labels_outside_the_alphabet_are_an_error_in_words() -> None:
    bad = Document("bad", {"user": "www-data"}, {"app": "a b"})
    with pytest.raises(CredentialError, match="workload bad") as error:
        resolve(NGINX, [bad], {}, host="h")
    assert error.value.reason == DropReason.NO_LOCAL_IDENTITY


def test_the_id_follows_path_and_labels() -> None:
    one = resolve(NGINX, [WEB], {}, host="h")
    assert one.id == resolve(replace(NGINX, pid=1), [WEB], {}, host="h").id
    assert one.id != resolve(NGINX, [WEB], {}, host="i").id
    assert one.id != replace(one, labels=LabelSet({"app": "b"})).id


def test_the_keys_documents_match_on() -> None:
    assert NGINX.mapping() == {
        "systemd.unit": "nginx.service",
        "user": "www-data",
        "executable": "/usr/sbin/nginx",
        "sha256": "ab" * 32,
        "cgroup": "/system.slice/nginx.service",
    }


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", ""),
        ("nginx", "nginx"),
        ("a b", "a_b"),
        (".", "_"),
        ("-x", "_x"),
        ("x-", "x_"),
        ("/", "/"),
        ("ä", "_"),
        ("a\x1b[m", "a__m"),
    ],
)
def test_label_values(text: str, value: str) -> None:
    assert label_value(text) == value


@given(st.text())
def test_any_text_becomes_a_label_value_and_a_path_segment(text: str) -> None:
    check_label("k", label_value(text))
    check_path("/" + path_segment(text))


@given(st.builds(Facts, st.integers(0, 2**32 - 1), *[st.text(max_size=80)] * 5, st.integers(0, 2**22)))
def test_any_process_resolves(facts: Facts) -> None:
    workload = resolve(facts, [WEB], {"/a": {"app": "a"}}, host="web1")
    check_path(workload.path)
    assert workload.path.startswith("/host/web1/")
    assert set(attested_labels(facts).items()) <= set(workload.labels.items())
