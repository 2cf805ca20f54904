"""Reports of Trivy and Grype: what is taken of them, and what is refused with its place."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sectool.context.vulnreport import MAX_TEXT, SEVERITIES, Finding, read_report
from sectool.errors import UsageError

DIGEST = "sha256:" + "ab" * 32
OTHER = "sha256:" + "cd" * 32


def trivy(*vulnerabilities: dict[str, Any], **over: Any) -> dict[str, Any]:
    return {
        "SchemaVersion": 2,
        "CreatedAt": "2026-03-01T10:00:00.123456789Z",
        "ArtifactName": "shop/web:1.2",
        "ArtifactType": "container_image",
        "Metadata": {"ImageID": DIGEST, "RepoDigests": [f"shop/web@{OTHER}"], "OS": {"Family": "debian"}},
        "Results": [
            {"Target": "shop/web:1.2 (debian 12)", "Class": "os-pkgs", "Type": "debian",
             "Vulnerabilities": list(vulnerabilities)},
        ],
        **over,
    }  # fmt: skip


def issue(**over: Any) -> dict[str, Any]:
    return {
        "VulnerabilityID": "CVE-2026-1", "PkgName": "libssl3", "InstalledVersion": "3.0.1-1",
        "FixedVersion": "3.0.2-1", "Severity": "CRITICAL", "CVSS": {"nvd": {"V3Score": 9.8}}, **over,
    }  # fmt: skip


def grype(*matches: dict[str, Any], **over: Any) -> dict[str, Any]:
    target = {"userInput": "shop/web:1.2", "imageID": DIGEST, "manifestDigest": OTHER, "repoDigests": []}
    return {
        "matches": list(matches),
        "source": {"type": "image", "target": target},
        "descriptor": {"name": "grype", "version": "0.90.0", "timestamp": "2026-03-01T10:00:00+01:00"},
        **over,
    }


def match(severity: str = "High", **artifact: Any) -> dict[str, Any]:
    return {
        "vulnerability": {"id": "CVE-2026-2", "severity": severity,
                          "fix": {"versions": ["1.27"], "state": "fixed"}},
        "relatedVulnerabilities": [],
        "artifact": {"name": "nginx", "version": "1.22.1-9", "type": "deb",
                     "locations": [{"path": "/var/lib/dpkg/status"}], **artifact},
    }  # fmt: skip


def read(document: object) -> Any:
    return read_report(json.dumps(document).encode())


def test_a_trivy_report_on_an_image() -> None:
    report = read(trivy(issue()))
    assert (report.tool, report.name, report.digests) == (
        "trivy",
        "shop/web:1.2",
        tuple(sorted((DIGEST, OTHER))),
    )
    assert report.made_us == 1_772_359_200_123_456
    assert report.findings == (Finding("CVE-2026-1", "critical", "libssl3", "3.0.1-1", "3.0.2-1"),)


def test_a_trivy_report_on_a_file_system_names_programs_by_path() -> None:
    result = {"Target": "usr/local/bin/shop", "Class": "lang-pkgs", "Type": "gobinary",
              "Vulnerabilities": [issue(PkgName="stdlib")]}  # fmt: skip
    report = read(trivy(ArtifactType="filesystem", ArtifactName="/", Metadata={}, Results=[result]))
    assert report.digests == ()
    assert report.findings[0].path == "/usr/local/bin/shop"
    assert read(trivy(Results=None)).findings == ()
    assert read(trivy(Results=[{"Target": "x"}])).findings == ()


def test_a_grype_report() -> None:
    report = read(grype(match(), match("Negligible", name="bash"), match("Unknown", name="sed")))
    assert (report.tool, report.digests) == ("grype", tuple(sorted((DIGEST, OTHER))))
    assert report.made_us == 1_772_355_600_000_000
    assert [(f.package, f.severity, f.fixed_in, f.path) for f in report.findings] == [
        ("nginx", "high", "1.27", ""), ("bash", "low", "1.27", ""), ("sed", "low", "1.27", ""),
    ]  # fmt: skip
    binary = match(name="go", type="go-module", locations=[{"path": "/opt/shop"}])
    host = read(grype(binary, source={"type": "directory", "target": "/"}))
    assert (host.name, host.digests, host.findings[0].path) == ("/", (), "/opt/shop")


def test_of_one_finding_twice_the_graver_counts() -> None:
    report = read(trivy(issue(Severity="LOW"), issue(Severity="HIGH"), issue(Severity="MEDIUM")))
    assert [f.severity for f in report.findings] == ["high"]


def test_long_texts_are_cut() -> None:
    assert len(read(trivy(issue(FixedVersion="x" * 5000))).findings[0].fixed_in) == MAX_TEXT


@pytest.mark.parametrize(
    ("document", "place"),
    [
        (trivy(issue(Severity="GRAVE")), r"Results\[0\]\.Vulnerabilities\[0\]\.Severity"),
        (trivy(issue(), issue(VulnerabilityID=None)), r"Vulnerabilities\[1\]\.VulnerabilityID"),
        (trivy(issue(PkgName=7)), "PkgName"),
        (trivy(Results={}), "Results"),
        (trivy(Results=["x"]), r"Results\[0\]"),
        (trivy(SchemaVersion=3), "SchemaVersion"),
        (trivy(Metadata={}), "no digest"),
        (grype({"vulnerability": {}}), r"matches\[0\]"),
        (grype({**match(), "artifact": None}), r"matches\[0\]\.artifact"),
        (grype(match(), source={"type": "image", "target": "x"}), "no digest"),
        ({"Results": []}, "neither"),
        ([1], "neither"),
    ],
)
def test_what_is_missing_is_named(document: object, place: str) -> None:
    with pytest.raises(UsageError, match=place):
        read(document)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["HIGH", DIGEST]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(
            ["SchemaVersion", "Results", "Vulnerabilities", "VulnerabilityID", "PkgName", "Severity", "matches",
             "vulnerability", "artifact", "source", "target", "id", "severity", "name", "locations", "Metadata",
             "RepoDigests", "repoDigests", "ArtifactType", "fix", "versions", "descriptor", "type"]
        ),
        inner, max_size=5,
    ),
    max_leaves=20,
)  # fmt: skip


@given(document=_VALUES)
@settings(max_examples=int(os.environ.get("SECTOOL_EXAMPLES", "150")), deadline=None)
def test_any_json_is_read_or_refused(document: object) -> None:
    for text in (document, {"SchemaVersion": 2, "Results": document}, {"matches": [], "source": document}):
        try:
            assert all(f.severity in SEVERITIES for f in read(text).findings)
        except UsageError as error:
            assert error.message


@pytest.mark.parametrize("data", [b"", b"\xff", b"[" * 5000, b'{"SchemaVersion": 2'])
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with pytest.raises(UsageError):
        read_report(data)
