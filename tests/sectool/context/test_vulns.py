"""Findings over time: new, old, fixed; and whose they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from sectool.clock import DAY, HOUR
from sectool.context.vulnreport import Finding, Report
from sectool.context.vulns import Vulnerabilities
from sectool.errors import SectoolError
from sectool.labels import LabelSet
from sectool.policy import Engine, parse
from sectool.policy.request import Party, Request

DIGEST, OTHER, THIRD = ("sha256:" + pair * 32 for pair in ("ab", "cd", "ef"))
NOW = 1_772_330_400_000_000  # 2026-03-01T02:00:00Z

WEB = {"executable": "/usr/sbin/nginx"}
SHOP = {"executable": "/opt/shop"}
INSIDE = {"executable": "/usr/sbin/nginx", "container.id": "1", "container.digest": DIGEST}


def owner(path: str) -> str:
    return "nginx 1:1.22.1-9" if path == "/usr/sbin/nginx" else ""


def finding(name: str, severity: str, package: str = "nginx", **over: str) -> Finding:
    return Finding(name, severity, package, **over)


def report(*findings: Finding, digests: tuple[str, ...] = (), made: int = 0, name: str = "/") -> Report:
    return Report("trivy", name, digests, made, findings)


@pytest.fixture
def known(tmp_path: Path) -> Vulnerabilities:
    return Vulnerabilities(tmp_path / "vulns.json")


def test_what_nobody_looked_at_has_no_label(known: Vulnerabilities) -> None:
    assert known.labels(WEB, owner) == {}
    known.take(report(digests=(DIGEST,)), NOW)
    assert known.labels(WEB, owner) == {}
    assert known.labels(INSIDE, owner) == {"vuln": "none"}


def test_programs_are_found_by_package_version_and_path(known: Vulnerabilities) -> None:
    known.take(
        report(
            finding("A", "medium", version="1.22.1-9"),
            finding("B", "critical", version="1.18"),  # not what is installed any more
            finding("C", "high", "openssl"),
            finding("D", "low", "stdlib", path="/opt/shop"),
        ),
        NOW,
    )
    assert known.labels(WEB, owner)["vuln"] == "medium"
    assert known.labels(SHOP, owner)["vuln"] == "low"
    assert known.labels({"executable": "/bin/true"}, owner) == {"vuln": "none"}
    assert known.labels({"executable": "/opt/shop", "container.id": "1"}, owner) == {}


def test_containers_are_found_by_any_digest_of_their_image(known: Vulnerabilities) -> None:
    known.take(report(finding("A", "high"), digests=(DIGEST, OTHER), name="shop"), NOW)
    known.take(report(finding("A", "high"), finding("B", "low"), digests=(OTHER, THIRD), name="shop"), NOW)
    assert len(known.subjects) == 1
    for digest in (DIGEST, OTHER, THIRD):
        assert known.labels({**INSIDE, "container.digest": digest}, owner)["vuln"] == "high"
    assert known.labels({**INSIDE, "container.digest": "sha256:" + "0" * 64}, owner) == {}


def test_findings_age_and_get_fixed(known: Vulnerabilities, tmp_path: Path) -> None:
    first = known.take(report(finding("A", "critical"), finding("B", "low")), NOW)
    assert (first.new, first.fixed, first.open) == (2, 0, 2)
    second = known.take(report(finding("A", "critical"), finding("C", "critical")), NOW + DAY)
    assert (second.new, second.fixed, second.open) == (1, 1, 2)
    assert known.labels(WEB, owner) == {"vuln": "critical", "vuln-age": "2026-03-01T02:00:00Z"}
    again = Vulnerabilities(tmp_path / "vulns.json")
    assert again.subjects == known.subjects
    third = again.take(report(finding("C", "critical")), NOW + 2 * DAY)
    assert (third.new, third.fixed) == (0, 1)
    assert again.labels(WEB, owner)["vuln-age"] == "2026-03-02T02:00:00Z"
    again.take(report(), NOW + 3 * DAY)
    assert again.labels(WEB, owner) == {"vuln": "none"}
    assert [k.fixed_us for k in again.subjects[0].known] == [NOW + DAY, NOW + 2 * DAY, NOW + 3 * DAY]
    back = again.take(report(finding("A", "critical")), NOW + 4 * DAY)
    assert back.new == 1
    assert again.labels(WEB, owner)["vuln-age"] == "2026-03-05T02:00:00Z"


def test_a_report_of_yesterday_counts_from_yesterday_and_none_from_tomorrow(known: Vulnerabilities) -> None:
    known.take(report(finding("A", "high"), made=NOW - DAY), NOW)
    assert known.labels(WEB, owner)["vuln-age"] == "2026-02-28T02:00:00Z"
    known.take(report(finding("B", "critical"), made=NOW + DAY), NOW)
    assert known.labels(WEB, owner)["vuln-age"] == "2026-03-01T02:00:00Z"


def test_the_labels_mean_to_policy_what_they_say(known: Vulnerabilities) -> None:
    """The guardrail of the documentation: a week after, and by itself."""
    known.take(report(finding("A", "critical")), NOW)
    engine = Engine(
        parse(
            "kind: Policy\nname: p\nowner: o\nrules: [allow app=web to call app=out]\n---\n"
            "kind: Guardrail\nname: g\nowner: s\n"
            "rules: [deny vuln=critical to call app=out where source.vuln-age > 7d]\n"
        )
    )
    source = Party(LabelSet({"app": "web", **known.labels(WEB, owner)}))
    asked = Request(source, Party(LabelSet({"app": "out"})), 6, 443)
    young = engine.decide(asked, NOW + HOUR)
    assert young.rule is not None
    assert young.rule.policy == "p"
    assert young.valid_until_us == NOW + 7 * DAY + 1
    old = engine.decide(asked, NOW + 7 * DAY + 1)
    assert old.rule is not None
    assert old.rule.policy == "g"


def test_a_subject_can_be_forgotten(known: Vulnerabilities) -> None:
    known.take(report(finding("A", "high"), digests=(DIGEST,), name="shop"), NOW)
    with pytest.raises(SectoolError, match="no report"):
        known.forget("other")
    known.forget(DIGEST)
    assert known.subjects == []


@pytest.mark.parametrize("data", [b"", b"{}", b'{"subjects": [{}]}', b"[1]"])
def test_a_damaged_file_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "vulns.json"
    path.write_bytes(data)
    with pytest.raises(SectoolError, match=r"vulns\.json"):
        Vulnerabilities(path)
