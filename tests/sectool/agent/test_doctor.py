"""What is wrong on purpose is found, named, and comes with a remedy; nothing is changed by looking."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from sectool.agent import statechecks
from sectool.agent.doctor import Finding, Level, examine, worst
from sectool.agent.hostchecks import Checked
from sectool.agent.settings import Settings
from sectool.api.paths import Paths
from sectool.identity.enrolment import enroll_host, init_ca

DAY_US = 86_400_000_000


def enrolled(folder: Path, *, at_us: int | None = None, days: int = 365) -> Paths:
    """A state folder with a root and an enrolled host."""
    paths = Paths(folder / "state", folder / "run")
    paths.state.mkdir()
    init_ca(paths.state, "shop.example", now_us=at_us)
    enroll_host(paths.state, "web-1", paths.state / "ca", days=days, now_us=at_us)
    return paths


def found(paths: Paths, settings: Settings | None = None) -> dict[str, Checked]:
    """Findings about the state that are not good, by check."""
    checked = statechecks.checks(paths, settings or Settings())
    return {one[0]: one for one in checked if one[1] != "good"}


def test_an_enrolled_host_is_in_order(tmp_path: Path) -> None:
    assert set(found(enrolled(tmp_path))) <= {"disk"}


def test_no_state_is_a_note(tmp_path: Path) -> None:
    only = found(Paths(tmp_path / "none", tmp_path / "run"))
    assert only["state folder"][1] == "note"
    assert "sectool host enroll" in only["state folder"][3]


def test_a_key_others_can_read(tmp_path: Path) -> None:
    paths = enrolled(tmp_path)
    (paths.host / "host.key").chmod(0o640)
    bad = found(paths)
    assert bad["private keys"][1] == "bad"
    assert "host.key (mode 0640" in bad["private keys"][2]


def test_a_folder_others_can_write_in(tmp_path: Path) -> None:
    paths = enrolled(tmp_path)
    paths.state.chmod(0o777)
    assert found(paths)["state folder"][1] == "bad"


@pytest.mark.parametrize(
    ("age_days", "days", "level", "words"),
    [
        (400, 365, "bad", "ended"),
        (-3, 365, "bad", "begins in"),
        (350, 365, "warning", "ends in"),
    ],
)
def test_certificates_out_of_time(tmp_path: Path, age_days: int, days: int, level: str, words: str) -> None:
    made = time.time_ns() // 1000 - age_days * DAY_US
    said = found(enrolled(tmp_path, at_us=made, days=days))["enrolment"]
    assert said[1] == level
    assert words in said[2]
    assert said[3]


def test_files_of_different_hosts(tmp_path: Path) -> None:
    paths = enrolled(tmp_path)
    (paths.host / "host.yaml").write_text(
        (paths.host / "host.yaml").read_text().replace("web-1", "other"), encoding="utf-8"
    )
    assert found(paths)["enrolment"][1] == "bad"


def test_a_group_that_is_not_there(tmp_path: Path) -> None:
    said = found(enrolled(tmp_path), Settings(socket_group="no-such-group"))["socket group"]
    assert said[1] == "bad"
    assert "groupadd" in said[3]


def test_settings_that_cannot_be_read_are_one_finding_among_the_others(tmp_path: Path) -> None:
    paths = enrolled(tmp_path)
    paths.settings.write_text("qeue: 7\n")
    findings = examine(paths)
    [wrong] = [f for f in findings if f.check == "settings"]
    assert wrong.level is Level.BAD
    assert "unknown setting 'qeue'" in wrong.message
    assert wrong.message.startswith(f"{paths.settings}:1:1")
    assert any(f.check == "enrolment" and f.level is Level.GOOD for f in findings)
    assert worst(findings) is Level.BAD


def test_whatever_is_wrong_comes_with_a_remedy(tmp_path: Path) -> None:
    paths = enrolled(tmp_path)
    for finding in examine(paths):
        assert finding.level is Level.GOOD or finding.hint, finding


def test_the_worst_counts() -> None:
    def one(level: Level) -> Finding:
        return Finding("a", "b", level, "c")

    assert worst([]) is Level.GOOD
    assert worst([one(Level.NOTE), one(Level.WARNING), one(Level.GOOD)]) is Level.WARNING
    assert worst([one(Level.BAD), one(Level.NOTE)]) is Level.BAD
