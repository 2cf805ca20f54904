"""Explaining, alerting, staging and promoting on a running host."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from .conftest import Host, until
from .test_daemon import SERVER, client

pytestmark = pytest.mark.kernel

POLICY = """\
kind: Policy
name: shop
owner: team-shop
rules:
  - allow app=web to call app=db on tcp/5432
---
kind: Policy
name: next
owner: team-shop
mode: stage   # for a while
rules:
  - allow app=batch to call app=db on tcp/5432
"""


@pytest.mark.long
def test_a_recorded_connection_is_explained_then_staged_policy_promoted(host: Host) -> None:
    told = host.folder / "told.json"
    (host.state / "alerts.yaml").write_text(
        "alerts: [{name: hammering, when: denied-burst, count: 1, send: [page]}]\n"
        f"send: {{page: {{command: [/bin/sh, -c, 'cat > {told}']}}}}\n"
    )
    host.ok("up", "--background")
    assert host.apply(POLICY, "--reason", "opening day").code == 0
    server = host.popen(
        sys.executable, "-m", "sectool", "run", "--label", "app=db", "--", sys.executable, "-c", SERVER,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        assert server.stdout.readline() == "listening\n"
        assert client(host, "app=batch", 0.5) == 7
        flow = until(
            lambda: [r for r in host.json("flows", "--verdict", "deny")["items"] if r["destination.labels"]],
            "the denied flow is on record",
        )[-1]
        assert flow["pending.action"] == "allow"
        done = host.sectool("explain", flow["event.id"])
        assert done.code == 1, done
        assert "denied (default_deny)" in done.out
        assert "initiator (egress): DENIED by default" in done.out
        assert "Policy next, rule 1 (owner team-shop) would allow it, but it is only staged" in done.out
        answer = host.json("explain", flow["event.id"])
        assert answer["recorded"]["agrees"] is True
        assert answer["recorded"]["flow"]["event.id"] == flow["event.id"]
        assert answer["nearest_allow"]["since"]["reason"] == "opening day"
        assert [side["verdict"] for side in answer["sides"]] == ["deny", "deny"]
        until(told.exists, "the alert was sent")
        message = until(lambda: told.read_text(), "all of it")
        assert json.loads(message)["text"].startswith("app=batch")
        alerts = host.sectool("alerts")
        assert alerts.code == 1
        assert "hammering" in alerts.out
        report = host.sectool("policy", "staged-report", "-o", "json")
        assert report.code == 1
        assert "allow app=batch to call app=db on tcp/5432" in report.out
        done = host.ok("policy", "promote", "next")
        assert "revision 2 is in force" in done.err
        assert host.json("policy", "conflicts", "--owner", "team-shop")["conflicts"] == []
        assert "mode: enforce   # for a while" in host.ok("policy", "show").out
        assert client(host, "app=batch") == 0
        # The old flow is explained by the text of its time, and by today's.
        done = host.sectool("explain", flow["event.id"])
        assert done.code == 1
        assert (
            "by the policy in force now (revision 2) it would be allowed by Policy next, rule 1" in done.out
        )
    finally:
        server.kill()
        server.wait()
