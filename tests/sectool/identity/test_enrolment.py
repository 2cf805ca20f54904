from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sectool.clock import DAY, SECOND
from sectool.errors import CredentialError, SectoolError, UsageError
from sectool.events import DropReason
from sectool.identity.enrolment import enroll_host, init_ca, load_host
from sectool.identity.extensions import LabelConstraints
from sectool.identity.verify import Verifier
from sectool.labels import LabelSet

NOW = 1_772_330_400 * SECOND


@pytest.fixture
def state(tmp_path: Path) -> Path:
    init_ca(tmp_path, "example.org", now_us=NOW)
    return tmp_path


def enroll(state: Path, **over: Any) -> Any:
    arguments: dict[str, Any] = {"labels": {"env": "dev"}, "now_us": NOW, **over}
    return enroll_host(state, arguments.pop("name", "web1"), arguments.pop("ca", state / "ca"), **arguments)


def test_enrolment_writes_what_the_agent_loads(state: Path) -> None:
    made = enroll(state, enforced_networks=["10.1.0.0/16", "fd00::/8"])
    folder = state / "host"
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert modes == {"host.crt": 0o644, "host.key": 0o600, "host.yaml": 0o644, "trust.pem": 0o644}
    assert folder.stat().st_mode & 0o777 == 0o700
    host = load_host(state)
    assert (host.name, host.trust_domain, host.labels) == ("web1", "example.org", LabelSet({"env": "dev"}))
    assert host.constraints == made.constraints
    assert [str(network) for network in host.enforced_networks] == ["10.1.0.0/16", "fd00::/8"]
    assert host.bundle.trust_domains == ("example.org",)
    credential = host.authority.issue("/host/web1/wl/a", LabelSet({"app": "a", "env": "dev"}), NOW)
    assert Verifier(host.bundle).verify(credential.blob, NOW) == credential.peer


def test_a_host_pins_its_own_labels_unless_told_otherwise(state: Path) -> None:
    """A stolen dev host cannot mint env=prod."""
    host = enroll(state)
    with pytest.raises(CredentialError) as error:
        host.authority.issue("/host/web1/wl/a", LabelSet({"env": "prod"}), NOW)
    assert error.value.reason == DropReason.LABEL_NOT_PERMITTED
    with pytest.raises(CredentialError):
        host.authority.issue("/host/web2/wl/a", LabelSet({"env": "dev"}), NOW)


def test_two_hosts_of_one_ca_verify_each_other(state: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    one, two = enroll(state), enroll_host(other, "db1", state / "ca", now_us=NOW)
    credential = two.authority.issue("/host/db1/wl/db", LabelSet({"app": "db"}), NOW)
    peer = Verifier(one.bundle).verify(credential.blob, NOW)
    assert (peer.host, peer.labels["app"]) == ("db1", "db")


def test_given_constraints_leave_room_for_what_every_workload_carries(state: Path) -> None:
    host = enroll(state, constraints=LabelConstraints({"app": ["shop*"], "env": ["dev"]}))
    assert host.constraints.path_prefix == "/host/web1/"
    labels = LabelSet({"app": "shop2", "exe": "x", "user": "root", "unit": "a.service", "env": "dev"})
    assert host.authority.issue("/host/web1/wl/a", labels, NOW).peer.labels["app"] == "shop2"
    with pytest.raises(CredentialError):
        host.authority.issue("/host/web1/wl/a", LabelSet({"team": "x"}), NOW)


def test_an_enrolment_is_not_overwritten_unless_forced(state: Path) -> None:
    first = enroll(state)
    with pytest.raises(UsageError, match="already") as error:
        enroll(state)
    assert "--force" in error.value.hint
    assert load_host(state).authority.certificate == first.authority.certificate
    second = enroll(state, force=True)
    assert load_host(state).authority.certificate == second.authority.certificate
    assert sorted(path.name for path in state.iterdir()) == ["ca", "host"]


@pytest.mark.parametrize(
    ("over", "match"),
    [
        ({"name": "a b"}, "host name"),
        ({"name": ""}, "host name"),
        ({"labels": {"a b": "c"}}, "label key"),
        ({"labels": {"domain": "x"}}, "domain"),
        ({"labels": {"user": "root"}}, "attested"),
        ({"enforced_networks": ["10.0.0.1/8"]}, "enforced network"),
        ({"enforced_networks": ["nowhere"]}, "enforced network"),
        ({"constraints": LabelConstraints({"env": ["prod"]})}, "not within its own constraints"),
        ({"constraints": LabelConstraints({"*": ["*"]}, "/host/db1/")}, "leaves no room"),
        (
            {
                "constraints": LabelConstraints(
                    {f"k{i}": [f"{i * 7919**4:x}"] for i in range(50)} | {"env": ["dev"]}
                )
            },
            "cannot be enrolled",
        ),
        ({"ca": Path("/nonexistent")}, "does not exist"),
        ({"days": 0}, "days"),
        ({"now_us": NOW + 11 * 365 * DAY}, "root is valid until"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing_behind(
    state: Path, over: dict[str, Any], match: str
) -> None:
    with pytest.raises(UsageError, match=match):
        enroll(state, **over)
    assert [path.name for path in state.iterdir()] == ["ca"]


def test_a_host_that_is_not_enrolled_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no host CA") as error:
        load_host(tmp_path)
    assert "sectool host enroll" in error.value.hint


@pytest.mark.parametrize("name", ["host.crt", "host.key", "trust.pem", "host.yaml"])
def test_a_missing_or_damaged_file_is_named(state: Path, name: str) -> None:
    enroll(state)
    path = state / "host" / name
    whole = path.read_bytes()
    for damaged in (b"", whole[: len(whole) // 2], b"\xff\x00" * 50):
        path.write_bytes(damaged)
        with pytest.raises(SectoolError):
            load_host(state)
    path.write_bytes(whole)
    load_host(state)
    path.unlink()
    with pytest.raises(UsageError, match=name):
        load_host(state)


def test_a_host_key_that_others_can_read_is_refused(state: Path) -> None:
    enroll(state)
    (state / "host" / "host.key").chmod(0o640)
    with pytest.raises(SectoolError, match="0640"):
        load_host(state)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "db1"},
        {"name": 1},
        {"trust_domain": "b.example"},
        {"labels": ["env"]},
        {"labels": {"env": 1}},
        {"labels": {"a b": "c"}},
        {"labels": None, "extra": 1},
        {"enforced_networks": ["x"]},
        {"enforced_networks": 7},
        {"enforced_networks": [1.5]},
    ],
)
def test_an_edited_host_yaml_is_checked(state: Path, change: dict[str, Any]) -> None:
    enroll(state)
    path = state / "host" / "host.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **change}))
    with pytest.raises(SectoolError):
        load_host(state)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(text=st.text(max_size=200) | st.binary(max_size=100))
def test_arbitrary_host_yaml_is_an_error_in_words(state: Path, text: str | bytes) -> None:
    if not (state / "host").exists():
        enroll(state)
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
    (state / "host" / "host.yaml").write_bytes(data)
    with pytest.raises(SectoolError):
        load_host(state)


def test_the_certificate_of_another_ca_is_noticed(
    state: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    enroll(state)
    other = tmp_path_factory.mktemp("other")
    init_ca(other, "example.org", now_us=NOW)
    enroll(other)
    (state / "host" / "trust.pem").write_bytes((other / "host" / "trust.pem").read_bytes())
    with pytest.raises(SectoolError, match="no root of"):
        load_host(state)
