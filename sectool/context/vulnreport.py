"""Vulnerability reports of Trivy and Grype, as JSON: what was looked at, and what was found in it.

    Trivy   trivy image|rootfs|fs --format json     SchemaVersion 2; Results[].Vulnerabilities[]
    Grype   grype -o json                           matches[] with vulnerability and artifact; source

What is needed of them is checked and named when it is not there; everything else, known to us or not, is left alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sectool.clock import from_datetime
from sectool.errors import UsageError

MAX_REPORT: Final = 64 << 20  # bytes
MAX_FINDINGS: Final = 50_000
MAX_TEXT: Final = 256  # characters kept of any text
SEVERITIES: Final = ("low", "medium", "high", "critical")  # from mild to grave

_SEVERITY: Final = {
    "critical": "critical",
    "high": "high",
    "medium": "medium",
    "low": "low",
    "negligible": "low",
    "unknown": "low",  # nobody has judged it yet: it counts, as little as anything does
}
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Finding:
    """One vulnerability in one package. `path`: the file it is in, absolute, '' for a package as a whole."""

    id: str
    severity: str  # one of SEVERITIES
    package: str
    version: str = ""
    fixed_in: str = ""
    path: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes it the same finding in a later report."""
        return self.id, self.package, self.path


@dataclass(frozen=True, slots=True)
class Report:
    """`digests`: of the image that was looked at; none: a file system of this host. `made_us`: when, 0 if not said."""

    tool: str
    name: str
    digests: tuple[str, ...]
    made_us: int
    findings: tuple[Finding, ...]


class _Reader:
    """Takes values out of a document; what is not as it must be is named by its place."""

    def __init__(self, tool: str) -> None:
        self.tool = tool

    def fail(self, place: str, expected: str) -> UsageError:
        return UsageError(
            f"the {self.tool} report cannot be read: {place} is not {expected}",
            "make it anew with --format json (trivy) or -o json (grype)",
        )

    def items(self, holder: Mapping[str, Any], key: str, place: str, *, needed: bool) -> list[Any]:
        value = holder.get(key)
        if value is None and not needed:
            return []
        if not isinstance(value, list):
            raise self.fail(f"{place}{key}", "a list")
        return value

    def mapping(self, value: Any, place: str) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self.fail(place, "an object")
        return value

    def text(self, holder: Mapping[str, Any], key: str, place: str, *, needed: bool = True) -> str:
        value = holder.get(key)
        if value is None and not needed:
            return ""
        if not isinstance(value, str) or (needed and not value):
            raise self.fail(f"{place}{key}", "text")
        return value[:MAX_TEXT]

    def severity(self, holder: Mapping[str, Any], key: str, place: str) -> str:
        found = _SEVERITY.get(self.text(holder, key, place).lower())
        if found is None:
            raise self.fail(f"{place}{key}", "a severity")
        return found


def read_report(data: bytes) -> Report:
    """Read a report; any bytes give a Report or UsageError."""
    if len(data) > MAX_REPORT:
        raise UsageError(f"the report has {len(data)} bytes; at most {MAX_REPORT} are read")
    try:
        document = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the report is not JSON: {error}", "trivy --format json, grype -o json") from None
    if isinstance(document, dict) and isinstance(document.get("matches"), list):
        return _grype(document)
    if isinstance(document, dict) and "SchemaVersion" in document:
        return _trivy(document)
    raise UsageError(
        "the file is neither a Trivy nor a Grype report",
        "make one with `trivy image --format json NAME` or `grype -o json NAME`",
    )


def _bounded(findings: dict[tuple[str, str, str], Finding]) -> tuple[Finding, ...]:
    if len(findings) > MAX_FINDINGS:
        raise UsageError(f"the report has {len(findings)} findings; at most {MAX_FINDINGS} are taken")
    return tuple(findings.values())


def _trivy(document: Mapping[str, Any]) -> Report:
    read = _Reader("Trivy")
    if document["SchemaVersion"] != 2:
        raise read.fail("SchemaVersion", "2")
    meta = document.get("Metadata")
    meta = meta if isinstance(meta, dict) else {}
    named = [meta.get("ImageID"), *(meta.get("RepoDigests") or ())]
    image = document.get("ArtifactType") == "container_image"
    digests = _digests(named) if image else ()
    name = read.text(document, "ArtifactName", "", needed=False)
    if image and not digests:
        raise UsageError(
            f"the report on image {name} names no digest of it", "scan an image, not a tag alone"
        )
    findings: dict[tuple[str, str, str], Finding] = {}
    for i, value in enumerate(read.items(document, "Results", "", needed=False)):
        place = f"Results[{i}]"
        result = read.mapping(value, place)
        target = read.text(result, "Target", f"{place}.", needed=False)
        binary = result.get("Type") in ("gobinary", "rustbinary")
        for n, each in enumerate(read.items(result, "Vulnerabilities", f"{place}.", needed=False)):
            at = f"{place}.Vulnerabilities[{n}]"
            item = read.mapping(each, at)
            path = read.text(item, "PkgPath", f"{at}.", needed=False) or (target if binary else "")
            finding = Finding(
                read.text(item, "VulnerabilityID", f"{at}."),
                read.severity(item, "Severity", f"{at}."),
                read.text(item, "PkgName", f"{at}."),
                read.text(item, "InstalledVersion", f"{at}.", needed=False),
                read.text(item, "FixedVersion", f"{at}.", needed=False),
                f"/{path.lstrip('/')}" if path else "",
            )
            _keep(findings, finding)
    return Report("trivy", name, digests, _moment(document.get("CreatedAt")), _bounded(findings))


def _grype(document: Mapping[str, Any]) -> Report:
    read = _Reader("Grype")
    source = document.get("source")
    source = source if isinstance(source, dict) else {}
    target = source.get("target")
    digests: tuple[str, ...] = ()
    name = target if isinstance(target, str) else ""
    if isinstance(target, dict):
        name = str(target.get("userInput") or "")
        named = [target.get("imageID"), target.get("manifestDigest"), *(target.get("repoDigests") or ())]
        digests = _digests(named)
    if source.get("type") == "image" and not digests:
        raise UsageError(f"the report on image {name[:100]} names no digest of it")
    findings: dict[tuple[str, str, str], Finding] = {}
    for n, each in enumerate(read.items(document, "matches", "", needed=True)):
        at = f"matches[{n}]"
        match = read.mapping(each, at)
        found = read.mapping(match.get("vulnerability"), f"{at}.vulnerability")
        artifact = read.mapping(match.get("artifact"), f"{at}.artifact")
        fix = found.get("fix")
        versions = fix.get("versions") if isinstance(fix, dict) else None
        fixed_in = str(versions[0])[:MAX_TEXT] if isinstance(versions, list) and versions else ""
        _keep(
            findings,
            Finding(
                read.text(found, "id", f"{at}.vulnerability."),
                read.severity(found, "severity", f"{at}.vulnerability."),
                read.text(artifact, "name", f"{at}.artifact."),
                read.text(artifact, "version", f"{at}.artifact.", needed=False),
                fixed_in,
                _location(artifact),
            ),
        )
    descriptor = document.get("descriptor")
    made = descriptor.get("timestamp") if isinstance(descriptor, dict) else None
    return Report("grype", name[:MAX_TEXT], digests, _moment(made), _bounded(findings))


def _location(artifact: Mapping[str, Any]) -> str:
    """The file an artifact is, for those that are one: packages of a distribution are known by their name."""
    if artifact.get("type") not in ("binary", "go-module", "rust-crate", "java-archive"):
        return ""
    for location in artifact.get("locations") or ():
        path = location.get("path") if isinstance(location, dict) else None
        if isinstance(path, str) and path.startswith("/"):
            return path[:MAX_TEXT]
    return ""


def _keep(findings: dict[tuple[str, str, str], Finding], finding: Finding) -> None:
    """Of two of one key the graver stays."""
    known = findings.get(finding.key)
    if known is None or SEVERITIES.index(finding.severity) > SEVERITIES.index(known.severity):
        findings[finding.key] = finding


def _digests(values: list[Any]) -> tuple[str, ...]:
    found = (_DIGEST.search(value) for value in values if isinstance(value, str))
    return tuple(sorted({match[0] for match in found if match}))


def _moment(value: Any) -> int:
    """UTC microseconds of an RFC 3339 time with up to nine digits of a second; 0 for anything else."""
    if not isinstance(value, str):
        return 0
    text = re.sub(r"(\.[0-9]{6})[0-9]*", r"\1", value[:40]).replace("Z", "+00:00")
    try:
        moment = datetime.fromisoformat(text)
        return from_datetime(moment) if moment.tzinfo is not None else 0
    except (ValueError, OverflowError):
        return 0
