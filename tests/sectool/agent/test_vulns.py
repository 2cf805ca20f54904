"""Reports imported into a running daemon: labels of workloads follow, and policy with them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import Host, until

pytestmark = pytest.mark.kernel

HOLD = "import signal, socket; s = socket.create_server(('127.0.0.1', 0)); print('up', flush=True); signal.pause()"


def report(*vulnerabilities: tuple[str, str]) -> str:
    """A Trivy report on this host: something in the Python that runs the workload below."""
    path = str(Path(sys.executable).resolve()).lstrip("/")
    found = [
        {"VulnerabilityID": name, "PkgName": "python", "Severity": severity, "PkgPath": path}
        for name, severity in vulnerabilities
    ]
    return json.dumps(
        {
            "SchemaVersion": 2,
            "ArtifactName": "/",
            "ArtifactType": "filesystem",
            "Results": [{"Target": "/", "Vulnerabilities": found}],
        }
    )


def labels(host: Host, name: str) -> dict[str, Any]:
    rows = [row for row in host.json("workload", "list")["items"] if row["name"] == name]
    return dict(rows[0]["labels"]) if rows else {}


def test_labels_follow_reports(shared: Host, tmp_path: Path) -> None:
    program = shared.popen(
        sys.executable, "-m", "sectool", "run", "--name", "shop", "--label", "app=shop", "--",
        sys.executable, "-c", HOLD, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert program.stdout is not None
    assert program.stdout.readline() == "up\n"
    file = tmp_path / "report.json"
    try:
        until(lambda: labels(shared, "shop"), "the workload is found")
        assert "vuln" not in labels(shared, "shop")
        file.write_text(report(("CVE-2026-1", "CRITICAL"), ("CVE-2026-2", "LOW")))
        done = shared.ok("vuln", "import", file)
        assert "2 open, 2 of them new, 0 fixed" in done.err
        found = until(lambda: (got := labels(shared, "shop")).get("vuln") and got, "the label")
        assert (found["vuln"], found["app"]) == ("critical", "shop")
        assert found["vuln-age"].startswith("20")
        row = shared.json("vuln", "list", "--severity", "critical")["items"]
        assert [(r["id"], r["severity"]) for r in row] == [("CVE-2026-1", "critical")]
        assert "shop" in row[0]["workloads"]
        file.write_text(report(("CVE-2026-2", "LOW")))
        shared.ok("vuln", "import", file)
        until(lambda: labels(shared, "shop").get("vuln") == "low", "what is fixed does not count")
        assert [r["fixed"] > 0 for r in shared.json("vuln", "show", "CVE-2026-1")["items"]] == [True]
        shared.ok("vuln", "forget", "/")
        until(lambda: "vuln" not in labels(shared, "shop"), "what is forgotten does not count")
        file.write_text("{}")
        refused = shared.sectool("vuln", "import", file)
        assert refused.code == 2
        assert "neither a Trivy nor a Grype report" in refused.err
        events = until(lambda: shared.json("events", "--type", "vuln.changed")["items"], "events")
        assert events[0]["data"]["open"] == 2
    finally:
        program.kill()
        program.wait()
